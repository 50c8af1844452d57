"""A photo's bytes as they came -> what goes into a shard: the same bytes, checked, or a smaller JPEG.

In: bytes of any kind. Out: `StoredPhoto`, or `UnusablePhoto` with one of a few reasons. A plain JPEG is checked by its
structure, at the speed of the disk; everything else is decoded to the end. It reads no files and writes none.
"""

from __future__ import annotations

import dataclasses
import io
import re
import struct
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from diffcap_dist.data.photo import upright_rgb

SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more behind it
MAX_PIXELS = 89_478_485  # PIL's own limit: 256 MB as RGB
SIXTEEN_BIT_MODES = ("I", "F")  # PIL's modes I, I;16, F: a cut to 8 bits would be nearly white or black

UNDECODABLE, TOO_SMALL, TOO_LARGE = "photo can't be decoded", "photo too small", "photo too large (decompression bomb)"
WRONG_FORMAT, ANIMATED, SIXTEEN_BIT = "photo of another format", "animated picture", "16-bit picture"

EXIF_ORIENTATION = 0x0112
PNG_BIT_DEPTH = 24  # its byte in the header: PIL cuts 16-bit colours to 8 without a word
# JPEG (ITU-T T.81, annex B): markers that are followed by a length, and those that may stand within a scan.
_EOI, _SOS, _DHT, _DQT, _APP1 = 0xD9, 0xDA, 0xC4, 0xDB, 0xE1
_BASELINE = (0xC0, 0xC1)
_SKIPPED = {0xDD, 0xFE, *range(0xE0, 0xF0)}  # restart interval, comment, application data
_LUMA_SAMPLINGS = (0x11, 0x21, 0x12, 0x22, 0x41)  # beside chroma at 1x1: 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")


@dataclasses.dataclass(frozen=True)
class StoredPhoto:
    """`orientation` is EXIF's (1: upright); `width` and `height` are those of the upright picture."""

    suffix: str
    data: bytes
    width: int
    height: int
    orientation: int = 1


