"""What a dataset of shards is on disk: tars, their member indexes, feature files, and index.json.

In: a directory. Out: `ShardIndex` (what the dataset holds), `Shard` (one tar, any sample by number, every
read checked against its crc32). `atomic_write` is the one way files come to be.
A tar of another tool is read as ours is once it has a member index (`foreign_record`).
It does not make shards, choose an order, decode images or fetch anything.
S, N samples, K member suffixes, F feature width, P patches.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import orjson
from isal.isal_zlib import crc32  # zlib's, at 20 times its speed: that takes longer than reading a photo from memory

INDEX_FILE = "index.json"
INDEX_VERSION = 1
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
RECORD_SUFFIXES = ("json", "txt")  # where a sample's captions are: at least one of them
TAR_BLOCK = 512
MAX_KEY_LENGTH = 80  # a USTAR name holds 100 bytes, the suffix included


class ShardDamage(ValueError):
    """Bytes on disk are not those that were written; `key` is None when no one sample is to blame."""

    def __init__(self, shard: Path, key: str | None, found: str) -> None:
        where = f"{shard}: sample {key}" if key is not None else str(shard)
        super().__init__(f"{where}: {found}. Fetch or make this shard again")
        self.shard = shard
        self.key = key
        self.found = found

    def __reduce__(self) -> tuple[type, tuple[Path, str | None, str]]:
        return type(self), (self.shard, self.key, self.found)  # crosses process borders whole


class NewFile:
    """A file that appears with `finish`: written aside, synced, renamed, so that `path` holds all of the old or all
    of the new, also after a power cut. `discard` leaves no trace."""

    def __init__(self, path: Path) -> None:
        self._path, self._aside = path, path.with_name(path.name + ".tmp")
        self._file = self._aside.open("wb", buffering=1 << 20)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._file.write(data)

    def finish(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._aside.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself is only durable once the folder is
        finally:
            os.close(folder)

    def discard(self) -> None:
        """After an error, a full disk for one: the half file would keep it full."""
        self._aside.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # its buffer can't be written any more
            self._file.close()


def atomic_write(path: Path, data: bytes | bytearray | memoryview) -> None:
    """`path` holds all of the old or all of the new, also after a power cut."""
    file = NewFile(path)
    try:
        file.write(data)
        file.finish()
    except BaseException:
        file.discard()
        raise


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_key(photo_id: str) -> str:
    """The photo id as a tar name without dots; a changed id gets a hash, so that no two collide."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", photo_id)
    if safe == photo_id and 0 < len(safe) <= MAX_KEY_LENGTH:
        return safe
    digest = hashlib.sha256(photo_id.encode()).hexdigest()[:12]
    return f"{safe[: MAX_KEY_LENGTH - 13]}-{digest}"


# ---- index.json: what the dataset holds ----


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    name: str  # file name without .tar
    split: str
    samples: int
    bytes: int
    sha256: str  # of the tar
    url: str = ""  # where the tar is when it isn't beside its member index


@dataclasses.dataclass(frozen=True)
class FeatureInfo:
    name: str
    source: str  # the encoder, or the file that the features were imported from
    weights_sha256: str | None  # None: imported
    pooled_dim: int  # F
    patches: tuple[int, int] | None  # (P, F) of one sample
    preprocessing: str
    files: dict[str, dict[str, dict[str, str]]]  # shard name -> "pooled" | "patches" -> {"file", "sha256"}


