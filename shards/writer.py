"""Samples in, a finished dataset folder out: SPLIT-000000.tar and .idx.npz, rejected.jsonl, index.json last.

The same samples give the same bytes. The tars are plain USTAR with integer times; webdataset reads them too.
A shard is put together in memory (one for each split) and appears on disk complete or not at all.
Photos are decoded once to prove that they can be, and stored untouched. It does not know any raw dataset.
"""

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffcap_dist.data.shard_format import (
    INDEX_FILE,
    MemberIndex,
    ShardIndex,
    ShardInfo,
    atomic_write,
    file_sha256,
    member_index_path,
    safe_key,
    tar_path,
)

UNFINISHED_FILE = "unfinished.json"  # the request of a run that hasn't reached its index.json
REJECTED_FILE = "rejected.jsonl"
CODE_FOLDERS = ("diffcap_dist", "shards", "launch", "configs", "benchmarks", "tests", "docs")
IMAGE_SUFFIX_OF_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
UNREADABLE = "photo can't be decoded"
TAR_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class RawSample:
    """A photo with its captions as a source gives it; image None: captions only."""

    photo_id: str
    captions: list[str]
    split: str
    source: str
    image: bytes | None
    scene: dict[str, Any] | None = None  # ground truth of a rendered picture


@dataclasses.dataclass(frozen=True)
class Rejected:
    """An input that became no sample. A blank caption of a photo that is kept counts 0 photos, 1 caption."""

    photo_id: str
    reason: str  # one of few, they are counted
    photos: int
    captions: int
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Written:
    index: ShardIndex
    already_complete: bool
    shards_kept: int  # found complete from an interrupted run


class UnreadableImage(ValueError):
    """Bytes that PIL can't decode to the end, or a format that shards don't hold."""


def write_dataset(
    samples: Iterable[RawSample],
    directory: Path,
    samples_per_shard: int,
    provenance: dict[str, Any],
    rejected: list[Rejected],
) -> Written:
    """Write all samples; `rejected` may grow while `samples` is read. `provenance` is what was asked, of
    which sources (hashes): a second run with the same one continues, one with another is refused."""
    if samples_per_shard < 1:
        raise ValueError(f"samples per shard is {samples_per_shard}, it must be at least 1")
    request = {**provenance, "samples_per_shard": samples_per_shard}
    finished = _prepare(directory, request)
    if finished is not None:
        return Written(finished, already_complete=True, shards_kept=len(finished.shards))
    shards, kept, captions = _write_shards(samples, directory, samples_per_shard, rejected)
    if not shards:
        raise ValueError(f"no sample is left to write to {directory}; rejected: {count_by_reason(rejected)}")
    lines = [json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in rejected]
    atomic_write(directory / REJECTED_FILE, "".join(lines).encode())
    counts = _counts(shards, captions, rejected)
    index = ShardIndex(shards, {}, {"request": request, "versions": _versions(), "counts": counts})
    index.save(directory)
    (directory / UNFINISHED_FILE).unlink()
    return Written(index, already_complete=False, shards_kept=kept)


# ---- the folder ----


def _prepare(directory: Path, request: dict[str, Any]) -> ShardIndex | None:
    """The finished dataset of the same request, if it is there; else a folder that is ours to write into."""
    refuse_code_folder(directory)
    if (directory / INDEX_FILE).exists():
        index = ShardIndex.load(directory)
        _require_same(directory, index.provenance.get("request", {}), request)
        _require_present(directory, index)
        (directory / UNFINISHED_FILE).unlink(missing_ok=True)  # killed between the last two steps
        return index
    directory.mkdir(parents=True, exist_ok=True)
    marker = directory / UNFINISHED_FILE
    if marker.exists():
        _require_same(directory, json.loads(marker.read_bytes()), request)
    elif any(path.name != f"{UNFINISHED_FILE}.tmp" for path in directory.iterdir()):
        raise ValueError(f"{directory} holds files, but no dataset of ours. Choose an empty or new folder")
    else:
        atomic_write(marker, (json.dumps(request, indent=1, ensure_ascii=False) + "\n").encode())
    return None


