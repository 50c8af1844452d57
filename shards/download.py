"""Lists of URLs with captions (CC3M's TSV, other TSV, parquet) -> `RawSample`s whose photos are downloaded.

In: the lists, and a folder for what is downloaded. Out: a `Source`; its `prepare` fetches the photos of one shard.
The folder holds two append-only files for each 1,000 URLs: NAME.blob, the bytes, and NAME.jsonl, a line for each
URL with where its bytes are or why there are none. Nothing that was fetched is ever fetched again; what failed is,
when asked. A page that opts out (X-Robots-Tag) is left alone. It reads no robots.txt and decodes no photo.
"""

import asyncio
import dataclasses
import email.utils
import fcntl
import functools
import hashlib
import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from diffcap_dist.data.shard_format import file_sha256
from shards.writer import RawSample, Rejected, Source, Unavailable

NO_ROW, BAD_UTF8, BAD_URL = "row is no caption and url", "bad UTF-8", "no http(s) url"
BLANK_CAPTION, URL_AGAIN = "blank caption", "url comes again"
DEAD_LINK, SERVER_ERROR, TIMED_OUT = "dead link", "server error", "timed out"
CONNECTION_FAILED, SHORT_BODY = "connection failed", "short body"
OPTED_OUT, TOO_LARGE, NOT_AN_IMAGE = "opted out", "too large", "not an image"
HOST_SILENT = "host does not answer"
FAILURES = frozenset(
    {DEAD_LINK, SERVER_ERROR, TIMED_OUT, CONNECTION_FAILED, SHORT_BODY, OPTED_OUT, TOO_LARGE, NOT_AN_IMAGE, HOST_SILENT}
)
SILENT_AFTER = 12  # attempts at a host in a row without any answer: the rest of its urls in this store is not tried

