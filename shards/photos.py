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

from PIL import Image, UnidentifiedImageError

from diffcap_dist.data.photo import upright_rgb

SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more behind it
MAX_PIXELS = 89_478_485  # PIL's own limit: 256 MB as RGB
SIXTEEN_BIT_MODES = ("I", "F")  # PIL's modes I, I;16, F: a cut to 8 bits would be nearly white or black

UNDECODABLE, TOO_SMALL, TOO_LARGE = "photo can't be decoded", "photo too small", "photo too large (decompression bomb)"
WRONG_FORMAT, ANIMATED, SIXTEEN_BIT = "photo of another format", "animated picture", "16-bit picture"

EXIF_ORIENTATION = 0x0112
# JPEG (ITU-T T.81, annex B): markers that are followed by a length, and those that may stand within a scan.
_SOI, _EOI, _SOS, _DHT, _DQT, _APP1 = 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xE1
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
    if image.mode.startswith(SIXTEEN_BIT_MODES):
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


def plain_jpeg(data: bytes) -> tuple[int, int, int] | None:
    """(width, height, orientation) of a JPEG that is whole and ordinary: sequential, 8 bits, Huffman-coded, 1 or 3
    components, every table in place, each component coded, its end marker last. None: decode it to find out."""
    frame: tuple[int, int, list[int]] | None = None  # width, height, component ids
    orientation, coded, tables = 1, set[int](), set[tuple[str, int]]()
    position, size = 2, len(data)
    if size < 4 or data[0] != 0xFF or data[1] != _SOI:
        return None
    while position + 4 <= size:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        start, position = position + 4, position + 2 + (data[position + 2] << 8 | data[position + 3])
        if position > size or position < start:
            return None
        if marker == _DHT:
            huffman = _huffman_tables(data[start:position])
            valid = huffman is not None
            tables |= huffman or frozenset()
        elif marker == _DQT:
            valid = _quantization_tables(data, start, position, tables)
        elif marker in _BASELINE:
            first = frame is None
            frame = _frame(data, start, position, tables)
            valid = first and frame is not None
        elif marker == _SOS:
            valid = frame is not None and _scan(frame[2], data, start, position, tables, coded)
            end = _END_OF_SCAN.search(data, position)
            if not valid or end is None:
                return None
            position = end.start()
            if data[position + 1] == _EOI:
                break
        elif marker == _APP1 and data.startswith(b"Exif\0\0", start):
            orientation = _orientation(data[start:position])
            valid = orientation > 0
        else:
            valid = marker in _SKIPPED
        if not valid:
            return None
    whole = frame is not None and data.endswith(b"\xff\xd9") and position + 2 == size and coded == set(frame[2])
    return (frame[0], frame[1], orientation) if frame is not None and whole else None


def _frame(data: bytes, start: int, end: int, tables: set[tuple[str, int]]) -> tuple[int, int, list[int]] | None:
    if end - start < 6 or data[start] != 8 or data[start + 5] not in (1, 3) or end - start != 6 + 3 * data[start + 5]:
        return None
    height, width = struct.unpack_from(">HH", data, start + 1)
    parts = [data[at : at + 3] for at in range(start + 6, end, 3)]
    ordinary = parts[0][1] in _LUMA_SAMPLINGS and all(part[1] == 0x11 for part in parts[1:])
    identifiers = [part[0] for part in parts]
    if not width or not height or not ordinary or len(set(identifiers)) < len(parts):
        return None
    if not tables.issuperset(("quantization", part[2]) for part in parts):
        return None
    return width, height, identifiers


@lru_cache(maxsize=256)  # most cameras and programs use the tables of the standard's annex K
def _huffman_tables(segment: bytes) -> frozenset[tuple[str, int]] | None:
    """The tables of a segment: code lengths that make a prefix code, all symbols there (annex C). None: they don't."""
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


def _quantization_tables(data: bytes, start: int, end: int, tables: set[tuple[str, int]]) -> bool:
    while start + 65 <= end:
        if data[start] > 3:  # 16-bit entries are not ordinary
            return False
        tables.add(("quantization", data[start]))
        start += 65
    return start == end


def _scan(
    identifiers: list[int],
    data: bytes,
    start: int,
    end: int,
    tables: set[tuple[str, int]],
    coded: set[int],
) -> bool:
    """The scan's components are the frame's, and the Huffman tables that it names are there."""
    count = data[start] if end > start else 0
    if not 1 <= count <= 4 or end - start != 4 + 2 * count:
        return False
    if data[end - 3 : end] != b"\x00\x3f\x00":  # all coefficients at once, at full precision
        return False
    for at in range(start + 1, end - 3, 2):
        identifier, dc, ac = data[at], data[at + 1] >> 4, data[at + 1] & 15
        if identifier not in identifiers or not tables.issuperset([("huffman", dc), ("huffman", 16 + ac)]):
            return False
        coded.add(identifier)
    return True


def _orientation(exif: bytes) -> int:
    """EXIF's orientation, 0 where the segment can't be read."""
    try:
        parsed = Image.Exif()
        parsed.load(exif)
        orientation = parsed.get(EXIF_ORIENTATION, 1)
    except Exception:  # whatever PIL's TIFF reader trips over: decoding decides
        return 0
    return orientation if orientation in range(1, 9) else 1
