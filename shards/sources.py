"""Raw datasets in, `Source`s out: one function for each dataset, as people download it.

A photo, its captions and its split meet here by photo id. What can be checked before the first sample is checked
(captions without photo, photos without caption, a photo that comes twice, the split). Nothing is left out
silently: photos and captions are either in `samples` or in `rejected`. Photos are only listed, not read; captions
and splits are read in caption_files.py and splits.py. It writes nothing.
"""

import dataclasses
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from diffcap_dist.data.shard_format import file_sha256
from shards.caption_files import CaptionFile, read_captions
from shards.splits import RESTVAL, ROWS, SPLITS, Splits, read_splits, row_splits
from shards.writer import RawSample, Rejected, Source

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MAX_MISSING = 0.01  # the share of captions without photo, or photos without captions, that is no mistake
NO_PHOTO, NO_CAPTION = "caption without photo", "photo without caption"
DUPLICATE, NOT_IN_SPLIT = "duplicate photo", "photo not in the split file"
LEFT_OUT_RESTVAL = "restval photo, without --restval"
SAME_PHOTO = "same photo in Flickr30k"


@dataclasses.dataclass(frozen=True)
class Given:
    """What the user has of a dataset. Without `images` the samples are captions only, of the photos `npz` names."""

    captions: Path
    split: str
    images: Path | None = None
    npz: Path | None = None
    allow_missing: bool = False
    restval: bool = False


@dataclasses.dataclass(frozen=True)
class Photos:
    """Where there are photos, and which: file names below `where` by photo id (of several the first is kept)."""

    where: Path
    names: dict[str, list[str]]
    notes: list[str]
    hold_bytes: bool  # False: `where` is an npz file, it has features only


@dataclasses.dataclass(frozen=True)
class Joined:
    """A dataset whose photos, captions and splits have met."""

    source: Source
    samples: list[RawSample]
    split_of: dict[str, str]  # all that the split names, at hand or not


# ---- datasets ----


def flickr8k(given: Given) -> Source:
    """Flickr8k: a folder of photos, and captions.txt or Flickr8k.token.txt."""
    return _flickr("flickr8k", given)


def flickr30k(given: Given) -> Source:
    """Flickr30k: a folder of photos, and results_20130124.token or results.csv."""
    return _flickr("flickr30k", given)


def karpathy(given: Given) -> Source:
    """Any dataset by Karpathy's dataset_*.json: photos at filepath/filename or filename below the folder."""
    captions = read_captions(given.captions)
    if not captions.splits:
        raise ValueError(f"{given.captions} is not one of Karpathy's dataset_*.json")
    folders = {str(PurePosixPath(name).parent) for name in captions.captions}
    return _join("karpathy", given, captions, find_photos(given, folders), photo_id_of).source


def folder(given: Given) -> Source:
    """A folder of photos, with folders in it, and a file of captions; a photo's id is its path in there."""
    captions = read_captions(given.captions)
    photos = find_photos(given, None, path_id_of)
    return _join("folder", given, captions, photos, _by_path_or_file_name(photos)).source


def flickr30k_8k(given30k: Given, given8k: Given) -> Source:
    """Both as one, by Flickr's photo number: each photo once, and no val or test photo of either in train.

    Split by caption rows, as the published code of CLIP-Diffusion-LM did it: nothing is matched, a photo of both is in
    twice.
    """
    if given30k.split.startswith(ROWS) != given8k.split.startswith(ROWS):
        raise ValueError(f"one dataset is split {ROWS}SEED, the other {given30k.split!r} / {given8k.split!r}: take one")
    captions30k, captions8k = read_captions(given30k.captions), read_captions(given8k.captions)
    photos30k, photos8k = find_photos(given30k, {"."}), find_photos(given8k, {"."})
    if photos30k.where == photos8k.where:
        photos30k, photos8k = _share(photos30k, captions30k, captions8k)
    f30k = _join("flickr30k", given30k, captions30k, photos30k, photo_id_of)
    f8k = _join("flickr8k", given8k, captions8k, photos8k, photo_id_of)
    unite_them = put_together if given30k.split.startswith(ROWS) else unite
    samples, rejected, notes = unite_them(f30k, f8k)
    return Source(
        samples=samples,
        rejected=[*f30k.source.rejected, *f8k.source.rejected, *rejected],
        provenance={
            "command": "flickr30k+8k",
            "flickr30k": f30k.source.provenance,
            "flickr8k": f8k.source.provenance,
        },
        notes=[*f30k.source.notes, *f8k.source.notes, *notes],
    )


def _flickr(name: str, given: Given) -> Source:
    return _join(name, given, read_captions(given.captions), find_photos(given, {"."}), photo_id_of).source


