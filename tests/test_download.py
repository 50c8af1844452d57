"""Lists of URLs: what becomes of each row, of each answer of a server, and of a process that is killed.

The server is a real one, on 127.0.0.1 in a thread; it counts requests and how many it serves at once.
"""

import asyncio
import contextlib
import hashlib
import json
import pickle
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiohttp
import pyarrow
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from shards import download
from shards.download import Limits, opt_out_rule, retry_after_seconds, url_list
from shards.writer import RawSample, Source, Unavailable

FAST = Limits(timeout_seconds=5, backoff_seconds=0.02, max_bytes=5000)
HITS = web.AppKey("hits", Counter)
PHOTO = b"\xff\xd8\xff" + bytes(range(256)) * 4  # nothing here decodes it


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


# ---- the server ----


async def photo(request: web.Request) -> web.StreamResponse:
    return web.Response(body=PHOTO + request.path.encode(), content_type="image/jpeg")


def first(times: int, answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
    """`answer` so many times, then the photo."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return await (answer if request.app[HITS][request.path] <= times else photo)(request)

    return handler


def status(number: int, **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=number, headers=named, body=PHOTO, content_type="image/jpeg")

    return handler


def broken_off(abort: bool, declared: int = 2000) -> Any:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(declared), "Content-Type": "image/jpeg"})
        await response.prepare(request)
        await response.write(PHOTO)
        assert request.transport is not None
        request.transport.abort() if abort else request.transport.close()
        return response

    return handler


async def drip(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(100):
        await response.write(b"\xff")
        await asyncio.sleep(0.05)
    return response


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()  # chunked: no length says how much comes
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):  # the client hangs up
        while True:
            await response.write(b"\xff" * 1000)
    return response


def text(body: str, content_type: str) -> Any:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(text=body, content_type=content_type)

    return handler


def moved(to: str) -> Any:
    async def handler(request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound(to)

    return handler


class Server:
    """Answers by the first part of the path; what it doesn't know is a photo."""

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()
        self.now = self.peak = 0
        self.delay = 0.0
        self.answers: dict[str, Any] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    async def _start(self) -> str:
        app = web.Application()
        app[HITS] = self.hits
        app.router.add_route("*", "/{name:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.hits[request.path] += 1
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            await asyncio.sleep(self.delay)
            return await self.answers.get(request.path.split("/")[1], photo)(request)
        finally:
            self.now -= 1

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.stop()


def tsv(folder: Path, urls: list[str], name: str = "list.tsv") -> Path:
    path = folder / name
    path.write_text("".join(f"caption {i}\t{url}\n" for i, url in enumerate(urls)))
    return path


def fetch(
    folder: Path, urls: list[str], limits: Limits = FAST, retry_failed: bool = False
) -> dict[str, bytes | tuple[str, str]]:
    """By url: the bytes, or (reason, detail)."""
    source = url_list([("train", tsv(folder, urls))], folder / "downloads", limits, retry_failed)
    return outcomes(source, list(source.samples))


def outcomes(source: Source, samples: list[RawSample]) -> dict[str, bytes | tuple[str, str]]:
    prepare, samples = pickle.loads(pickle.dumps((source.prepare, samples)))  # as it goes to a worker
    prepare(samples)
    found: dict[str, bytes | tuple[str, str]] = {}
    for sample in samples:
        try:
            found[sample.url] = sample.image()
        except Unavailable as error:
            found[sample.url] = (error.reason, error.detail)
    return found


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of all logs."""
    text = "".join(path.read_text() for path in sorted(folder.glob("*.jsonl")))
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


# ---- answers ----

ANSWERS = [
    # name, handler, requests, what comes of it (None: the photo)
    ("plain", photo, 1, None),
    ("gone", status(404), 1, ("dead link", "HTTP 404")),
    ("removed", status(410), 1, ("dead link", "HTTP 410")),
    ("forbidden", status(403), 1, ("dead link", "HTTP 403")),
    ("nothing", status(204), 1, ("dead link", "HTTP 204")),
    ("twice503", first(2, status(503)), 3, None),
    ("always503", status(503), 3, ("server error", "HTTP 503")),
    ("busy", first(1, status(429, Retry_After="0")), 2, None),
    ("later", status(429, Retry_After="3600"), 1, ("server error", "HTTP 429")),
    ("reset", broken_off(abort=True), 3, ("short body", "")),
    ("reset-once", first(1, broken_off(abort=True)), 2, None),
    ("short", broken_off(abort=False), 3, ("short body", "")),
    ("short-once", first(1, broken_off(abort=False)), 2, None),
    ("moved", moved("/plain/target.jpg"), 1, None),
    ("circle", moved("/circle/x.jpg"), 6, ("dead link", "more than 5 redirects")),
    ("elsewhere", moved("ftp://127.0.0.1/x.jpg"), 1, ("dead link", "")),
    ("page", text("<p>sold out</p>", "text/html"), 1, ("not an image", "content type text/html")),
    ("hidden-page", text("\n<!DOCTYPE html><p>", "image/jpeg"), 1, ("not an image", "")),
    ("empty", text("", "image/jpeg"), 1, ("not an image", "empty body")),
    ("large", text("x" * 5001, "image/jpeg"), 1, ("too large", "5001 bytes, more than 5000")),
    ("endless", endless, 1, ("too large", "more than 5000 bytes")),
    ("opted-out", status(200, X_Robots_Tag="noai, noimageai"), 1, ("opted out", "X-Robots-Tag: noai")),
    ("for-others", status(200, X_Robots_Tag="googlebot: noindex"), 1, None),
    ("for-us", status(200, X_Robots_Tag="diffcap-dist: noimageai"), 1, ("opted out", "X-Robots-Tag: noimageai")),
]


def test_each_answer_of_a_server(server: Server, tmp_path: Path) -> None:
    server.answers = {name: handler for name, handler, _, _ in ANSWERS}
    urls = {name: f"{server.url}/{name}/x.jpg" for name, _, _, _ in ANSWERS}
    found = fetch(tmp_path, list(urls.values()))
    for name, _, requests, expected in ANSWERS:
        outcome = found[urls[name]]
        assert server.hits[f"/{name}/x.jpg"] == requests, name
        if expected is None:
            assert isinstance(outcome, bytes) and outcome.startswith(PHOTO), (name, outcome)
        else:
            assert isinstance(outcome, tuple) and outcome[0] == expected[0], (name, outcome)
            assert outcome[1].startswith(expected[1]), (name, outcome)
    assert {path.suffix for path in (tmp_path / "downloads").iterdir()} == {".jsonl", ".blob"}
    logged = {entry["url"]: entry for entry in log_lines(tmp_path / "downloads")}
    assert logged.keys() == set(urls.values())
    assert logged[urls["twice503"]]["attempts"] == 3
    (blob,) = (tmp_path / "downloads").glob("*.blob")
    assert blob.stat().st_size == sum(len(outcome) for outcome in found.values() if isinstance(outcome, bytes))


def test_an_opt_out_on_the_way_counts(server: Server, tmp_path: Path) -> None:
    server.answers = {"from": status(302, X_Robots_Tag="noai", Location="/to/x.jpg")}
    url = f"{server.url}/from/x.jpg"
    assert fetch(tmp_path, [url]) == {url: ("opted out", "X-Robots-Tag: noai")}


def test_a_dripping_server_is_left_after_the_timeout(server: Server, tmp_path: Path) -> None:
    server.answers = {"drip": drip}
    url, start = f"{server.url}/drip", time.monotonic()
    found = fetch(tmp_path, [url], Limits(timeout_seconds=0.2, attempts=2, backoff_seconds=0.02))
    assert found == {url: ("timed out", "after 0.2 s")}
    assert server.hits["/drip"] == 2 and time.monotonic() - start < 4


def test_nobody_listens(tmp_path: Path, server: Server) -> None:
    found = fetch(tmp_path, ["http://127.0.0.1:1/x.jpg", f"{server.url}/x.jpg", "http://exa..mple:80/x.jpg"])
    reasons = [outcome[0] for outcome in found.values() if isinstance(outcome, tuple)]
    assert reasons == ["connection failed", "dead link"]


def test_without_network_nothing_is_put_down(tmp_path: Path) -> None:
    urls = [f"http://127.0.0.{i}:1/x.jpg" for i in range(1, 12)]
    with pytest.raises(ValueError, match=r"not one of 11 hosts could be reached.*Is there a network"):
        fetch(tmp_path, urls)
    assert log_lines(tmp_path / "downloads") == []


def test_dead_hosts_beside_one_that_answers_are_dead(server: Server, tmp_path: Path) -> None:
    server.answers = {"gone": status(404)}
    urls = [f"{server.url}/gone"] + [f"http://127.0.0.{i}:1/x.jpg" for i in range(1, 12)]
    fetch(tmp_path, urls)
    (log,) = (tmp_path / "downloads").glob("*.jsonl")
    only_the_answer = [line for line in log.read_bytes().splitlines(keepends=True) if b"HTTP 404" in line]
    log.write_bytes(b"".join(only_the_answer))  # as after a kill
    found = fetch(tmp_path, urls)
    assert Counter(one[0] for one in found.values()) == {"dead link": 1, "connection failed": 11}


@pytest.mark.parametrize(
    ("error", "reason", "may_pass"),
    [
        (aiohttp.ServerDisconnectedError(), "connection failed", True),
        (aiohttp.ClientConnectorCertificateError(Mock(), ssl.CertificateError("expired")), "connection failed", False),
        (OSError(101, "Network is unreachable"), "connection failed", True),
        (aiohttp.ServerTimeoutError(), "timed out", True),
        (UnicodeError("label too long"), "dead link", False),
    ],
)
def test_errors_of_connections(error: Exception, reason: str, may_pass: bool) -> None:
    session = Mock(get=Mock(side_effect=error))
    with pytest.raises(download._Failed) as failed:
        asyncio.run(download._request(session, "http://a/b", FAST))
    assert (failed.value.reason, failed.value.may_pass) == (reason, may_pass)


def test_retry_after_is_waited_for(server: Server, tmp_path: Path) -> None:
    server.answers = {"busy": first(1, status(429, Retry_After="1"))}
    start = time.monotonic()
    fetch(tmp_path, [f"{server.url}/busy"])
    assert time.monotonic() - start >= 1 and server.hits["/busy"] == 2


def test_retry_after_as_seconds_and_as_date() -> None:
    assert retry_after_seconds("17", 0) == 17
    assert retry_after_seconds(formatdate(1_000_017, usegmt=True), 1_000_000) == 17
    assert retry_after_seconds(formatdate(999_000, usegmt=True), 1_000_000) == 0
    assert retry_after_seconds("soon", 0) == retry_after_seconds("", 0) == retry_after_seconds("-5", 0) == 0


def test_the_limits_hold(server: Server, tmp_path: Path) -> None:
    server.delay = 0.03
    urls = [f"{server.url}/{i}.jpg" for i in range(24)]
    assert len(fetch(tmp_path, urls, Limits(connections=8, per_host=3))) == 24
    assert server.peak == 3
    urls = [f"{url.replace('127.0.0.1', host)}?2" for url in urls for host in ("127.0.0.1", "localhost")]
    server.peak = 0
    assert len(fetch(tmp_path, urls, Limits(connections=5, per_host=4))) == 48
    assert server.peak == 5


def test_waiting_for_a_place_is_no_timeout(server: Server, tmp_path: Path) -> None:
    server.delay = 0.1
    urls = [f"{server.url}/{i}.jpg" for i in range(12)]
    found = fetch(tmp_path, urls, Limits(per_host=1, timeout_seconds=1, attempts=1))
    assert all(isinstance(outcome, bytes) for outcome in found.values())


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="attempts is 0, it must be more than 0"):
        Limits(attempts=0)


def test_backoff_doubles_and_is_the_same_each_time() -> None:
    waits = [download._backoff("http://a/b", attempt, Limits()) for attempt in range(1, 12)]
    assert waits == [download._backoff("http://a/b", attempt, Limits()) for attempt in range(1, 12)]
    assert all(0.5 * 2**i <= wait <= 1.5 * 2**i for i, wait in enumerate(waits[:5]))
    assert waits[-1] == 60
    assert download._backoff("http://a/c", 1, Limits()) != waits[0]


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        (["noai"], "noai"),
        (["NoIndex, nofollow"], "noindex"),
        (["nofollow, noarchive", "noimageindex"], "noimageindex"),
        (["none"], "none"),
        (["*: noimageai"], "noimageai"),
        (["googlebot: noindex, noai"], None),
        (["googlebot: nofollow, diffcap-dist: noai"], "noai"),
        (["diffcap-dist/0.1: nofollow, noai"], "noai"),
        (["googlebot: noindex", "noai"], "noai"),
        (["unavailable_after: Wed, 25 Jun 2031 15:00:00 GMT, noai"], "noai"),
        (["max-image-preview: none, all"], None),
        (["googlebot: max-snippet: 10, noindex"], None),
        (["all"], None),
        ([""], None),
        ([], None),
    ],
)
def test_opt_out_rules(values: list[str], rule: str | None) -> None:
    assert opt_out_rule(values) == rule


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text()), st.sampled_from(sorted(download.OPT_OUTS)), st.lists(st.text()))
def test_a_header_of_its_own_always_opts_out(before: list[str], rule: str, after: list[str]) -> None:
    assert opt_out_rule([*before, rule, *after]) is not None


# ---- again ----


def test_a_second_run_asks_for_nothing_and_retry_for_what_failed(server: Server, tmp_path: Path) -> None:
    server.answers = {"gone": status(404), "twice": first(3, status(503))}
    urls = [f"{server.url}/{path}" for path in ("a.jpg", "gone/b.jpg", "c.jpg", "twice/d.jpg")]
    found = fetch(tmp_path, urls)
    assert isinstance(found[urls[3]], tuple)
    server.hits.clear()
    assert fetch(tmp_path, urls) == found and not server.hits
    server.hits["/twice/d.jpg"] = 3
    again = fetch(tmp_path, urls, retry_failed=True)
    assert server.hits == {"/gone/b.jpg": 1, "/twice/d.jpg": 4}
    assert isinstance(again[urls[3]], bytes) and again[urls[1]] == found[urls[1]]
    server.hits.clear()
    assert fetch(tmp_path, urls) == again and not server.hits


def test_shards_of_another_size_find_what_was_fetched(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "URLS_PER_STORE", 10)
    urls = [f"{server.url}/{i}.jpg" for i in range(25)]
    path = tsv(tmp_path, urls)
    for size in (10, 7, 25):
        source = url_list([("train", path)], tmp_path / "downloads", FAST, False)
        samples = list(source.samples)
        for start in range(0, 25, size):
            outcomes(source, samples[start : start + size])
        assert set(server.hits.values()) == {1} and len(server.hits) == 25
    assert len(list((tmp_path / "downloads").iterdir())) == 6


def test_two_workers_in_one_store_take_turns(server: Server, tmp_path: Path) -> None:
    server.delay = 0.02
    urls = [f"{server.url}/{i}.jpg" for i in range(20)]
    source = url_list([("train", tsv(tmp_path, urls))], tmp_path / "downloads", FAST, False)
    samples = list(source.samples)
    assert source.prepare is not None
    workers = [threading.Thread(target=source.prepare, args=(part,)) for part in (samples[:12], samples[8:])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert set(server.hits.values()) == {1} and len(server.hits) == 20
    assert all(sample.image is not None and sample.image().startswith(PHOTO) for sample in samples)


KILLED = """
import sys
from pathlib import Path
from shards.download import Limits, url_list
source = url_list([("train", Path(sys.argv[1]))], Path(sys.argv[2]), Limits(per_host=2), False)
source.prepare(list(source.samples))
"""


@pytest.mark.parametrize("requests_before", [1, 15])
def test_killed_and_run_again(server: Server, tmp_path: Path, requests_before: int) -> None:
    server.delay = 0.02
    urls = [f"{server.url}/{i}.jpg" for i in range(40)]
    path = tsv(tmp_path, urls)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(tmp_path / "downloads")])
    deadline = time.monotonic() + 30
    while sum(server.hits.values()) < requests_before and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    logged = {entry["url"] for entry in log_lines(tmp_path / "downloads")}
    assert requests_before - 3 <= len(logged) < 40
    time.sleep(0.1)  # what the server still has in hand
    server.hits.clear()
    server.delay = 0
    found = fetch(tmp_path, urls)
    assert found == {url: PHOTO + url.removeprefix(server.url).encode() for url in urls}
    assert {server.url + path for path in server.hits} == set(urls) - logged
    assert set(server.hits.values()) == {1}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_torn_tail_is_dropped(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("store")
    log, blob = folder / "a.jsonl", folder / "a.blob"
    photos = {f"http://a/{i}": bytes([i]) * size for i, size in enumerate(data.draw(st.lists(st.integers(1, 40))))}
    with download._Store(log) as store:
        for url, body in photos.items():
            store.add(url, body, 1)
        store.add_failed("http://a/none", "dead link", "HTTP 404", 1)
    whole = log.read_bytes()
    log.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    in_flight = data.draw(st.binary())  # either bytes without a line, or (the power went) lines without bytes
    whole = blob.read_bytes()
    blob.write_bytes(whole + in_flight if in_flight else whole[: data.draw(st.integers(0, len(whole)))])
    with download._Store(log) as store:
        kept = set(store.entries)
        store.add("http://a/new", b"new", 1)
    assert set(list(photos)[: len(kept)]) >= kept - {"http://a/none"}
    for url in kept - {"http://a/none"}:
        assert download.DownloadedPhoto(log, url)() == photos[url]
    assert download.DownloadedPhoto(log, "http://a/new")() == b"new"
    with download._Store(log) as store:
        assert set(store.entries) == kept | {"http://a/new"}


def test_a_damaged_store_is_named(server: Server, tmp_path: Path) -> None:
    urls = [f"{server.url}/{i}.jpg" for i in range(3)]
    fetch(tmp_path, urls)
    (blob,) = (tmp_path / "downloads").glob("*.blob")
    (log,) = (tmp_path / "downloads").glob("*.jsonl")
    body = bytearray(blob.read_bytes())
    body[5] ^= 1
    blob.write_bytes(body)
    with pytest.raises(ValueError, match=r"blob: the \d+ bytes at 0 are not those fetched from.*Delete it and"):
        fetch(tmp_path, urls)
    log.write_bytes(b"x" + log.read_bytes())
    with pytest.raises(ValueError, match=r"the line at byte 0 is damaged.*Delete it and"):
        fetch(tmp_path, urls)


def test_a_photo_before_its_download(tmp_path: Path) -> None:
    source = url_list([("train", tsv(tmp_path, ["http://a/b"]))], tmp_path / "downloads", FAST, False)
    (sample,) = source.samples
    assert sample.image is not None
    with pytest.raises(ValueError, match="has no line for http://a/b"):
        sample.image()


def test_a_full_disk_ends_the_run(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: download._Store, url: str, data: bytes, attempts: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download._Store, "add", full)
    with pytest.raises(OSError, match="No space left"):
        fetch(tmp_path, [f"{server.url}/{i}.jpg" for i in range(20)])
    assert sum(server.hits.values()) < 20


# ---- rows ----

ROWS = [
    (b"a dog", b"http://a/1"),
    (b" caf\xc3\xa9 ", b"https://a/2?x=y z"),
    (b"bad \xff", b"http://a/3"),
    (b"  ", b"http://a/4"),
    (b"a cat", b"ftp://a/5"),
    (b"a cat", b""),
    (b"a cat", b"http://a b/6"),
    (b"a cat", b"http://a:x/7"),
    (b"another dog", b"http://a/1"),
    (b"last", b"http://a/8"),
]
REASONS = ["bad UTF-8", "blank caption", *["no http(s) url"] * 4, "url comes again"]


def read(path: Path, folder: Path) -> tuple[list[RawSample], list[tuple[str, str, str]]]:
    source = url_list([("train", path)], folder / "downloads", FAST, False)
    samples = list(source.samples)
    assert all((one.photos, one.captions, one.by_choice) == (1, 1, False) for one in source.rejected)
    return samples, [(one.photo_id, one.reason, one.detail) for one in source.rejected]


def check(samples: list[RawSample], rejected: list[tuple[str, str, str]]) -> None:
    assert len(samples) + len(rejected) == len(ROWS)
    assert [sample.url for sample in samples] == ["http://a/1", "https://a/2?x=y z", "http://a/8"]
    assert [sample.captions for sample in samples] == [["a dog"], ["café"], ["last"]]
    assert samples[0].photo_id == hashlib.sha256(b"http://a/1").hexdigest()[:16]
    assert {(sample.split, sample.source) for sample in samples} == {("train", "urls")}
    assert [reason for _, reason, _ in rejected] == REASONS


def test_cc3m_layout(tmp_path: Path) -> None:
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_bytes(b"".join(caption + b"\t" + url + b"\n" for caption, url in ROWS))
    samples, rejected = read(path, tmp_path)
    check(samples, rejected)
    assert rejected[0][2] == "Train_GCC-training.tsv:3"
    assert rejected[2][2] == "Train_GCC-training.tsv:5 ftp://a/5"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    check(*read(path, tmp_path))


@pytest.mark.parametrize("caption", [b"caption", b"TEXT"])
def test_header_in_any_order_and_case(tmp_path: Path, caption: bytes) -> None:
    lines = [b"\xef\xbb\xbfURL\tsize\t" + caption, *(url + b"\t7\t" + caption for caption, url in ROWS)]
    (tmp_path / "list.tsv").write_bytes(b"\n".join(lines))
    samples, rejected = read(tmp_path / "list.tsv", tmp_path)
    check(samples, rejected)
    assert rejected[0][2] == "list.tsv:4"


def test_lines_that_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("a\thttp://a/1\n\nb\n\nc\thttp://a/2\tmore\nd\thttp://a/3\n")
    samples, rejected = read(tmp_path / "list.tsv", tmp_path)
    assert [sample.captions for sample in samples] == [["a"], ["d"]]
    assert rejected == [("", "row is no caption and url", f"list.tsv:{i}") for i in (2, 3, 4, 5)]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), "dictionary"])
def test_parquet_is_as_tsv(tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PARQUET_BATCH", 3)
    captions = [caption for caption, _ in ROWS]
    urls = [url or None for _, url in ROWS]
    arrays = [pyarrow.array(values, pyarrow.binary()) for values in (urls, [b"x"] * len(ROWS), captions)]
    if kind != pyarrow.binary():
        # Arrow lets no bad UTF-8 in by a checked cast, but files made elsewhere hold it.
        arrays = [pyarrow.Array.from_buffers(pyarrow.string(), len(one), one.buffers()) for one in arrays]
    if kind == "dictionary":
        arrays = [one.dictionary_encode() for one in arrays]
    elif kind == pyarrow.large_string():
        arrays = [one.cast(pyarrow.large_binary()).view(pyarrow.large_string()) for one in arrays]
    path = tmp_path / "list"  # known by its content
    parquet.write_table(pyarrow.table(arrays, names=["URL", "other", "Text"]), path)
    samples, rejected = read(path, tmp_path)
    check(samples, rejected)
    assert rejected[0][2] == "list:3"


def test_splits_share_no_url_and_the_place_in_the_store_is_by_split(tmp_path: Path) -> None:
    urls = [f"http://a/{i}" for i in range(2500)]
    train, more = tsv(tmp_path, urls[:1200], "t.tsv"), tsv(tmp_path, urls[1200:2400], "u.tsv")
    val = tsv(tmp_path, urls[2300:], "v.tsv")
    source = url_list([("train", train), ("train", more), ("val", val)], tmp_path / "downloads", FAST, False)
    samples = list(source.samples)
    assert Counter(sample.split for sample in samples) == {"train": 2400, "val": 100}
    assert {(one.reason, one.detail.split(":")[0]) for one in source.rejected} == {("url comes again", "v.tsv")}
    assert len(source.rejected) == 100
    logs = Counter(sample.image.log for sample in samples)  # type: ignore[union-attr]
    assert sorted(logs.values()) == [100, 400, 1000, 1000]


def test_provenance_is_of_the_contents_alone(tmp_path: Path) -> None:
    path = tsv(tmp_path, ["http://a/1"])
    first = url_list([("train", path)], tmp_path / "downloads", FAST, False).provenance
    moved = path.rename(tmp_path / "moved.tsv")
    assert url_list([("train", moved)], tmp_path / "other", Limits(), True).provenance == first
    assert json.loads(json.dumps(first)) == first
    assert url_list([("val", moved)], tmp_path / "downloads", FAST, False).provenance != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"http://a/1\ta dog\n", "expected `caption<TAB>url`.*Add such a header"),
        (b"url,caption\n", "expected `caption<TAB>url`"),
        (b"url\tcaption\ttext\n", "more than one may be meant"),
        (b"PAR1 and then nothing", "can't be read as parquet"),
    ],
)
def test_files_that_are_no_list(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        url_list([("train", tmp_path / "list.tsv")], tmp_path / "downloads", FAST, False)


def test_parquet_without_the_columns(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"a": ["x"], "url": ["y"]}), tmp_path / "list.parquet")
    with pytest.raises(ValueError, match="has the columns a, url, expected url and caption"):
        url_list([("train", tmp_path / "list.parquet")], tmp_path / "downloads", FAST, False)


def test_a_long_list_is_read_as_it_is_used(tmp_path: Path) -> None:
    path = tsv(tmp_path, [f"http://a/{i}" for i in range(10)])
    source = url_list([("train", path)], tmp_path / "downloads", FAST, False)
    assert next(iter(source.samples)).captions == ["caption 0"]
    assert isinstance(source.samples, Iterator)


def test_a_host_that_never_answers_is_given_up(tmp_path: Path) -> None:
    """It takes connections and says nothing: 60 urls of it don't cost 60 times the patience of one."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(100)
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}/{number}" for number in range(60)]
        started = time.monotonic()
        found = fetch(tmp_path, urls, Limits(timeout_seconds=0.3, attempts=3, backoff_seconds=0.02))
    assert time.monotonic() - started < 5  # 60 urls x 3 attempts x 0.3 s / 4 at once are 13.5
    reasons = Counter(outcome[0] for outcome in found.values() if isinstance(outcome, tuple))
    assert reasons[download.HOST_SILENT] > 40 and set(reasons) <= {download.HOST_SILENT, download.TIMED_OUT}
