"""Which photo is in which split: `--split`, one grammar for all datasets, in; split by photo id out.

`train`, `val` or `test` (all photos in that one), `random:SEED` (80/10/10), `official` (Flickr8k's own lists),
`karpathy` (his JSON: the captions file itself, or beside it), a FILE (lines `name.jpg split`, or such a JSON), a
DIR with lists of photos (f30k_train.txt, f30k_val.txt, f30k_test.txt) or DIR/f30k where it holds several sets of
lists. `rows:SEED` alone splits captions instead of photos (`row_splits`). It names the files that were read and decides
nothing about photos that are in no split.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from diffcap_dist.data.shard_format import file_sha256
from shards.caption_files import SPLIT_NAME, is_karpathy, karpathy_images, numbered_lines, read_text

SPLITS = ("train", "val", "test")
RESTVAL = "restval"  # COCO's validation photos that Karpathy's val and test don't use
GRAMMAR = "FILE|DIR|official|karpathy|random:SEED|rows:SEED|train|val|test"
ROWS = "rows:"
OFFICIAL = "Flickr_8k"
LIST_FILE = re.compile(r"(?:(.*)[_.-])?(train|val|dev|test)(?:Images)?\.txt")

Pairs = Iterable[tuple[str, str]]  # (photo name, split)


@dataclasses.dataclass(frozen=True)
class Splits:
    of: dict[str, str]  # split by photo id; `restval` stays what it is
    provenance: str | dict[str, str]  # the sha256 of the file, or of each list, or how it was drawn


def read_splits(
    split: str,
    captions: Path,
    photo_ids: list[str],
    id_of: Callable[[str], str] = str,
    karpathy: Pairs = (),
    dataset: str = "*",
) -> Splits:
    """`photo_ids`: all photos with captions; `id_of`: the photo id of a name; `karpathy`: what the captions file
    itself says, if it is Karpathy's; else `dataset` tells which of his files to take."""
    if split in SPLITS:
        return Splits(dict.fromkeys(photo_ids, split), split)
    if split.startswith("random:"):
        return Splits(random_splits(photo_ids, _seed(split)), split)
    if split == "karpathy" and (pairs := list(karpathy)):
        return Splits(_by_id(captions, pairs, id_of), file_sha256(captions))
    if split == "official":
        return _from_lists(_official_lists(captions), id_of)
    path = _karpathy_file(captions, dataset) if split == "karpathy" else Path(split)
    if path.is_file():
        return Splits(read_split_file(path, id_of), file_sha256(path))
    return _from_lists(_lists_at(path, split), id_of)


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


def row_splits(num_captions: dict[str, int], split: str) -> dict[str, list[str]]:
    """The split of each caption of each photo, by `rows:SEED`: 80/20 of the rows (photo, caption) into train and val.

    The published code of CLIP-Diffusion-LM draws its validation set so. Most photos are then in both, and a score on
    val is one on photos that were trained on: for comparison with that code only.
    """
    rows = [photo_id for photo_id in sorted(num_captions) for _ in range(num_captions[photo_id])]
    num_train = int(0.8 * len(rows))
    if num_train == 0:
        raise ValueError(f"--split {split}: {len(rows)} captions are too few for 80/20")
    is_train = np.zeros(len(rows), bool)
    is_train[np.random.RandomState(_seed(split)).permutation(len(rows))[:num_train]] = True
    splits: dict[str, list[str]] = {photo_id: [] for photo_id in num_captions}
    for photo_id, in_train in zip(rows, is_train.tolist()):
        splits[photo_id].append("train" if in_train else "val")
    return splits


def read_split_file(path: Path, id_of: Callable[[str], str]) -> dict[str, str]:
    """Lines `name.jpg split`, or Karpathy's JSON."""
    text = read_text(path)
    if is_karpathy(text):
        pairs: Pairs = ((image.name, image.split) for image in karpathy_images(path, text))
    else:
        pairs = _line_pairs(path, text)
    return _by_id(path, pairs, id_of)


