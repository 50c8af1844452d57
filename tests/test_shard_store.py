"""Shards through the cache: right bytes or a clear error in time, whatever the server or the neighbours do.

Servers on 127.0.0.1 with faults on order; datasets of a few tiny photos.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffcap_dist.data import fetching, shard_cache, shard_store
from diffcap_dist.data.fetching import ShardUnavailable
from diffcap_dist.data.shard_format import FeatureInfo, Shard, ShardDamage, ShardIndex, file_sha256, open_shard
from diffcap_dist.data.shard_store import ShardStore
from shards.foreign import index_tars
from shards.output import output_at
from shards.writer import RawSample, ShardSettings, Source, write_dataset

NUM_SAMPLES, PER_SHARD = 12, 4
FEATURES = FeatureInfo("tiny", "made", None, 3, (2, 3), "none", {})


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")  # noise: some 7 kB each
    return buffer.getvalue()


def write(folder: Path, first: int = 0) -> Path:
    """Three shards of four photos, with pooled and patch features."""
    samples = [
        RawSample(f"p{i}", [f"photo {i}"], "train", "made", partial(picture, i))
        for i in range(first, first + NUM_SAMPLES)
    ]
    write_dataset(Source(samples, [], {"command": "test", "first": first}, []), output_at(str(folder)), SETTINGS)
    index = ShardIndex.load(folder)
    files: dict[str, dict[str, dict[str, str]]] = {}
    generator = np.random.default_rng(first)
    for info in index.shards:
        for kind, shape in (("pooled", (3,)), ("patches", (2, 3))):
            path = folder / f"{info.name}.tiny.{kind}.npy"
            np.save(path, generator.normal(size=(info.samples, *shape)).astype(np.float16))
            files.setdefault(info.name, {})[kind] = {"file": path.name, "sha256": file_sha256(path)}
    index.features["tiny"] = dataclasses.replace(FEATURES, files=files)
    index.save(folder)
    return folder


SETTINGS = ShardSettings(PER_SHARD, min_side=1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sets") / "one")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sets") / "two", first=100)


class Server(http.server.ThreadingHTTPServer):
    """Files below a folder. `faults` of a path are used up, one a request; `forever` are not."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.gets: list[tuple[str, str]] = []  # (path, Range)
        self.faults: dict[str, list[str]] = {}
        self.forever: dict[str, str] = {}
        self.ranges = True
        self.slow = 0.0  # seconds before each 4 kB
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, end: str) -> int:
        return sum(path.endswith(end) for path, _ in self.gets)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what is tested."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted, path = self.headers.get("Range", ""), self.path
        self.server.gets.append((path, wanted))
        faults = self.server.faults.get(path, [])
        fault = faults.pop(0) if faults else self.server.forever.get(path, "")
        file = self.server.root / path.lstrip("/")
        if fault.isdigit() or not file.is_file():
            return self.send_error(int(fault or 404))
        data = file.read_bytes()
        if fault == "changed":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "cut":  # a whole answer of too few bytes
            data = data[: len(data) // 2]
        start = int(wanted[6:-1]) if wanted and self.server.ranges else 0
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.send_body(data[start:], fault)

    def send_body(self, data: bytes, fault: str) -> None:
        if fault == "reset":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            return self.connection.shutdown(2)
        if fault in ("stall", "drip"):
            for at in range(2000):
                self.wfile.write(data[at : at + 1])
                self.wfile.flush()
                time.sleep(0.05 if fault == "drip" else 20)
        for at in range(0, len(data), 4096):
            time.sleep(self.server.slow)
            self.wfile.write(data[at : at + 4096])

    def log_message(self, format: str, *words: Any) -> None:
        pass


@pytest.fixture
def server(dataset: Path) -> Iterator[Server]:
    started = Server(dataset)
    yield started
    started.shutdown()
    started.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(fetching, "STALL_SECONDS", 5.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def contents(shard: Shard) -> list[tuple[dict[str, Any], bytes | None]]:
    return [(shard.record(sample), shard.image_bytes(sample)) for sample in range(len(shard))]


def expected(folder: Path, number: int = 0) -> list[tuple[dict[str, Any], bytes | None]]:
    return contents(open_shard(folder, ShardIndex.load(folder).shards[number]))


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if not path.name.startswith("lock-")}


def bytes_in(cache: Path) -> int:
    return sum((cache / name).stat().st_size for name in names(cache))


def wait_until(true: Callable[[], object], seconds: float = 8) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


# ---- it works ----


def test_a_local_folder_has_no_cache(dataset: Path, cache: Path) -> None:
    store = ShardStore(dataset, cache)
    feature = store.index.feature("tiny")
    for number, info in enumerate(store.index.shards):
        shard = store.open(info, feature)
        assert contents(shard) == expected(dataset, number) and shard.path == dataset / f"{info.name}.tar"
        assert shard.features(feature)[0].shape == (PER_SHARD, 3)
    store.prefetch(store.index.shards, feature)
    assert not store.forget(store.index.shards[0])
    store.close()
    assert not cache.exists()


def test_what_a_server_has_comes_once_and_checked(server: Server, dataset: Path, cache: Path) -> None:
    store = ShardStore(server.url + "/", cache)
    feature = store.index.feature("tiny")
    for number, info in enumerate(store.index.shards):
        shard = store.open(info, feature)
        assert contents(shard) == expected(dataset, number) and shard.path.name == f"{info.name}.tar"
        local = open_shard(dataset, info).features(feature)
        assert all(np.array_equal(found, wanted) for found, wanted in zip(shard.features(feature), local))
    assert set(Counter(server.gets).values()) == {1} and len(server.gets) == 1 + 3 * 4
    for name in names(cache):
        assert "idx" in name or hashlib.sha256((cache / name).read_bytes()).hexdigest() == name.split(".")[0]
    again = ShardStore(server.url, cache)
    assert contents(again.open(again.index.shards[0])) == expected(dataset)
    assert len(server.gets) == 2 + 3 * 4  # another index.json, nothing else
    assert (cache.stat().st_mode & 0o777) == 0o700


def test_patches_are_fetched_only_where_they_are_wanted(server: Server, cache: Path) -> None:
    store = ShardStore(server.url, cache)
    pooled = dataclasses.replace(store.index.feature("tiny"), patches=None)
    assert store.open(store.index.shards[0], pooled).features(pooled)[1] is None
    assert server.count("pooled.npy") == 1 and server.count("patches.npy") == 0
    with pytest.raises(ValueError, match="opened without features"):
        store.open(store.index.shards[0]).features(pooled)


def test_tars_elsewhere_with_an_index_here(server: Server, dataset: Path, cache: Path, tmp_path: Path) -> None:
    here = tmp_path / "index"
    index_tars([f"{server.url}/train-00000{i}.tar" for i in range(3)], here)
    server.gets.clear()
    store = ShardStore(here, cache)
    assert contents(store.open(store.index.shards[1])) == expected(dataset, 1)
    assert server.gets == [("/train-000001.tar", "")]


def test_a_place_in_memory_and_one_that_is_unknown(dataset: Path, cache: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(dataset), "/sets/one", recursive=True)
    store = ShardStore("memory://sets/one", cache)
    assert contents(store.open(store.index.shards[2])) == expected(dataset, 2)
    with pytest.raises(ShardUnavailable, match=r"nonsense://x/index.json.*after 1 attempt "):
        ShardStore("nonsense://x", cache)


def test_an_object_store(dataset: Path, cache: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    monkeypatch.setattr(fetching, "STALL_SECONDS", 20.0)
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    for path in dataset.iterdir():
        client.upload_file(str(path), name, f"sets/{path.name}")
    store = ShardStore(f"{bucket}/sets", cache, deadline_seconds=20)
    assert contents(store.open(store.index.shards[0], store.index.feature("tiny"))) == expected(dataset)
    client.delete_object(Bucket=name, Key="sets/train-000001.tar")
    with pytest.raises(ShardUnavailable, match=r"captions/sets/train-000001.tar.*not there.*after 1 attempt "):
        store.open(store.index.shards[1])


# ---- faults ----

TAR = "/train-000000.tar"


@pytest.mark.parametrize(
    ("faults", "ranges", "requests"),
    [
        (["503", "503"], True, 3),
        (["429", "500"], True, 3),
        (["reset"], True, 2),
        (["reset"], False, 2),
        (["reset", "reset", "reset"], True, 4),
        (["cut"], True, 2),
        (["stall"], True, 2),
        (["changed"], True, 2),
        (["reset", "changed"], True, 3),
    ],
)
def test_what_passes_is_waited_for(
    server: Server,
    dataset: Path,
    cache: Path,
    faults: list[str],
    ranges: bool,
    requests: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "stall" in faults:
        monkeypatch.setattr(fetching, "STALL_SECONDS", 0.5)
    server.ranges, server.faults[TAR] = ranges, list(faults)
    server.faults["/index.json"], server.faults["/train-000000.idx.npz"] = ["503", "reset"], ["reset", "changed"]
    store = ShardStore(server.url, cache, deadline_seconds=10)
    assert contents(store.open(store.index.shards[0])) == expected(dataset)
    assert server.count(TAR) == requests and not any(name.startswith("part-") for name in names(cache))
    wanted = [range for path, range in server.gets if path == TAR]
    resumed = [bool(range) for range in wanted[1:]]
    assert resumed == [fault in ("reset", "stall") for fault in faults], "what was got is not fetched again"


@pytest.mark.parametrize(
    ("fault", "found", "requests"),
    [
        ("404", "it is not there", 1),
        ("403", "HTTP 403.*credentials", 1),
        ("401", "HTTP 401.*credentials", 1),
        ("410", "HTTP 410", 1),
        ("changed", "not what index.json lists.*sha256", 2),
        ("503", "HTTP 503", None),
        ("cut", r"it has \d+ bytes, index.json says \d+", None),
        ("stall", "no byte came", None),
        ("drip", "too slowly|no byte came", None),
    ],
)
def test_what_stays_is_a_clear_error_in_time(
    server: Server, dataset: Path, cache: Path, fault: str, found: str, requests: int | None
) -> None:
    seconds = 10.0 if requests else 0.8
    store = ShardStore(server.url, cache, deadline_seconds=seconds)
    server.forever[TAR] = fault
    start = time.monotonic()
    with pytest.raises(ShardUnavailable, match=rf"{server.url}{TAR} .*{found}") as raised:
        store.open(store.index.shards[0])
    assert time.monotonic() - start < seconds + 1.5
    assert re.search(r"after \d+ attempts? in [\d.]+ s", str(raised.value))
    assert requests is None or server.count(TAR) == requests
    assert f"{store.index.shards[0].sha256}.tar" not in names(cache)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    server.forever.clear()
    store.deadline_seconds = 10
    assert contents(store.open(store.index.shards[0])) == expected(dataset)


def test_an_attempt_cut_short_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one has no time for an answer: what the others were told is said."""
    failures = [fetching.Failure("HTTP 503"), fetching.OutOfTime("no byte came for 0.0 s")]
    monkeypatch.setattr(fetching, "backoff", lambda place, attempt: 0.0 if attempt == 1 else 9.0)

    def once() -> None:
        raise failures.pop(0)

    with pytest.raises(ShardUnavailable, match=r"fetched: HTTP 503\. Given up after 2 attempts"):
        fetching.retried("http://x", fetching.Deadline(5.0), once)


def test_no_server_no_dataset_no_index(server: Server, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardUnavailable, match=r"index.json can't be fetched: .*efused"):
        ShardStore("http://127.0.0.1:9/set", cache, deadline_seconds=0.3)
    with pytest.raises(ShardUnavailable, match=r"elsewhere/index.json.*not there"):
        ShardStore(f"{server.url}/elsewhere", cache)
    server.root = tmp_path
    (tmp_path / "index.json").write_text("<html>log in here</html>")
    with pytest.raises(ValueError, match="no index of shards"):
        ShardStore(server.url, cache)


def test_an_index_can_not_name_files_outside_the_cache(server: Server, dataset: Path, tmp_path: Path) -> None:
    text = (dataset / "index.json").read_text()
    server.root = tmp_path
    (tmp_path / "index.json").write_text(text.replace(ShardIndex.load(dataset).shards[0].sha256, "../../secret"))
    with pytest.raises(ValueError, match=r"secret.*Do not use it"):
        ShardStore(server.url, tmp_path / "cache")


def test_another_set_under_the_same_names(server: Server, dataset: Path, other: Path, cache: Path) -> None:
    """The tars of one, then the member indexes of the other: neither passes."""
    store = ShardStore(server.url, cache, deadline_seconds=5)
    server.root = other
    with pytest.raises(ShardUnavailable, match=r"not what index.json lists"):
        store.open(store.index.shards[0])
    server.root = dataset
    first = store.index.shards[0]
    wrong = dataclasses.replace(first, samples=first.samples + 1)
    with pytest.raises(ShardUnavailable, match=r"idx.npz .*with 4 samples, not .* with 5"):
        store.open(wrong)
    assert contents(store.open(first)) == expected(dataset)


def test_a_read_only_cache(server: Server) -> None:
    with pytest.raises(ShardUnavailable, match=r"cache /proc/diffcap can't be used.*DIFFCAP_CACHE"):
        ShardStore(server.url, Path("/proc/diffcap"))


def test_a_full_disk(server: Server, dataset: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was used least recently goes; with nothing left to go it is an error, and no half file keeps it full."""
    store = ShardStore(server.url, cache, deadline_seconds=5)
    first, second, _ = store.index.shards
    read = contents(store.open(first))
    count, full = shard_cache.Part._count, [True]

    def write_to_a_full_disk(part: Any, data: bytes) -> None:
        if full[0] or (cache / f"{first.sha256}.tar").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        count(part, data)

    def counted_in_room(part: Any, data: bytes) -> None:
        with part._room_on_disk():
            write_to_a_full_disk(part, data)

    monkeypatch.setattr(shard_cache.Part, "_count", counted_in_room)
    full[0] = False
    assert contents(store.open(second)) == expected(dataset, 1)
    assert f"{first.sha256}.tar" not in names(cache)
    full[0] = True
    with pytest.raises(ShardUnavailable, match=r"disk of the cache .* is full.*Free some space"):
        store.open(first)
    assert bytes_in(cache) == 0 and read == expected(dataset)


# ---- the cache and its other users ----


def in_process(target: Callable[..., Any], *words: Any, method: str = "fork") -> Any:
    process = multiprocessing.get_context(method).Process(target=target, args=words)  # type: ignore[attr-defined]
    process.start()
    return process


def read_all(store: ShardStore, dataset: Path) -> None:
    for number, info in enumerate(store.index.shards):
        assert contents(store.open(info, store.index.feature("tiny"))) == expected(dataset, number)


def read_all_of(url: str, cache: Path, dataset: Path) -> None:
    store = ShardStore(url, cache)
    store.prefetch(store.index.shards, store.index.feature("tiny"))
    read_all(store, dataset)


def test_four_processes_fetch_each_file_once(server: Server, dataset: Path, cache: Path) -> None:
    server.slow = 0.01
    processes = [in_process(read_all_of, server.url, cache, dataset) for _ in range(4)]
    for process in processes:
        process.join(15)
        assert process.exitcode == 0
    assert {path: count for path, count in Counter(path for path, _ in server.gets).items() if count > 1} == {
        "/index.json": 4
    }
    assert len(server.gets) == 4 + 3 * 4


def test_a_killed_process_leaves_its_lock_and_half_a_file(server: Server, dataset: Path, cache: Path) -> None:
    server.slow = 0.1
    process = in_process(read_all_of, server.url, cache, dataset)
    wait_until(lambda: any(path.stat().st_size > 4096 for path in cache.glob("part-*.tar")))
    store = ShardStore(server.url, cache, deadline_seconds=10)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    server.slow, served = 0.0, len(server.gets)
    read_all(store, dataset)
    assert any(range for _, range in server.gets[served:]), "what was there is not fetched again"
    assert not any(name.startswith("part-") for name in names(cache))


def test_a_dead_parents_lock_is_not_held_by_its_child(server: Server, dataset: Path, cache: Path) -> None:
    store = ShardStore(server.url, cache, deadline_seconds=5)
    server.slow = 0.1
    store.prefetch(store.index.shards[:1])
    wait_until(lambda: any(cache.glob("part-*.tar")))
    held = set(shard_cache._held)
    assert held
    child = in_process(time.sleep, 30)
    wait_until(lambda: not any("lock-" in link for link in links_of(child.pid)))
    child.kill()
    server.slow = 0.0
    assert contents(store.open(store.index.shards[0])) == expected(dataset)


def links_of(pid: int) -> list[str]:
    found = []
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed while they are listed
            found.append(str(one.readlink()))
    return found


def test_a_neighbour_that_never_finishes(server: Server, cache: Path) -> None:
    store = ShardStore(server.url, cache, deadline_seconds=0.4)
    info = store.index.shards[0]
    with (cache / f"lock-{info.sha256}.tar").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ShardUnavailable, match=r"train-000000.tar: another process fetches it .* 0.4 s"):
            store.open(info)
    assert server.count(TAR) == 0


def test_half_a_file_that_is_wrong_is_not_built_upon(server: Server, dataset: Path, cache: Path) -> None:
    store = ShardStore(server.url, cache, deadline_seconds=5)
    info = store.index.shards[0]
    (cache / f"part-{info.bytes}-{info.sha256}.tar").write_bytes(b"x" * 1000)
    assert contents(store.open(info)) == expected(dataset)
    assert [wanted for path, wanted in server.gets if path == TAR] == ["bytes=1000-", ""]


@pytest.mark.parametrize("suffix", ["tar", "idx.npz"])
def test_a_torn_file_in_the_cache_is_fetched_again(server: Server, dataset: Path, cache: Path, suffix: str) -> None:
    store = ShardStore(server.url, cache, deadline_seconds=5)
    info = store.index.shards[0]
    store.open(info).close()
    os.truncate(cache / f"{info.sha256}.{suffix}", 300)
    assert contents(store.open(info)) == expected(dataset)
    assert server.count(TAR.replace("tar", suffix)) == 2


def test_a_torn_features_file_is_fetched_again(server: Server, cache: Path) -> None:
    store = ShardStore(server.url, cache, deadline_seconds=5)
    info, feature = store.index.shards[0], store.index.feature("tiny")
    store.open(info, feature).close()
    os.truncate(cache / f"{feature.files[info.name]['pooled']['sha256']}.npy", 140)
    assert store.open(info, feature).features(feature)[0].shape == (PER_SHARD, 3)


def test_a_damaged_shard_is_forgotten_once(server: Server, dataset: Path, cache: Path) -> None:
    store, neighbour = (ShardStore(server.url, cache, deadline_seconds=5) for _ in range(2))
    info = store.index.shards[0]
    store.open(info).close()
    with (cache / f"{info.sha256}.tar").open("r+b") as file:
        file.seek(5000)
        file.write(b"\0" * 100)
    shards = [store.open(info), neighbour.open(info)]
    for shard in shards:
        with pytest.raises(ShardDamage, match=r"train-000000.tar: sample p0"):
            contents(shard)
    assert store.forget(info)
    assert contents(store.open(info)) == expected(dataset)
    assert neighbour.forget(info), "it was damaged for this one too"
    assert contents(neighbour.open(info)) == expected(dataset)
    assert server.count(TAR) == 2, "the good one was thrown away"
    assert not store.forget(info)


def test_the_limit_holds_and_open_shards_read_on(server: Server, dataset: Path, cache: Path) -> None:
    size = max(path.stat().st_size for path in dataset.glob("*.tar"))
    limit = int(2.5 * size)
    cache.mkdir()
    (cache / "notes.txt").write_bytes(b"of somebody else")
    store = ShardStore(server.url, cache, cache_bytes=limit, deadline_seconds=5)
    opened = {}
    for _ in range(2):
        for number, info in enumerate(store.index.shards):
            opened[number] = store.open(info)
            assert bytes_in(cache) <= limit
    assert server.count(".tar") == 6, "the least recently used went each time"
    oldest = store.open(store.index.shards[1])  # now the other one is the oldest
    store.open(store.index.shards[0])
    assert contents(oldest) == contents(store.open(store.index.shards[1])) and server.count(".tar") == 7
    assert all(contents(shard) == expected(dataset, number) for number, shard in opened.items())
    assert (cache / "notes.txt").exists() and len(list(cache.glob("lock-*"))) < 8
    with pytest.raises(ShardUnavailable, match=r"bytes, the cache .* may have 1000"):
        ShardStore(server.url, cache, cache_bytes=1000).open(store.index.shards[0])


def read_under_a_limit(url: str, cache: Path, dataset: Path, limit: int, over: Any) -> None:
    store = ShardStore(url, cache, cache_bytes=limit)
    for turn in range(4):
        number = (turn + os.getpid()) % 3
        assert contents(store.open(store.index.shards[number])) == expected(dataset, number)
        over.value = max(over.value, bytes_in_moving(cache))


def bytes_in_moving(cache: Path) -> int:
    total = 0
    for path in cache.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_the_limit_holds_for_several_processes(server: Server, dataset: Path, cache: Path) -> None:
    limit = int(2.5 * max(path.stat().st_size for path in dataset.glob("*.tar")))
    over = multiprocessing.get_context("fork").Value("q", 0)
    processes = [in_process(read_under_a_limit, server.url, cache, dataset, limit, over) for _ in range(3)]
    for process in processes:
        process.join(15)
        assert process.exitcode == 0
    assert 0 < over.value <= limit


def test_two_datasets_with_the_same_names(dataset: Path, other: Path, cache: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(dataset, both / "one")
    shutil.copytree(other, both / "two")
    server = Server(both)
    stores = [ShardStore(f"{server.url}/{name}", cache) for name in ("one", "two")]
    for _ in range(2):
        for store, folder in zip(stores, (dataset, other)):
            assert contents(store.open(store.index.shards[0])) == expected(folder)
    server.shutdown()
    assert server.count(".tar") == 2


def test_prefetch_is_in_order_and_the_last_call_counts(
    server: Server, dataset: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_store, "PREFETCH_THREADS", 1)
    server.slow = 0.01
    store = ShardStore(server.url, cache)
    first, second, third = store.index.shards
    start = time.monotonic()
    store.prefetch([first, second])
    assert time.monotonic() - start < 0.1
    wait_until(lambda: server.count(TAR))
    store.prefetch([third, second])
    wait_until(lambda: f"{second.sha256}.idx.npz" in names(cache))
    tars = [path for path, _ in server.gets if path.endswith(".tar")]
    assert tars == ["/train-000000.tar", "/train-000002.tar", "/train-000001.tar"]
    assert contents(store.open(third)) == expected(dataset, 2) and server.count(".tar") == 3
    store.prefetch([dataclasses.replace(first, name="lost", sha256="0" * 64)])  # no error, and no thread is left
    wait_until(lambda: not any(thread.name == "prefetch" for thread in threading.enumerate()))


def test_prefetch_does_not_drive_out_what_it_fetched(
    server: Server, dataset: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_store, "PREFETCH_THREADS", 1)
    limit = int(2.5 * max(path.stat().st_size for path in dataset.glob("*.tar")))
    store = ShardStore(server.url, cache, cache_bytes=limit)
    store.prefetch(store.index.shards)
    wait_until(lambda: not any(thread.name == "prefetch" for thread in threading.enumerate()))
    assert {f"{info.sha256}.tar" in names(cache) for info in store.index.shards[:2]} == {True}
    assert server.count(".tar") == 2 and bytes_in(cache) <= limit
    read_all_tars = [contents(store.open(info)) for info in store.index.shards]
    assert read_all_tars == [expected(dataset, number) for number in range(3)]


def test_close_ends_the_prefetch(server: Server, cache: Path) -> None:
    server.slow = 0.1
    store = ShardStore(server.url, cache)
    store.prefetch(store.index.shards)
    wait_until(lambda: server.count(".tar"))
    store.close()
    wait_until(lambda: not any(thread.name == "prefetch" for thread in threading.enumerate()), 1.5)
    assert not any(name.endswith(".tar") and not name.startswith("part-") for name in names(cache))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_goes_on_in_another_process(server: Server, dataset: Path, cache: Path, method: str) -> None:
    """Also while this one is in the middle of its prefetch."""
    server.slow = 0.01
    store = ShardStore(server.url, cache)
    store.prefetch(store.index.shards, store.index.feature("tiny"))
    wait_until(lambda: server.count(".tar"))
    process = in_process(prefetch_and_read_all, store, dataset, method=method)
    read_all(store, dataset)
    process.join(20)
    assert process.exitcode == 0
    assert set(Counter(path for path, _ in server.gets).values()) == {1}


def prefetch_and_read_all(store: ShardStore, dataset: Path) -> None:
    store.prefetch(store.index.shards, store.index.feature("tiny"))
    read_all(store, dataset)
    store.close()


def prefetch_one(store: ShardStore, cache: Path) -> None:
    store.prefetch(store.index.shards[2:])
    wait_until(lambda: f"{store.index.shards[2].sha256}.idx.npz" in names(cache), 5)


def test_a_forked_process_has_threads_of_its_own(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_store, "PREFETCH_THREADS", 1)
    server.slow = 0.05
    store = ShardStore(server.url, cache)
    store.prefetch(store.index.shards[:1])
    wait_until(lambda: server.count(".tar"))
    process = in_process(prefetch_one, store, cache)
    store.close()
    process.join(10)
    assert process.exitcode == 0


def test_the_lock_of_a_deleted_file_keeps_nobody_out(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process evicts between the opening of the lock's file and the lock."""
    path, flock = cache / "lock-one", fcntl.flock
    ShardStore(server.url, cache)

    def after_an_eviction(descriptor: int, kind: int) -> None:
        path.unlink()
        flock(descriptor, kind)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", after_an_eviction)
        assert shard_cache._try_lock(path, fcntl.LOCK_EX) is None
    held = shard_cache._try_lock(path, fcntl.LOCK_EX)
    assert held is not None and shard_cache._try_lock(path, fcntl.LOCK_SH) is None
    shard_cache._unlock(held)
    assert not shard_cache._held


def test_where_the_cache_is(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFCAP_CACHE", str(tmp_path / "named"))
    store = ShardStore(server.url)
    store.open(store.index.shards[0])
    assert len(names(tmp_path / "named")) == 2
    monkeypatch.delenv("DIFFCAP_CACHE")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ShardStore(server.url)
    folder = tmp_path / f"diffcap-cache-{os.getuid()}"
    assert (folder.stat().st_mode & 0o777) == 0o700
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    (tmp_path / f"diffcap-cache-{os.getuid()}").mkdir()
    with pytest.raises(ValueError, match="another user's"):
        ShardStore(server.url)