# A fixed number, not the samples of a shard: another --samples-per-shard finds everything in its place again.
URLS_PER_STORE = 1000
PARQUET_MAGIC, PARQUET_BATCH = b"PAR1", 4096
CAPTION_COLUMNS = ("caption", "text")
AGENT = "diffcap-dist"
HEADERS = {
    "User-Agent": f"{AGENT}/0.1 (downloads photos of caption datasets; honours X-Robots-Tag)",
    "Accept": "image/jpeg, image/png, image/webp, image/*;q=0.5, */*;q=0.1",
    "Accept-Encoding": "identity",  # photos are compressed already
}
OPT_OUTS = {"noai", "noimageai", "noindex", "noimageindex", "none"}  # none: noindex and nofollow
VALUED_RULES = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
STATUS_MAY_PASS = {408, 425, 429}  # and 5xx
MAX_REDIRECTS = 5
MAX_DETAIL = 200  # characters
PIECE = 1 << 16  # bytes of a body read at a time
NO_NETWORK_HOSTS = 10  # as many hosts and not one reached: the fault is on this side


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one process: with several workers, each has as many connections."""

    connections: int = 64
    per_host: int = 4
    timeout_seconds: float = 20.0  # for a whole request, the body included
    attempts: int = 3
    max_bytes: int = 20_000_000
    backoff_seconds: float = 1.0  # before the second attempt; doubles
    max_wait_seconds: float = 60.0  # a server that asks for more (Retry-After) is not asked again in this run

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"download limit {field.name} is {value}, it must be more than 0")


def url_list(files: list[tuple[str, Path]], downloads: Path, limits: Limits, retry_failed: bool) -> Source:
    """The rows of `files` ((split, path), ...) in their order. `rejected` grows while the samples are read."""
    if not files:
        raise ValueError("no list of urls is given; expected at least one TSV or parquet file")
    readers = [(split, path, _rows(path)) for split, path in files]
    rejected: list[Rejected] = []
    provenance = {"command": "urls", "files": [{"split": split, "sha256": file_sha256(path)} for split, path in files]}
    downloads.mkdir(parents=True, exist_ok=True)
    prepare = functools.partial(download, limits=limits, retry_failed=retry_failed)
    retried = FAILURES if retry_failed else frozenset()
    return Source(_samples(readers, downloads, rejected), rejected, provenance, [], prepare, retried)


# ---- rows ----


@dataclasses.dataclass(frozen=True)
class _Row:
    number: int  # line of a TSV, row of a parquet file, from 1
    url: bytes | None  # None: a line with another number of fields
    caption: bytes


def _samples(
    readers: list[tuple[str, Path, Iterator[_Row]]], downloads: Path, rejected: list[Rejected]
) -> Iterator[RawSample]:
    seen: set[int] = set()  # 64 bits of each url, the photo id: equal ones would also be equal keys
    accepted: Counter[str] = Counter()
    logs: dict[str, Path] = {}  # by split, the store that is being filled
    for split, path, rows in readers:
        for row in rows:
            url, caption, problem = _parse(row)
            photo_id = photo_id_of(url) if url else ""
            if not problem and int(photo_id, 16) in seen:
                problem = URL_AGAIN
            if problem:
                detail = f"{path.name}:{row.number} {url}".rstrip()[:MAX_DETAIL]
                rejected.append(Rejected(photo_id, problem, 1, 1, detail))
                continue
            seen.add(int(photo_id, 16))
            if accepted[split] % URLS_PER_STORE == 0:
                logs[split] = downloads / f"{photo_id}.jsonl"
            accepted[split] += 1
            yield RawSample(photo_id, [caption], split, "urls", DownloadedPhoto(logs[split], url), url=url)


def photo_id_of(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def _parse(row: _Row) -> tuple[str, str, str]:
    """(url, caption, what is wrong with the row or "")."""
    if row.url is None:
        return "", "", NO_ROW
    try:
        url, caption = row.url.decode().strip(), row.caption.decode().strip()
    except UnicodeDecodeError:
        return "", "", BAD_UTF8
    if not _is_http(url):
        return url, caption, BAD_URL
    return url, caption, "" if caption else BLANK_CAPTION


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a port that is no number raises
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(host) and not re.search(r"[\x00-\x1f\x7f]|//[^/?#]*\s", url)


def _rows(path: Path) -> Iterator[_Row]:
    """Opens the file and finds its columns now, so that a wrong file is an error before any work."""
    with path.open("rb") as file:
        magic, first = file.read(len(PARQUET_MAGIC)), b""
        if magic != PARQUET_MAGIC:
            first = magic + file.readline()
    if magic == PARQUET_MAGIC:
        return _parquet_rows(path, *_parquet_columns(path))
    if not first:
        raise ValueError(f"{path} is empty, expected lines `caption<TAB>url` or a parquet file")
    return _tsv_rows(path, _tsv_header(path, first.splitlines()[0]))


def _column_numbers(path: Path, names: list[str]) -> tuple[int, int] | None:
    """(column of the url, of the caption), None when the names are those of neither."""
    lower = [name.strip().lower() for name in names]
    captions = [lower.index(name) for name in CAPTION_COLUMNS if name in lower]
    if "url" not in lower or not captions:
        return None
    if lower.count("url") > 1 or len(captions) > 1 or lower.count(lower[captions[0]]) > 1:
        raise ValueError(f"{path} has the columns {', '.join(names)}: more than one may be meant. Rename all but one")
    return lower.index("url"), captions[0]


def _tsv_header(path: Path, first: bytes) -> tuple[int, int, int] | None:
    """(url, caption, number of fields) by the header; None: no header, CC3M's own layout."""
    names = first.decode("utf-8-sig", errors="replace").split("\t")
    columns = _column_numbers(path, names)
    if columns is not None:
        return *columns, len(names)
    if len(names) != 2 or (_is_http(names[0].strip()) and not _is_http(names[1].strip())):
        raise ValueError(
            f"{path} starts with {names!r}, expected `caption<TAB>url` (CC3M's layout), "
            "or a header that names the columns url and caption, separated by tabs. Add such a header"
        )
    return None


def _tsv_rows(path: Path, header: tuple[int, int, int] | None) -> Iterator[_Row]:
    url_column, caption_column, num_fields = header or (1, 0, 2)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                if header:
                    continue
                line = line.removeprefix(b"\xef\xbb\xbf")
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) == num_fields:
                yield _Row(number, fields[url_column], fields[caption_column])
            else:
                yield _Row(number, None, b"")


