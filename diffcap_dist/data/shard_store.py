"""Shards from wherever they are: a local folder, or a URL through a cache that all processes of a node share.

In: the place of a dataset. Out: its index, and open shards. A remote file is fetched once per node, compared with the
sha256 in the index, and only then gets its name in the cache, which is that hash: datasets never mix there.
It does not choose which shards are needed, and writes nothing where the dataset is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import http.client
import itertools
import os
import queue
import re
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np

from diffcap_dist.data.shard_format import (
    INDEX_FILE,
    FeatureInfo,
    MemberIndex,
    Shard,
    ShardDamage,
    ShardIndex,
    ShardInfo,
    open_shard,
    tar_path,
)

PREFETCH_THREADS = 4
STALL_SECONDS = 30.0  # without a byte, then the attempt has failed
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 20.0
ROOM_SECONDS = 0.2  # until other processes may have let go of what takes the cache's room
CHUNK = 1 << 20
BLOCK = 8 << 20  # bytes of one request to an object store
STATUS_MAY_PASS = (408, 425, 429)
NEVER_PASS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    ValueError,  # an unknown protocol, a place that is no URL, a certificate that does not fit
    TypeError,
    http.client.InvalidURL,
)
CACHED = re.compile(r"(?:part-(\d+)-)?([0-9a-f]{64}\.(?:tar|idx\.npz|npy))")

T = TypeVar("T")


class ShardUnavailable(ValueError):
    """A file of the dataset is not to be had. One text is its only argument, so it crosses process borders whole."""


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
        self._cache: _Cache | None = None
        if self._remote or any(info.url for info in self.index.shards):
            _require_hashes(self.index, self.where)
            self._cache = _Cache(cache, cache_bytes)
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
        deadline = _Deadline(self.deadline_seconds)
        terms = _Terms(deadline, frozenset(file.key for file in files), patient=True)
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
        place, deadline = f"{self.where}/{INDEX_FILE}", _Deadline(self.deadline_seconds)
        data = _retried(place, deadline, lambda: b"".join(_only_bytes(_body(place, 0, deadline))))
        return ShardIndex.from_bytes(data, place)

    def _files(self, info: ShardInfo, feature: FeatureInfo | None) -> list[_File]:
        """What of this shard comes through the cache: nothing where it lies in a local folder."""
        if not (self._remote or info.url):
            return []
        tar = info.url or self._place(f"{info.name}.tar")
        index = self._place(f"{info.name}.idx.npz")
        files = [
            _File(tar, f"{info.sha256}.tar", info, info.sha256, info.bytes, info.bytes),
            _File(index, f"{info.sha256}.idx.npz", info, None, None, 0),
        ]
        if feature is not None:
            listed = feature.files.get(info.name, {})
            for kind, shape in _feature_shapes(info, feature).items():
                if kind not in listed:
                    raise ValueError(f"{tar}: features {feature.name!r} have no {kind} file for it. Write them again")
                name, sha256 = listed[kind]["file"], listed[kind]["sha256"]
                room = 2 * int(np.prod(shape)) + 128  # float16, and numpy's header
                files.append(_File(self._place(name), f"{sha256}.npy", info, sha256, None, room))
        return files

    def _place(self, name: str) -> str:
        if self.where.startswith(("http://", "https://")):
            name = quote(name)
        return f"{self.where}/{name}"

    def _note_opened(self, files: list[_File]) -> None:
        assert self._cache is not None
        self._opened.update({file.key: (self._cache.folder / file.key).stat().st_ino for file in files})

    def _delete(self, files: list[_File]) -> None:
        """Those that this process read: another one may have fetched them again already."""
        assert self._cache is not None
        for file in files:
            self._cache.delete(file, self._opened.pop(file.key, None), _Deadline(self.deadline_seconds))


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

    def __init__(self, folder: Path, files: list[_File], info: ShardInfo, feature: FeatureInfo | None) -> None:
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

    def __init__(self, cache: _Cache, seconds: float) -> None:
        self.pid = os.getpid()
        self._cache, self._seconds = cache, seconds
        self._lock = threading.Lock()
        self._pending: deque[list[_File]] = deque()
        self._wanted: frozenset[str] = frozenset()
        self._running: set[_Deadline] = set()

    def replace(self, jobs: list[list[_File]]) -> None:
        with self._lock:
            self._pending = deque(jobs)
            self._wanted = frozenset(file.key for files in jobs for file in files)
            for _ in range(min(PREFETCH_THREADS - len(self._running), len(jobs))):
                deadline = _Deadline(self._seconds)
                self._running.add(deadline)
                threading.Thread(target=self._work, args=(deadline,), name="prefetch", daemon=True).start()

    def stop(self) -> None:
        with self._lock:
            self._pending.clear()
            for deadline in self._running:
                deadline.ended.set()

    def _work(self, deadline: _Deadline) -> None:
        while True:
            with self._lock:
                self._running.discard(deadline)
                if not self._pending:
                    return
                files = self._pending.popleft()
                # What is wanted soon must not be driven out by what is wanted later.
                terms = _Terms(_Deadline(self._seconds), self._wanted, patient=False)
                deadline = terms.deadline
                self._running.add(deadline)
            for file in files:
                with contextlib.suppress(ValueError):  # whoever opens it meets the same error
                    self._cache.fetch(file, terms)


# ---- the cache ----


class _Deadline:
    """Seconds from now; `ended` ends them early."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._start, self.ended = seconds, time.monotonic(), threading.Event()

    def left(self) -> float:
        return 0.0 if self.ended.is_set() else max(0.0, self.seconds - self.used())

    def used(self) -> float:
        return time.monotonic() - self._start


