"""Raw datasets in, `RawSample`s out: one reader for each dataset, as people download it.

A reader checks what can be checked before the first sample (captions without photo, photos without caption,
the split) and gives a `Source`: samples in the order of the captions file, photos read one at a time. Nothing
is left out silently: what becomes no sample is in `rejected`. It writes nothing.
"""

import csv
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffcap_dist.data.shard_format import file_sha256
from shards.writer import RawSample, Rejected

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
KARPATHY_FILE = "dataset_flickr8k.json"
MAX_MISSING = 0.01  # the share of captions without photo, or photos without captions, that is no mistake
NO_PHOTO, NO_CAPTION = "caption without photo", "photo without caption"
NOT_IN_SPLIT, BLANK_CAPTION = "photo not in the split file", "blank caption"


@dataclasses.dataclass(frozen=True)
class Source:
    samples: Iterator[RawSample]
    rejected: list[Rejected]
    provenance: dict[str, Any]  # arguments and hashes of what was read: equal for equal datasets
    notes: list[str]


def flickr8k(images: Path | None, captions: Path, split: str, allow_missing: bool, npz: Path | None = None) -> Source:
    """Flickr8k as it is passed around: a folder of photos and `captions.txt`. `split`: a file, `karpathy`, or
    `random:SEED`. Without `images` the samples are captions only, of the photos that `npz` names."""
    texts, rejected = read_captions(captions)
    if images is not None:
        photos, notes = find_photos(images)
        available, where = set(photos), str(images)
    elif npz is not None:
        photos, notes = {}, []
        available, where = {photo_id_of(name) for name in npz_names(npz)}, str(npz)
    else:
        raise ValueError("neither --images nor --npz is given: there is nothing that the captions belong to")
    usable, missing = _match(texts, available, where, allow_missing)
    split_of = _splits(split, captions, list(texts))
    outside = [photo_id for photo_id in usable if photo_id not in split_of]
    if split_of.keys() - texts.keys():
        notes.append(f"{len(split_of.keys() - texts.keys())} photos of the split file have no captions here")
    rejected += missing + [Rejected(one, NOT_IN_SPLIT, 1, len(texts[one])) for one in outside]
    usable = [photo_id for photo_id in usable if photo_id in split_of]
    provenance = {
        "command": "flickr8k",
        "captions": file_sha256(captions),
        "photos": _folder_fingerprint(photos) if images is not None else None,
        "npz": file_sha256(npz) if images is None and npz is not None else None,
        "split": file_sha256(_split_file(split, captions)) if not split.startswith("random:") else split,
    }
    samples = (
        RawSample(one, texts[one], split_of[one], "flickr8k", photos[one].read_bytes() if photos else None)
        for one in usable
    )
    return Source(samples, rejected, provenance, notes)


def _match(
    texts: dict[str, list[str]], available: set[str], where: str, allow_missing: bool
) -> tuple[list[str], list[Rejected]]:
    """(photo ids that have both, what has only one). Much of the latter: a wrong path, half a download."""
    without_photo = {photo_id: len(texts[photo_id]) for photo_id in texts if photo_id not in available}
    without_caption = sorted(available - texts.keys())
    num_captions = sum(map(len, texts.values()))
    checks = [
        (
            sum(without_photo.values()),
            num_captions,
            f"captions have no photo in {where}",
            list(without_photo),
        ),
        (len(without_caption), len(available), f"photos of {where} have no caption", without_caption),
    ]
    for found, total, what, photo_ids in checks:
        if found > MAX_MISSING * total and not allow_missing:
            raise ValueError(
                f"{found} of {total} {what} ({100 * found / total:.1f}%, more than {MAX_MISSING:.0%}), "
                f"e.g. {', '.join(photo_ids[:3])}. Check the paths, or accept it with --allow-missing"
            )
    rejected = [Rejected(photo_id, NO_PHOTO, 1, count) for photo_id, count in without_photo.items()]
    rejected += [Rejected(photo_id, NO_CAPTION, 1, 0) for photo_id in without_caption]
    return [photo_id for photo_id in texts if photo_id in available], rejected


def photo_id_of(name: str) -> str:
    """The file's name without folder and ending: `1000268201_693b08cb0e` (Flickr's own id is the number)."""
    path = Path(name)
    return path.stem if path.suffix.lower() in PHOTO_SUFFIXES else path.name


# ---- captions.txt ----


def read_captions(path: Path) -> tuple[dict[str, list[str]], list[Rejected]]:
    """Captions by photo id, from a CSV file headed `image,caption`; blank captions are rejected."""
    texts: dict[str, list[str]] = {}
    rejected = []
    for line, name, caption in _caption_rows(path):
        photo_id = photo_id_of(name)
        texts.setdefault(photo_id, [])
        if caption:
            texts[photo_id].append(caption)
        else:
            rejected.append(Rejected(photo_id, BLANK_CAPTION, 0, 1, f"line {line}"))
    if not texts:
        raise ValueError(f"{path} has a header and no captions")
    return {photo_id: captions for photo_id, captions in texts.items() if captions}, rejected