class UnusablePhoto(ValueError):
    """`reason` is one of the constants above; the text says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def check_photo(data: bytes, min_side: int) -> StoredPhoto:
    """The bytes untouched, their format told by the content and not by a name. Raises UnusablePhoto."""
    plain = plain_jpeg(data)
    suffix, width, height, orientation = ("jpg", *plain) if plain else _decoded(data, min_side)
    _check_size(width, height, min_side)
    if orientation > 4:  # the four that turn the picture on its side
        width, height = height, width
    return StoredPhoto(suffix, data, width, height, orientation)


def shrink_photo(data: bytes, min_side: int, size: int, quality: int) -> StoredPhoto:
    """A JPEG whose shorter side is at most `size`, upright, on white where it was transparent."""
    image = _open(data, min_side)
    scale = min(1.0, size / min(image.size))
    width, height = (max(1, round(scale * side)) for side in image.size)
    try:
        turned = image.getexif().get(EXIF_ORIENTATION, 1) in range(5, 9)
        if scale < 1:
            image.draft(None, (2 * width, 2 * height))  # a JPEG is decoded to 1/2, 1/4 or 1/8, no smaller than this
        picture = upright_rgb(image)
        if scale < 1:
            small = (height, width) if turned else (width, height)
            picture = picture.resize(small, Image.Resampling.LANCZOS, reducing_gap=2.0)
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise UnusablePhoto(UNDECODABLE, str(error)) from error
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return StoredPhoto("jpg", buffer.getvalue(), *picture.size)


# ---- by decoding ----


def _open(data: bytes, min_side: int) -> Image.Image:
    """The picture, not decoded yet, all that its header tells against it raised."""
    try:
        image = Image.open(io.BytesIO(data))
        frames = getattr(image, "n_frames", 1)
    except Image.DecompressionBombError as error:
        raise UnusablePhoto(TOO_LARGE, str(error)) from error
    except UnidentifiedImageError as error:  # its own message names a memory address
        raise UnusablePhoto(UNDECODABLE, f"no image format known to PIL, starts with {data[:8]!r}") from error
    except Exception as error:
        raise UnusablePhoto(UNDECODABLE, str(error)) from error
    if image.format not in SUFFIX_OF_FORMAT:
        raise UnusablePhoto(WRONG_FORMAT, f"{image.format}; shards hold JPEG, PNG and WebP")
    _check_size(*image.size, min_side)
    if frames > 1 and image.format != "MPO":
        raise UnusablePhoto(ANIMATED, f"{image.format} of {frames} frames")
    if image.mode.startswith(SIXTEEN_BIT_MODES) or (image.format == "PNG" and data[PNG_BIT_DEPTH] == 16):
        raise UnusablePhoto(SIXTEEN_BIT, f"{image.format} of mode {image.mode}")
    return image


def _decoded(data: bytes, min_side: int) -> tuple[str, int, int, int]:
    """(suffix, width, height, orientation), the picture decoded to its end: truncation shows."""
    image = _open(data, min_side)
    try:
        image.load()
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception as error:
        raise UnusablePhoto(UNDECODABLE, str(error)) from error
    return SUFFIX_OF_FORMAT[str(image.format)], *image.size, orientation if orientation in range(1, 9) else 1


def _check_size(width: int, height: int, min_side: int) -> None:
    if min(width, height) < min_side:
        raise UnusablePhoto(TOO_SMALL, f"{width}x{height}, at least {min_side} on each side")
    if width * height > MAX_PIXELS:
        raise UnusablePhoto(TOO_LARGE, f"{width}x{height}, at most {MAX_PIXELS:,} pixels")


# ---- by structure: a plain JPEG ----

Tables = frozenset[tuple[str, int]]  # ("huffman" | "quantization", its number)


def plain_jpeg(data: bytes) -> tuple[int, int, int] | None:
    """(width, height, orientation) of a JPEG that is whole and ordinary: sequential, 8 bits, Huffman-coded, 1 or 3
    components, every table in place, each component coded, its end marker last. None: decode it to find out."""
    frame: _Frame | None = None
    tables, coded, orientation = Tables(), Tables(), 1
    position, size = 2, len(data)
    if not data.startswith(b"\xff\xd8"):
        return None
    while position + 4 <= size and data[position] == 0xFF:
        marker, start = data[position + 1], position + 4
        position += 2 + (data[position + 2] << 8 | data[position + 3])
        segment = data[start:position]
        if start + len(segment) != position:
            return None
        if marker in _TABLES:
            found = _TABLES[marker](segment)
            if found is None:
                return None
            tables |= found
        elif marker in _BASELINE and frame is None:
            frame = _frame(segment)
            if frame is None or not frame.tables <= tables:
                return None
        elif marker == _SOS and frame is not None:
            scan = _scan(segment)
            end = _END_OF_SCAN.search(data, position)
            if scan is None or end is None or not scan.tables <= tables:
                return None
            coded |= scan.components
            position = end.start()
            if data[position + 1] == _EOI:
                whole = position + 2 == size and coded == frame.components
                return (frame.width, frame.height, orientation) if whole else None
        elif marker == _APP1 and segment.startswith(b"Exif\0\0"):
            orientation = _orientation(segment)
            if not orientation:
                return None
        elif marker not in _SKIPPED:
            return None
    return None


class _Frame(NamedTuple):
    width: int
    height: int
    components: Tables
    tables: Tables  # that it needs


class _Scan(NamedTuple):
    components: Tables
    tables: Tables


# Photos of one camera or one program share these segments: each is judged once.
@lru_cache(maxsize=256)
def _frame(segment: bytes) -> _Frame | None:
    if len(segment) < 6 or segment[0] != 8 or segment[5] not in (1, 3) or len(segment) != 6 + 3 * segment[5]:
        return None
    height, width = struct.unpack_from(">HH", segment, 1)
    parts = [segment[at : at + 3] for at in range(6, len(segment), 3)]
    components = frozenset(("component", part[0]) for part in parts)
    ordinary = parts[0][1] in _LUMA_SAMPLINGS and all(part[1] == 0x11 for part in parts[1:])
    if not width or not height or not ordinary or len(components) < len(parts):
        return None
    return _Frame(width, height, components, frozenset(("quantization", part[2]) for part in parts))


@lru_cache(maxsize=256)
def _huffman_tables(segment: bytes) -> Tables | None:
    """Code lengths that make a prefix code, all symbols there (annex C). None: they don't."""
    tables, start = set(), 0
    while start + 17 <= len(segment):
        counts = segment[start + 1 : start + 17]
        if sum(count << (15 - length) for length, count in enumerate(counts)) > 1 << 16 or not 0 < sum(counts) <= 256:
            return None
        end = start + 17 + sum(counts)
        if segment[start] < 16 and max(segment[start + 17 : end], default=0) > 15:  # a DC symbol is a number of bits
            return None
        tables.add(("huffman", segment[start]))
        start = end
    return frozenset(tables) if start == len(segment) else None


@lru_cache(maxsize=256)
def _quantization_tables(segment: bytes) -> Tables | None:
    numbers = segment[::65]
    if len(segment) % 65 or not numbers or max(numbers) > 3:  # above: entries of 16 bits, not ordinary
        return None
    return frozenset(("quantization", number) for number in numbers)


@lru_cache(maxsize=256)
def _scan(segment: bytes) -> _Scan | None:
    """Which components it codes and the Huffman tables that they name; all coefficients at once, at full precision."""
    count = segment[0] if segment else 0
    if not 1 <= count <= 4 or len(segment) != 4 + 2 * count or segment[-3:] != b"\x00\x3f\x00":
        return None
    pairs = [(segment[at], segment[at + 1]) for at in range(1, len(segment) - 3, 2)]
    tables = [("huffman", number) for _, pair in pairs for number in (pair >> 4, 16 + (pair & 15))]
    return _Scan(frozenset(("component", identifier) for identifier, _ in pairs), frozenset(tables))


_TABLES = {_DHT: _huffman_tables, _DQT: _quantization_tables}


def _orientation(exif: bytes) -> int:
    """EXIF's orientation, 0 where the segment can't be read."""
    try:
        parsed = Image.Exif()
        parsed.load(exif)
        orientation = parsed.get(EXIF_ORIENTATION, 1)
    except Exception:  # whatever PIL's TIFF reader trips over: decoding decides
        return 0
    return orientation if orientation in range(1, 9) else 1