# ---- names ----


def photo_id_of(name: str) -> str:
    """The file's name without folder and ending: `1000268201_693b08cb0e` (Flickr's own id is the number)."""
    return path_id_of(PurePosixPath(name).name)


def path_id_of(name: str) -> str:
    """The path without ending, `birds/17`: in a tree of folders a file's name alone may come twice."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in PHOTO_SUFFIXES else str(path)


def flickr_number(photo_id: str) -> int:
    match = re.match(r"([0-9]+)(?![A-Za-z0-9])", photo_id)
    if match is None:
        raise ValueError(f"photo {photo_id!r} is not called by a Flickr photo number, as in 1000268201_693b08cb0e.jpg")
    return int(match[1])


def _by_path_or_file_name(photos: Photos) -> Callable[[str], str]:
    """The id of a name that gives the photo's path, or its file name alone where that is in one folder only."""
    same_name = Counter(map(photo_id_of, photos.names))
    path_of = {photo_id_of(one): one for one in photos.names if same_name[photo_id_of(one)] == 1}

    def id_of(name: str) -> str:
        photo_id = path_id_of(name)
        return photo_id if photo_id in photos.names else path_of.get(photo_id, photo_id)

    return id_of


# ---- photos ----


def find_photos(given: Given, folders: set[str] | None, id_of: Callable[[str], str] | None = None) -> Photos:
    """The photos in the image folder and those `folders` of it, in the whole tree if None; or those an npz names."""
    if given.images is not None:
        names, others = _list_photos(given.images, folders)
        notes = [f"{len(others)} entries of {given.images} are no photos: {', '.join(others[:5])}"] if others else []
        where = given.images
    elif given.npz is not None:
        names, notes, where = npz_names(given.npz), [], given.npz
    else:
        raise ValueError("neither --images nor --npz is given: there is nothing that the captions belong to")
    by_id: dict[str, list[str]] = {}
    for name in names:
        by_id.setdefault((id_of or photo_id_of)(name), []).append(name)
    return Photos(where, by_id, notes, hold_bytes=given.images is not None)


def _list_photos(images: Path, folders: set[str] | None) -> tuple[list[str], list[str]]:
    """(photos, what else is there), as sorted paths relative to `images`."""
    if not images.is_dir():
        raise ValueError(f"{images} is no folder of photos")
    photos: list[str] = []
    others: list[str] = []
    for place, subfolders, files in os.walk(images, onerror=_raise, followlinks=True):
        here = Path(place).relative_to(images)
        for name in files:
            (photos if _is_photo(Path(place, name)) else others).append((here / name).as_posix())
        for name in subfolders.copy():
            path = (here / name).as_posix()
            if name.startswith(".") or not (folders is None or _leads_to(path, folders)):
                subfolders.remove(name)
                others.append(path)
    if not photos:
        inside = f" It holds {', '.join(sorted(others)[:3])}: is one of them the folder?" if others else ""
        raise ValueError(f"{images} has no photos ({', '.join(sorted(PHOTO_SUFFIXES))}).{inside}")
    return sorted(photos), sorted(others)


def _is_photo(path: Path) -> bool:
    """Not ._1.jpg, which macOS leaves beside 1.jpg in archives, and not a link to nowhere."""
    return path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _leads_to(path: str, folders: set[str]) -> bool:
    return any(PurePosixPath(one).is_relative_to(path) for one in folders)


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out a folder that it may not read


def npz_names(npz: Path) -> list[str]:
    """The `names` array of a file of features."""
    try:
        with np.load(npz, allow_pickle=False) as arrays:
            if "names" not in arrays:
                raise ValueError(f"it has the arrays {', '.join(arrays.files)}, but no `names`")
            return [str(name) for name in arrays["names"]]
    except (OSError, ValueError) as error:
        raise ValueError(f"{npz} can't be read as an npz file of features: {error}") from error


def _fingerprint(photos: Photos) -> str:
    """Names and sizes: hashing the photos' bytes would read the whole dataset a second time."""
    if not photos.hold_bytes:
        return file_sha256(photos.where)
    names = sorted(name for same_id in photos.names.values() for name in same_id)
    lines = "".join(f"{name} {(photos.where / name).stat().st_size}\n" for name in names)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _share(photos: Photos, captions30k: CaptionFile, captions8k: CaptionFile) -> tuple[Photos, Photos]:
    """One folder, or one npz, of both datasets: each gets its own part, and what has no caption goes to the first."""
    of_30k, of_8k = (set(map(photo_id_of, file.captions)) for file in (captions30k, captions8k))
    names30k = {one: names for one, names in photos.names.items() if one in of_30k or one not in of_8k}
    names8k = {one: names for one, names in photos.names.items() if one in of_8k}
    return dataclasses.replace(photos, names=names30k), dataclasses.replace(photos, names=names8k, notes=[])