def _caption_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, image name, caption). A caption with bare commas, not quoted, is put together again; one
    that goes on over several lines is taken for a quote that was never closed."""
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            if header != ["image", "caption"]:
                raise ValueError(f"{path} starts with {','.join(header)!r}, expected the header image,caption")
            line = reader.line_num + 1
            for row in reader:
                if reader.line_num > line:
                    raise ValueError(f"{path} line {line}: a quote opens here and closes in line {reader.line_num}")
                if row:
                    name, caption = row[0].strip(), ",".join(row[1:]).strip()
                    if len(row) < 2 or not name:
                        raise ValueError(f"{path} line {line}: {','.join(row)!r} is no image name and caption")
                    yield line, name, caption
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}). Convert it, e.g. with iconv") from error
    except csv.Error as error:
        raise ValueError(f"{path} line {line}: {error}. Is a quote opened here and not closed?") from error


# ---- photos ----


def find_photos(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """(photos by id, notes on what else is in the folder)."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of photos")
    photos: dict[str, Path] = {}
    others = []
    for path in sorted(folder.iterdir()):
        photo_id = photo_id_of(path.name)
        if not path.is_file() or path.suffix.lower() not in PHOTO_SUFFIXES:
            others.append(path.name)
        elif photo_id in photos:
            raise ValueError(f"{folder} holds {photos[photo_id].name} and {path.name}: which is photo {photo_id}?")
        else:
            photos[photo_id] = path
    if not photos:
        inside = f" It holds {', '.join(others[:3])}: is one of them the folder?" if others else ""
        raise ValueError(f"{folder} has no photos ({', '.join(sorted(PHOTO_SUFFIXES))}).{inside}")
    notes = [f"{len(others)} entries of {folder} are no photos: {', '.join(others[:5])}"] if others else []
    return photos, notes


def _folder_fingerprint(photos: dict[str, Path]) -> str:
    """Names and sizes: hashing the photos' bytes would read the whole dataset a second time."""
    lines = "".join(f"{path.name} {path.stat().st_size}\n" for path in photos.values())
    return hashlib.sha256(lines.encode()).hexdigest()


def npz_names(npz: Path) -> list[str]:
    """The `names` array of a file of features."""
    try:
        with np.load(npz, allow_pickle=False) as arrays:
            if "names" not in arrays:
                raise ValueError(f"it has the arrays {', '.join(arrays.files)}, but no `names`")
            return [str(name) for name in arrays["names"]]
    except (OSError, ValueError) as error:
        raise ValueError(f"{npz} can't be read as an npz file of features: {error}") from error


# ---- splits ----


def _split_file(split: str, captions: Path) -> Path:
    if split != "karpathy":
        return Path(split)
    path = captions.with_name(KARPATHY_FILE)
    if not path.is_file():
        raise ValueError(
            f"--split karpathy needs {KARPATHY_FILE} in {captions.parent.resolve()}. "
            "Put it there, give its path as --split, or take --split random:0"
        )
    return path


def _splits(split: str, captions: Path, photo_ids: list[str]) -> dict[str, str]:
    """Photo id -> split."""
    if split.startswith("random:"):
        seed = split.removeprefix("random:")
        if not seed.isdecimal() or int(seed) >= 2**32:
            raise ValueError(f"--split {split}: the seed must be a whole number below 2^32, e.g. random:0")
        return random_splits(photo_ids, int(seed))
    path = _split_file(split, captions)
    if not path.is_file():
        raise ValueError(f"--split {split}: no such file. Give a file, `karpathy`, or `random:SEED`")
    return read_split_file(path)


def random_splits(photo_ids: list[str], seed: int) -> dict[str, str]:
    """80/10/10, drawn over all photos with captions, so that which photos are at hand doesn't change it."""
    num_held_out = round(0.1 * len(photo_ids))
    if num_held_out == 0:
        raise ValueError(f"{len(photo_ids)} photos are too few for a random split of 80/10/10; use a split file")
    # RandomState, not Generator: numpy has frozen its stream for good.
    shuffled = np.random.RandomState(seed).permutation(np.array(sorted(photo_ids)))
    split_of = dict.fromkeys((str(one) for one in shuffled), "train")
    split_of.update((str(one), "val") for one in shuffled[:num_held_out])
    split_of.update((str(one), "test") for one in shuffled[num_held_out : 2 * num_held_out])
    return split_of


def read_split_file(path: Path) -> dict[str, str]:
    """Lines `name.jpg split`, or Karpathy's json (its `restval` is training data)."""
    text = path.read_text(encoding="utf-8-sig")
    pairs = _karpathy_pairs(path, text) if text.lstrip().startswith("{") else _line_pairs(path, text)
    split_of: dict[str, str] = {}
    for name, split in pairs:
        photo_id = photo_id_of(name)
        if split_of.setdefault(photo_id, split) != split:
            raise ValueError(f"{path}: {name} is in {split_of[photo_id]!r} and in {split!r}")
    return split_of


def _line_pairs(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if fields and (len(fields) != 2 or not re.fullmatch(r"[A-Za-z0-9_]+", fields[1])):
            raise ValueError(f"{path} line {number}: {line!r}, expected `name.jpg split`")
        if fields:
            yield fields[0], fields[1]


def _karpathy_pairs(path: Path, text: str) -> Iterator[tuple[str, str]]:
    try:
        for image in json.loads(text)["images"]:
            yield image["filename"], "train" if image["split"] == "restval" else image["split"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no Karpathy split file ({error!r})") from error