def _by_id(path: Path, pairs: Pairs, id_of: Callable[[str], str]) -> dict[str, str]:
    split_of: dict[str, str] = {}
    for name, split in pairs:
        photo_id = id_of(name)
        if split_of.setdefault(photo_id, split) != split:
            raise ValueError(f"{path}: photo {name} is in {split_of[photo_id]!r} and in {split!r}")
    return split_of


def _line_pairs(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in numbered_lines(text):
        fields = line.rsplit(maxsplit=1)  # a name may hold spaces
        if len(fields) != 2 or not re.fullmatch(SPLIT_NAME, fields[1]):
            raise ValueError(f"{path} line {number}: {line[:80]!r}, expected `name.jpg split`")
        yield fields[0].strip(), fields[1]


def _seed(split: str) -> int:
    kind, _, seed = split.partition(":")
    if not re.fullmatch(r"[0-9]+", seed) or int(seed) >= 2**32:
        raise ValueError(f"--split {split}: the seed must be a whole number below 2^32, e.g. {kind}:0")
    return int(seed)


def _karpathy_file(captions: Path, dataset: str) -> Path:
    folder = captions.absolute().parent
    found = sorted(folder.glob(f"dataset_{dataset}.json"))
    if len(found) != 1:
        what = f"found {', '.join(path.name for path in found)}" if found else "which is not there"
        raise ValueError(
            f"--split karpathy needs dataset_{dataset}.json in {folder}, {what}. "
            "Give the path of the right one as --split, or take --split random:0"
        )
    return found[0]


# ---- lists: a file of photo names for each split ----


def _from_lists(lists: dict[str, Path], id_of: Callable[[str], str]) -> Splits:
    split_of: dict[str, str] = {}
    for split, path in lists.items():
        for number, line in numbered_lines(read_text(path)):
            photo_id = id_of(line.strip())
            if split_of.setdefault(photo_id, split) != split:
                raise ValueError(f"{path} line {number}: photo {line.strip()} is also in {split_of[photo_id]!r}")
    return Splits(split_of, {split: file_sha256(path) for split, path in lists.items()})


def _official_lists(captions: Path) -> dict[str, Path]:
    folder = captions.absolute().parent
    for place in (folder, folder.parent):
        found = _lists_in(place).get(OFFICIAL, {})
        if len(found) == len(SPLITS):
            return found
    raise ValueError(
        f"--split official needs {OFFICIAL}.trainImages.txt, .devImages.txt and .testImages.txt in {folder} or "
        f"{folder.parent}. Put them there, or give their folder as --split"
    )


def _lists_at(path: Path, split: str) -> dict[str, Path]:
    """The three lists in the folder `path`, or those whose names begin with `path`."""
    groups = _lists_in(path) if path.is_dir() else _lists_in(path.parent)
    if not path.is_dir():
        groups = {prefix: lists for prefix, lists in groups.items() if prefix == path.name.rstrip("_.-")}
        if not groups:
            raise ValueError(f"--split {split}: no such file, folder or set of lists. Expected {GRAMMAR}")
    if len(groups) != 1:
        found = f"several: {', '.join(map(repr, sorted(groups)))}; give DIR/NAME" if groups else "none"
        raise ValueError(
            f"--split {split}: expected one set of lists such as f30k_train.txt, _val, _test; found {found}"
        )
    (lists,) = groups.values()
    missing = [one for one in SPLITS if one not in lists]
    if missing:
        raise ValueError(f"--split {split}: lists for {', '.join(lists)} are there, for {', '.join(missing)} not")
    return lists


def _lists_in(folder: Path) -> dict[str, dict[str, Path]]:
    """The folder's list files by what their names begin with, then by split (in the order of SPLITS)."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := LIST_FILE.fullmatch(path.name):
            split = "val" if match[2] == "dev" else match[2]
            other = found.setdefault(match[1] or "", {}).setdefault(split, path)
            if other != path:
                raise ValueError(f"{folder}: {other.name} and {path.name} both list the photos of {split}")
    return {prefix: {split: lists[split] for split in SPLITS if split in lists} for prefix, lists in found.items()}