# ---- photos, captions and splits meet ----


def _join(name: str, given: Given, captions: CaptionFile, photos: Photos, id_of: Callable[[str], str]) -> Joined:
    rejected = [dataclasses.replace(one, photo_id=id_of(one.photo_id)) for one in captions.rejected]
    texts, files, duplicates = _one_of_each(captions.captions, photos.names, id_of)
    missing = _missing(texts, files, photos.where, given.allow_missing)
    kept = [
        RawSample(photo_id, found, "", name, (photos.where / files[photo_id]).read_bytes if photos.hold_bytes else None)
        for photo_id, found in texts.items()
        if found and photo_id in files
    ]
    if given.split.startswith(ROWS):
        splits = Splits({}, given.split)
        samples, outside = _split_by_rows(
            kept, row_splits({one: len(found) for one, found in texts.items()}, given.split)
        )
    else:
        splits = read_splits(given.split, given.captions, list(texts), id_of, captions.splits, _karpathy_name(name))
        samples, outside = _split_by_photo(kept, splits, given.restval)
    provenance = {
        "command": name,
        "captions": captions.sha256,
        "photos" if photos.hold_bytes else "npz": _fingerprint(photos),
        "split": splits.provenance,
        **({"restval": True} if given.restval else {}),
    }
    notes = [*captions.notes, *photos.notes, *_split_notes(splits.of, texts, given.restval), *_leak_notes(samples)]
    rejected += [*duplicates, *missing, *outside]
    return Joined(Source(samples, rejected, provenance, notes), samples, splits.of)


def _split_by_photo(samples: list[RawSample], splits: Splits, restval: bool) -> tuple[list[RawSample], list[Rejected]]:
    inside, outside = [], []
    for sample in samples:
        split = splits.of.get(sample.photo_id)
        if split is None or (split == RESTVAL and not restval):
            reason = NOT_IN_SPLIT if split is None else LEFT_OUT_RESTVAL
            outside.append(Rejected(sample.photo_id, reason, 1, len(sample.captions), by_choice=True))
        else:
            inside.append(dataclasses.replace(sample, split="train" if split == RESTVAL else split))
    return inside, outside


def _split_by_rows(samples: list[RawSample], splits: dict[str, list[str]]) -> tuple[list[RawSample], list[Rejected]]:
    """A photo in each split that has captions of it, with those; all of its captions stay with it as references."""
    found = []
    for sample in samples:
        rows = list(zip(splits[sample.photo_id], sample.captions))
        for split in sorted({split for split, _ in rows}, key=SPLITS.index):
            captions = [caption for of_split, caption in rows if of_split == split]
            found.append(dataclasses.replace(sample, split=split, captions=captions, references=sample.captions))
    return found, []


def _leak_notes(samples: list[RawSample]) -> list[str]:
    """What a split by caption rows does."""
    photos = {split: {one.photo_id for one in samples if one.split == split and one.references} for split in SPLITS}
    rows = {split: sum(len(one.captions) for one in samples if one.split == split) for split in SPLITS}
    if not any(photos.values()):
        return []
    return [
        f"split by caption rows: {rows['train']} in train, {rows['val']} in val. IT LEAKS: "
        f"{len(photos['train'] & photos['val'])} of {len(photos['val'])} val photos are train photos too. "
        "Photos are counted in each split they are in"
    ]


def _karpathy_name(dataset: str) -> str:
    return dataset if dataset.startswith("flickr") else "*"


def _one_of_each(
    captions: dict[str, list[str]], photos: dict[str, list[str]], id_of: Callable[[str], str]
) -> tuple[dict[str, list[str]], dict[str, str], list[Rejected]]:
    """(captions by photo id, file name by photo id, the other photos of the same id). The first is kept: of the
    names in the captions file one that is there as a file, so that its captions are those of that very file."""
    named: dict[str, list[str]] = {}
    for name in captions:
        named.setdefault(id_of(name), []).append(name)
    texts, files, rejected = {}, {one: names[0] for one, names in photos.items()}, []
    for photo_id, names in named.items():
        there = [name for name in names if name in photos.get(photo_id, [])]
        kept = there[0] if there else names[0]
        texts[photo_id] = captions[kept]
        files.update({photo_id: kept} if there else {})
        rejected += [_duplicate(photo_id, kept, name, len(captions[name])) for name in names if name != kept]
    for photo_id, names in photos.items():
        known = {files[photo_id], *named.get(photo_id, [])}
        rejected += [_duplicate(photo_id, files[photo_id], name, 0) for name in names if name not in known]
    return texts, files, rejected