def _parquet_columns(path: Path) -> tuple[str, str]:
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} can't be read as parquet ({error}). Fetch it again") from error
    columns = _column_numbers(path, names)
    if columns is None:
        raise ValueError(f"{path} has the columns {', '.join(names)}, expected url and caption (or text)")
    return names[columns[0]], names[columns[1]]


def _parquet_rows(path: Path, url_column: str, caption_column: str) -> Iterator[_Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_BATCH, columns=[url_column, caption_column]):
                # As bytes: arrow doesn't check that strings are UTF-8, and one bad value would fail the whole batch.
                columns = [batch.column(name).cast(pyarrow.large_binary()) for name in (url_column, caption_column)]
                for url, caption in zip(*(column.to_pylist() for column in columns)):
                    number += 1
                    yield _Row(number, url or b"", caption or b"")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: rows after {number} can't be read ({error}). Fetch or make it again") from error


# ---- the store: a blob and its log ----


@dataclasses.dataclass(frozen=True)
class DownloadedPhoto:
    """Reads one photo from the store. Small, so that it goes to a worker with its sample."""

    log: Path
    url: str

    def __call__(self) -> bytes:
        status = self.log.stat() if self.log.exists() else None
        entries = _entries(self.log, status.st_size, status.st_mtime_ns) if status else {}
        if self.url not in entries:
            raise ValueError(f"{self.log} has no line for {self.url}: it was not downloaded. Run this again")
        entry = entries[self.url]
        if entry["status"] == "failed":
            raise Unavailable(entry["reason"], entry["detail"])
        blob = _blob_of(self.log)
        with blob.open("rb") as file:
            file.seek(entry["offset"])
            data = file.read(entry["size"])
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(
                f"{blob}: the {entry['size']} bytes at {entry['offset']} are not those fetched from {self.url} "
                f"(sha256 differs). Delete it and {self.log.name}, then run this again"
            )
        return data


def _blob_of(log: Path) -> Path:
    return log.with_suffix(".blob")


@functools.lru_cache(maxsize=2)
def _entries(log: Path, size: int, mtime_ns: int) -> dict[str, dict[str, Any]]:
    """By url. Size and time are the cache's key: a log only grows."""
    return _parse_log(log, log.read_bytes(), _blob_of(log).stat().st_size)[0]


def _parse_log(log: Path, content: bytes, blob_bytes: int) -> tuple[dict[str, dict[str, Any]], int, int]:
    """(entries, bytes of the log, bytes of the blob) up to the first line that is torn or points past the blob:
    what was in flight when a process was killed or the power went."""
    entries: dict[str, dict[str, Any]] = {}
    log_end = blob_end = 0
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
            if entry is None or (entry["status"] == "fetched" and entry["offset"] + entry["size"] > blob_bytes):
                break
            entries[entry["url"]] = entry
        except (ValueError, KeyError, TypeError) as error:
            if log_end + len(line) == len(content):
                break
            raise ValueError(
                f"{log}: the line at byte {log_end} is damaged ({error!r}). "
                f"Delete it and {_blob_of(log).name}, then run this again: they are fetched again"
            ) from error
        log_end += len(line)
        if entry["status"] == "fetched":
            blob_end = max(blob_end, entry["offset"] + entry["size"])
    return entries, log_end, blob_end


class _Store:
    """Open for appending by one process at a time; others wait. Opening it drops what was in flight."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("ab+", buffering=0)
        fcntl.flock(self._log, fcntl.LOCK_EX)  # ends with the process, however it ends
        self._blob = _blob_of(log).open("ab", buffering=0)
        self._log.seek(0)
        blob_bytes = os.fstat(self._blob.fileno()).st_size
        self.entries, self._log_start, self._blob_end = _parse_log(log, self._log.read(), blob_bytes)
        self._log.truncate(self._log_start)
        self._blob.truncate(self._blob_end)

    def __enter__(self) -> "_Store":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._blob.close()
        self._log.close()

    def add(self, url: str, data: bytes, attempts: int) -> None:
        _write_all(self._blob, data)
        place = {"offset": self._blob_end, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self._blob_end += len(data)
        self._add_line({"url": url, "status": "fetched", **place, "attempts": attempts})

    def add_failed(self, url: str, reason: str, detail: str, attempts: int) -> None:
        self._add_line({"url": url, "status": "failed", "reason": reason, "detail": detail, "attempts": attempts})

    def _add_line(self, entry: dict[str, Any]) -> None:
        _write_all(self._log, json.dumps(entry).encode() + b"\n")
        self.entries[entry["url"]] = entry

    def sync(self) -> None:
        os.fsync(self._blob.fileno())
        os.fsync(self._log.fileno())

    def forget(self) -> None:
        """Drop the lines added since it was opened (they were all failures)."""
        self._log.truncate(self._log_start)


def _write_all(file: Any, data: bytes) -> None:
    """Unbuffered, so that what is written survives the process; such a write may be short."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


