"""Photos on their way into a shard: what is kept, what is refused and why, and what everybody sees of them."""

import io
import random
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffcap_dist.data.photo import decode_photo
from shards import photos
from shards.photos import UnusablePhoto, check_photo, plain_jpeg, shrink_photo

MIN_SIDE = 16


def picture(mode: str = "RGB", width: int = 40, height: int = 24) -> Image.Image:
    chance = np.random.RandomState(0)
    coarse = Image.fromarray(chance.randint(0, 256, (3, 4, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def saved(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def decodable(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
        return True
    except Exception:
        return False


# ---- plain JPEGs are known by their structure ----

JPEGS = {
    "4:2:0": saved(picture()),
    "4:4:4": saved(picture(), subsampling=0, quality=97),
    "grey": saved(picture("L")),
    "optimised": saved(picture(), optimize=True),
    "restarts": saved(picture(width=80, height=80), restart_marker_rows=1),
    "comment and profile": saved(picture(), comment=b"\xff\xd9 is no end here", icc_profile=b"x" * 500),
}


@pytest.mark.parametrize("name", JPEGS)
def test_ordinary_jpegs_are_plain(name: str) -> None:
    with Image.open(io.BytesIO(JPEGS[name])) as image:
        assert plain_jpeg(JPEGS[name]) == (*image.size, 1)
    kept = check_photo(JPEGS[name], MIN_SIDE)
    assert (kept.suffix, kept.data) == ("jpg", JPEGS[name])


@pytest.mark.parametrize("name", JPEGS)
def test_no_cut_jpeg_is_plain(name: str) -> None:
    assert not any(plain_jpeg(JPEGS[name][:size]) for size in range(len(JPEGS[name])))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(JPEGS)), st.data())
def test_what_is_plain_can_be_decoded(name: str, data: st.DataObject) -> None:
    """The contrary is no harm: what is not plain is decoded."""
    content = bytearray(JPEGS[name])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["set", "insert", "delete", "zero"])):
            case "set":
                content[at] = data.draw(st.integers(0, 255))
            case "insert":
                content.insert(at, data.draw(st.integers(0, 255)))
            case "delete":
                del content[at]
            case "zero":
                content[at : at + 16] = bytes(len(content[at : at + 16]))
    found = plain_jpeg(bytes(content))
    if found is not None and found[0] * found[1] < 10_000:  # a wrong size shows only in decoding
        assert decodable(bytes(content))


def test_a_thousand_damages_are_judged_as_pil_judges_them() -> None:
    """Flips anywhere in all kinds: hardly any that PIL refuses passes (measured: none of these)."""
    chance = random.Random(1)
    passed, refused = 0, 0
    for _ in range(1000):
        content = bytearray(JPEGS[chance.choice(sorted(JPEGS))])
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        plain, whole = plain_jpeg(bytes(content)) is not None, decodable(bytes(content))
        passed += plain and not whole
        refused += not whole
    assert passed <= 1 and refused > 100


# ---- what is refused ----


def animated() -> bytes:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    return saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def bomb() -> bytes:
    """A PNG whose header promises 30,000 x 30,000 pixels."""
    content = bytearray(saved(Image.new("L", (20, 20)), "PNG"))
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


def sixteen_bit_rgb() -> bytes:
    """PIL can't write one: a black picture, chunk by chunk."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (20).to_bytes(4, "big") * 2
    rows = zlib.compress(bytes(20 * (1 + 20 * 6)))
    header = chunk(b"IHDR", size + bytes([16, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    content = bytearray(JPEGS["4:2:0"])
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = (20_000).to_bytes(2, "big") * 2
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (b"", photos.UNDECODABLE, "no image format"),
        (b"<html>gone</html>", photos.UNDECODABLE, "<html>"),
        (JPEGS["4:2:0"][:-300], photos.UNDECODABLE, ""),
        (saved(picture(), "PNG")[:-40], photos.UNDECODABLE, ""),
        (saved(picture(), "WEBP")[:-40], photos.UNDECODABLE, ""),
        (saved(picture(), "BMP"), photos.WRONG_FORMAT, "BMP"),
        (saved(picture(), "GIF"), photos.WRONG_FORMAT, "GIF"),
        (saved(picture(width=15)), photos.TOO_SMALL, "15x24"),
        (saved(picture(height=3), "PNG"), photos.TOO_SMALL, "40x3"),
        (animated(), photos.ANIMATED, "WEBP of 2 frames"),
        (saved(Image.new("I;16", (20, 20)), "PNG"), photos.SIXTEEN_BIT, "I;16"),
        (sixteen_bit_rgb(), photos.SIXTEEN_BIT, "PNG of mode RGB"),
        (bomb(), photos.TOO_LARGE, ""),
        (huge_jpeg(), photos.TOO_LARGE, ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_photos(content: bytes, reason: str, detail: str) -> None:
    for judge in (lambda: check_photo(content, MIN_SIDE), lambda: shrink_photo(content, MIN_SIDE, 20, 90)):
        with pytest.raises(UnusablePhoto) as caught:
            judge()
        assert caught.value.reason == reason and detail in caught.value.detail


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_pngs_and_webps_are_kept_as_they_are(image_format: str) -> None:
    content = saved(picture(), image_format)
    kept = check_photo(content, MIN_SIDE)
    assert (kept.suffix, kept.data, kept.width, kept.height) == (image_format.lower(), content, 40, 24)


def test_jpegs_that_are_not_plain_are_kept_too() -> None:
    progressive = saved(picture(), progressive=True)
    assert plain_jpeg(progressive) is None and check_photo(progressive, MIN_SIDE).data == progressive
    cmyk = saved(picture("CMYK"))
    assert plain_jpeg(cmyk) is None and check_photo(cmyk, MIN_SIDE).data == cmyk
    difference = np.abs(np.asarray(decode_photo(cmyk), int) - np.asarray(picture(), int))
    assert difference.mean() < 12
    longer = JPEGS["4:2:0"] + b"more"
    assert plain_jpeg(longer) is None and check_photo(longer, MIN_SIDE).data == longer


# ---- what everybody sees ----


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_photos_are_upright(orientation: int, image_format: str) -> None:
    exif = Image.Exif()
    exif[photos.EXIF_ORIENTATION] = orientation
    content = saved(picture(width=64, height=32), image_format, exif=exif)
    kept, seen = check_photo(content, MIN_SIDE), decode_photo(content)
    assert kept.orientation == orientation and (kept.width, kept.height) == seen.size
    assert seen.size == ((64, 32) if orientation < 5 else (32, 64))
    small = shrink_photo(content, MIN_SIDE, 16, 95)
    assert small.orientation == 1 and decode_photo(small.data).size == (small.width, small.height)
    expected = seen.resize((small.width, small.height), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(decode_photo(small.data), int) - np.asarray(expected, int)).mean() < 6


def test_transparent_pictures_stand_on_white() -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert decode_photo(saved(clear, "PNG")).getpixel((3, 3)) == (255, 255, 255)
    palette = Image.new("P", (20, 20))
    assert decode_photo(saved(palette, "PNG", transparency=0)).getpixel((3, 3)) == (255, 255, 255)
    assert decode_photo(shrink_photo(saved(clear, "WEBP"), MIN_SIDE, 16, 90).data).getpixel((3, 3)) == (255, 255, 255)


@given(st.integers(16, 300), st.integers(16, 300), st.integers(16, 80))
@settings(max_examples=50, deadline=None)
def test_the_shorter_side_is_as_asked_and_never_larger(width: int, height: int, size: int) -> None:
    small = shrink_photo(saved(picture(width=width, height=height)), MIN_SIDE, size, 90)
    assert min(small.width, small.height) == min(size, width, height)
    assert abs(small.width / small.height - width / height) <= 1.5 * (width / height) / min(small.width, small.height)