@dataclasses.dataclass
class ShardIndex:
    shards: list[ShardInfo]
    features: dict[str, FeatureInfo]
    provenance: dict[str, Any]

    @classmethod
    def load(cls, directory: Path) -> "ShardIndex":
        path = directory / INDEX_FILE
        if not path.is_file():
            what = "has no index.json, so it is no finished dataset" if directory.is_dir() else "does not exist"
            raise ValueError(f"{directory} {what}. Make it, or finish it, by running its `make-shards` command")
        return cls.from_bytes(path.read_bytes(), str(path))

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> "ShardIndex":
        """The index in the bytes of a file; `path` is for messages."""
        try:
            content = json.loads(data)
            version = content["version"]
            if version == INDEX_VERSION:
                return cls(
                    shards=[ShardInfo(**shard) for shard in content["shards"]],
                    features={name: _feature_info(info) for name, info in content["features"].items()},
                    provenance=content["provenance"],
                )._checked(path)
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no index of shards ({error!r}). Make the dataset again") from error
        raise ValueError(
            f"{path} has format version {version!r}, this program reads version {INDEX_VERSION}. "
            "Make the dataset again with this version, or read it with the one that wrote it"
        )

    def save(self, directory: Path) -> None:
        atomic_write(directory / INDEX_FILE, self.to_bytes())

    def to_bytes(self) -> bytes:
        content = {"version": INDEX_VERSION, **dataclasses.asdict(self)}
        for shard in content["shards"]:
            if not shard["url"]:
                del shard["url"]  # so that programs that don't know the field read what they can read
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()

    def splits(self) -> list[str]:
        return list(dict.fromkeys(shard.split for shard in self.shards))

    def split(self, name: str) -> list[ShardInfo]:
        found = [shard for shard in self.shards if shard.split == name and shard.samples > 0]
        if not found:
            existing = ", ".join(f"{split} ({self.num_samples(split)} samples)" for split in self.splits())
            raise ValueError(f"split {name!r} has no samples; the dataset has: {existing or 'no split at all'}")
        return found

    def num_samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.shards if shard.split == split)

    def feature(self, name: str) -> FeatureInfo:
        if name not in self.features:
            existing = ", ".join(self.features) or "none"
            raise ValueError(
                f"features {name!r} are not in the dataset; it has: {existing}. "
                "Write them with `make-shards features DIR --encoder NAME` or `--npz FILE --name NAME`"
            )
        return self.features[name]

    def _checked(self, path: str) -> "ShardIndex":
        """An index may come from elsewhere: no name in it may lead out of the dataset's folder."""
        files = [
            file["file"] for info in self.features.values() for kinds in info.files.values() for file in kinds.values()
        ]
        for name in [shard.name for shard in self.shards] + files:
            if Path(name).name != name:
                raise ValueError(f"{path} names the file {name!r}, which is not a plain file name. Do not use it")
        return self


def _feature_info(content: dict[str, Any]) -> FeatureInfo:
    patches = content["patches"]
    return FeatureInfo(**{**content, "patches": None if patches is None else (patches[0], patches[1])})


# ---- one shard ----


class Member(NamedTuple):
    suffix: str
    offset: int
    size: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class MemberIndex:
    """Where each member's bytes lie in a tar, samples in tar order; offset -1: no such member."""

    keys: np.ndarray  # (S,) unicode
    suffixes: np.ndarray  # (K,) unicode
    offset: np.ndarray  # (S, K) int64, of the data, behind its header
    size: np.ndarray  # (S, K) int64
    crc32: np.ndarray  # (S, K) uint32
    tar_bytes: np.ndarray  # () int64, of the whole tar

    @classmethod
    def load(cls, tar: Path) -> "MemberIndex":
        path = member_index_path(tar)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                index = cls(**{field.name: arrays[field.name] for field in dataclasses.fields(cls)})
        except FileNotFoundError as error:
            raise ShardDamage(tar, None, f"its member index {path.name} is missing") from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ShardDamage(tar, None, f"its member index {path.name} can't be read ({error})") from error
        shape = (len(index.keys), len(index.suffixes))
        fits = index.offset.shape == index.size.shape == index.crc32.shape == shape
        if not fits or not set(RECORD_SUFFIXES) & set(index.suffixes.tolist()):
            raise ShardDamage(tar, None, f"its member index {path.name} has arrays that don't fit together")
        return index

    @classmethod
    def from_members(cls, samples: Sequence[tuple[str, Sequence[Member]]], tar_bytes: int) -> "MemberIndex":
        """The index of (key, members) in the order of the samples."""
        suffixes = sorted({member.suffix for _, members in samples for member in members})
        shape = (len(samples), len(suffixes))
        offset, size = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        crc32 = np.zeros(shape, np.uint32)
        for row, (_, members) in enumerate(samples):
            for member in members:
                at = row, suffixes.index(member.suffix)
                offset[at], size[at], crc32[at] = member.offset, member.size, member.crc32
        keys = np.array([key for key, _ in samples])
        return cls(keys, np.array(suffixes), offset, size, crc32, np.array(tar_bytes, np.int64))

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        return buffer.getvalue()


