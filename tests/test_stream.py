"""The stream on real shards: the same batches for any workers and ranks, from any position; clear errors."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from diffcap_dist.config import DataConfig
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.shard_format import ShardDamage, ShardIndex
from diffcap_dist.data.stream import Batch, CaptionStream, ShardReader, all_records, chosen_captions, evaluation_photos

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
        stream = CaptionStream(reader, tokenizer, config, 5, 8 // world, rank, world)
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


def test_captions_of_a_visit_differ_and_change_between_visits() -> None:
    texts = ["a", "b", "c", "d", "e"]
    picks = [chosen_captions(texts, 3, seed=0, position=p) for p in range(200)]
    assert all(len(set(pick)) == 3 for pick in picks)
    assert {pick[0] for pick in picks} == set(texts)
    assert sorted(chosen_captions(["a", "b"], 5, 0, 1)) in (["a", "a", "a", "b", "b"], ["a", "a", "b", "b", "b"])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_evaluation_sees_each_photo_once(scene_shards: Path, world: int) -> None:
    reader = ShardReader(scene_shards, "test", "oracle")
    keys = [photo.key for rank in range(world) for photo in evaluation_photos(reader, rank, world)]
    assert sorted(keys) == sorted(key for key, _ in all_records(reader)) and len(keys) == 12


def test_pixels_go_through_the_transform(scene_shards: Path, tokenizer: CaptionTokenizer) -> None:
    reader = ShardReader(scene_shards, "train", transform=lambda image: torch.tensor(image.size))
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