def refuse_code_folder(directory: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    for folder in (root / name for name in CODE_FOLDERS):
        if directory.resolve().is_relative_to(folder):
            raise ValueError(f"{directory} lies in {folder}, which holds code. Choose a folder outside it")


def _require_same(directory: Path, found: dict[str, Any], request: dict[str, Any]) -> None:
    if found == request:
        return
    keys = [key for key in {**found, **request} if found.get(key) != request.get(key)]
    differences = "; ".join(f"{key} {found.get(key)!r}, now {request.get(key)!r}" for key in keys)
    raise ValueError(
        f"{directory} holds another dataset ({differences}). It is never overwritten: "
        "choose another folder, or delete that one yourself"
    )


def _require_present(directory: Path, index: ShardIndex) -> None:
    for shard in index.shards:
        path = tar_path(directory, shard.name)
        if not path.is_file() or path.stat().st_size != shard.bytes or not member_index_path(path).is_file():
            raise ValueError(
                f"{path}, or its member index, is missing or cut short though {INDEX_FILE} lists it. "
                f"Delete {directory / INDEX_FILE} and the folder's other files, then run this again"
            )


# ---- shards ----


@dataclasses.dataclass
class _Member:
    suffix: str
    offset: int
    size: int
    crc32: int


class _OpenShard:
    """A tar growing in memory, with the index of its members."""

    def __init__(self, split: str, number: int) -> None:
        self.split = split
        self.name = f"{split}-{number:06d}"
        self.samples: list[tuple[str, list[_Member]]] = []
        self._tar = io.BytesIO()

    def add(self, key: str, members: dict[str, bytes]) -> None:
        self.samples.append((key, [self._append(key, suffix, data) for suffix, data in members.items()]))

    def _append(self, key: str, suffix: str, data: bytes) -> _Member:
        header = tarfile.TarInfo(f"{key}.{suffix}")  # mode 0644, uid and gid 0, mtime 0: nothing of this machine
        header.size = len(data)
        self._tar.write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._tar.tell()
        self._tar.write(data)
        self._tar.write(b"\0" * (-len(data) % TAR_BLOCK))
        return _Member(suffix, offset, len(data), zlib.crc32(data))

    def write(self, directory: Path) -> tuple[ShardInfo, bool]:
        """The shard on disk, and whether it already was (a run before this one was interrupted)."""
        self._tar.write(b"\0" * (2 * TAR_BLOCK))
        path = tar_path(directory, self.name)
        with self._tar.getbuffer() as tar:
            info = ShardInfo(self.name, self.split, len(self.samples), len(tar), hashlib.sha256(tar).hexdigest())
            kept = _write_unless_there(path, tar)
        kept = _write_unless_there(member_index_path(path), self._member_index(info.bytes).to_bytes()) and kept
        return info, kept

    def _member_index(self, tar_bytes: int) -> MemberIndex:
        suffixes = sorted({member.suffix for _, members in self.samples for member in members})
        shape = (len(self.samples), len(suffixes))
        offset, size = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        crc32 = np.zeros(shape, np.uint32)
        for row, (_, members) in enumerate(self.samples):
            for member in members:
                at = row, suffixes.index(member.suffix)
                offset[at], size[at], crc32[at] = member.offset, member.size, member.crc32
        keys = np.array([key for key, _ in self.samples])
        return MemberIndex(keys, np.array(suffixes), offset, size, crc32, np.array(tar_bytes, np.int64))


def _write_unless_there(path: Path, data: bytes | memoryview) -> bool:
    same_size = path.is_file() and path.stat().st_size == len(data)
    if same_size and file_sha256(path) == hashlib.sha256(data).hexdigest():
        return True
    atomic_write(path, data)
    return False


def _write_shards(
    samples: Iterable[RawSample], directory: Path, samples_per_shard: int, rejected: list[Rejected]
) -> tuple[list[ShardInfo], int, int]:
    """(shards, how many of them were already there, captions written). One shard is open for each split."""
    open_shards: dict[str, _OpenShard] = {}
    written: list[tuple[ShardInfo, bool]] = []
    numbers: Counter[str] = Counter()
    seen: set[str] = set()
    captions = 0
    for sample in samples:
        _check(sample, seen)
        try:
            members = sample_members(sample)
        except UnreadableImage as error:
            rejected.append(Rejected(sample.photo_id, UNREADABLE, 1, len(sample.captions), str(error)))
            continue
        captions += len(sample.captions)
        if sample.split not in open_shards:
            open_shards[sample.split] = _OpenShard(sample.split, numbers[sample.split])
            numbers[sample.split] += 1
        open_shards[sample.split].add(safe_key(sample.photo_id), members)
        if len(open_shards[sample.split].samples) == samples_per_shard:
            written.append(open_shards.pop(sample.split).write(directory))
    written += [shard.write(directory) for shard in open_shards.values()]
    infos = sorted((info for info, _ in written), key=lambda info: info.name)
    return infos, sum(kept for _, kept in written), captions


def _check(sample: RawSample, seen: set[str]) -> None:
    if sample.photo_id in seen:
        raise ValueError(f"{sample.source}: photo {sample.photo_id!r} comes twice. Make the photo ids unique")
    seen.add(sample.photo_id)
    if not re.fullmatch(r"[A-Za-z0-9_]+", sample.split):
        raise ValueError(f"photo {sample.photo_id!r}: split {sample.split!r} must be of letters, digits and _")
    if not sample.captions:
        raise ValueError(f"{sample.source}: photo {sample.photo_id!r} has no caption")


def sample_members(sample: RawSample) -> dict[str, bytes]:
    """The tar members by suffix: the photo untouched (if any) and the JSON record."""
    members = {}
    width = height = sha256 = None
    if sample.image is not None:
        suffix, width, height = inspect_image(sample.image)
        sha256 = hashlib.sha256(sample.image).hexdigest()
        members[suffix] = sample.image
    record: dict[str, Any] = {
        "photo_id": sample.photo_id,
        "captions": sample.captions,
        "split": sample.split,
        "source": sample.source,
        "width": width,
        "height": height,
        "sha256": sha256,
    }
    if sample.scene is not None:
        record["scene"] = sample.scene
    members["json"] = json.dumps(record, ensure_ascii=False).encode()
    return members


def inspect_image(data: bytes) -> tuple[str, int, int]:
    """(suffix, width, height) by the content, not the file's name. Decodes to the end: truncation shows."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            found, (width, height) = image.format, image.size
    except UnidentifiedImageError as error:  # its own message names a memory address
        raise UnreadableImage(f"no image format known to PIL, starts with {data[:8]!r}") from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise UnreadableImage(str(error)) from error
    if found not in IMAGE_SUFFIX_OF_FORMAT:
        raise UnreadableImage(f"format {found} is not one of {', '.join(IMAGE_SUFFIX_OF_FORMAT)}")
    return IMAGE_SUFFIX_OF_FORMAT[found], width, height


# ---- what index.json says about the making ----


def count_by_reason(rejected: list[Rejected]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for one in rejected:
        count = counts.setdefault(one.reason, {"photos": 0, "captions": 0})
        count["photos"] += one.photos
        count["captions"] += one.captions
    return counts


def _counts(shards: list[ShardInfo], captions: int, rejected: list[Rejected]) -> dict[str, Any]:
    return {
        "photos": sum(shard.samples for shard in shards),
        "captions": captions,
        "rejected_photos": sum(one.photos for one in rejected),
        "rejected_captions": sum(one.captions for one in rejected),
        "rejected": count_by_reason(rejected),
    }


def _versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("diffcap-dist")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"  # run from a source tree
    return {"diffcap-dist": own, "pillow": importlib.metadata.version("pillow"), "numpy": np.__version__}