def tar_path(directory: Path, shard_name: str) -> Path:
    return directory / f"{shard_name}.tar"


def member_index_path(tar: Path) -> Path:
    return tar.with_suffix(".idx.npz")


def foreign_record(content: Any, text: bytes | None, key: str, split: str) -> dict[str, Any]:
    """The record of a sample that another tool wrote, from its JSON and its txt member (None: it has none).
    `captions` is empty when neither holds one. Its sha256 is left out: tools mean that of the original file."""
    content = content if isinstance(content, dict) else {}
    found = next((content[name] for name in ("captions", "caption", "text") if content.get(name)), None)
    if found is None and text is not None:
        found = text.decode()
    captions = found if isinstance(found, list) else [found]
    width, height = (content.get(name) if isinstance(content.get(name), int) else None for name in ("width", "height"))
    record = {
        "photo_id": str(content.get("photo_id") or key),
        "captions": [one.strip() for one in captions if isinstance(one, str) and one.strip()],
        "split": split,
        "source": str(content.get("source") or ""),
        "width": width,
        "height": height,
        "sha256": None,
    }
    return {**record, "url": content["url"]} if isinstance(content.get("url"), str) else record


def references_of(record: dict[str, Any]) -> list[str]:
    """What a caption of the photo is scored against: all its captions, also where a split holds only some of them."""
    return record.get("references", record["captions"])


def is_our_record(content: Any) -> TypeGuard[dict[str, Any]]:
    return (
        isinstance(content, dict)
        and isinstance(content.get("captions"), list)
        and "photo_id" in content
        and "split" in content
    )