@dataclasses.dataclass(frozen=True)
class _Terms:
    deadline: _Deadline
    keep: frozenset[str]  # names in the cache that must not make room for this
    patient: bool  # waits for other processes that fetch the file, or take the room


@dataclasses.dataclass(frozen=True)
class _File:
    place: str
    key: str  # its name in the cache
    info: ShardInfo
    sha256: str | None  # None: a member index, which must fit `info`
    bytes: int | None  # None: the index doesn't say
    room: int  # bytes set aside for it in the cache

    def is_at(self, path: Path) -> bool:
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return False
        return self.bytes is None or size == self.bytes

    def check(self, part: _Part) -> None:
        """Raises _Failure unless all of it, and nothing else, was fetched."""
        if self.bytes is not None and part.size < self.bytes:
            part.restart()
            raise _Failure(f"it has {part.size} bytes, {INDEX_FILE} says {self.bytes}")
        found = self._difference(part)
        if not found:
            return
        resumed = part.resumed
        part.restart()
        raise (_Failure if resumed else _Changed)(f"it is not what {INDEX_FILE} lists ({found})", CHANGED)

    def _difference(self, part: _Part) -> str:
        if self.bytes is not None and part.size > self.bytes:
            return f"more than {self.bytes} bytes"
        if self.sha256 is not None:
            found = part.sha256.hexdigest()
            return "" if found == self.sha256 else f"sha256 {found}, expected {self.sha256}"
        try:
            index = MemberIndex.load(part.path.with_name(part.path.name.removesuffix(".idx.npz") + ".tar"))
        except ShardDamage as damage:
            return damage.found
        found_numbers, expected = (int(index.tar_bytes), len(index.keys)), (self.info.bytes, self.info.samples)
        what = "of a tar of {} bytes with {} samples"
        return "" if found_numbers == expected else f"{what.format(*found_numbers)}, not {what.format(*expected)}"


CHANGED = "Copy the dataset there anew, its index.json last"


