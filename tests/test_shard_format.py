"""Shards on disk: what is written is read back, webdataset reads it too, and no damage passes unseen.

Every dataset is made here, of a few tiny pictures.
"""

import dataclasses
import io
import json
import os
import pickle
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffcap_dist.data.shard_format import (
    INDEX_FILE,
    MAX_KEY_LENGTH,
    FeatureInfo,
    MemberIndex,
    Shard,
    ShardDamage,
    ShardIndex,
    atomic_write,
    open_shard,
    safe_key,
)
from shards.output import output_at
from shards.verification import unknown_files, verify
from shards.workers import in_processes
from shards.writer import RawSample, ShardSettings, Source, write_dataset

NUM_TRAIN, NUM_VAL, SAMPLES_PER_SHARD = 12, 3, 5


def picture(seed: int, image_format: str = "JPEG") -> bytes:
    pixels = np.random.RandomState(seed).randint(0, 256, (12, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def raw_samples() -> list[RawSample]:
    formats = {1: "PNG", 2: "WEBP"}
    samples = [
        RawSample(f"p{i}.é", [f"a “{i}”, b", "c"], "train", "made", partial(picture, i, formats.get(i, "JPEG")))
        for i in range(NUM_TRAIN - 1)
    ]
    samples.append(RawSample("no_photo", ["only words"], "train", "made", None, scene={"objects": [1]}))
    return samples + [RawSample(f"v{i}", ["d"], "val", "made", partial(picture, 100 + i)) for i in range(NUM_VAL)]


def write(directory: Path) -> None:
    settings = ShardSettings(SAMPLES_PER_SHARD, min_side=1)
    write_dataset(Source(raw_samples(), [], {"command": "test"}, []), output_at(str(directory)), settings)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards") / "data"
    write(directory)
    return directory


@pytest.fixture
def dataset(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "data"))


def all_samples(directory: Path) -> dict[str, tuple[dict, bytes | None]]:
    shards = [open_shard(directory, info) for info in ShardIndex.load(directory).shards]
    return {shard.key(i): (shard.record(i), shard.image_bytes(i)) for shard in shards for i in range(len(shard))}


def test_every_sample_comes_back_untouched(written: Path) -> None:
    found = all_samples(written)
    assert len(found) == NUM_TRAIN + NUM_VAL
    for sample in raw_samples():
        record, image = found[safe_key(sample.photo_id)]
        assert image == (sample.image and sample.image())
        assert (record["photo_id"], record["captions"], record["split"]) == (
            sample.photo_id,
            sample.captions,
            sample.split,
        )
        assert (record["width"], record["height"]) == ((16, 12) if image else (None, None))
        assert record.get("scene") == sample.scene
    assert verify(written) == []


def test_same_input_gives_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write(tmp_path / "again")
    files = sorted(path.name for path in written.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (written / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_webdataset_reads_the_same_samples(written: Path) -> None:
    found = all_samples(written)
    urls = [str(path) for path in sorted(written.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == list(found)
    for sample in read:
        record, image = found[sample["__key__"]]
        assert json.loads(sample["json"]) == record
        images = [sample[suffix] for suffix in ("jpg", "png", "webp") if suffix in sample]
        assert images == ([] if image is None else [image])


def test_tar_is_plain_ustar(written: Path) -> None:
    header = (written / "train-000000.tar").read_bytes()[:512]
    assert header[257:263] == b"ustar\0"
    assert (header[100:108], header[136:148], header[156:157]) == (b"0000644\0", b"00000000000\0", b"0")


def test_every_flipped_byte_of_a_member_is_found_and_named(dataset: Path) -> None:
    path = dataset / "train-000000.tar"
    intact, members = path.read_bytes(), MemberIndex.load(path)
    spans = [
        (sample, int(members.offset[sample, column]), int(members.size[sample, column]))
        for sample, column in zip(*np.nonzero(members.offset >= 0))
    ]
    chance = random.Random(0)
    for _ in range(400):
        sample, offset, size = chance.choice(spans)
        damaged = bytearray(intact)
        damaged[offset + chance.randrange(size)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        shard = Shard(path)
        with pytest.raises(ShardDamage) as caught:
            shard.record(sample), shard.image_bytes(sample)
        assert caught.value.key == shard.key(sample)
        assert shard.key(sample) in str(caught.value) and "crc32" in str(caught.value)
        for other in {0, 1, 2, 3, 4} - {sample}:
            shard.record(other), shard.image_bytes(other)
        shard.close()


def test_verify_finds_any_flipped_byte_of_a_tar(dataset: Path) -> None:
    path = dataset / "val-000000.tar"
    intact = path.read_bytes()
    for position in random.Random(1).sample(range(len(intact)), 60):  # headers and padding too
        damaged = bytearray(intact)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        damages = verify(dataset)
        assert damages and all("val-000000" in damage for damage in damages)


@pytest.mark.parametrize("member", [0, 3])
@pytest.mark.parametrize("at", [0, 100, 130, 148, 257, 511])
def test_a_damaged_header_is_named_with_its_place(dataset: Path, member: int, at: int) -> None:
    path = dataset / "train-000000.tar"
    members, content = MemberIndex.load(path), bytearray(path.read_bytes())
    places = sorted((int(members.offset[row, column]), row) for row, column in zip(*np.nonzero(members.offset >= 0)))
    start = places[member][0] - 512
    content[start + at] ^= 1
    path.write_bytes(content)
    (damage,) = verify(dataset)
    assert f"sample {members.keys[places[member][1]]}: the tar header" in damage and f"at byte {start} " in damage


def test_damaged_padding_is_named_and_all_damages_are(dataset: Path) -> None:
    path = dataset / "train-000000.tar"
    members, content = MemberIndex.load(path), bytearray(path.read_bytes())
    column = members.suffixes.tolist().index("json")
    end = int(members.offset[1, column] + members.size[1, column])
    content[end] = 7
    for row in (2, 3):
        content[int(members.offset[row, column])] ^= 1
    content[-1] = 1  # the end of the tar belongs to no sample
    path.write_bytes(content)
    damages = verify(dataset)
    assert len(damages) == 3
    for damage, row, what in zip(
        damages, (2, 3, 1), ("its json member at byte", "its json", f"padding of its json member at byte {end}")
    ):
        assert str(members.keys[row]) in damage and what in damage


def test_verify_says_the_same_with_any_workers(dataset: Path) -> None:
    for number in range(3):
        path = dataset / f"train-{number:06d}.tar"
        content = bytearray(path.read_bytes())
        content[600] ^= 1
        path.write_bytes(content)
    done: list[int] = []
    damages = verify(dataset, workers=2, progress=done.append)
    assert damages == verify(dataset) and ["train-00000" in damage for damage in damages] == [True] * 3
    assert done == [shard.bytes for shard in ShardIndex.load(dataset).shards]
    with pytest.raises(ValueError, match="workers is 0"):
        verify(dataset, workers=0)


def test_a_killed_worker_is_an_error() -> None:
    with pytest.raises(ValueError, match="worker process was killed"):
        list(in_processes(os._exit, [1, 1], 2))


def test_files_that_the_index_does_not_know_are_no_damage(dataset: Path) -> None:
    assert unknown_files(dataset) == []
    for name in ("train-000009.tar", "train-000000.tar.tmp", "train-000000.f.npy", "README.md"):
        (dataset / name).write_bytes(b"")
    assert unknown_files(dataset) == ["train-000000.f.npy", "train-000000.tar.tmp", "train-000009.tar"]
    assert verify(dataset) == []


def test_index_with_and_without_url(dataset: Path) -> None:
    assert '"url"' not in (dataset / INDEX_FILE).read_text()
    index = ShardIndex.load(dataset)
    index.shards[0] = dataclasses.replace(index.shards[0], url="s3://bucket/train-000000.tar")
    index.save(dataset)
    assert ShardIndex.load(dataset) == index
    with pytest.raises(ValueError, match=r"train-000000 is at s3://bucket.*only training and evaluation fetch"):
        open_shard(dataset, index.shards[0])


@pytest.mark.parametrize("kept", [0, 1, 700, -1])
def test_truncated_tar_is_an_error_when_opened(dataset: Path, kept: int) -> None:
    path = dataset / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ShardDamage, match=r"train-000001.*bytes, its member index says"):
        Shard(path)
    assert len(verify(dataset)) == 1


def test_tar_cut_short_after_opening_is_an_error_not_a_crash(dataset: Path) -> None:
    path = dataset / "train-000000.tar"
    shard = Shard(path)
    with path.open("r+b") as file:
        file.truncate(600)
    with pytest.raises(ShardDamage, match="expected"):
        shard.record(4)


def test_missing_and_exchanged_files_are_named(dataset: Path) -> None:
    (dataset / "train-000000.tar").unlink()
    (dataset / "train-000001.idx.npz").unlink()
    index = dataset / "train-000002.idx.npz"
    index.write_bytes(index.read_bytes()[:-30])
    for ending in (".tar", ".idx.npz"):
        shutil.copy(dataset / f"train-000002{ending}", dataset / f"val-000000{ending}")
    expected = [
        "train-000000.tar: the tar is missing",
        "train-000001.tar: its member index train-000001.idx.npz is missing",
        "train-000002.tar: its member index train-000002.idx.npz can't be read",
        "val-000000.tar: its member index val-000000.idx.npz can't be read",
    ]
    damages = verify(dataset)
    assert len(damages) == len(expected)
    for damage, what in zip(damages, expected):
        assert what in damage


def test_shard_of_another_count_is_refused(dataset: Path) -> None:
    for ending in (".tar", ".idx.npz"):
        shutil.copy(dataset / f"train-000000{ending}", dataset / f"val-000000{ending}")
    (info,) = ShardIndex.load(dataset).split("val")
    with pytest.raises(ShardDamage, match=r"5 samples, index.json says 3"):
        open_shard(dataset, info)


def test_damage_crosses_process_borders() -> None:
    damage = pickle.loads(pickle.dumps(ShardDamage(Path("a.tar"), "k", "it is gone")))
    assert (damage.key, str(damage)) == ("k", str(ShardDamage(Path("a.tar"), "k", "it is gone")))


def test_index_round_trip_and_splits(written: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(written)
    index.features["f"] = FeatureInfo("f", "e", "00", 4, (2, 3), "none", {})
    index.save(tmp_path)
    assert ShardIndex.load(tmp_path) == index
    assert [shard.samples for shard in index.split("train")] == [5, 5, 2]
    assert (index.num_samples("train"), index.num_samples("nowhere")) == (NUM_TRAIN, 0)
    with pytest.raises(ValueError, match=r"'test' has no samples.*train \(12 samples\), val \(3 samples\)"):
        index.split("test")
    with pytest.raises(ValueError, match="'g' are not in the dataset; it has: f"):
        index.feature("g")


def test_split_whose_shards_are_empty_is_an_error(written: Path) -> None:
    index = ShardIndex.load(written)
    index.shards.append(dataclasses.replace(index.shards[0], split="test", samples=0))
    with pytest.raises(ValueError, match=r"test \(0 samples\)"):
        index.split("test")


def test_a_folder_without_index_is_no_dataset(dataset: Path) -> None:
    (dataset / INDEX_FILE).unlink()
    with pytest.raises(ValueError, match=r"no index\.json.*make-shards"):
        ShardIndex.load(dataset)
    with pytest.raises(ValueError, match="does not exist"):
        ShardIndex.load(dataset / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2.*reads version 1"),
        ({"shards": [{"name": "x"}]}, "no index of shards"),
        ({"shards": None}, "no index of shards"),
        (
            {"shards": [{"name": "../x", "split": "a", "samples": 1, "bytes": 1, "sha256": ""}]},
            "not a plain file name",
        ),
    ],
)
def test_bad_index_is_refused(dataset: Path, change: dict, message: str) -> None:
    path = dataset / INDEX_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        ShardIndex.load(dataset)


def test_features_of_another_shape_are_refused(dataset: Path) -> None:
    info = FeatureInfo("f", "e", None, 4, None, "none", {"val-000000": {"pooled": {"file": "v.npy", "sha256": ""}}})
    shard = Shard(dataset / "val-000000.tar")
    np.save(dataset / "v.npy", np.ones((NUM_VAL, 4), np.float16))
    pooled_NF, patches_NPF = shard.features(info)
    assert pooled_NF.shape == (NUM_VAL, 4) and patches_NPF is None
    for wrong in (np.ones((NUM_VAL + 1, 4), np.float16), np.ones((NUM_VAL, 4), np.float32)):
        np.save(dataset / "v.npy", wrong)
        with pytest.raises(ShardDamage, match=r"expected float16 of shape \(3, 4\)"):
            shard.features(info)
    with pytest.raises(ValueError, match="no pooled file"):
        Shard(dataset / "train-000000.tar").features(info)


def test_atomic_write_keeps_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_: int) -> None:
        raise OSError("no space left")

    path = tmp_path / "file"
    atomic_write(path, b"old")
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, b"new and longer")
    assert path.read_bytes() == b"old"


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=120), unique=True, max_size=20))
def test_keys_are_safe_and_never_collide(photo_ids: list[str]) -> None:
    keys = [safe_key(photo_id) for photo_id in photo_ids]
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert 0 < len(key) <= MAX_KEY_LENGTH
        assert all(c.isascii() and (c.isalnum() or c in "_-") for c in key)
