"""Is a dataset still what was written? Every byte of it is read.

In: a finished dataset folder. Out: every damage, with shard, byte and key, in the order of the index; and the names of
files that the index doesn't know. It mends nothing and deletes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from diffcap_dist.data.shard_format import (
    INDEX_FILE,
    FeatureInfo,
    Shard,
    ShardDamage,
    ShardIndex,
    ShardInfo,
    file_sha256,
    member_index_path,
    open_shard,
    tar_path,
)
from shards.workers import in_processes


def verify(directory: Path, workers: int = 1, progress: Callable[[int], object] | None = None) -> list[str]:
    """Every damage that can be found by reading all bytes once or twice, in the order of the index; empty: the
    dataset is as written. `progress` is told the bytes of each tar that is done."""
    index = ShardIndex.load(directory)
    check = partial(_shard_damages, directory)
    jobs = [(info, _features_of(index, info.name)) for info in index.shards]
    damages = []
    for info, found in zip(index.shards, in_processes(check, jobs, workers)):
        damages += found
        if progress is not None:
            progress(info.bytes)
    known = {info.name for info in index.shards}
    for feature in index.features.values():
        unknown = sorted(feature.files.keys() - known)
        damages += [f"features {feature.name!r} list the unknown shard {name}" for name in unknown]
    return damages


def unknown_files(directory: Path) -> list[str]:
    """Names of files that look like parts of a dataset (tars, member indexes, .npy, half-written *.tmp) of which
    index.json doesn't know. They do no harm, and nothing reads them."""
    index = ShardIndex.load(directory)
    known = {path.name for info in index.shards for path in _files_of(directory, info)}
    for feature in index.features.values():
        known |= {file["file"] for kinds in feature.files.values() for file in kinds.values()}
    endings = (".tar", ".idx.npz", ".npy", ".tmp")
    return sorted(path.name for path in directory.iterdir() if path.name.endswith(endings) and path.name not in known)


def _files_of(directory: Path, info: ShardInfo) -> list[Path]:
    tar = tar_path(directory, info.name)
    return [member_index_path(tar)] if info.url else [tar, member_index_path(tar)]


def _features_of(index: ShardIndex, shard_name: str) -> list[FeatureInfo]:
    """The features with this shard's files only: all files of all shards are too much for each job."""
    return [
        dataclasses.replace(
            feature, files={name: feature.files[name] for name in [shard_name] if name in feature.files}
        )
        for feature in index.features.values()
    ]


def _shard_damages(directory: Path, job: tuple[ShardInfo, list[FeatureInfo]]) -> list[str]:
    info, features = job
    try:
        shard = open_shard(directory, info)
    except ShardDamage as damage:
        return [str(damage)]
    damages = [damage for sample in range(len(shard)) for damage in shard.damages(sample)]
    if file_sha256(shard.path) != info.sha256:
        damages += [damage for sample in range(len(shard)) for damage in shard.frame_damages(sample)]
        if not damages:
            found = f"its sha256 differs from that in {INDEX_FILE}, though all samples agree with its member index"
            damages.append(ShardDamage(shard.path, None, found))
    found_in_features = [damage for feature in features for damage in _feature_damages(shard, feature)]
    shard.close()
    return [str(damage) for damage in damages] + found_in_features


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
