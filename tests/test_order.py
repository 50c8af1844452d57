"""The order of samples: each epoch a permutation, the same for any layout, from any position."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcap_dist.data.order import SampleOrder, draw, draw_uniform, evaluation_positions, rank_positions

COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(lambda counts: sum(counts) > 0)
UNEVEN = [1, 7, 100, 250, 3, 0, 39]


@settings(deadline=None, max_examples=60)
@given(COUNTS, st.integers(0, 5), st.integers(1, 17), st.integers(1, 40), st.integers(0, 3))
def test_each_epoch_holds_each_sample_exactly_once(
    counts: list[int], seed: int, spans: int, window: int, epoch: int
) -> None:
    order = SampleOrder(counts, seed, spans, window)
    total = sum(counts)
    places = [order.sample_at(epoch * total + q) for q in range(total)]
    assert {place.epoch for place in places} == {epoch}
    expected = {(shard, sample) for shard, count in enumerate(counts) for sample in range(count)}
    assert len(places) == len(expected)
    assert {(place.shard, place.sample) for place in places} == expected


def test_epochs_and_seeds_differ() -> None:
    total = sum(UNEVEN)

    def epoch(number: int, seed: int) -> list[tuple[int, int]]:
        order = SampleOrder(UNEVEN, seed)
        return [(p.shard, p.sample) for p in (order.sample_at(number * total + q) for q in range(total))]

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(1, 0)
    assert epoch(0, 0) != epoch(0, 1)


def global_batches(world_size: int, start_step: int, num_steps: int, batch: int = 24) -> str:
    """sha256 of the ordered samples of the global batches, put together from the ranks' own positions."""
    order = SampleOrder(UNEVEN, seed=3, canonical_spans=8, shuffle_window=16)
    ranks = [rank_positions(start_step * batch, rank, world_size) for rank in range(world_size)]
    digest = hashlib.sha256()
    for _ in range(num_steps):
        positions = sorted(next(rank) for rank in ranks for _ in range(batch // world_size))
        digest.update(repr([order.sample_at(p) for p in positions]).encode())
    return digest.hexdigest()


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_global_batches_do_not_depend_on_the_world_size(world_size: int) -> None:
    assert global_batches(world_size, 0, 60) == global_batches(1, 0, 60)


@pytest.mark.parametrize("step", [0, 1, 17, 40])
def test_any_step_can_be_entered(step: int) -> None:
    assert global_batches(4, step, 10) == global_batches(2, step, 10)


def test_a_rank_reads_only_its_spans() -> None:
    counts, spans, world = [100] * 16, 16, 4
    order = SampleOrder(counts, seed=0, canonical_spans=spans, shuffle_window=10)
    shards = [{order.sample_at(p).shard for p in range(rank, 1600, world)} for rank in range(world)]
    assert all(len(part) == 4 for part in shards)
    assert not set.intersection(*shards)


@settings(deadline=None)
@given(st.integers(1, 300), st.sampled_from([1, 2, 3, 4, 7]))
def test_evaluation_is_an_exact_partition(total: int, world: int) -> None:
    parts = [list(evaluation_positions(total, rank, world)) for rank in range(world)]
    assert sorted(p for part in parts for p in part) == list(range(total))


def test_draws_are_uniform_and_unrelated() -> None:
    values = np.array([draw_uniform(0, "a", p) for p in range(4000)])
    assert abs(values.mean() - 0.5) < 0.02
    others = np.array([draw_uniform(0, "b", p) for p in range(4000)])
    assert abs(np.corrcoef(values, others)[0, 1]) < 0.05
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05
    assert len({draw(s, "a", p) for s in range(50) for p in range(50)}) == 2500


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        SampleOrder([0, 0], seed=0)
    with pytest.raises(ValueError, match="canonical_spans"):
        SampleOrder([4], seed=0, canonical_spans=0)
    with pytest.raises(ValueError, match="not a multiple"):
        next(rank_positions(3, 0, 2))
