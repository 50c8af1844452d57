"""Bytes from a place, a path or a URL, within a deadline: attempts, what they fail with, and when another is worth it.

In: a place and the seconds that it may take. Out: its bytes from an offset on, or an error that says what was tried. It
knows nothing of shards.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

STALL_SECONDS = 30.0  # without a byte, then the attempt has failed
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 20.0
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

T = TypeVar("T")


class ShardUnavailable(ValueError):
    """A file of the dataset is not to be had. One text is its only argument, so it crosses process borders whole."""


class Deadline:
    """Seconds from now; `ended` ends them early."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._start, self.ended = seconds, time.monotonic(), threading.Event()

    def left(self) -> float:
        return 0.0 if self.ended.is_set() else max(0.0, self.seconds - self.used())

    def used(self) -> float:
        return time.monotonic() - self._start


# ---- attempts ----


class Failure(Exception):
    """One attempt without the file."""

    def __init__(self, reason: str, hint: str = "", may_pass: bool = True, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.may_pass, self.wait = reason, may_pass, wait
        self.hint = hint or "Is the server up? Run this again: what is fetched is kept"


class Changed(Failure):
    """Another content than the index says. Once, it may be a proxy's fault."""


class OutOfTime(Failure):
    """An attempt that the deadline cut short: what was wrong before it says more."""


def retried(place: str, deadline: Deadline, once: Callable[[], T]) -> T:
    changed, before = 0, None
    for attempt in itertools.count(1):
        try:
            return once()
        except Failure as last:
            failure = before if before and isinstance(last, OutOfTime) else last
            before = failure
            changed += isinstance(failure, Changed)
            wait = failure.wait or backoff(place, attempt)
            if not failure.may_pass or changed > 1 or wait >= deadline.left():
                raise ShardUnavailable(
                    f"{place} can't be fetched: {failure.reason}. Given up after {attempt} "
                    f"attempt{'s' * (attempt > 1)} in {deadline.used():.1f} s (of at most {deadline.seconds:g} s). "
                    f"{failure.hint}"
                ) from failure
            deadline.ended.wait(wait)
    raise AssertionError


def backoff(place: str, attempt: int) -> float:
    """Seconds; 0.5 to 1.5 times the doubled base, so that the nodes of a job don't come back in a burst."""
    jitter = zlib.crc32(f"{socket.gethostname()} {place} {attempt}".encode()) / 2**32
    return min(BACKOFF_SECONDS * 2 ** (attempt - 1), MAX_BACKOFF_SECONDS) * (0.5 + jitter)


def failure_of(error: Exception) -> Failure:
    """Errors of many libraries: OSErrors, HTTP errors with a status, and others."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    response = getattr(error, "response", None)
    statuses = (getattr(error, "code", None), getattr(error, "status", None), getattr(response, "status_code", None))
    status = next((one for one in statuses if isinstance(one, int)), 0)
    what = f"HTTP {status}" if status else f"{type(error).__name__}: {error}"
    if status in (401, 403) or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        return Failure(what, "Set the credentials that this place needs", may_pass=False)
    if status == 404 or isinstance(error, FileNotFoundError):
        return Failure(f"it is not there ({what})", "Is this the dataset's place, and is all of it there?", False)
    if isinstance(error, ImportError):
        return Failure(what, "Install the package that this place needs", may_pass=False)
    final = isinstance(error, NEVER_PASS) or (300 <= status < 500 and status not in STATUS_MAY_PASS)
    headers = getattr(error, "headers", None)
    after = (headers.get("Retry-After") or "") if headers is not None else ""
    return Failure(what, may_pass=not final, wait=float(after) if after.isdecimal() else 0.0)


# ---- bytes from a place ----


def body(place: str, start: int, deadline: Deadline) -> Iterator[int | bytes]:
    """First the offset at which the bytes begin, `start` or 0, then the bytes. Raises Failure.

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
                kind = Failure if seconds == STALL_SECONDS else OutOfTime
                raise kind(f"no byte came for {seconds:.1f} s") from None
            if item is None:
                return
            if isinstance(item, Exception):
                raise failure_of(item) from item
            yield item
        raise OutOfTime("it comes too slowly")
    finally:
        given_up.set()


def only_bytes(items: Iterable[int | bytes]) -> Iterator[bytes]:
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
            raise Failure(f"the body ended after {found} of {length} bytes")


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
