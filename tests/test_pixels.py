"""A photo's bytes to an encoder's pixels: the exact way is open_clip's own, the fast way within a tolerance of it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from diffcap_dist.data.photo import decode_photo
from diffcap_dist.data.pixels import PixelTransform, parted
from diffcap_dist.model.image_encoder import ImageEncoder
from tests.test_image_encoder import saved_clip

SIZE = 224
OPEN_CLIP = image_transform(SIZE, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
WORST, MEAN = 1, 0.01  # of 255 levels: both decode alike, and round alike but for a few


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with edges and fine texture: as hard to resample as a photo."""
    noise = np.random.default_rng(seed)
    coarse = Image.fromarray(noise.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height))
    pixels = np.asarray(coarse).astype(int) + noise.normal(0, 12, (height, width, 1)).astype(int)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 60)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(picture(300, 400), exif=exif)


def transform(exact: bool = False) -> PixelTransform:
    return PixelTransform(parted(OPEN_CLIP)[0], exact)


def by_open_clip(data: bytes) -> torch.Tensor:
    return (OPEN_CLIP(decode_photo(data)) * 255).round().to(torch.uint8)


PHOTOS = {
    "landscape": saved(picture(500, 375), quality=90),
    "portrait": saved(picture(333, 500), quality=75),
    "large": saved(picture(1024, 683), quality=85, subsampling=0),
    "its own size": saved(picture(224, 224)),
    "smaller": saved(picture(120, 90)),
    "wide": saved(picture(900, 225)),
    "progressive": saved(picture(400, 300), progressive=True),
    "grey": saved(picture(400, 300).convert("L")),
}
ODD = {
    "cmyk": saved(picture(300, 300).convert("CMYK")),
    "upside down": turned(3),
    "on its side": turned(6),
    "png": saved(picture(300, 300), "PNG"),
    "webp": saved(picture(300, 300), "WEBP"),
}


@pytest.mark.parametrize("name", PHOTOS)
def test_the_fast_way_is_within_a_few_levels_of_the_encoders_own(name: str) -> None:
    pixels_CHW, expected_CHW = transform()(PHOTOS[name]), by_open_clip(PHOTOS[name])
    assert pixels_CHW.dtype == torch.uint8 and pixels_CHW.shape == (3, SIZE, SIZE)
    difference = (pixels_CHW.int() - expected_CHW.int()).abs().float()
    assert difference.max() <= WORST and difference.mean() <= MEAN


@pytest.mark.parametrize("name", PHOTOS | ODD)
def test_the_exact_way_is_the_encoders_own(name: str) -> None:
    data = (PHOTOS | ODD)[name]
    assert transform(exact=True)(data).equal(by_open_clip(data))
    assert transform().of_picture(decode_photo(data)).equal(by_open_clip(data))


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_plain_jpeg_goes_the_exact_way(name: str) -> None:
    assert transform()(ODD[name]).equal(by_open_clip(ODD[name]))


def test_steps_without_a_tensor_twin_go_the_exact_way() -> None:
    longest = image_transform(SIZE, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode="longest")
    pixels = PixelTransform(parted(longest)[0])
    assert pixels.described == "PIL" and transform().described == "torchvision"
    expected_CHW = (longest(decode_photo(PHOTOS["landscape"])) * 255).round().to(torch.uint8)
    assert pixels(PHOTOS["landscape"]).equal(expected_CHW)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_photo_cut_short_is_an_error(exact: bool, keep: float) -> None:
    data = PHOTOS["landscape"]
    with pytest.raises((OSError, RuntimeError), match=r"truncated|incomplete|cut"):
        transform(exact)(data[: int(len(data) * keep)])


def test_bytes_of_something_else_are_an_error() -> None:
    for data in (b"", b"\xff\xd8", b"<html>not a photo</html>"):
        with pytest.raises(Exception, match=r"."):
            transform()(data)


def test_features_of_both_ways_are_alike(tmp_path: Path) -> None:
    saved_clip("vit", tmp_path / "vit")
    encoder = ImageEncoder(str(tmp_path / "vit"))
    fast, exact = (
        torch.stack([encoder.pixel_transform(exact)(data) for data in PHOTOS.values()]) for exact in (False, True)
    )
    cosines = (encoder(fast)[0] * encoder(exact)[0]).sum(-1)
    assert cosines.min() > 0.9999
