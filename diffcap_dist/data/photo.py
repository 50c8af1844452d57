"""A photo's bytes -> the picture that everybody sees: RGB, upright, on white where it is transparent.

The encoder, the feature writer, `diffcap caption` and the pages that show photos all decode here, so that they see
the same. It resizes nothing and knows no shard.
"""

from __future__ import annotations

import io

from PIL import ExifTags, Image, ImageOps

UPRIGHT = 1  # of EXIF's orientations


def decode_photo(data: bytes) -> Image.Image:
    """The picture of JPEG, PNG or WebP bytes. Raises what PIL raises on bad bytes."""
    with Image.open(io.BytesIO(data)) as image:
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB with its EXIF orientation applied."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """EXIF's number for how the picture is turned; ``UPRIGHT`` where it says nothing."""
    return int(image.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
