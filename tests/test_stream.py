"""The stream on real shards: the same batches for any workers and ranks, from any position; clear errors."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffcap_dist.config import DataConfig, TrainShards
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.order import Place
from diffcap_dist.data.photo import decode_photo
from diffcap_dist.data.pixels import Crop
from diffcap_dist.data.shard_format import Shard, ShardDamage, ShardIndex, ShardInfo
from diffcap_dist.data.stream import (
    Batch,
    CaptionStream,
    Photo,
    ShardReader,
    all_records,
    chosen_captions,
    evaluation_photos,
)
from shards.output import Folder
from shards.writer import RawSample, ShardSettings, Source, write_dataset

CONFIG = DataConfig(shards="", max_length=18, num_workers=0, canonical_spans=4, shuffle_window=8, captions_per_image=2)


@pytest.fixture(scope="module")
def reader(scene_shards: Path) -> ShardReader:
    return ShardReader(scene_shards, "train", "oracle")


@pytest.fixture(scope="module")
def tokenizer(reader: ShardReader) -> CaptionTokenizer:
    return CaptionTokenizer.from_captions(c for _, record in all_records(reader) for c in record["captions"])


def global_batches(
    reader: ShardReader, tokenizer: CaptionTokenizer, workers: int, world: int, start: int, steps: int
) -> list[tuple]:
    """Steps of 8 photos put together from the ranks' batches, in the order of positions."""
    config = dataclasses.replace(CONFIG, num_workers=workers)
    streams = []
    for rank in range(world):
        stream = CaptionStream(reader, tokenizer, config, 5, 8, rank, world)
        stream.load_state_dict({"samples_seen": start})
        streams.append(iter(stream))
    result = []
    for _ in range(steps):
        rows = []
        for stream_batches in streams:
            batch: Batch = next(stream_batches)
            rows += list(zip(batch.positions, batch.keys, batch.ids_NCL.tolist(), batch.pooled_NF.tolist()))  # type: ignore
        result.append(sorted(rows))
    return result


@pytest.mark.parametrize("workers, world", [(0, 2), (0, 4), (2, 1), (1, 2)])
def test_batches_do_not_depend_on_workers_or_ranks(
    reader: ShardReader, tokenizer: CaptionTokenizer, workers: int, world: int
) -> None:
    assert global_batches(reader, tokenizer, workers, world, 0, 12) == global_batches(reader, tokenizer, 0, 1, 0, 12)


def test_restored_anywhere_the_rest_is_the_same(reader: ShardReader, tokenizer: CaptionTokenizer) -> None:
    whole = global_batches(reader, tokenizer, 0, 1, 0, 12)
    assert global_batches(reader, tokenizer, 0, 2, 5 * 8, 7) == whole[5:]


def test_features_belong_to_their_photo(reader: ShardReader, tokenizer: CaptionTokenizer, scene_shards: Path) -> None:
    archive = np.load(scene_shards.parent / "oracle.npz")
    by_name = dict(zip(archive["names"].tolist(), archive["features"]))
    batch = next(iter(CaptionStream(reader, tokenizer, CONFIG, 0, 8)))
    for key, pooled_F in zip(batch.keys, batch.pooled_NF):  # type: ignore[arg-type]
        np.testing.assert_allclose(pooled_F, by_name[key].astype(np.float16), rtol=1e-3)


def test_captions_of_a_visit_differ_and_photos_begin_with_different_ones() -> None:
    texts = ["a", "b", "c", "d", "e"]
    picks = [chosen_captions(texts, 3, 0, Place(0, 0, sample)) for sample in range(400)]
    assert all(len(set(pick)) == 3 for pick in picks)
    assert len(set(map(tuple, picks))) == 20  # five starts, four strides
    assert max(Counter(pick[0] for pick in picks).values()) < 120
    assert sorted(chosen_captions(["a", "b"], 5, 0, Place(0, 0, 1))) in (list("aaabb"), list("aabbb"))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 50), st.integers(0, 99))
def test_epochs_of_photos_are_epochs_of_captions(n: int, count: int, sample: int, start: int) -> None:
    """After n visits that take ``count`` of n captions, each was taken ``count`` times; whenever one begins."""
    texts = [str(i) for i in range(n)]
    visits = [chosen_captions(texts, count, 7, Place(start + visit, 3, sample)) for visit in range(n)]
    assert Counter(text for visit in visits for text in visit) == dict.fromkeys(texts, count)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_evaluation_sees_each_photo_once(scene_shards: Path, world: int) -> None:
    reader = ShardReader(scene_shards, "test", "oracle")
    keys = [photo.key for rank in range(world) for photo in evaluation_photos(reader, rank, world)]
    assert sorted(keys) == sorted(key for key, _ in all_records(reader)) and len(keys) == 12


