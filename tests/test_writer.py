"""The writer: the same bytes whoever writes them and however often it is killed, and nothing half-written."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffcap_dist.data.shard_format import INDEX_FILE, ShardIndex, ShardInfo, open_shard, safe_key
from shards import writer
from shards.make_shards import main
from shards.output import Folder, Store, output_at, write_file
from shards.verification import verify
from shards.writer import (
    REJECTED_FILE,
    UNFINISHED,
    RawSample,
    Rejected,
    ShardSettings,
    Source,
    Unavailable,
    tar_header,
    write_dataset,
)
from tests.test_photos import saved

FIVE = ShardSettings(samples_per_shard=5)


def photo(seed: int) -> bytes:
    if seed % 7 == 3:
        return b"no photo"
    if seed % 11 == 5:
        raise Unavailable("dead link", f"HTTP 404 for {seed}")
    return saved(Image.fromarray(np.random.RandomState(seed).randint(0, 256, (20, 24, 3), np.uint8)))


def good(seed: int) -> bytes:
    return saved(Image.fromarray(np.random.RandomState(seed).randint(0, 256, (20, 24, 3), np.uint8)))


def samples(count: int, stop_after: int | None = None, image: object = good) -> Iterator[RawSample]:
    for i in range(count):
        if i == stop_after:
            raise KeyboardInterrupt
        split = "val" if i % 6 == 5 else "train"
        yield RawSample(f"p{i}", [f"caption {i}", "é “b”"], split, "made", partial(image, i))  # type: ignore[arg-type]


def source(count: int = 20, stop_after: int | None = None, image: object = good) -> Source:
    return Source(samples(count, stop_after, image), [], {"command": "x"}, [])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- the same bytes ----


def test_any_number_of_workers_or_parts_gives_the_same_bytes(tmp_path: Path) -> None:
    """With photos that are rejected in the workers, and shards that stay empty."""
    lenient = {"max_rejected": 1.0}
    one = write_dataset(source(60, image=photo), Folder(tmp_path / "1"), FIVE, **lenient)
    assert one.index is not None and one.index.provenance["counts"]["rejected_photos"] > 10
    write_dataset(source(60, image=photo), Folder(tmp_path / "3"), FIVE, workers=3, **lenient)
    for part in (2, 0, 1):
        written = write_dataset(source(60, image=photo), Folder(tmp_path / "p"), FIVE, part=(part, 3), **lenient)
        assert (written.index is not None) == (part == 1)
    assert contents(tmp_path / "1") == contents(tmp_path / "3") == contents(tmp_path / "p")
    assert verify(tmp_path / "1") == []
    reasons = {json.loads(line)["reason"] for line in (tmp_path / "1" / REJECTED_FILE).read_text().splitlines()}
    assert reasons == {"photo can't be decoded", "dead link"}


def test_parts_that_run_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    write_dataset(source(60), Folder(tmp_path / "one"), FIVE)
    for attempt in range(8):
        many = tmp_path / str(attempt)
        with ThreadPoolExecutor(6) as pool:  # locks are of open files, so threads stand for processes
            parts = [pool.submit(write_dataset, source(60), Folder(many), FIVE, part=(part, 6)) for part in range(6)]
        assert any(part.result().index is not None for part in parts)
        assert contents(many) == contents(tmp_path / "one")


def test_a_part_that_begins_at_this_moment_is_no_stranger(tmp_path: Path) -> None:
    class Beside(Folder):
        def names(self) -> list[str]:
            write_file(self, writer.REQUEST_FILE, writer._request_bytes({"command": "x"}))
            (tmp_path / "train-000001.tar.tmp").touch()
            return super().names()

    writer._require_free(Beside(tmp_path), {"command": "x"})


@settings(max_examples=12, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 12), parts=st.integers(1, 4), kill=st.integers(0, 40))
def test_totals_add_up_and_parts_agree(
    tmp_path_factory: pytest.TempPathFactory, count: int, size: int, parts: int, kill: int
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    layout = ShardSettings(samples_per_shard=size)
    rejected = [Rejected("q", "why", 1, 2)]
    whole = Source(samples(count), rejected, {"command": "x"}, [])
    index = write_dataset(whole, Folder(folder / "a"), layout, max_rejected=1.0).index
    assert index is not None
    counts = index.provenance["counts"]
    assert (counts["photos"], counts["rejected_photos"]) == (count, 1)
    assert (counts["captions"], counts["rejected_captions"]) == (2 * count, 2)
    assert all(shard.samples <= size for shard in index.shards)
    found = [record for shard in index.shards for record in shard_records(folder / "a", shard)]
    assert sorted(found) == sorted(f"p{i}" for i in range(count))
    if kill < count:
        with pytest.raises(KeyboardInterrupt):
            write_dataset(source(count, kill), Folder(folder / "b"), layout)
    for part in range(parts):
        again = Source(samples(count), [Rejected("q", "why", 1, 2)], {"command": "x"}, [])
        write_dataset(again, Folder(folder / "b"), layout, max_rejected=1.0, part=(part, parts))
    assert contents(folder / "a") == contents(folder / "b")
    shutil.rmtree(folder)


def shard_records(directory: Path, info: ShardInfo) -> list[str]:
    shard = open_shard(directory, info)
    found = [shard.record(i)["photo_id"] for i in range(len(shard))]
    shard.close()
    return found


def test_an_interrupted_write_is_continued(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_dataset(source(20, stop_after=13), Folder(tmp_path / "a"), FIVE)
    assert sorted(path.name for path in (tmp_path / "a").glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]
    with pytest.raises(ValueError, match=r"no index\.json"):
        ShardIndex.load(tmp_path / "a")
    (tmp_path / "a" / "train-000001.tar").write_bytes(b"half")  # what a copy tool might leave
    (tmp_path / "a" / "val-000000.tar.tmp").write_bytes(b"half")
    kept = (tmp_path / "a" / "train-000000.tar").stat().st_mtime_ns
    written = write_dataset(source(), Folder(tmp_path / "a"), FIVE)
    assert written.shards_kept == 1
    assert (tmp_path / "a" / "train-000000.tar").stat().st_mtime_ns == kept
    write_dataset(source(), Folder(tmp_path / "b"), FIVE)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not any(UNFINISHED in name or name.endswith(".tmp") for name in contents(tmp_path / "a"))


@pytest.mark.slow
def test_sigkill_at_any_moment_and_again_gives_the_same_bytes(tmp_path: Path) -> None:
    command = ["scenes", "--train", "1500", "--val", "120", "--test", "120", "--samples-per-shard", "60"]
    assert main([*command, "--workers", "1", "--out", str(tmp_path / "whole")]) == 0
    chance = random.Random(0)
    program = [sys.executable, "-m", "shards.make_shards", *command, "--workers", "2", "--out", str(tmp_path / "out")]
    kills = 0
    while kills < 20:
        running = subprocess.Popen(
            program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            assert running.wait(timeout=chance.uniform(0.1, 1.2)) == 0
            assert contents(tmp_path / "out") == contents(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")  # and from the start
        except subprocess.TimeoutExpired:
            os.kill(running.pid, signal.SIGKILL)  # the parent only: its workers must end by themselves
            running.wait()
            kills += 1
            wait_for_the_end_of(running.pid)
    assert subprocess.run(program, capture_output=True).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def wait_for_the_end_of(group: int) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("workers live on after their parent was killed")


@given(st.text("abcdefghijk_-0123456789", min_size=1, max_size=80), st.integers(0, 8**11 - 1))
def test_headers_are_those_of_tarfile(key: str, size: int) -> None:
    info = tarfile.TarInfo(f"{key}.json")
    info.size = size
    assert tar_header(f"{key}.json", size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_what_a_header_can_not_hold(tmp_path: Path) -> None:
    for name, size in (("a" * 101, 1), ("a", 8**11)):
        with pytest.raises(ValueError, match="USTAR header holds"):
            tar_header(name, size)
    assert len(f"{safe_key('a' * 500)}.jpeg") <= 100


# ---- whose place it is ----


def test_an_interrupted_write_is_not_continued_by_another(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_dataset(source(20, stop_after=13), Folder(tmp_path), FIVE)
    with pytest.raises(ValueError, match="another dataset"):
        write_dataset(source(), Folder(tmp_path), ShardSettings(samples_per_shard=4))


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match="no dataset of ours"):
        write_dataset(source(), Folder(tmp_path), FIVE)
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    output = Folder(tmp_path / "out")
    with output.reserve(0, 1), pytest.raises(ValueError, match="another run is writing"):
        write_dataset(source(), output, FIVE)
    with output.reserve(0, 2):
        for part in ((0, 2), (0, 1), (1, 3)):
            with pytest.raises(ValueError, match="another run is writing"):
                write_dataset(source(), output, FIVE, part=part)
        assert write_dataset(source(), output, FIVE, part=(1, 2)).index is None
    assert write_dataset(source(), output, FIVE).index is not None


def test_a_finished_dataset_keeps_the_files_of_others(tmp_path: Path) -> None:
    """Features in the making, and what the user put there."""
    write_dataset(source(), Folder(tmp_path), FIVE)
    others = ["train-000000.clip.npy.tmp", "mine.tmp", "unfinished/lock-features-clip"]
    (tmp_path / "unfinished").mkdir()
    for name in [*others, "index.json.tmp", "train-000000.tar.tmp", "unfinished/train-000000.json"]:
        (tmp_path / name).write_bytes(b"x")
    before = set(contents(tmp_path))
    assert write_dataset(source(), Folder(tmp_path), FIVE).already_complete
    left = before - set(contents(tmp_path))
    assert left == {"index.json.tmp", "train-000000.tar.tmp", "unfinished/train-000000.json"}


def test_shards_with_rejections_that_are_retried_are_made_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="photos were rejected"):
        write_dataset(source(22, image=photo), Folder(tmp_path / "a"), FIVE)
    again = dataclasses.replace(source(22), retried=frozenset({"dead link"}))
    written = write_dataset(again, Folder(tmp_path / "a"), FIVE, max_rejected=1.0)
    assert written.index is not None and written.shards_kept == 3  # p5 and p16 were dead links, in two of five shards
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "a" / REJECTED_FILE).read_text().splitlines()]
    assert "dead link" not in reasons


def test_the_count_of_kept_shards_is_of_this_part(tmp_path: Path) -> None:
    for part in range(3):
        written = write_dataset(source(60), Folder(tmp_path), FIVE, part=(part, 3))
        assert written.shards_kept == 0


@pytest.mark.parametrize("settings", [FIVE, ShardSettings(samples_per_shard=5, min_side=8, resize=12, quality=80)])
def test_resized_or_not_workers_change_no_byte(tmp_path: Path, settings: ShardSettings) -> None:
    for workers in (1, 2, 4):
        write_dataset(source(30), Folder(tmp_path / str(workers)), settings, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "4")


def test_a_full_disk_is_a_clear_error_and_no_half_files(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no mount here")
    try:
        with pytest.raises(ValueError, match=r"No space left on device.*Free some space and run this again"):
            write_dataset(source(200), Folder(disk), ShardSettings(samples_per_shard=20))
        assert list(disk.glob("*.tar")) and not list(disk.rglob("*.tmp")) and not (disk / INDEX_FILE).exists()
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        written = write_dataset(source(200), Folder(disk), ShardSettings(samples_per_shard=20))
        assert written.shards_kept >= 1 and verify(disk) == []
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(ValueError, match="Read-only file system"):
            write_dataset(source(), Folder(disk / "new"), FIVE)
        again = write_dataset(source(200), Folder(disk), ShardSettings(samples_per_shard=20))
        assert again.already_complete  # there is nothing to write
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("folder", ["shards/made", "tests/deep/er", "configs"])
def test_datasets_are_not_written_among_code(folder: str) -> None:
    with pytest.raises(ValueError, match="which holds code"):
        output_at(str(Path(__file__).resolve().parents[1] / folder))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (RawSample("p0", ["a"], "train", "made", None), "comes twice"),
        (RawSample("p", ["a"], "../train", "made", None), "split"),
        (RawSample("p", [], "train", "made", None), "has no caption"),
    ],
)
def test_samples_that_a_source_must_not_give(tmp_path: Path, sample: RawSample, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_dataset(Source([*samples(1), sample], [], {}, []), Folder(tmp_path), FIVE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": ShardSettings(samples_per_shard=0)}, "at least 1"),
        ({"settings": ShardSettings(resize=10)}, "at least the smallest side"),
        ({"settings": ShardSettings(quality=101)}, "quality"),
        ({"max_rejected": 1.5}, "it is a share"),
        ({"workers": 0}, "workers"),
        ({"part": (2, 2)}, "part"),
    ],
)
def test_settings_that_can_not_be(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_dataset(source(), Folder(tmp_path), **{"settings": FIVE, **changes})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_too_many_rejections_end_before_the_index(tmp_path: Path) -> None:
    by_choice = [Rejected(f"c{i}", "not in the split", 1, 1, by_choice=True) for i in range(50)]
    with pytest.raises(ValueError, match=r"5 of 22 photos were rejected \(22\.73%, more than 20%\): 3 photo can't"):
        rejected = [*by_choice, Rejected("q", "why", 0, 1)]
        twenty_two = Source(samples(22, image=photo), rejected, {}, [])
        write_dataset(twenty_two, Folder(tmp_path), FIVE, max_rejected=0.2)
    assert not (tmp_path / INDEX_FILE).exists() and len((tmp_path / REJECTED_FILE).read_text().splitlines()) == 56
    again = Source(samples(22, image=photo), by_choice, {}, [])
    assert write_dataset(again, Folder(tmp_path), FIVE, max_rejected=0.25).shards_kept == 5


# ---- an object store ----


def test_a_dataset_in_an_object_store_is_the_one_on_disk(bucket: str, tmp_path: Path) -> None:
    write_dataset(source(60), Folder(tmp_path / "here"), FIVE)
    there = f"{bucket}/deep/set"
    with pytest.raises(KeyboardInterrupt):
        write_dataset(source(60, stop_after=33), output_at(there), FIVE)
    written = write_dataset(source(60), output_at(there), FIVE, workers=2)
    assert written.shards_kept >= 3
    store = Store(there)
    assert {name: store.read(name) for name in store.names()} == contents(tmp_path / "here")
    assert write_dataset(source(60), output_at(there), FIVE).already_complete
    with pytest.raises(ValueError, match="another dataset"):
        write_dataset(source(60), output_at(there), ShardSettings(samples_per_shard=6))
    with pytest.raises(ValueError, match="no dataset of ours"):
        write_dataset(source(60), output_at(f"{bucket}/deep"), FIVE)


def test_a_store_that_can_not_be_written_is_a_clear_error(bucket: str) -> None:
    with pytest.raises(ValueError, match=r"s3://nowhere/set.*run this again"):
        write_dataset(source(), output_at("s3://nowhere/set"), FIVE)
    with pytest.raises(ValueError, match="can't be written"):
        output_at("nonsense://place")


# ---- large datasets ----


def test_opening_a_dataset_reads_the_index_only(tmp_path: Path) -> None:
    """O(shards): a hundred thousand shards that aren't even there."""
    names = [f"train-{number:06d}" for number in range(100_000)]
    ShardIndex([ShardInfo(name, "train", 1000, 1, "0" * 64) for name in names], {}, {}).save(tmp_path)
    index = ShardIndex.load(tmp_path)
    assert index.num_samples("train") == 100_000_000 and len(index.split("train")) == 100_000