class _Cache:
    """A folder of files named by the sha256 of their content, for all processes of a node.

    `part-ROOM-KEY` is being fetched, and ROOM bytes are set aside for it. Whoever holds the flock of `lock-KEY` alone
    may write or delete KEY; who shares it may open KEY. The time of the last use is the modification time.
    """

    def __init__(self, folder: Path | None, limit: int | None) -> None:
        self.folder, self.limit = (folder or _default_folder()).absolute(), limit
        with self._usable():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # In a folder for all, somebody else may have made it first, and filled it.
            if self.folder.parent == Path(tempfile.gettempdir()) and self.folder.lstat().st_uid != os.getuid():
                raise ValueError(f"the cache {self.folder} is another user's. Set DIFFCAP_CACHE to a folder of yours")

    def require_room(self, files: Iterable[_File]) -> None:
        files = list(files)
        room = sum(file.room for file in files)
        if self.limit is not None and room > self.limit:
            raise ShardUnavailable(
                f"{files[0].place} and what belongs to it have {room} bytes, the cache {self.folder} may have "
                f"{self.limit}. Give it more bytes, or make smaller shards"
            )

    def fetch(self, file: _File, terms: _Terms) -> None:
        """See to it that the file is here. It may be gone again right after: `kept` tells."""
        path = self.folder / file.key
        with self._usable():
            if file.is_at(path):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
                return
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # on another node, or cleaned away
            with self._lock(file.key, fcntl.LOCK_EX, terms.deadline if terms.patient else _Deadline(0)) as locked:
                if not locked:
                    raise ShardUnavailable(
                        f"{file.place}: another process fetches it into {self.folder} and has not finished in "
                        f"{terms.deadline.seconds:g} s. Look at that process; if none is there, at the disk"
                    )
                if not file.is_at(path):  # else it came while this process waited
                    path.unlink(missing_ok=True)
                    _retried(file.place, terms.deadline, lambda: self._attempt(file, terms))
                    if self.limit is not None:
                        self._shrink(self.limit, terms.keep)

    @contextlib.contextmanager
    def kept(self, files: Sequence[_File], deadline: _Deadline) -> Iterator[bool]:
        """Whether all of them are here; nobody deletes them meanwhile."""
        with self._usable(), contextlib.ExitStack() as stack:
            locked = [stack.enter_context(self._lock(file.key, fcntl.LOCK_SH, deadline)) for file in files]
            yield all(locked) and all(file.is_at(self.folder / file.key) for file in files)

    def delete(self, file: _File, inode: int | None, deadline: _Deadline) -> None:
        """`inode` None: whatever is there."""
        with self._usable(), self._lock(file.key, fcntl.LOCK_EX, deadline) as locked:
            path = self.folder / file.key
            if locked and path.exists() and inode in (None, path.stat().st_ino):
                path.unlink()

    def _attempt(self, file: _File, terms: _Terms) -> None:
        try:
            self._download(file, terms)
        except _DiskFull as full:
            entries = self._entries()
            size = sum(entry.bytes for entry in entries)
            if self._shrink(size - max(full.missing, 1), terms.keep | {file.key}) == size:
                raise
            self._download(file, terms)

    def _download(self, file: _File, terms: _Terms) -> None:
        path = self._reserve(file, terms)
        with _Part(path, file) as part:
            if file.sha256 is None or part.sha256.hexdigest() != file.sha256:
                for item in _body(file.place, part.size, terms.deadline):
                    if isinstance(item, bytes):
                        part.write(item)
                    elif item != part.size:
                        part.restart()  # the server can't go on in the middle
                    if file.bytes is not None and part.size > file.bytes:
                        break
            file.check(part)
            part.finish(self.folder / file.key)

    def _reserve(self, file: _File, terms: _Terms) -> Path:
        """The file to write into, once there is room for it."""
        part = self.folder / f"part-{file.room}-{file.key}"
        if self.limit is None:
            part.touch(0o600)
            return part
        with self._lock("room", fcntl.LOCK_EX, terms.deadline) as locked:
            if not part.exists():
                size = self._shrink(self.limit - file.room, terms.keep) if locked else self.limit
                if size + file.room > self.limit:
                    found = f"of the {self.limit} bytes of the cache {self.folder}, {size} are taken by files in use"
                    raise _Failure(found, "Give the cache more bytes", may_pass=terms.patient, wait=ROOM_SECONDS)
                part.touch(0o600)
        return part

    def _shrink(self, target: int, keep: frozenset[str]) -> int:
        """Delete what was used least recently until `target` bytes are left, or nothing more may go. The bytes left."""
        entries = self._entries()
        left = sum(entry.bytes for entry in entries)
        for entry in sorted(entries, key=lambda one: one.used):
            if left <= target:
                break
            if entry.key not in keep and self._evict(entry):
                left -= entry.bytes
        return left

    def _evict(self, entry: _Entry) -> bool:
        with self._lock(entry.key, fcntl.LOCK_EX, _Deadline(0)) as locked:
            if locked:
                entry.path.unlink(missing_ok=True)
                (self.folder / f"lock-{entry.key}").unlink(missing_ok=True)
            return locked

    def _entries(self) -> list[_Entry]:
        found = []
        for path in self.folder.iterdir():
            name = CACHED.fullmatch(path.name)  # whatever else is in the folder is none of ours
            if name:
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append(_Entry(status.st_mtime_ns, max(status.st_size, int(name[1] or 0)), name[2], path))
        return found

    @contextlib.contextmanager
    def _lock(self, key: str, kind: int, deadline: _Deadline) -> Iterator[bool]:
        """Whether the lock was got before the deadline. It ends with its process, however that ends."""
        pause = 0.005
        while (descriptor := _try_lock(self.folder / f"lock-{key}", kind)) is None and deadline.left() > 0:
            time.sleep(min(pause, deadline.left()))
            pause = min(2 * pause, 0.1)
        try:
            yield descriptor is not None
        finally:
            if descriptor is not None:
                _unlock(descriptor)

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"the cache {self.folder} can't be used: {error.strerror or error}"
            hint = "Set DIFFCAP_CACHE to a folder on a local disk that can be written"
            raise ShardUnavailable(f"{what} ({error.filename or 'its files'}). {hint}") from error


