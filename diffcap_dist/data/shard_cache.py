"""A folder of files named by their sha256, which all processes of a node share.

In: files that an index lists. Out: those files, fetched once per node, compared with their sha256, and only then under
that name; what was used least recently makes room. Locks end with their process, however that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from diffcap_dist.data.fetching import CHUNK, Changed, Deadline, Failure, ShardUnavailable, body, retried
from diffcap_dist.data.shard_format import INDEX_FILE, MemberIndex, ShardDamage, ShardInfo

ROOM_SECONDS = 0.2  # until other processes may have let go of what takes the cache's room
CHANGED = "Copy the dataset there anew, its index.json last"
CACHED = re.compile(r"(?:part-(\d+)-)?([0-9a-f]{64}\.(?:tar|idx\.npz|npy))")


@dataclasses.dataclass(frozen=True)
class Terms:
    deadline: Deadline
    keep: frozenset[str]  # names in the cache that must not make room for this
    patient: bool  # waits for other processes that fetch the file, or take the room


@dataclasses.dataclass(frozen=True)
class File:
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

    def check(self, part: Part) -> None:
        """Raises Failure unless all of it, and nothing else, was fetched."""
        if self.bytes is not None and part.size < self.bytes:
            part.restart()
            raise Failure(f"it has {part.size} bytes, {INDEX_FILE} says {self.bytes}")
        found = self._difference(part)
        if not found:
            return
        resumed = part.resumed
        part.restart()
        raise (Failure if resumed else Changed)(f"it is not what {INDEX_FILE} lists ({found})", CHANGED)

    def _difference(self, part: Part) -> str:
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


class Cache:
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

    def require_room(self, files: Iterable[File]) -> None:
        files = list(files)
        room = sum(file.room for file in files)
        if self.limit is not None and room > self.limit:
            raise ShardUnavailable(
                f"{files[0].place} and what belongs to it have {room} bytes, the cache {self.folder} may have "
                f"{self.limit}. Give it more bytes, or make smaller shards"
            )

    def fetch(self, file: File, terms: Terms) -> None:
        """See to it that the file is here. It may be gone again right after: `kept` tells."""
        path = self.folder / file.key
        with self._usable():
            if file.is_at(path):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
                return
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # on another node, or cleaned away
            with self._lock(file.key, fcntl.LOCK_EX, terms.deadline if terms.patient else Deadline(0)) as locked:
                if not locked:
                    raise ShardUnavailable(
                        f"{file.place}: another process fetches it into {self.folder} and has not finished in "
                        f"{terms.deadline.seconds:g} s. Look at that process; if none is there, at the disk"
                    )
                if not file.is_at(path):  # else it came while this process waited
                    path.unlink(missing_ok=True)
                    retried(file.place, terms.deadline, lambda: self._attempt(file, terms))
                    if self.limit is not None:
                        self._shrink(self.limit, terms.keep)

    @contextlib.contextmanager
    def kept(self, files: Sequence[File], deadline: Deadline) -> Iterator[bool]:
        """Whether all of them are here; nobody deletes them meanwhile."""
        with self._usable(), contextlib.ExitStack() as stack:
            locked = [stack.enter_context(self._lock(file.key, fcntl.LOCK_SH, deadline)) for file in files]
            yield all(locked) and all(file.is_at(self.folder / file.key) for file in files)

    def delete(self, file: File, inode: int | None, deadline: Deadline) -> None:
        """`inode` None: whatever is there."""
        with self._usable(), self._lock(file.key, fcntl.LOCK_EX, deadline) as locked:
            path = self.folder / file.key
            if locked and path.exists() and inode in (None, path.stat().st_ino):
                path.unlink()

    def _attempt(self, file: File, terms: Terms) -> None:
        try:
            self._download(file, terms)
        except DiskFull as full:
            entries = self._entries()
            size = sum(entry.bytes for entry in entries)
            if self._shrink(size - max(full.missing, 1), terms.keep | {file.key}) == size:
                raise
            self._download(file, terms)

    def _download(self, file: File, terms: Terms) -> None:
        path = self._reserve(file, terms)
        with Part(path, file) as part:
            if file.sha256 is None or part.sha256.hexdigest() != file.sha256:
                for item in body(file.place, part.size, terms.deadline):
                    if isinstance(item, bytes):
                        part.write(item)
                    elif item != part.size:
                        part.restart()  # the server can't go on in the middle
                    if file.bytes is not None and part.size > file.bytes:
                        break
            file.check(part)
            part.finish(self.folder / file.key)

    def _reserve(self, file: File, terms: Terms) -> Path:
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
                    raise Failure(found, "Give the cache more bytes", may_pass=terms.patient, wait=ROOM_SECONDS)
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

    def _evict(self, entry: Entry) -> bool:
        with self._lock(entry.key, fcntl.LOCK_EX, Deadline(0)) as locked:
            if locked:
                entry.path.unlink(missing_ok=True)
                (self.folder / f"lock-{entry.key}").unlink(missing_ok=True)
            return locked

    def _entries(self) -> list[Entry]:
        found = []
        for path in self.folder.iterdir():
            name = CACHED.fullmatch(path.name)  # whatever else is in the folder is none of ours
            if name:
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append(Entry(status.st_mtime_ns, max(status.st_size, int(name[1] or 0)), name[2], path))
        return found

    @contextlib.contextmanager
    def _lock(self, key: str, kind: int, deadline: Deadline) -> Iterator[bool]:
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
class Entry:
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


class DiskFull(Failure):
    def __init__(self, reason: str, missing: int) -> None:
        super().__init__(reason, "Free some space, or set DIFFCAP_CACHE to a folder on another disk", may_pass=False)
        self.missing = missing


class Part:
    """A file that is being fetched: what an earlier attempt, or a process that died, left of it counts."""

    def __init__(self, path: Path, file: File) -> None:
        self.path, self.size, self.sha256 = path, 0, hashlib.sha256()
        self._room = file.room
        self._file = path.open("r+b", buffering=0)  # nothing in memory that a fork could write twice
        if file.sha256 is None:
            self.restart()
        while data := self._file.read(CHUNK):
            self._count(data)
        self.resumed = self.size > 0

    def __enter__(self) -> Part:
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
            raise DiskFull(f"the disk of the cache {self.path.parent} is full", missing) from error
