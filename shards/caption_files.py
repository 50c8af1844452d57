"""A file of captions in, captions by photo name out, in the order of the file, whatever layout it is published in.

`read_captions` tells the layout by what the file holds, never by its name: CSV with a header, token files
(`1.jpg#0<TAB>caption`), Flickr30k's results.csv, Karpathy's JSON (which holds the splits too), JSONL. A caption
that is blank or not UTF-8 is rejected with its line; a file that is none of these is an error. It knows no photos.
"""

import csv
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffcap_dist.data.shard_format import file_sha256
from shards.writer import Rejected

BLANK_CAPTION, NOT_UTF8 = "blank caption", "caption is not UTF-8"
NAME_KEYS = ("image", "file_name", "filename", "image_name")
CAPTION_KEYS = ("caption", "captions", "text", "comment")
KARPATHY_KEYS = ("images", "filename", "filepath", "split", "sentences", "raw")
KEPT_KEYS = frozenset(NAME_KEYS + CAPTION_KEYS + KARPATHY_KEYS)
SPLIT_NAME = r"[A-Za-z0-9_]+"

TOKEN_LINE = re.compile(r"([^\t]+)#\d+\t(.*)")
RESULTS_HEADER = re.compile(r"image_name\s*\|\s*comment_number\s*\|\s*comment")
RESULTS_LINE = re.compile(r"([^|]+)\|\s*\d+\s*\|(.*)")
RESULTS_LINE_WITHOUT_SEPARATOR = re.compile(r"([^|]+)\|\s*\d+\s+([^|]*)")  # 2199200615.jpg as published

Row = tuple[str, str, list[str]]  # (where it stands, photo name, captions)


@dataclasses.dataclass(frozen=True)
class CaptionFile:
    captions: dict[str, list[str]]  # by photo name; a photo that has none left stays, with an empty list
    rejected: list[Rejected]  # photo_id is the photo's name, as it stands in the file
    notes: list[str]
    splits: list[tuple[str, str]]  # (photo name, split), of Karpathy's files
    sha256: str


@dataclasses.dataclass(frozen=True)
class KarpathyImage:
    name: str  # with its folder, if one is given (COCO): val2014/COCO_val2014_000000391895.jpg
    split: str
    captions: list[str]


def read_captions(path: Path) -> CaptionFile:
    """All captions of a file in any of the layouts; captions are stripped, an exact repetition is kept."""
    text = read_text(path)
    notes: list[str] = []
    images = karpathy_images(path, text) if is_karpathy(text) else []
    rows = ((f"images[{i}]", image.name, image.captions) for i, image in enumerate(images))
    captions: dict[str, list[str]] = {}
    rejected = []
    for where, name, found in rows if images else _rows(path, text, notes):
        kept = captions.setdefault(_printable(name), [])
        for caption in map(str.strip, found):
            if not (_is_utf8(caption) and _is_utf8(name)):
                rejected.append(Rejected(_printable(name), NOT_UTF8, 0, 1, where))
            elif not caption:
                rejected.append(Rejected(name, BLANK_CAPTION, 0, 1, where))
            else:
                kept.append(caption)
    if not any(captions.values()):
        raise ValueError(f"{path} has no captions ({len(captions)} photos, {len(rejected)} captions rejected)")
    return CaptionFile(captions, rejected, notes, [(image.name, image.split) for image in images], file_sha256(path))


def read_text(path: Path) -> str:
    """The file's text; bytes that are not UTF-8 stand in it as surrogates, so that only their line is lost."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return path.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, line), without the lines that are blank."""
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: captions may hold U+2028 and the like
        if line.strip():
            yield number, line.removesuffix("\r")


def is_karpathy(text: str) -> bool:
    """Inside a JSON string the quotes would be escaped, so no caption looks like this."""
    return text.lstrip().startswith("{") and re.search(r'"images"\s*:\s*\[', text) is not None


def karpathy_images(path: Path, text: str) -> list[KarpathyImage]:
    content = _json(f"{path}", text)
    images = [_karpathy_image(f"{path}: images[{i}]", image) for i, image in enumerate(content["images"])]
    if not images:
        raise ValueError(f"{path}: its list `images` is empty")
    return images


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a surrogate: a bad byte, or half a pair escaped in JSON
        return False
    return True


def _printable(name: str) -> str:
    return name if _is_utf8(name) else name.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


# ---- layouts ----