@dataclasses.dataclass(frozen=True)
class _Entry:
    used: int  # nanoseconds
    bytes: int
    key: str
    path: Path


def _default_folder() -> Path:
    named = os.environ.get("DIFFCAP_CACHE")
    return Path(named) if named else Path(tempfile.gettempdir()) / f"diffcap-cache-{os.getuid()}"


_held: set[int] = set()  # descriptors of locks


def _try_lock(path: Path, kind: int) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        # Who evicts deletes the lock's file too: the lock of a deleted file keeps nobody out.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        _unlock(descriptor)
        raise
    _unlock(descriptor)
    return None


def _unlock(descriptor: int) -> None:
    _held.discard(descriptor)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough while a forked process has it too
    os.close(descriptor)


def _drop_inherited_locks() -> None:
    """A child that keeps its parent's locks would hold them on after the parent's death."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_drop_inherited_locks)


class _Part:
    """A file that is being fetched: what an earlier attempt, or a process that died, left of it counts."""

    def __init__(self, path: Path, file: _File) -> None:
        self.path, self.size, self.sha256 = path, 0, hashlib.sha256()
        self._room = file.room
        self._file = path.open("r+b", buffering=0)  # nothing in memory that a fork could write twice
        if file.sha256 is None:
            self.restart()
        while data := self._file.read(CHUNK):
            self._count(data)
        self.resumed = self.size > 0

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.size, self.sha256, self.resumed = 0, hashlib.sha256(), False

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        with self._room_on_disk():
            while rest:
                rest = rest[self._file.write(rest) :]
        self._count(data)

    def finish(self, path: Path) -> None:
        with self._room_on_disk():
            os.fsync(self._file.fileno())
        os.utime(self.path)
        self.path.replace(path)

    def _count(self, data: bytes) -> None:
        self.sha256.update(data)
        self.size += len(data)

    @contextlib.contextmanager
    def _room_on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            missing = max(self._room - self.size, CHUNK)
            self.restart()  # what is here would keep the disk full
            raise _DiskFull(f"the disk of the cache {self.path.parent} is full", missing) from error


# ---- attempts ----


class _Failure(Exception):
    """One attempt without the file."""

    def __init__(self, reason: str, hint: str = "", may_pass: bool = True, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.may_pass, self.wait = reason, may_pass, wait
        self.hint = hint or "Is the server up? Run this again: what is fetched is kept"


class _Changed(_Failure):
    """Another content than the index says. Once, it may be a proxy's fault."""


class _DiskFull(_Failure):
    def __init__(self, reason: str, missing: int) -> None:
        super().__init__(reason, "Free some space, or set DIFFCAP_CACHE to a folder on another disk", may_pass=False)
        self.missing = missing


class _OutOfTime(_Failure):
    """An attempt that the deadline cut short: what was wrong before it says more."""


def _retried(place: str, deadline: _Deadline, once: Callable[[], T]) -> T:
    changed, before = 0, None
    for attempt in itertools.count(1):
        try:
            return once()
        except _Failure as last:
            failure = before if before and isinstance(last, _OutOfTime) else last
            before = failure
            changed += isinstance(failure, _Changed)
            wait = failure.wait or _backoff(place, attempt)
            if not failure.may_pass or changed > 1 or wait >= deadline.left():
                raise ShardUnavailable(
                    f"{place} can't be fetched: {failure.reason}. Given up after {attempt} "
                    f"attempt{'s' * (attempt > 1)} in {deadline.used():.1f} s (of at most {deadline.seconds:g} s). "
                    f"{failure.hint}"
                ) from failure
            deadline.ended.wait(wait)
    raise AssertionError