def _duplicate(photo_id: str, kept: str, name: str, captions: int) -> Rejected:
    return Rejected(photo_id, DUPLICATE, 1, captions, f"{kept} is kept, {name} is not")


def _missing(texts: dict[str, list[str]], files: dict[str, str], where: Path, allow_missing: bool) -> list[Rejected]:
    """What has only photo or only captions. Much of it: a wrong path, half a download."""
    without_photo = {photo_id: len(found) for photo_id, found in texts.items() if found and photo_id not in files}
    without_caption = sorted(photo_id for photo_id in files.keys() | texts.keys() if not texts.get(photo_id))
    lost_captions, num_captions = sum(without_photo.values()), sum(map(len, texts.values()))
    checks = [
        (lost_captions, num_captions, f"captions have no photo in {where}", list(without_photo)),
        (len(without_caption), len(files), f"photos of {where} have no caption", without_caption),
    ]
    for found, total, what, photo_ids in checks:
        if found > MAX_MISSING * total and not allow_missing:
            share = f"{100 * found / total:.1f}%, " if total else ""
            raise ValueError(
                f"{found} of {total} {what} ({share}more than {MAX_MISSING:.0%}), "
                f"e.g. {', '.join(photo_ids[:3])}. Check the paths, or accept it with --allow-missing"
            )
    rejected = [
        Rejected(photo_id, NO_PHOTO, 1, count, by_choice=allow_missing) for photo_id, count in without_photo.items()
    ]
    return rejected + [Rejected(photo_id, NO_CAPTION, 1, 0, by_choice=allow_missing) for photo_id in without_caption]


def _split_notes(split_of: dict[str, str], texts: dict[str, list[str]], restval: bool) -> list[str]:
    notes = []
    if elsewhere := split_of.keys() - texts.keys():
        notes.append(f"{len(elsewhere)} photos of the split file have no captions here")
    if restval and RESTVAL not in split_of.values():
        notes.append("--restval changes nothing: the split has no restval photos")
    return notes


# ---- Flickr30k and Flickr8k as one ----


def unite(f30k: Joined, f8k: Joined) -> tuple[list[RawSample], list[Rejected], list[str]]:
    """(samples, Flickr8k's copies of photos that Flickr30k has, notes)."""
    split_of = joint_splits([f30k.split_of, f8k.split_of])
    samples: list[RawSample] = []
    rejected: list[Rejected] = []
    kept: dict[int, RawSample] = {}
    for sample in [*f30k.samples, *f8k.samples]:
        number = flickr_number(sample.photo_id)
        first = kept.setdefault(number, sample)
        if first is not sample:
            other_set = first.source != sample.source
            reason = SAME_PHOTO if other_set else DUPLICATE
            detail = f"{first.photo_id} is kept, {sample.photo_id} is not"
            rejected.append(Rejected(sample.photo_id, reason, 1, len(sample.captions), detail, by_choice=other_set))
        else:
            samples.append(dataclasses.replace(sample, split=split_of[number]))
    in_both = sum(one.reason == SAME_PHOTO for one in rejected)
    moves = Counter(
        f"{kept[number].split} -> {split_of[number]}" for number in kept if kept[number].split != split_of[number]
    )
    moved = ": " + ", ".join(f"{move} {count}" for move, count in sorted(moves.items())) if moves else ""
    return (
        samples,
        rejected,
        [
            f"flickr30k: {len(f30k.samples)} photos, flickr8k: {len(f8k.samples)}, in both: {in_both} "
            "(Flickr30k's copy and captions are kept)",
            f"{moves.total()} photos are in another split because of the other dataset{moved}",
        ],
    )


def put_together(f30k: Joined, f8k: Joined) -> tuple[list[RawSample], list[Rejected], list[str]]:
    """The samples of both, each under its own id: what both have is in twice."""
    numbers30k, numbers8k = ({flickr_number(one.photo_id) for one in joined.samples} for joined in (f30k, f8k))
    twice = f"{len(numbers30k & numbers8k)} photos are in twice, once from each dataset"
    return [*f30k.samples, *f8k.samples], [], [twice]


def joint_splits(datasets: list[dict[str, str]]) -> dict[int, str]:
    """Split by Flickr's photo number: test if any dataset tests on the photo, else val, else train."""
    joint: dict[int, str] = {}
    for split_of in datasets:
        for photo_id, split in split_of.items():
            split = "train" if split == RESTVAL else split
            if split not in SPLITS:
                raise ValueError(
                    f"photo {photo_id} is in split {split!r}: two datasets join in train, val and test only"
                )
            number = flickr_number(photo_id)
            joint[number] = max(joint.get(number, "train"), split, key=SPLITS.index)
    return joint