def _rows(path: Path, text: str, notes: list[str]) -> Iterable[Row]:
    _, first = next(numbered_lines(text), (0, ""))
    if first.lstrip().startswith("{"):
        return _jsonl_rows(path, text)
    if TOKEN_LINE.fullmatch(first):
        return _token_rows(path, text)
    if RESULTS_HEADER.fullmatch(first.strip().lower()):
        return _results_rows(path, text, notes)
    return _csv_rows(path, text)


def _token_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in numbered_lines(text):
        match = TOKEN_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{path} line {number}: {line[:80]!r}, expected `name.jpg#0<TAB>caption`")
        yield f"line {number}", match[1].strip(), [match[2]]


def _results_rows(path: Path, text: str, notes: list[str]) -> Iterator[Row]:
    _, *lines = numbered_lines(text)
    for number, line in lines:
        match = RESULTS_LINE.fullmatch(line)
        if match is None:
            match = RESULTS_LINE_WITHOUT_SEPARATOR.fullmatch(line)
            if match is None:
                raise ValueError(f"{path} line {number}: {line[:80]!r}, expected `name.jpg| 0| caption`")
            notes.append(f"{path.name} line {number} lacks a separator, read as {match[1]}: {match[2].strip()}")
        yield f"line {number}", match[1].strip(), [match[2]]


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    """Rows under a header that names both columns; the bare commas of a caption in the last one are its own."""
    (header_number, header_line), *lines = [*numbered_lines(text)] or [(1, "")]
    header = [field.strip().lower() for field in _csv_fields(f"{path} line {header_number}", header_line)]
    name_column, caption_column = _column(header, NAME_KEYS), _column(header, CAPTION_KEYS)
    if name_column is None or caption_column is None:
        raise ValueError(
            f"{path} starts with {header_line[:80]!r}, which is no captions file. Expected a CSV header such as "
            "image,caption, or `name.jpg#0<TAB>caption`, `image_name| comment_number| comment`, Karpathy's JSON, JSONL"
        )
    for number, line in lines:
        fields = _csv_fields(f"{path} line {number}", line)
        if caption_column == len(header) - 1:
            fields[caption_column:] = [",".join(fields[caption_column:])] if len(fields) > caption_column else []
        if len(fields) != len(header) or not fields[name_column].strip():
            raise ValueError(f"{path} line {number}: {line[:80]!r} is no row of {','.join(header)}")
        yield f"line {number}", fields[name_column].strip(), [fields[caption_column]]


def _csv_fields(where: str, line: str) -> list[str]:
    """A row is one line: a caption that goes on in the next is taken for a quote that was never closed."""
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise ValueError(f"{where}: {error}. Is a quote opened here and not closed in the same line?") from error


def _column(header: list[str], keys: tuple[str, ...]) -> int | None:
    return next((header.index(key) for key in keys if key in header), None)


def _jsonl_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in numbered_lines(text):
        where = f"{path} line {number}"
        record = _json(where, line)
        name, captions = _value(record, NAME_KEYS), _value(record, CAPTION_KEYS)
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(name, str) or not name or not _is_texts(captions):
            raise ValueError(
                f'{where}: {line[:80]!r}, expected {{"image": name, "caption": text}} or "captions": [...]'
            )
        yield f"line {number}", name, captions


def _value(record: Any, keys: tuple[str, ...]) -> Any:
    return next((record[key] for key in keys if key in record), None) if isinstance(record, dict) else None


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _json(where: str, text: str) -> Any:
    def needed(record: dict[str, Any]) -> dict[str, Any]:  # COCO's tokens would take a gigabyte
        return {key: value for key, value in record.items() if key in KEPT_KEYS}

    try:
        return json.loads(text, object_hook=needed)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from error


def _karpathy_image(where: str, image: Any) -> KarpathyImage:
    match image:
        case {"filename": str(name), "split": str(split)} if name and re.fullmatch(SPLIT_NAME, split):
            captions: Any = [one.get("raw") if isinstance(one, dict) else None for one in image.get("sentences", [])]
            if _is_texts(captions):
                folder = image.get("filepath")
                return KarpathyImage(f"{folder}/{name}" if folder else name, split, captions)
    raise ValueError(
        f"{where} is not as in Karpathy's JSON (filename, split, sentences[].raw), found {str(image)[:80]}. "
        "COCO's own captions_*.json is another file: take dataset_coco.json"
    )