# ---- downloading ----


class _Failed(Exception):
    """One request without a photo; `wait` is what the server asked for in seconds."""

    def __init__(self, reason: str, detail: str, may_pass: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.may_pass, self.wait = reason, detail[:MAX_DETAIL], may_pass, wait


def download(samples: Iterable[RawSample], limits: Limits, retry_failed: bool) -> None:
    """Fetch what the stores of these samples lack. Stores are taken one after another, so none waits in a ring."""
    urls_of: dict[Path, list[str]] = defaultdict(list)
    for sample in samples:
        assert isinstance(sample.image, DownloadedPhoto), f"{sample.photo_id} is not of a list of urls"
        urls_of[sample.image.log].append(sample.image.url)
    for log, urls in urls_of.items():
        with _Store(log) as store:
            done = {url for url, entry in store.entries.items() if not retry_failed or entry["status"] == "fetched"}
            wanted = [url for url in urls if url not in done]
            if wanted:
                asyncio.run(_download_all(wanted, store, limits))
                _require_network(store)
                store.sync()


def _require_network(store: _Store) -> None:
    """A machine without network must not put down a whole list as dead. It looks at all of the store: the last
    urls after an interruption may well be those of the slow and the dead."""
    hosts = {_host(url) for url in store.entries}
    reached = any(
        entry.get("reason") not in (CONNECTION_FAILED, TIMED_OUT, HOST_SILENT) for entry in store.entries.values()
    )
    if len(hosts) >= NO_NETWORK_HOSTS and not reached:
        url, entry = next(iter(store.entries.items()))
        store.forget()
        raise ValueError(
            f"not one of {len(hosts)} hosts could be reached, e.g. {url}: {entry['detail']}. "
            "Is there a network (and HTTPS_PROXY set, where one is needed)? Then run this again"
        )


async def _download_all(urls: list[str], store: _Store, limits: Limits) -> None:
    connector = aiohttp.TCPConnector(limit=limits.connections, limit_per_host=limits.per_host)
    connections = asyncio.Semaphore(limits.connections)
    hosts: dict[str, _Host] = defaultdict(lambda: _Host(asyncio.Semaphore(limits.per_host)))
    async with aiohttp.ClientSession(
        connector=connector,
        headers=HEADERS,
        timeout=aiohttp.ClientTimeout(total=limits.timeout_seconds),
        cookie_jar=aiohttp.DummyCookieJar(),  # a request never depends on those before it
        trust_env=True,  # clusters reach the world through a proxy
    ) as session:
        # The session's own limits would count the time in the queue as time of the request.
        fetches = [_store_one(session, url, store, limits, hosts[_host(url)], connections) for url in urls]
        await asyncio.gather(*fetches)


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


@dataclasses.dataclass
class _Host:
    places: asyncio.Semaphore
    unanswered: int = 0  # attempts in a row


async def _store_one(
    session: aiohttp.ClientSession,
    url: str,
    store: _Store,
    limits: Limits,
    host: _Host,
    connections: asyncio.Semaphore,
) -> None:
    """All attempts at one url. It keeps its place at the host while it waits: a host in trouble gets less to do."""
    async with host.places:
        for attempt in range(1, limits.attempts + 1):
            if host.unanswered >= SILENT_AFTER:
                return store.add_failed(url, HOST_SILENT, f"{host.unanswered} attempts without an answer", attempt - 1)
            try:
                async with connections:
                    data = await _request(session, url, limits)
                host.unanswered = 0
                return store.add(url, data, attempt)
            except _Failed as failure:
                silent = failure.reason in (TIMED_OUT, CONNECTION_FAILED)
                host.unanswered = host.unanswered + 1 if silent else 0
                wait = max(failure.wait, _backoff(url, attempt, limits))
                if not failure.may_pass or attempt == limits.attempts or failure.wait > limits.max_wait_seconds:
                    return store.add_failed(url, failure.reason, failure.detail, attempt)
            await asyncio.sleep(wait)


def _backoff(url: str, attempt: int, limits: Limits) -> float:
    """Seconds; 0.5 to 1.5 times the doubled base, by the url, so that retries don't come in a burst."""
    jitter = int(photo_id_of(f"{attempt} {url}"), 16) / 2**64
    return min(limits.backoff_seconds * 2 ** (attempt - 1) * (0.5 + jitter), limits.max_wait_seconds)


async def _request(session: aiohttp.ClientSession, url: str, limits: Limits) -> bytes:
    try:
        async with session.get(url, max_redirects=MAX_REDIRECTS + 1) as response:
            _check_head(response, limits.max_bytes)
            return await _read_body(response, limits.max_bytes)
    except TimeoutError as error:
        raise _Failed(TIMED_OUT, f"after {limits.timeout_seconds:g} s", may_pass=True) from error
    except aiohttp.TooManyRedirects as error:
        raise _Failed(DEAD_LINK, f"more than {MAX_REDIRECTS} redirects") from error
    except aiohttp.ClientConnectorCertificateError as error:  # before ValueError, which it is too
        raise _Failed(CONNECTION_FAILED, str(error)) from error
    except (ValueError, aiohttp.NonHttpUrlClientError) as error:  # no request can be made of it, or of its redirect
        raise _Failed(DEAD_LINK, f"{type(error).__name__}: {error}") from error
    except aiohttp.ClientPayloadError as error:
        raise _Failed(SHORT_BODY, str(error), may_pass=True) from error
    except (aiohttp.ClientError, OSError) as error:
        raise _Failed(CONNECTION_FAILED, str(error) or type(error).__name__, may_pass=True) from error


def _check_head(response: aiohttp.ClientResponse, max_bytes: int) -> None:
    status, headers = response.status, response.headers
    if status in STATUS_MAY_PASS or status >= 500:
        wait = retry_after_seconds(headers.get("Retry-After", ""), time.time())
        raise _Failed(SERVER_ERROR, f"HTTP {status}", may_pass=True, wait=wait)
    if status != 200:
        raise _Failed(DEAD_LINK, f"HTTP {status}")
    for hop in (*response.history, response):
        rule = opt_out_rule(hop.headers.getall("X-Robots-Tag", []))
        if rule:
            raise _Failed(OPTED_OUT, f"X-Robots-Tag: {rule}")
    if response.content_type in ("text/html", "application/xhtml+xml"):
        raise _Failed(NOT_AN_IMAGE, f"content type {response.content_type}")
    if response.content_length is not None and response.content_length > max_bytes:
        raise _Failed(TOO_LARGE, f"{response.content_length} bytes, more than {max_bytes}")


async def _read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_chunked(PIECE):
        body += piece
        if len(body) > max_bytes:
            raise _Failed(TOO_LARGE, f"more than {max_bytes} bytes")
    start = bytes(body[:64]).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not body or start.startswith((b"<!doctype html", b"<html")):
        raise _Failed(NOT_AN_IMAGE, f"starts with {bytes(body[:16])!r}" if body else "empty body")
    return bytes(body)


def opt_out_rule(values: Iterable[str]) -> str | None:
    """The first rule of the X-Robots-Tag headers by which we may not take the photo. A name with a colon scopes
    the rules behind it, up to the next one, to that crawler: only ours and `*` are meant for us."""
    for value in values:
        for_us = True
        for part in value.lower().split(","):
            *names, rule = (piece.strip() for piece in part.split(":"))
            for name in names:
                if name in VALUED_RULES:
                    rule = ""
                    break
                if re.fullmatch(r"[a-z*][\w.*/-]*", name):  # else it is the hour of an unavailable_after
                    for_us = name == "*" or name.partition("/")[0] == AGENT
            if for_us and rule in OPT_OUTS:
                return rule
    return None


def retry_after_seconds(value: str, now: float) -> float:
    """Of a Retry-After header: seconds or a date; 0 when it says nothing that can be read."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError):
        return 0.0