def test_other_captions_stand_in_for_the_shards(
    reader: ShardReader, tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    """A teacher's captions, by key; a photo without any, a line that is none and a missing file are named."""
    keys = [photo.key for photo in evaluation_photos(reader)]
    file = tmp_path / "teacher.jsonl"
    file.write_text("".join(json.dumps({"key": key, "captions": [f"a {key}", "a circle"]}) + "\n" for key in keys))
    config = dataclasses.replace(CONFIG, captions=str(file))
    batch = next(iter(CaptionStream(reader, tokenizer, config, 5, 8)))
    assert [sorted(some) for some in batch.captions] == [["a circle", f"a {key}"] for key in batch.keys]
    records = dict(all_records(reader))
    assert batch.references == [records[key]["captions"] for key in batch.keys]
    file.write_text(json.dumps({"key": keys[0], "captions": ["a circle"]}) + "\n")
    with pytest.raises(ValueError, match=r"teacher\.jsonl has no captions for scene-train-"):
        list(islice(CaptionStream(reader, tokenizer, config, 5, 8), 8))
    for line in ("{", '{"key": "a"}', '{"key": "a", "captions": []}', '{"key": "a", "captions": [1]}'):
        file.write_text(json.dumps({"key": "b", "captions": ["a circle"]}) + f"\n{line}\n")
        with pytest.raises(ValueError, match=r"teacher\.jsonl, line 2: expected"):
            CaptionStream(reader, tokenizer, config, 5, 8)
    with pytest.raises(ValueError, match="no such file"):
        CaptionStream(reader, tokenizer, dataclasses.replace(CONFIG, captions=str(tmp_path / "no.jsonl")), 5, 8)


def test_training_sees_no_caption_of_another_split(
    reader: ShardReader, tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows of captions are split, a photo's record has the others too, for scoring alone."""
    photo_at = reader.photo

    def with_others(shard: int, sample: int, crop: object = None) -> Photo:
        photo = photo_at(shard, sample)
        own = photo.record["captions"][:2]
        return photo._replace(record={**photo.record, "captions": own, "references": photo.record["captions"]})

    monkeypatch.setattr(reader, "photo", with_others)
    batch = next(iter(CaptionStream(reader, tokenizer, CONFIG, 5, 8)))
    assert [len(some) for some in batch.references] == [2] * 8


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
def test_records_of_one_shard_in_so_many(every: int, uneven: ShardReader) -> None:
    assert len(uneven.counts) > 2
    records = iter(all_records(uneven))
    of_shards = [list(islice(records, count)) for count in uneven.counts]
    assert list(all_records(uneven, every=every)) == [record for some in of_shards[::every] for record in some]


def test_pixels_go_through_the_transform(scene_shards: Path, tokenizer: CaptionTokenizer) -> None:
    reader = ShardReader(scene_shards, "train", transform=lambda data: torch.tensor(decode_photo(data).size))
    batch = next(iter(CaptionStream(reader, tokenizer, CONFIG, 0, 4)))
    assert batch.images_NCHW is not None and batch.images_NCHW.tolist() == [[64, 64]] * 4
    assert batch.pooled_NF is None


def test_a_flipped_byte_is_named(scene_shards: Path, tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    shutil.copytree(scene_shards, tmp_path / "s")
    tar = next((tmp_path / "s").glob("train-*.tar"))
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    reader = ShardReader(tmp_path / "s", "train", transform=lambda image: torch.zeros(1))
    with pytest.raises(ShardDamage, match=r"train-000000.*crc32"):
        for shard, count in enumerate(reader.counts):
            for sample in range(count):
                reader.photo(shard, sample)


def test_bad_requests_are_named(scene_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test \(12 samples\), train"):
        ShardReader(scene_shards, "holdout", "oracle")
    with pytest.raises(ValueError, match="oracle"):
        ShardReader(scene_shards, "train", "clip")
    with pytest.raises(ValueError, match="--patches"):
        ShardReader(scene_shards, "train", "oracle", patches=True)
    with pytest.raises(ValueError, match=r"index\.json"):
        ShardReader(tmp_path, "train", "oracle")
    assert ShardIndex.load(scene_shards).num_samples("train") == 64


# ---- the order, through the loader ----


def order_hash(reader: ShardReader, tokenizer: CaptionTokenizer, workers: int, world: int, start: int, end: int) -> str:
    """sha256 of the global batches of 24, from step ``start`` to ``end``."""
    config = dataclasses.replace(CONFIG, num_workers=workers, canonical_spans=8)
    streams = []
    for rank in range(world):
        stream = CaptionStream(reader, tokenizer, config, 5, 24, rank, world)
        stream.load_state_dict({"samples_seen": start * 24})
        streams.append(iter(stream))
    digest = hashlib.sha256()
    for _ in range(start, end):
        batches = [next(stream) for stream in streams]
        rows = sorted(row for batch in batches for row in zip(batch.positions, batch.keys, batch.ids_NCL.tolist()))
        digest.update(repr(rows).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    """Shards of 1, 7, 100, 250, 3, 39 and 0 samples."""
    folder = tmp_path_factory.mktemp("uneven") / "shards"
    counts, names = [1, 7, 100, 250, 3, 39], itertools.count()
    for number, count in enumerate(counts):
        samples = [RawSample(f"p{next(names)}", ["a b", "c"], "train", "made", None) for _ in range(count)]
        part = folder.parent / str(number)
        write_dataset(Source(samples, [], {}, []), Folder(part), ShardSettings(samples_per_shard=300))
    folder.mkdir()
    infos = []
    for number in range(len(counts)):
        info = ShardIndex.load(folder.parent / str(number)).shards[0]
        for ending in (".tar", ".idx.npz"):
            (folder.parent / str(number) / f"{info.name}{ending}").rename(folder / f"train-{number:06d}{ending}")
        infos.append(dataclasses.replace(info, name=f"train-{number:06d}"))
    ShardIndex([*infos, ShardInfo("train-000009", "train", 0, 0, "0" * 64)], {}, {}).save(folder)
    return ShardReader(folder, "train", transform=lambda image: torch.zeros(1))


class Keys(ShardReader):
    """Captions-only shards have nothing to see; the order is all that is asked here."""

    def _image(self, opened: Shard, sample: int, crop: Crop | None) -> torch.Tensor:
        return torch.zeros(1)


@pytest.mark.slow
def test_the_order_is_one_hash_for_every_layout(uneven: ShardReader) -> None:
    reader = Keys(uneven.stores[0].where, "train", transform=lambda image: torch.zeros(1))
    tokenizer = CaptionTokenizer.from_captions(["a b c"])
    steps = 30  # nearly two epochs of 400
    whole = order_hash(reader, tokenizer, 0, 1, 0, steps)
    rest = order_hash(reader, tokenizer, 0, 1, 11, steps)
    for world in (1, 2, 3, 4, 8):
        for workers in (0, 1, 2, 3):
            start, expected = (0, whole) if (world + workers) % 2 else (11, rest)  # every layout once
            assert order_hash(reader, tokenizer, workers, world, start, steps) == expected


# ---- several datasets, and datasets elsewhere ----


def test_a_mix_streams_both_datasets(scene_shards: Path, reader: ShardReader, tokenizer: CaptionTokenizer) -> None:
    """Train and test scenes as two datasets of one split."""
    other = ShardReader(scene_shards, "test", "oracle")
    mixed = ShardReader([scene_shards, scene_shards], "train", "oracle")
    mixed.datasets[1], mixed.shards[1:], mixed.counts[1:] = other.shards, other.shards, other.counts
    mix = [TrainShards("a", 1.0), TrainShards("b", 0.5)]
    stream = CaptionStream(mixed, tokenizer, dataclasses.replace(CONFIG, train=mix), 5, 10)
    keys = [key for batch in itertools.islice(iter(stream), 7) for key in batch.keys]  # an epoch: 64 + 6
    assert sum(key.startswith("scene-test") for key in keys) == 6 and len(set(keys)) == 70


@pytest.fixture
def served(scene_shards: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(scene_shards)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_at_a_url_gives_the_batches_of_a_local_one(
    served: str, reader: ShardReader, tokenizer: CaptionTokenizer, tmp_path: Path, workers: int
) -> None:
    remote = ShardReader(served, "train", "oracle", cache=str(tmp_path / "cache"))
    assert global_batches(remote, tokenizer, workers, 2, 0, 6) == global_batches(reader, tokenizer, 0, 1, 0, 6)
    assert list((tmp_path / "cache").glob("*.tar"))


def test_a_damaged_copy_in_the_cache_is_fetched_anew(served: str, reader: ShardReader, tmp_path: Path) -> None:
    remote = ShardReader(served, "train", "oracle", cache=str(tmp_path / "cache"))
    assert remote.photo(0, 0).key == reader.photo(0, 0).key
    (tar,) = (tmp_path / "cache").glob("[0-9a-f]*.tar")
    content = bytearray(tar.read_bytes())
    content[len(content) // 4 : 3 * len(content) // 4] = bytes(len(content) // 2)
    with tar.open("r+b") as file:  # the same file: the reader has it open
        file.write(content)
    assert [remote.photo(0, i).record for i in range(64)] == [reader.photo(0, i).record for i in range(64)]


# ---- workers ----


class Sick(ShardReader):
    """Dies, or stalls, at its tenth photo."""

    def photo(self, shard: int, sample: int, crop: Crop | None = None) -> Photo:
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen == 10 and self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seen == 10 and self.how == "stalls":
            time.sleep(1000)
        return super().photo(shard, sample, crop)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"), [("dies", "killed by signal|exited unexpectedly"), ("stalls", "where each of them stands")]
)
def test_a_dead_or_stalled_worker_is_an_error_in_seconds(
    scene_shards: Path, tokenizer: CaptionTokenizer, capfd: pytest.CaptureFixture[str], how: str, message: str
) -> None:
    reader = Sick(scene_shards, "train", "oracle")
    reader.how = how  # type: ignore[attr-defined]
    config = dataclasses.replace(CONFIG, num_workers=1, worker_timeout=3.0)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        for _ in CaptionStream(reader, tokenizer, config, 5, 8):
            pass
    assert time.monotonic() - started < 10
    if how == "stalls":
        time.sleep(0.5)
        assert "in photo" in capfd.readouterr().err  # the worker's own stack


@pytest.mark.slow
def test_nothing_leaks_over_200_epochs(reader: ShardReader, tokenizer: CaptionTokenizer) -> None:
    """Memory (the worker's too), files and shared memory stay what they are."""
    batches = iter(CaptionStream(reader, tokenizer, dataclasses.replace(CONFIG, num_workers=1), 5, 16))
    next(batches)
    own, (worker,) = os.getpid(), [child.pid for child in multiprocessing.active_children()]
    measured = []
    for count in (50, 150):
        for _ in itertools.islice(batches, count * 64 // 16):
            pass
        gc.collect()
        shared = [line for one in (own, worker) for line in Path(f"/proc/{one}/maps").read_text().splitlines()]
        shared = [line for line in shared if "/dev/shm/" in line]  # not all that is there: other tests' is too
        measured.append((memory_mb(own) + memory_mb(worker), num_files("/proc/self/fd"), len(shared)))
    (memory, files, shared), (memory_end, files_end, shared_end) = measured
    assert memory_end - memory < 30 and files_end <= files + 5 and shared_end <= shared + 5


def num_files(folder: str) -> int:
    return len(list(Path(folder).iterdir()))


def memory_mb(process: int | None) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_one_open_shard_at_a_time_is_enough(uneven: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffcap_dist.data.stream.MAX_OPEN_SHARDS", 1)
    reader = Keys(uneven.stores[0].where, "train", transform=lambda image: torch.zeros(1))
    before = num_files("/proc/self/fd")
    keys = [reader.photo(shard, 0).key for _ in range(3) for shard in range(6)]
    assert len(set(keys)) == 6 and num_files("/proc/self/fd") <= before + 1


def test_eight_nodes_fetch_an_eighth_of_the_bytes_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of 128 shards over http, each node with a cache of its own: what lies in it is what it fetched."""
    samples = [RawSample(f"p{i}", ["a photo"], "train", "made", None) for i in range(512)]
    write_dataset(Source(samples, [], {}, []), Folder(tmp_path / "set"), ShardSettings(samples_per_shard=4))
    monkeypatch.setattr("diffcap_dist.data.stream.SAMPLES_AHEAD", 1)  # no shard of the next epoch
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "set")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tokenizer = CaptionTokenizer.from_captions(["a photo"])
    everything = sum(path.stat().st_size for path in (tmp_path / "set").glob("train-*"))
    keys, fetched = [], []
    for node in range(8):
        cache = tmp_path / f"node-{node}"
        url = f"http://127.0.0.1:{server.server_port}"
        reader = Keys(url, "train", transform=lambda data: torch.zeros(1), cache=str(cache))
        config = DataConfig(shards="", max_length=4, num_workers=0)
        stream = CaptionStream(reader, tokenizer, config, seed=1, global_batch_size=64, rank=node, world_size=8)
        keys += [key for batch in itertools.islice(iter(stream), 7) for key in batch.keys]
        reader.stores.clear()
        fetched.append(sum(path.stat().st_size for path in cache.iterdir() if not path.name.startswith("lock-")))
    server.shutdown()
    server.server_close()
    assert len(set(keys)) == 448  # the last eighth of the epoch is fetched ahead
    assert 0.85 * everything / 8 <= min(fetched) and max(fetched) <= 1.15 * everything / 8
