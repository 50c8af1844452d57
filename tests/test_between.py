"""Points between photos: where they lie, whose captions they have, and that a mix of both trains and is captioned."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffcap_dist.data.shard_format import ShardIndex, open_shard
from diffcap_dist.data.stream import ShardReader, evaluation_photos
from shards.between import NEIGHBOURS, SHARE, _neighbours, between
from shards.make_shards import main


def training_photos(folder: Path) -> tuple[np.ndarray, list[list[str]]]:
    photos = list(evaluation_photos(ShardReader(folder, "train", "oracle")))
    return np.stack([p.pooled_F.float().numpy() for p in photos]), [p.record["captions"] for p in photos]


def test_a_point_lies_between_its_photo_and_a_neighbour(scene_shards: Path) -> None:
    features_NF, captions = training_photos(scene_shards)
    source, info, points_PF = between(scene_shards, "oracle", 300, 5)
    samples = list(source.samples)
    assert info == ShardIndex.load(scene_shards).feature("oracle")
    assert len(samples) == len(points_PF) == len({sample.photo_id for sample in samples}) == 300
    unit_NF = features_NF / np.linalg.norm(features_NF, axis=1, keepdims=True)
    found = set()
    for sample, point_F in zip(samples, points_PF):
        photos = [n for n, own in enumerate(captions) if own == sample.captions]
        assert photos and sample.split == "train" and sample.image is None
        for n in photos:
            for other in np.argsort(-(unit_NF @ unit_NF[n]), kind="stable")[: NEIGHBOURS + 1]:
                way_F = features_NF[n] - features_NF[other]
                share = float((point_F - features_NF[other]) @ way_F / max(way_F @ way_F, 1e-9))
                if np.allclose(features_NF[other] + share * way_F, point_F, atol=1e-4):
                    found.add(sample.photo_id)
                    assert other == n or not way_F.any() or SHARE[0] - 1e-3 <= share <= SHARE[1] + 1e-3
    assert len(found) == 300


def test_neighbours_by_rank_and_never_oneself() -> None:
    features_NF = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    photo_P = np.array([3, 7, 3, 49])
    for rank in (0, 1, 29):
        got = _neighbours(features_NF, photo_P, np.full(4, rank))
        cosine = features_NF / np.linalg.norm(features_NF, axis=1, keepdims=True)
        for photo, other in zip(photo_P, got):
            order = np.argsort(-(cosine @ cosine[photo]), kind="stable")
            assert other == order[order != photo][rank]


def test_the_command_again_and_with_another_seed(
    scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["between", str(scene_shards), "--features", "oracle", "--count", "70", "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "b"), "--seed", "1"]) == 0
    indices = [ShardIndex.load(tmp_path / name) for name in "ab"]
    assert [index.num_samples("train") for index in indices] == [70, 70]
    arrays = [open_shard(tmp_path / n, i.shards[0]).features(i.feature("oracle"))[0] for n, i in zip("ab", indices)]
    assert arrays[0].shape == arrays[1].shape and not np.array_equal(*arrays)
    mixed = ShardReader([scene_shards, tmp_path / "a", tmp_path / "b"], "train", "oracle")
    keys = [photo.key for photo in evaluation_photos(mixed)]
    assert len(keys) == len(set(keys)) == 64 + 70 + 70


def test_of_the_encoder_whose_features_they_are_made_of(scene_shards: Path, tmp_path: Path) -> None:
    """Else a mix with the photos' own would be refused."""
    shards = tmp_path / "shards"
    shutil.copytree(scene_shards, shards)
    index = ShardIndex.load(shards)
    index.features["oracle"] = dataclasses.replace(index.feature("oracle"), weights_sha256="ab" * 32)  # as if computed
    index.save(shards)
    command = ["between", str(shards), "--features", "oracle", "--count", "40", "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    made = ShardIndex.load(tmp_path / "out").feature("oracle")
    assert (made.weights_sha256, made.patches) == ("ab" * 32, None)
    ShardReader([shards, tmp_path / "out"], "train", "oracle")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--features", "nobody"], "features 'nobody' are not in the dataset"),
        (["--features", "oracle", "--out", "s3://x/y"], "local folder"),
    ],
)
def test_mistakes(
    words: list[str], message: str, scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["between", str(scene_shards), "--count", "5", "--out", str(tmp_path / "x"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()