def _parsed(data: bytes) -> Any:
    """JSON, a quarter of the time that json takes; which reads what orjson doesn't (NaN), or says what is wrong."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data)


class Shard:
    """One tar on local disk. Reads are `pread`s, not a memory map: under a map, a file cut short while it is
    read kills the process (SIGBUS) where this raises `ShardDamage`. Holds one open file; safe across fork."""

    def __init__(self, path: Path, split: str = "") -> None:
        self.path = path
        self.split = split  # of samples that don't say it themselves
        self._members = MemberIndex.load(path)
        suffixes = self._members.suffixes.tolist()
        self._json_column, self._text_column = (
            suffixes.index(suffix) if suffix in suffixes else None for suffix in RECORD_SUFFIXES
        )
        self._image_columns = [column for column, suffix in enumerate(suffixes) if suffix in IMAGE_SUFFIXES]
        expected = int(self._members.tar_bytes)
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            what = "the tar is missing" if found is None else f"the tar has {found} bytes"
            raise ShardDamage(path, None, f"{what}, its member index says {expected} bytes")
        self._file = path.open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self._members.keys)

    def close(self) -> None:
        self._file.close()

    def key(self, sample: int) -> str:
        return str(self._members.keys[sample])

    def record(self, sample: int) -> dict[str, Any]:
        """photo_id, captions, split, source, width, height, sha256, perhaps scene, url, references: the JSON member of
        our shards as it is, those of other tools brought into this form."""
        content: Any = None
        data = self._read(sample, self._json_column)
        try:
            if data is not None and is_our_record(content := _parsed(data)):
                return content
            record = foreign_record(content, self._read(sample, self._text_column), self.key(sample), self.split)
        except UnicodeDecodeError as error:
            raise ShardDamage(self.path, self.key(sample), f"its captions are not UTF-8 ({error})") from error
        except json.JSONDecodeError as error:
            raise ShardDamage(self.path, self.key(sample), f"its json member is no JSON ({error})") from error
        if not record["captions"]:
            raise ShardDamage(self.path, self.key(sample), "it has no caption in a json or txt member")
        return record

    def image_bytes(self, sample: int) -> bytes | None:
        """The photo as its source gave it; None when the sample has captions only."""
        for column in self._image_columns:
            data = self._read(sample, column)
            if data is not None:
                return data
        return None

    def image_size(self, sample: int) -> int | None:
        """How many bytes the photo has, without reading it; None: captions only."""
        sizes = [
            int(self._members.size[sample, c]) for c in self._image_columns if self._members.offset[sample, c] >= 0
        ]
        return sizes[0] if sizes else None

    def features(self, info: FeatureInfo) -> tuple[np.ndarray, np.ndarray | None]:
        """Memory maps pooled_NF and patches_NPF (None: the features have no patches), row i = sample i."""
        files = info.files.get(self.path.stem, {})
        pooled_NF = self._feature_array(info, files, "pooled", (len(self), info.pooled_dim))
        if info.patches is None:
            return pooled_NF, None
        return pooled_NF, self._feature_array(info, files, "patches", (len(self), *info.patches))

    def damages(self, sample: int) -> list[ShardDamage]:
        """What is wrong with the contents of each of its members."""
        found = []
        for column in range(len(self._members.suffixes)):
            try:
                self._read(sample, column)
            except ShardDamage as damage:
                found.append(damage)
        if not found:
            try:
                self.record(sample)
            except ShardDamage as damage:
                found.append(damage)
        return found

    def frame_damages(self, sample: int) -> list[ShardDamage]:
        """What is wrong around its members: in the tar header before each one and the padding behind it."""
        members, found = self._members, []
        for column in np.flatnonzero(members.offset[sample] >= 0):
            offset, size = int(members.offset[sample, column]), int(members.size[sample, column])
            what = f"of its {members.suffixes[column]} member"
            header = os.pread(self._file.fileno(), TAR_BLOCK, offset - TAR_BLOCK)
            if not _header_checksum_fits(header):
                where = f"the tar header {what} at byte {offset - TAR_BLOCK}"
                found.append(ShardDamage(self.path, self.key(sample), f"{where} has a wrong checksum"))
            if any(os.pread(self._file.fileno(), -size % TAR_BLOCK, offset + size)):
                where = f"the padding {what} at byte {offset + size}"
                found.append(ShardDamage(self.path, self.key(sample), f"{where} is not zero"))
        return found

    def _read(self, sample: int, column: int | None) -> bytes | None:
        if column is None:
            return None
        members = self._members
        offset, size = members.offset.item(sample, column), members.size.item(sample, column)
        if offset < 0:
            return None
        try:
            data = os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise self._damaged(sample, column, f"can't be read ({error})") from error
        if len(data) != size:
            raise self._damaged(sample, column, f"has {len(data)} bytes, expected {size}")
        found, expected = crc32(data), members.crc32.item(sample, column)
        if found != expected:
            raise self._damaged(sample, column, f"has crc32 {found:08x}, expected {expected:08x}")
        return data

    def _damaged(self, sample: int, column: int, found: str) -> ShardDamage:
        where = f"its {self._members.suffixes[column]} member at byte {self._members.offset[sample, column]}"
        return ShardDamage(self.path, self.key(sample), f"{where} {found}")

    def _feature_array(
        self, info: FeatureInfo, files: dict[str, dict[str, str]], kind: str, shape: tuple[int, ...]
    ) -> np.ndarray:
        if kind not in files:
            raise ValueError(f"{self.path}: features {info.name!r} have no {kind} file for it. Write them again")
        path = self.path.with_name(files[kind]["file"])
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ShardDamage(path, None, f"the {kind} features can't be read ({error})") from error
        if array.shape != shape or array.dtype != np.float16:
            found = f"{array.dtype} of shape {array.shape}"
            raise ShardDamage(path, None, f"the {kind} features are {found}, expected float16 of shape {shape}")
        return array


def _header_checksum_fits(header: bytes) -> bool:
    """Bytes 148 to 155 hold, in octal, the sum of all 512 with these eight counted as spaces (POSIX ustar)."""
    try:
        return int(header[148:156].strip(b" \0"), 8) == sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    except ValueError:
        return False


def open_shard(directory: Path, info: ShardInfo) -> Shard:
    """A shard, and the one that the index lists: one left by another run mostly has another count."""
    if info.url:
        raise ValueError(
            f"{directory}: shard {info.name} is at {info.url}, which only training and evaluation fetch. Copy the tars "
            "to a local folder and run `make-shards index` on it"
        )
    shard = Shard(tar_path(directory, info.name), info.split)
    if len(shard) != info.samples:
        shard.close()
        raise ShardDamage(shard.path, None, f"it has {len(shard)} samples, {INDEX_FILE} says {info.samples}")
    return shard
