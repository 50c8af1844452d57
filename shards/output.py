"""Where a dataset is written: a folder on disk, or an object store (s3://, gs://, hf://, ...) through fsspec.

In: small names ("train-000000.tar", "unfinished/request.json") and bytes. Out: files that appear whole or not at all:
written aside, synced and renamed on disk; one PUT in a store. `reserve` keeps two runs from writing one folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from diffcap_dist.data.shard_format import NewFile

CODE_FOLDERS = ("diffcap_dist", "shards", "launch", "configs", "benchmarks", "tests", "docs")
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


Write = Callable[[bytes | bytearray], object]


class Output(Protocol):
    """A place for a dataset. It pickles: worker processes write into it. What `create` makes is there when its block
    ends, and not at all after an error."""

    def __str__(self) -> str: ...
    def size(self, name: str) -> int | None: ...
    def read(self, name: str) -> bytes: ...
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
        """Held while a run writes: a whole run alone, the parts of an array beside each other."""
        alone = fcntl.LOCK_EX if num_parts == 1 else fcntl.LOCK_SH
        own = f"lock-{part}-of-{num_parts}"
        with self._lock("lock", alone | fcntl.LOCK_NB), self._lock(own, fcntl.LOCK_EX | fcntl.LOCK_NB):
            yield

    @contextlib.contextmanager
    def merging(self) -> Iterator[None]:
        """Held by the one part that writes the index; the others wait."""
        with self._lock("lock-merge", fcntl.LOCK_EX):
            yield

    @contextlib.contextmanager
    def _lock(self, name: str, kind: int) -> Iterator[None]:
        path = self.path / "unfinished" / name
        with _writing(str(path.parent)):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        with file:
            try:
                fcntl.flock(file, kind)
            except BlockingIOError as error:
                raise ValueError(f"another run is writing {self.path} now. Wait for it, or stop it") from error
            except OSError as error:
                if error.errno not in NO_LOCKS_HERE:
                    raise
                print(f"note: {self.path} has no file locks: let no second run write it", file=sys.stderr)
            yield


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
        with _writing(f"{self.url}/{name}"):
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
def _writing(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # disks give OSErrors; each store has errors of its own: boto, google and HTTP ones
        raise _cannot_write(where, error) from error


def _cannot_write(where: str, error: Exception) -> ValueError:
    hint = "Free some space" if isinstance(error, OSError) and error.errno == errno.ENOSPC else "See to it"
    what = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return ValueError(f"{where}: {what}. {hint} and run this again: what is finished is kept")
