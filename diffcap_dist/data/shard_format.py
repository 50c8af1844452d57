"""What a dataset of shards is on disk: tars, their member indexes, feature files, and index.json.

In: a directory. Out: `ShardIndex` (what the dataset holds), `Shard` (one tar, any sample by number, every
read checked against its crc32), `verify` (all damages found). `atomic_write` is the one way files come to be.
It does not make shards, choose an order, decode images or fetch anything.
S, N samples, K member suffixes, F feature width, P patches.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

INDEX_FILE = "index.json"
INDEX_VERSION = 1
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
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


def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Write aside, fsync, rename: `path` holds all of the old or all of the new, also after a power cut."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself is only durable once the folder is
    finally:
        os.close(folder)


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
        try:
            content = json.loads(path.read_bytes())
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
        content = {"version": INDEX_VERSION, **dataclasses.asdict(self)}
        atomic_write(directory / INDEX_FILE, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

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

    def _checked(self, path: Path) -> "ShardIndex":
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
        if not index.offset.shape == index.size.shape == index.crc32.shape == shape or "json" not in index.suffixes:
            raise ShardDamage(tar, None, f"its member index {path.name} has arrays that don't fit together")
        return index

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        return buffer.getvalue()


def tar_path(directory: Path, shard_name: str) -> Path:
    return directory / f"{shard_name}.tar"


def member_index_path(tar: Path) -> Path:
    return tar.with_suffix(".idx.npz")


class Shard:
    """One tar on local disk. Reads are `pread`s, not a memory map: under a map, a file cut short while it is
    read kills the process (SIGBUS) where this raises `ShardDamage`. Holds one open file; safe across fork."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members = MemberIndex.load(path)
        suffixes = self._members.suffixes.tolist()
        self._json_column = suffixes.index("json")
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
        """The JSON member: photo_id, captions, split, source, width, height, sha256, perhaps scene."""
        data = self._read(sample, self._json_column)
        if data is None:
            raise ShardDamage(self.path, self.key(sample), "it has no json member")
        try:
            return json.loads(data)
        except ValueError as error:
            raise ShardDamage(self.path, self.key(sample), f"its json member is no JSON ({error})") from error

    def image_bytes(self, sample: int) -> bytes | None:
        """The photo as its source gave it; None when the sample has captions only."""
        for column in self._image_columns:
            data = self._read(sample, column)
            if data is not None:
                return data
        return None

    def features(self, info: FeatureInfo) -> tuple[np.ndarray, np.ndarray | None]:
        """Memory maps pooled_NF and patches_NPF (None: the features have no patches), row i = sample i."""
        files = info.files.get(self.path.stem, {})
        pooled_NF = self._feature_array(info, files, "pooled", (len(self), info.pooled_dim))
        if info.patches is None:
            return pooled_NF, None
        return pooled_NF, self._feature_array(info, files, "patches", (len(self), *info.patches))

    def _read(self, sample: int, column: int) -> bytes | None:
        members = self._members
        offset, size = int(members.offset[sample, column]), int(members.size[sample, column])
        if offset < 0:
            return None
        where = f"its {members.suffixes[column]} member at byte {offset}"
        try:
            data = os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise ShardDamage(self.path, self.key(sample), f"{where} can't be read ({error})") from error
        if len(data) != size:
            raise ShardDamage(self.path, self.key(sample), f"{where} has {len(data)} bytes, expected {size}")
        found, expected = zlib.crc32(data), int(members.crc32[sample, column])
        if found != expected:
            raise ShardDamage(self.path, self.key(sample), f"{where} has crc32 {found:08x}, expected {expected:08x}")
        return data

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


def open_shard(directory: Path, info: ShardInfo) -> Shard:
    """A shard, and the one that the index lists: one left by another run mostly has another count."""
    shard = Shard(tar_path(directory, info.name))
    if len(shard) != info.samples:
        shard.close()
        raise ShardDamage(shard.path, None, f"it has {len(shard)} samples, {INDEX_FILE} says {info.samples}")
    return shard


# ---- verify ----


def verify(directory: Path) -> list[str]:
    """Every damage that can be found by reading all bytes once or twice; empty: the dataset is as written."""
    index = ShardIndex.load(directory)
    damages = [damage for info in index.shards for damage in _shard_damages(directory, info, index)]
    known = {info.name for info in index.shards}
    for feature in index.features.values():
        damages += [f"features {feature.name!r} list the unknown shard {name}" for name in feature.files.keys() - known]
    return damages


def _shard_damages(directory: Path, info: ShardInfo, index: ShardIndex) -> list[str]:
    try:
        shard = open_shard(directory, info)
    except ShardDamage as damage:
        return [str(damage)]
    damages = []
    for sample in range(len(shard)):
        for read in (shard.record, shard.image_bytes):
            try:
                read(sample)
            except ShardDamage as damage:
                damages.append(str(damage))
    if not damages and file_sha256(shard.path) != info.sha256:
        damages.append(
            str(
                ShardDamage(
                    shard.path,
                    None,
                    "its sha256 differs, all samples' contents agree (tar headers or padding)",
                )
            )
        )
    for feature in index.features.values():
        damages += _feature_damages(shard, feature)
    shard.close()
    return damages


def _feature_damages(shard: Shard, info: FeatureInfo) -> list[str]:
    try:
        shard.features(info)
    except ValueError as damage:
        return [str(damage)]
    paths = [(shard.path.with_name(file["file"]), file["sha256"]) for file in info.files[shard.path.stem].values()]
    return [
        str(ShardDamage(path, None, f"its sha256 differs from that in {INDEX_FILE}"))
        for path, sha256 in paths
        if file_sha256(path) != sha256
    ]
