"""The order of samples: each epoch a permutation, the same for any layout, from any position."""

from __future__ import annotations

import hashlib
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcap_dist.data.order import (
    MixedOrder,
    SampleOrder,
    dataset_at,
    digit_reversal,
    draw,
    draw_uniform,
    evaluation_positions,
    rank_positions,
)

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


@given(st.integers(1, 400), st.integers(1, 90), st.integers(1, 20))
def test_windows_part_each_span_and_none_is_short(total: int, window: int, spans: int) -> None:
    """Half to one and a half times the size (twice, of a span of one window); ends differ from slot to slot."""
    order = SampleOrder([total], 0, spans, window)
    first_ends = []
    for slot in range(spans):
        length = len(range(slot, total, spans))
        begin, numbers = 0, []
        while begin < length:
            number, start, end = order.window_at(slot, begin)
            assert start == begin and order.window_at(slot, end - 1) == (number, start, end)
            assert min(window, 2 * length) <= 2 * (end - start) <= (3 if end - start < length else 4) * window
            numbers.append(number)
            begin = end
        assert begin == length and numbers == list(range(len(numbers)))
        if len(numbers) > 2:
            first_ends.append(order.window_at(slot, 0)[2])
    if len(first_ends) > 2 and window >= 2 * spans:
        assert len(set(first_ends)) == len(first_ends)


def global_batches(world_size: int, start_step: int, num_steps: int, batch: int = 24) -> str:
    """sha256 of the ordered samples of the global batches, put together from the ranks' own positions."""
    order = SampleOrder(UNEVEN, seed=3, canonical_spans=8, shuffle_window=16)
    ranks = [rank_positions(order, start_step * batch, rank, world_size, batch) for rank in range(world_size)]
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
    ranks = [islice(rank_positions(order, 0, rank, world, 20), 400) for rank in range(world)]
    shards = [{order.sample_at(position).shard for position in positions} for positions in ranks]
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
    with pytest.raises(ValueError, match="among 2 ranks"):
        next(rank_positions(SampleOrder([4], seed=0), 0, 0, 2, 3))


# ---- locality: what a node reads ----


def shards_of_nodes(order: SampleOrder | MixedOrder, nodes: int, ranks_per_node: int, epoch: int) -> list[set[int]]:
    """The shards that each node's ranks touch in an epoch, at a global batch of 4 samples a rank."""
    world_size = nodes * ranks_per_node
    batch = 4 * world_size
    begin, end = epoch * order.num_samples, (epoch + 1) * order.num_samples
    first_step, last_step = begin // batch, -(-end // batch)  # they reach into the epochs before and behind
    touched: list[set[int]] = [set() for _ in range(nodes)]
    for rank in range(world_size):
        share = islice(rank_positions(order, first_step * batch, rank, world_size, batch), (last_step - first_step) * 4)
        touched[rank // ranks_per_node] |= {order.sample_at(p).shard for p in share if begin <= p < end}
    return touched


@pytest.mark.parametrize("ranks_per_node", [1, 2, 8])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_node_downloads_its_share_of_the_shards(ranks_per_node: int, epoch: int) -> None:
    """8 nodes, 128 shards of 240 samples (the last one smaller): whole shards are what is downloaded."""
    order = SampleOrder([240] * 127 + [136], seed=1, shuffle_window=16)
    assert max(map(len, shards_of_nodes(order, 8, ranks_per_node, epoch))) / 128 <= 1.15 / 8


def test_a_node_of_any_number_and_of_a_mix_reads_about_its_share() -> None:
    """12 nodes don't divide 64 spans, and a mix has no residue classes: a few spans are read by two nodes."""
    one = SampleOrder([60] * 240, seed=1)
    assert max(map(len, shards_of_nodes(one, 12, 1, 0))) / 240 <= 1.25 / 12
    mix = MixedOrder([SampleOrder([60] * 160, seed=1), SampleOrder([60] * 320, seed=2)], [1.0, 0.25])
    for touched in shards_of_nodes(mix, 8, 1, 0):
        assert len([shard for shard in touched if shard < 160]) / 160 <= 1.35 / 8
        assert len([shard for shard in touched if shard >= 160]) / 320 <= 1.25 / 8


@settings(deadline=None, max_examples=30)
@given(COUNTS, COUNTS, st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 3), st.integers(0, 900))
def test_a_global_batch_is_parted_exactly(
    counts: list[int], more: list[int], world_size: int, share: int, start: int
) -> None:
    if not sum(counts) or not sum(more):
        return
    mix = MixedOrder([SampleOrder(counts, 1, 8, 16), SampleOrder(more, 2, 8, 16)], [1.0, 1.0])
    batch = share * world_size
    parts = [list(islice(rank_positions(mix, start, r, world_size, batch), 2 * share)) for r in range(world_size)]
    assert sorted(p for part in parts for p in part[:share]) == list(range(start, start + batch))
    assert sorted(p for part in parts for p in part[share:]) == list(range(start + batch, start + 2 * batch))


