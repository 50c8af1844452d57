"""Damage in shards: none passes unseen, and what stands in for a damaged sample is the same on any cluster."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffcap_dist.config import DataConfig
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.order import Place
from diffcap_dist.data.shard_format import MemberIndex, ShardDamage, ShardIndex, open_shard
from diffcap_dist.data.stream import CaptionStream, ShardReader, all_records, candidates
from shards.verification import verify

CONFIG = DataConfig(shards="", max_length=18, num_workers=0, canonical_spans=4, shuffle_window=8, damage="replace")


@pytest.fixture
def dataset(scene_shards: Path, tmp_path: Path) -> Path:
    shutil.copytree(scene_shards, tmp_path / "shards")
    return tmp_path / "shards"


def tar_of(dataset: Path) -> Path:
    return dataset / "train-000000.tar"


def second_member(tar: Path) -> tuple[int, int]:
    """(offset of its data, size)."""
    members = MemberIndex.load(tar)
    return int(members.offset[1, 0]), int(members.size[1, 0])


def cut(tar: Path, size: int) -> None:
    tar.write_bytes(tar.read_bytes()[:size])


def overwrite(tar: Path, offset: int, data: bytes) -> None:
    content = bytearray(tar.read_bytes())
    content[offset : offset + len(data)] = data
    tar.write_bytes(content)


TEN_KINDS: dict[str, Callable[[Path], object]] = {
    "cut at a header": lambda tar: cut(tar, second_member(tar)[0] - 512),
    "cut in a header": lambda tar: cut(tar, second_member(tar)[0] - 200),
    "flipped header checksum": lambda tar: overwrite(tar, second_member(tar)[0] - 512 + 150, b"9"),
    "zeroed header": lambda tar: overwrite(tar, second_member(tar)[0] - 512, bytes(512)),
    "cut between members": lambda tar: cut(tar, second_member(tar)[0] + -(-second_member(tar)[1] // 512) * 512),
    "cut in a body": lambda tar: cut(tar, second_member(tar)[0] + 10),
    "flipped byte of a body": lambda tar: overwrite(tar, second_member(tar)[0] + 10, b"\x99"),
    "empty file": lambda tar: cut(tar, 0),
    "another file": lambda tar: tar.write_bytes(b"<html>Not found</html>"),
    "missing file": lambda tar: tar.unlink(),
}


@pytest.mark.parametrize("kind", TEN_KINDS)
def test_the_ten_kinds_of_damage(dataset: Path, kind: str) -> None:
    """Of what is read: an error that names it. Between the samples: it does no harm, and verify names it."""
    TEN_KINDS[kind](tar_of(dataset))
    damages = verify(dataset)
    assert damages and all("train-000000" in damage for damage in damages)
    reader = ShardReader(dataset, "train", transform=lambda data: torch.zeros(1))
    if "header" in kind and "cut" not in kind:
        assert all("at byte" in damage and "sample scene-train" in damage for damage in damages)
        assert [reader.photo(0, i).key for i in range(64)]
        return
    with pytest.raises(ShardDamage, match=r"train-000000\.tar"):
        for i in range(64):
            reader.photo(0, i)


def test_a_thousand_flipped_bytes(dataset: Path) -> None:
    """A flip in a body is an error naming key and offset; one elsewhere leaves every sample as it was."""
    chance = random.Random(0)
    tar, info = tar_of(dataset), ShardIndex.load(dataset).split("train")[0]
    whole = tar.read_bytes()
    members = MemberIndex.load(tar)
    places = [
        (int(members.offset[row, column]), int(members.size[row, column]), row)
        for row in range(len(members.keys))
        for column in range(len(members.suffixes))
    ]
    in_bodies = 0
    for _ in range(1000):
        at = chance.randrange(len(whole))
        with tar.open("r+b") as file:
            file.seek(at)
            file.write(bytes([whole[at] ^ 1 << chance.randrange(8)]))
        shard = open_shard(dataset, info)
        row = next((row for offset, size, row in places if offset <= at < offset + size), None)
        if row is None:
            damages = [damage for sample in range(len(shard)) for damage in shard.frame_damages(sample)]
            assert damages or at >= len(whole) - 1024  # the end of the tar: its sha256 tells
        else:
            in_bodies += 1
            with pytest.raises(ShardDamage, match=f"{shard.key(row)}: its .* at byte"):
                shard.record(row), shard.image_bytes(row)
        shard.close()
        with tar.open("r+b") as file:
            file.seek(at)
            file.write(whole[at : at + 1])
    assert in_bodies > 300 and verify(dataset) == []


# ---- what stands in ----


def test_the_next_sample_is_the_first_candidate() -> None:
    assert list(candidates([2, 0, 3], Place(0, 2, 1))) == [(2, 1), (2, 2), (2, 0), (0, 0), (0, 1)]


def batches(dataset: Path, world: int, workers: int, steps: int, **changes: object) -> list[list[tuple]]:
    reader = ShardReader(dataset, "train", "oracle")
    intact = ShardReader(dataset, "test", "oracle")
    tokenizer = CaptionTokenizer.from_captions(c for _, record in all_records(intact) for c in record["captions"])
    config = dataclasses.replace(CONFIG, num_workers=workers, **changes)  # type: ignore[arg-type]
    streams = [iter(CaptionStream(reader, tokenizer, config, 5, 8, rank, world)) for rank in range(world)]
    result = []
    for _ in range(steps):
        rows: list[tuple] = []
        for stream in streams:
            batch = next(stream)
            found = {position: [d for d in batch.damages if d.position == position] for position in batch.positions}
            rows += [(p, key, tuple(found[p])) for p, key in zip(batch.positions, batch.keys)]
        result.append(sorted(rows))
    return result


def test_a_damaged_sample_is_replaced_alike_on_any_cluster(dataset: Path) -> None:
    members = MemberIndex.load(tar_of(dataset))
    key = str(members.keys[1])
    overwrite(tar_of(dataset), int(members.offset[1, members.suffixes.tolist().index("json")]) + 5, b"\x01")
    one = batches(dataset, 1, 0, 8)  # one epoch of 64
    damages = [damage for step in one for _, _, found in step for damage in found]
    assert [(d.key, d.samples) for d in damages] == [(f"train-000000/{key}", 1)] and "crc32" in damages[0].found
    keys = [k for step in one for _, k, _ in step]
    assert len(keys) == 64 and key not in keys and len(set(keys)) == 63
    assert batches(dataset, 2, 0, 8) == batches(dataset, 1, 2, 8) == one
    with pytest.raises(ShardDamage, match=key):
        batches(dataset, 1, 0, 8, damage="raise")


def test_a_lost_shard_costs_all_its_samples(dataset: Path) -> None:
    tar_of(dataset).unlink()
    with pytest.raises(ValueError, match="no sample at all can be read; the first: train-000000: the tar is missing"):
        batches(dataset, 1, 0, 1)
