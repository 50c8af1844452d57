"""Shards from wherever they are: a local folder, or a URL through a cache that all processes of a node share.

In: the place of a dataset. Out: its index, and open shards. It does not choose which shards are needed, and writes
nothing where the dataset is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from diffcap_dist.data.fetching import Deadline, ShardUnavailable, body, only_bytes, retried
from diffcap_dist.data.shard_cache import Cache, File, Terms
from diffcap_dist.data.shard_format import (
    INDEX_FILE,
    FeatureInfo,
    Shard,
    ShardDamage,
    ShardIndex,
    ShardInfo,
    open_shard,
    tar_path,
)

PREFETCH_THREADS = 4


class ShardStore:
    """The shards of one dataset. It pickles and may be used on both sides of a fork: threads, locks and connections
    belong to the process that made them."""

    def __init__(
        self,
        where: str | Path,
        cache: Path | None = None,
        cache_bytes: int | None = None,
        deadline_seconds: float = 300.0,
    ) -> None:
        self.where = str(where).rstrip("/") if "://" in str(where) else str(where)
        self.deadline_seconds = deadline_seconds
        self._remote = "://" in self.where
        self.index = self._load_index()
        self._cache: Cache | None = None
        if self._remote or any(info.url for info in self.index.shards):
            _require_hashes(self.index, self.where)
            self._cache = Cache(cache, cache_bytes)
        self._opened: dict[str, int] = {}  # name in the cache -> inode that was read last
        self._forgotten: set[str] = set()
        self._prefetcher: _Prefetcher | None = None

    @property
    def is_remote(self) -> bool:
        """Its shards come through the cache."""
        return self._cache is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefetcher": None, "_opened": {}, "_forgotten": set()}

    def open(self, info: ShardInfo, feature: FeatureInfo | None = None) -> Shard:
        """The shard, its features too if they are named (its patch tokens only where `feature.patches` is set).
        Waits until its files are here. Raises ShardUnavailable."""
        files = self._files(info, feature)
        if not files:
            return open_shard(Path(self.where), info)
        assert self._cache is not None
        deadline = Deadline(self.deadline_seconds)
        terms = Terms(deadline, frozenset(file.key for file in files), patient=True)
        self._cache.require_room(files)
        damaged = False
        while True:
            for file in files:
                self._cache.fetch(file, terms)
            try:
                with self._cache.kept(files, deadline) as complete:
                    if complete:
                        self._note_opened(files)
                        return _CachedShard(self._cache.folder, files, info, feature)
            except ShardDamage:
                if damaged:
                    raise
                damaged = True
                self._delete(files)
            if deadline.left() <= 0:
                raise ShardUnavailable(
                    f"{files[0].place}: other processes drive it out of the cache {self._cache.folder} faster than it "
                    "can be opened. Give the cache more bytes"
                )

    def prefetch(self, infos: Sequence[ShardInfo], feature: FeatureInfo | None = None) -> None:
        """Fetch these in the background, in this order. Replaces what an earlier call asked for and was not begun.
        A shard that can't be had is passed over: opening it says why."""
        jobs = [files for info in infos if (files := self._files(info, feature))]
        if self._cache is None or not (jobs or self._prefetcher):
            return
        if self._prefetcher is None or self._prefetcher.pid != os.getpid():
            self._prefetcher = _Prefetcher(self._cache, self.deadline_seconds)
        self._prefetcher.replace(jobs)

    def forget(self, info: ShardInfo, feature: FeatureInfo | None = None) -> bool:
        """Delete a damaged shard from the cache. True: open it again, and it is fetched again. False: it is not from
        the cache, or this process did so once already, so what is at the source is damaged."""
        files = self._files(info, feature)
        if not files or info.sha256 in self._forgotten:
            return False
        self._forgotten.add(info.sha256)
        self._delete(files)
        return True

    def close(self) -> None:
        """Stop fetching in the background. Shards that are open stay so."""
        if self._prefetcher is not None and self._prefetcher.pid == os.getpid():
            self._prefetcher.stop()
        self._prefetcher = None

    def _load_index(self) -> ShardIndex:
        if not self._remote:
            return ShardIndex.load(Path(self.where))
        place, deadline = f"{self.where}/{INDEX_FILE}", Deadline(self.deadline_seconds)
        data = retried(place, deadline, lambda: b"".join(only_bytes(body(place, 0, deadline))))
        return ShardIndex.from_bytes(data, place)

    def _files(self, info: ShardInfo, feature: FeatureInfo | None) -> list[File]:
        """What of this shard comes through the cache: nothing where it lies in a local folder."""
        if not (self._remote or info.url):
            return []
        tar = info.url or self._place(f"{info.name}.tar")
        index = self._place(f"{info.name}.idx.npz")
        files = [
            File(tar, f"{info.sha256}.tar", info, info.sha256, info.bytes, info.bytes),
            File(index, f"{info.sha256}.idx.npz", info, None, None, 0),
        ]
        if feature is not None:
            listed = feature.files.get(info.name, {})
            for kind, shape in _feature_shapes(info, feature).items():
                if kind not in listed:
                    raise ValueError(f"{tar}: features {feature.name!r} have no {kind} file for it. Write them again")
                name, sha256 = listed[kind]["file"], listed[kind]["sha256"]
                room = 2 * int(np.prod(shape)) + 128  # float16, and numpy's header
                files.append(File(self._place(name), f"{sha256}.npy", info, sha256, None, room))
        return files

    def _place(self, name: str) -> str:
        if self.where.startswith(("http://", "https://")):
            name = quote(name)
        return f"{self.where}/{name}"

    def _note_opened(self, files: list[File]) -> None:
        assert self._cache is not None
        self._opened.update({file.key: (self._cache.folder / file.key).stat().st_ino for file in files})

    def _delete(self, files: list[File]) -> None:
        """Those that this process read: another one may have fetched them again already."""
        assert self._cache is not None
        for file in files:
            self._cache.delete(file, self._opened.pop(file.key, None), Deadline(self.deadline_seconds))