@given(st.integers(0, 719))
def test_digit_reversal_is_undone_by_the_factors_in_opposite_order(number: int) -> None:
    factors = [2, 2, 2, 2, 3, 3, 5]
    assert digit_reversal(digit_reversal(number, factors), factors[::-1]) == number
    assert [digit_reversal(i, [2, 2, 2]) for i in range(8)] == [0, 4, 2, 6, 1, 5, 3, 7]


def test_a_huge_dataset_is_opened_and_entered_anywhere_at_once() -> None:
    """100,000 shards, 1e9 samples: no step of it walks over samples, or the test would not end."""
    order = SampleOrder([10_000] * 100_000, seed=0)
    for position in (0, order.num_samples * 9 // 10, 7 * order.num_samples + 123):
        place = order.sample_at(position)
        assert place.epoch == position // 10**9 and place.sample < 10_000


# ---- several datasets ----


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(COUNTS, st.sampled_from([0.25, 0.5, 1.0, 1.7, 3.0])), min_size=1, max_size=4), st.integers(0, 3)
)
def test_a_mix_holds_each_dataset_as_often_as_asked(mix: list[tuple[list[int], float]], epoch: int) -> None:
    orders = [SampleOrder(counts, seed=2, canonical_spans=4, shuffle_window=8) for counts, _ in mix]
    if any(round(repeat * order.num_samples) < 1 for order, (_, repeat) in zip(orders, mix)):
        with pytest.raises(ValueError, match="at least one sample"):
            MixedOrder(orders, [repeat for _, repeat in mix])
        return
    mixed = MixedOrder(orders, [repeat for _, repeat in mix])
    places = [mixed.sample_at(epoch * mixed.num_samples + q) for q in range(mixed.num_samples)]
    first_shard = 0
    for order, share in zip(orders, mixed.shares):
        own = [p for p in places if first_shard <= p.shard < first_shard + len(order.counts)]
        expected = [order.sample_at(epoch * share + number) for number in range(share)]
        assert [(p.epoch, p.shard - first_shard, p.sample) for p in own] == [
            (p.epoch, p.shard, p.sample) for p in expected
        ]
        first_shard += len(order.counts)


@given(st.lists(st.integers(1, 400), min_size=2, max_size=5), st.data())
@settings(deadline=None, max_examples=80)
def test_windows_of_a_mix_hold_the_share_of_each_dataset(shares: list[int], data: st.DataObject) -> None:
    """Two datasets: any window's counts are those of the shares to within 1. More: each further one adds 1."""
    total = sum(shares)
    start = data.draw(st.integers(0, total - 1))
    end = data.draw(st.integers(start + 1, total))
    found = [dataset_at(q, shares)[0] for q in range(start, end)]
    for dataset, share in enumerate(shares):
        allowed = max(1, min(dataset + 1, len(shares) - 1))
        assert abs(found.count(dataset) - (end - start) * share / total) <= allowed


def test_one_dataset_alone_is_its_own_order() -> None:
    order = SampleOrder(UNEVEN, seed=4)
    mixed = MixedOrder([order], [1.0])
    assert [mixed.sample_at(p) for p in range(900)] == [order.sample_at(p) for p in range(900)]