def _backoff(place: str, attempt: int) -> float:
    """Seconds; 0.5 to 1.5 times the doubled base, so that the nodes of a job don't come back in a burst."""
    jitter = zlib.crc32(f"{socket.gethostname()} {place} {attempt}".encode()) / 2**32
    return min(BACKOFF_SECONDS * 2 ** (attempt - 1), MAX_BACKOFF_SECONDS) * (0.5 + jitter)


def _failure_of(error: Exception) -> _Failure:
    """Errors of many libraries: OSErrors, HTTP errors with a status, and others."""
    if isinstance(error, _Failure):
        return error
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    response = getattr(error, "response", None)
    statuses = (getattr(error, "code", None), getattr(error, "status", None), getattr(response, "status_code", None))
    status = next((one for one in statuses if isinstance(one, int)), 0)
    what = f"HTTP {status}" if status else f"{type(error).__name__}: {error}"
    if status in (401, 403) or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        return _Failure(what, "Set the credentials that this place needs", may_pass=False)
    if status == 404 or isinstance(error, FileNotFoundError):
        return _Failure(f"it is not there ({what})", "Is this the dataset's place, and is all of it there?", False)
    if isinstance(error, ImportError):
        return _Failure(what, "Install the package that this place needs", may_pass=False)
    final = isinstance(error, NEVER_PASS) or (300 <= status < 500 and status not in STATUS_MAY_PASS)
    headers = getattr(error, "headers", None)
    after = (headers.get("Retry-After") or "") if headers is not None else ""
    return _Failure(what, may_pass=not final, wait=float(after) if after.isdecimal() else 0.0)


# ---- bytes from a place ----


def _body(place: str, start: int, deadline: _Deadline) -> Iterator[int | bytes]:
    """First the offset at which the bytes begin, `start` or 0, then the bytes. Raises _Failure.

    They are read by a thread of their own: whatever a library does or waits for, this one can give up.
    """
    items: queue.Queue[int | bytes | Exception | None] = queue.Queue(maxsize=2)
    given_up = threading.Event()
    threading.Thread(target=_read, args=(place, start, items, given_up), name="fetch", daemon=True).start()
    try:
        while deadline.left() > 0:
            seconds = min(STALL_SECONDS, deadline.left())
            try:
                item = items.get(timeout=seconds)
            except queue.Empty:
                kind = _Failure if seconds == STALL_SECONDS else _OutOfTime
                raise kind(f"no byte came for {seconds:.1f} s") from None
            if item is None:
                return
            if isinstance(item, Exception):
                raise _failure_of(item) from item
            yield item
        raise _OutOfTime("it comes too slowly")
    finally:
        given_up.set()


def _only_bytes(items: Iterable[int | bytes]) -> Iterator[bytes]:
    return (item for item in items if isinstance(item, bytes))


def _read(place: str, start: int, items: queue.Queue, given_up: threading.Event) -> None:
    def put(item: int | bytes | Exception | None) -> bool:
        while not given_up.is_set():
            with contextlib.suppress(queue.Full):
                items.put(item, timeout=1)
                return True
        return False

    read = _read_http if place.startswith(("http://", "https://")) else _read_fsspec if "://" in place else _read_path
    try:
        with contextlib.closing(read(place, start)) as found:
            if all(put(item) for item in found):
                put(None)
    except Exception as error:
        put(error)


def _read_http(url: str, start: int) -> Generator[int | bytes, None, None]:
    headers = {"User-Agent": "diffcap-dist", **({"Range": f"bytes={start}-"} if start else {})}
    request = urllib.request.Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=STALL_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        yield from _read_http(url, 0)  # it ends before `start`
        return
    with response:
        yield start if response.status == 206 else 0
        length, found = response.length, 0
        while data := response.read1(CHUNK):
            found += len(data)
            yield data
        if length is not None and found < length:
            raise _Failure(f"the body ended after {found} of {length} bytes")


def _read_fsspec(url: str, start: int) -> Generator[int | bytes, None, None]:
    import fsspec

    # fsspec keeps one instance a process, and forgets it in a forked one
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()  # else a retry is told the size of an object that has changed
    with filesystem.open(path, "rb", block_size=BLOCK, cache_type="none") as file:
        file.seek(start)
        yield start
        while data := file.read(BLOCK):
            yield data


def _read_path(path: str, start: int) -> Generator[int | bytes, None, None]:
    with Path(path).open("rb") as file:
        file.seek(start)
        yield start
        while data := file.read(CHUNK):
            yield data
