"""Where a dataset is written: a folder on disk, or an object store (s3://, gs://, hf://, ...) through fsspec.

In: small names ("train-000000.tar", "unfinished/request.json") and bytes. Out: files that appear whole or not at all:
written aside, synced and renamed on disk; one PUT in a store. `reserve` keeps two runs from writing one folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from diffcap_dist.data.shard_format import NewFile

UNFINISHED = "unfinished"  # the folder of what is not done yet: requests, reports, locks
CODE_FOLDERS = ("diffcap_dist", "shards", "launch", "configs", "benchmarks", "tests", "docs")
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


Write = Callable[[bytes | bytearray], object]


class Output(Protocol):
    """A place for a dataset. It pickles: worker processes write into it. What `create` makes is there when its block
    ends, and not at all after an error."""

    def __str__(self) -> str: ...
    def size(self, name: str) -> int | None: ...
    def read(self, name: str) -> bytes: ...  # FileNotFoundError where it isn't
    def create(self, name: str) -> contextlib.AbstractContextManager[Write]: ...
    def names(self) -> list[str]: ...
    def delete(self, names: list[str]) -> None: ...
    def reserve(self, part: int, num_parts: int) -> contextlib.AbstractContextManager[None]: ...
    def merging(self) -> contextlib.AbstractContextManager[None]: ...


def output_at(where: str) -> Output:
    """The output that a path or URL names. Raises ValueError for a folder of code or an unknown protocol."""
    if "://" in where:
        return Store(where)
    refuse_code_folder(Path(where))
    return Folder(Path(where))


def refuse_code_folder(directory: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    for folder in (root / name for name in CODE_FOLDERS):
        if directory.resolve().is_relative_to(folder):
            raise ValueError(f"{directory} lies in {folder}, which holds code. Choose a folder outside it")


class Folder:
    """A folder on a local or shared disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def size(self, name: str) -> int | None:
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Write]:
        path = self.path / name

        def write(data: bytes | bytearray) -> None:
            try:
                file.write(data)
            except OSError as error:
                raise _cannot_write(str(path), error) from error

        with _writing(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = NewFile(path)
        try:
            yield write
            with _writing(str(path)):
                file.finish()
        except BaseException:
            file.discard()
            raise

    def names(self) -> list[str]:
        if not self.path.is_dir():
            return []
        return sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file())

    def delete(self, names: list[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        for folder in {(self.path / name).parent for name in names} - {self.path}:
            with contextlib.suppress(OSError):  # another part's file may still be in it
                folder.rmdir()

    @contextlib.contextmanager
    def reserve(self, part: int, num_parts: int) -> Iterator[None]:
        """Held while a run writes: a whole run alone, the parts of one array beside each other."""
        folder, array = self.path / UNFINISHED, self.path / UNFINISHED / "parts"
        with contextlib.ExitStack() as held:
            with self.merging():
                try:
                    lock = held.enter_context(file_lock(folder / "lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
                    array.write_text(str(num_parts))
                except Busy:
                    if num_parts == 1 or array.read_text() != str(num_parts):
                        raise
                    lock = held.enter_context(file_lock(folder / "lock", fcntl.LOCK_SH | fcntl.LOCK_NB))
                if num_parts > 1:
                    fcntl.flock(lock, fcntl.LOCK_SH)
            held.enter_context(file_lock(folder / f"lock-{part}", fcntl.LOCK_EX | fcntl.LOCK_NB))
            yield

    @contextlib.contextmanager
    def merging(self) -> Iterator[None]:
        """Held by the one part that writes the index; the others wait."""
        with file_lock(self.path / UNFINISHED / "lock-merge", fcntl.LOCK_EX):
            yield


class Busy(ValueError):
    """Another run holds the lock."""


@contextlib.contextmanager
def file_lock(path: Path, kind: int) -> Iterator[IO[str]]:
    """flock on a file made for it, which goes when its last holder does. Raises Busy where it may not wait."""
    while True:
        with _writing(str(path.parent)):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("w")
        except FileNotFoundError:  # the folder went with its last lock
            continue
        except OSError as error:
            raise _cannot_write(str(path), error) from error
        try:
            fcntl.flock(file, kind)
        except BlockingIOError as error:
            file.close()
            raise Busy(f"another run is writing {path.parent.parent} now. Wait for it, or stop it") from error
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise
            print(f"note: {path.parent} has no file locks: let no second run write it", file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # what was locked is no longer there: its holder took it away
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            path.parent.rmdir()
        file.close()


class Store:
    """A folder in an object store. Two runs at once need no lock: their objects are the same, and each is one PUT."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._filesystem()

    def __str__(self) -> str:
        return self.url

    def size(self, name: str) -> int | None:
        filesystem, path = self._filesystem()
        filesystem.invalidate_cache()
        with _writing(f"{self.url}/{name}"):
            try:
                return int(filesystem.info(f"{path}/{name}")["size"])
            except FileNotFoundError:
                return None

    def read(self, name: str) -> bytes:
        filesystem, path = self._filesystem()
        with _writing(f"{self.url}/{name}", passed=FileNotFoundError):
            return filesystem.cat_file(f"{path}/{name}")

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Write]:
        filesystem, path = self._filesystem()
        buffer = io.BytesIO()
        yield buffer.write
        with _writing(f"{self.url}/{name}"):
            filesystem.pipe_file(f"{path}/{name}", buffer.getvalue())

    def names(self) -> list[str]:
        filesystem, path = self._filesystem()
        filesystem.invalidate_cache()
        with _writing(self.url):
            try:
                found = filesystem.find(path)
            except FileNotFoundError:
                return []
        return sorted(one.removeprefix(f"{path}/") for one in found if one != path)

    def delete(self, names: list[str]) -> None:
        filesystem, path = self._filesystem()
        for name in names:
            with _writing(f"{self.url}/{name}"), contextlib.suppress(FileNotFoundError):
                filesystem.rm_file(f"{path}/{name}")

    def reserve(self, part: int, num_parts: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def merging(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _filesystem(self) -> tuple[Any, str]:
        """fsspec keeps one instance a process, so this is cheap; it must not be carried over to another process."""
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{self.url} can't be written: {error}") from error


def write_file(output: Output, name: str, data: bytes) -> None:
    with output.create(name) as write:
        write(data)


@contextlib.contextmanager
def _writing(where: str, passed: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    try:
        yield
    except passed:
        raise
    except Exception as error:  # disks give OSErrors; each store has errors of its own: boto, google and HTTP ones
        raise _cannot_write(where, error) from error


def _cannot_write(where: str, error: Exception) -> ValueError:
    hint = "Free some space" if isinstance(error, OSError) and error.errno == errno.ENOSPC else "See to it"
    what = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return ValueError(f"{where}: {what}. {hint} and run this again: what is finished is kept")