def _feature_shapes(info: ShardInfo, feature: FeatureInfo) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"pooled": (info.samples, feature.pooled_dim)}
    if feature.patches is not None:
        shapes["patches"] = (info.samples, *feature.patches)
    return shapes


def _require_hashes(index: ShardIndex, where: str) -> None:
    """They become file names, and an index may come from elsewhere."""
    files = [file for info in index.features.values() for kinds in info.files.values() for file in kinds.values()]
    for sha256 in itertools.chain((shard.sha256 for shard in index.shards), (file["sha256"] for file in files)):
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError(f"{where}/{INDEX_FILE} has the sha256 {sha256!r}, which is none. Do not use it")


class _CachedShard(Shard):
    """A shard whose files have the names of the cache. All are open when it is made: that they are evicted then does
    not harm its reader."""

    def __init__(self, folder: Path, files: list[File], info: ShardInfo, feature: FeatureInfo | None) -> None:
        super().__init__(tar_path(folder, info.sha256), info.split)
        self._arrays: tuple[np.ndarray, np.ndarray | None] | None = None
        try:
            if len(self) != info.samples:
                found = f"it has {len(self)} samples, {INDEX_FILE} says {info.samples}"
                raise ShardDamage(self.path, None, found)
            if feature is not None:
                named = {kind: {"file": f"{file['sha256']}.npy"} for kind, file in feature.files[info.name].items()}
                self._arrays = super().features(dataclasses.replace(feature, files={info.sha256: named}))
        except BaseException:
            self.close()
            raise
        self.path = Path(files[0].place)  # from here on it is for messages: a hash says nothing to their reader

    def features(self, info: FeatureInfo) -> tuple[np.ndarray, np.ndarray | None]:
        if self._arrays is None:
            raise ValueError(f"{self.path} was opened without features. Open it with {info.name!r}")
        return self._arrays


class _Prefetcher:
    """Threads of one process that fetch what is pending, and end when nothing is."""

    def __init__(self, cache: Cache, seconds: float) -> None:
        self.pid = os.getpid()
        self._cache, self._seconds = cache, seconds
        self._lock = threading.Lock()
        self._pending: deque[list[File]] = deque()
        self._wanted: frozenset[str] = frozenset()
        self._running: set[Deadline] = set()

    def replace(self, jobs: list[list[File]]) -> None:
        with self._lock:
            self._pending = deque(jobs)
            self._wanted = frozenset(file.key for files in jobs for file in files)
            for _ in range(min(PREFETCH_THREADS - len(self._running), len(jobs))):
                deadline = Deadline(self._seconds)
                self._running.add(deadline)
                threading.Thread(target=self._work, args=(deadline,), name="prefetch", daemon=True).start()

    def stop(self) -> None:
        with self._lock:
            self._pending.clear()
            for deadline in self._running:
                deadline.ended.set()

    def _work(self, deadline: Deadline) -> None:
        while True:
            with self._lock:
                self._running.discard(deadline)
                if not self._pending:
                    return
                files = self._pending.popleft()
                # What is wanted soon must not be driven out by what is wanted later.
                terms = Terms(Deadline(self._seconds), self._wanted, patient=False)
                deadline = terms.deadline
                self._running.add(deadline)
            for file in files:
                with contextlib.suppress(ValueError):  # whoever opens it meets the same error
                    self._cache.fetch(file, terms)
