"""How well the order shuffles, held to what its construction must give; and the benchmark that measures it.

The bounds are derived here, not read off: a shuffle that is broken, or becomes worse or less random, is outside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import combinations, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import shuffling
from benchmarks.shuffling import (
    BATCH,
    Data,
    chi2_per_dof,
    counts_in,
    epoch_of,
    gaps_between,
    ks_distance,
    main,
    most_in_use,
    our_epochs,
    position_correlation,
    shards_of_batches,
    share_with_duplicates,
    true_permutations,
    webdataset_epochs,
    webdataset_epochs_of_many,
    windows,
)
from diffcap_dist.data import order as order_module
from diffcap_dist.data.order import Place, SampleOrder

DATA = Data(num_shards=1000, samples_per_shard=1000)  # 100 classes one after the other: 10 shards of each
SPANS = 64

Epochs = list[np.ndarray]


def chi2_of_batches(epochs: Epochs, data: Data) -> float:
    found = [chi2_per_dof(counts_in(windows(data.classes_of(e), BATCH), data.num_classes)) for e in epochs]
    return float(np.mean(found))


def expected_chi2_of_batches(data: Data, window: int, spans: int) -> float:
    """What random windows give for sorted classes. Of n samples of a batch and K classes, chi-square is
    K/n sum_k c_k^2 - n, and sum_k c_k^2 = n + n (n-1) P(a pair is of one class), so only P is needed.

    n / C samples of a batch come from each span, and so from one window: those are of one shard with the probability p
    that two random places of the window are nearer than a shard's end; else of one class as random shards are.
    """
    shards_per_class = data.num_shards / data.num_classes
    of_one_class = (shards_per_class - 1) / (data.num_shards - 1)  # two different shards
    span = data.num_samples / spans
    whole, rest = divmod(span, window)
    lengths = [window] * int(whole) + [rest]
    p = sum(length * of_one_shard(length / data.samples_per_shard) for length in lengths) / span
    in_a_span, elsewhere = BATCH / spans - 1, BATCH - BATCH / spans
    pairs = in_a_span * (p + (1 - p) * of_one_class) + elsewhere * of_one_class
    return (data.num_classes * (1 + pairs) - BATCH) / (data.num_classes - 1)


def of_one_shard(window: float) -> float:
    """P that two random places of a window (its length in shards) are of one shard, whatever it begins with:
    the integral of (1 - distance) over the triangular density of their distance."""
    return 1 - window / 3 if window < 1 else 1 / window - 1 / (3 * window**2)


def assert_well_shuffled(epochs: Epochs, data: Data, window: int, spans: int = SPANS) -> None:
    for epoch in epochs:
        assert (np.bincount(epoch, minlength=data.num_samples) == 1).all()
        assert share_with_duplicates(epoch) == 0  # follows; but it is what is promised
        # Dvoretzky-Kiefer-Wolfowitz, as if neighbours were only as many pairs as there are shards, at 1 in 1,000.
        ks = ks_distance(np.abs(np.diff(epoch)), data.num_samples)
        assert ks < math.sqrt(math.log(2 / 1e-3) / (2 * data.num_shards))
        if window >= 4 * data.samples_per_shard:
            # Where in their shards neighbours lie has nothing to do with each other: 5 standard deviations. (Windows of
            # a shard or less begin at much the same place of their shards in all spans, so there it has.)
            within = epoch % data.samples_per_shard
            assert abs(np.corrcoef(within[:-1], within[1:])[0, 1]) < 5 / math.sqrt(data.num_samples)
    # Over the shards' orders the mean over 3 epochs scatters by 3 %.
    assert chi2_of_batches(epochs, data) == pytest.approx(expected_chi2_of_batches(data, window, spans), rel=0.1)
    for epoch, following in pairwise(epochs):
        # If shards kept together altogether, there would be as many ranks as shards: 3.5 standard deviations of those.
        correlation = position_correlation(epoch, following, data.num_samples)
        assert abs(correlation) < 3.5 / math.sqrt(data.num_shards - 1)


@pytest.mark.parametrize("window", [500, 1000, 4096, 10_000])
def test_sorted_classes_are_mixed_as_far_as_the_window_allows(window: int) -> None:
    epochs = list(islice(our_epochs(DATA, window, seed=3), 3))
    assert_well_shuffled(epochs, DATA, window)


def test_the_default_window_on_sorted_classes_in_one_number() -> None:
    """4,096 positions of shards of 1,000: 1.45; unshuffled windows would give 3.6, a single span 58."""
    assert SampleOrder([1], seed=0).shuffle_window == 4096
    assert expected_chi2_of_batches(DATA, 4096, SPANS) == pytest.approx(1.45, abs=0.01)


def in_place(self: SampleOrder, epoch: int, slot: int, window: int, length: int) -> np.ndarray:
    return np.arange(length)


def shards_in_order(self: SampleOrder, epoch: int) -> tuple[list[int], list[int]]:
    return list(range(len(self.counts))), np.cumsum(self.counts).tolist()


def deaf_to(purpose: str, argument: int) -> Callable[..., int]:
    """``draw`` that takes no notice of one of its numbers."""
    true_draw = order_module.draw

    def draw(seed: int, asked: str, *numbers: int) -> int:
        if asked == purpose:
            numbers = tuple(0 if i == argument else number for i, number in enumerate(numbers))
        return true_draw(seed, asked, *numbers)

    return draw


@pytest.mark.parametrize(
    "breakage",
    [
        lambda patch: patch.setattr(SampleOrder, "_make_window", in_place),
        lambda patch: patch.setattr(SampleOrder, "_make_line", shards_in_order),
        lambda patch: patch.setattr(order_module, "draw", deaf_to("shards", 0)),
        lambda patch: patch.setattr(order_module, "digit_reversal", lambda slot, factors: slot % 2),
    ],
    ids=["windows unshuffled", "shards unshuffled", "epochs alike", "samples twice"],
)
def test_a_broken_shuffle_is_seen(breakage: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        breakage(patch)
        epochs = list(islice(our_epochs(DATA, 4096, seed=3), 2))
        with pytest.raises(AssertionError):
            assert_well_shuffled(epochs, DATA, 4096)


def test_too_few_spans_or_too_small_windows_are_seen() -> None:
    for window, spans in ((4096, 1), (4096, 16), (1000, SPANS)):
        with pytest.raises(AssertionError):
            assert_well_shuffled(list(islice(our_epochs(DATA, window, 3, spans), 2)), DATA, 4096, SPANS)


def test_a_photo_comes_again_after_an_epoch_as_by_chance() -> None:
    """Between two random epochs L (L-1) / 2N photos have a gap below L: 16 at each of the 40 boundaries here. Those of
    a shard come together, so that the deviation is that of what was found, not a single photo's."""
    data, length = Data(200, 100), 800
    epochs = list(islice(our_epochs(data, 64, seed=0), 41))
    found = [(gaps_between(a, b, data.num_samples) < length).sum() for a, b in pairwise(epochs)]
    expected = length * (length - 1) / 2 / data.num_samples
    assert 0.7 * expected < np.mean(found) < 1.3 * expected
    assert abs(np.mean(found) - expected) < 4 * np.std(found) / math.sqrt(len(found))


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(lambda counts: sum(counts) > 0),
    st.integers(0, 5),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_what_is_measured_is_the_order_of_the_training(
    counts: list[int], seed: int, spans: int, window: int, epoch: int
) -> None:
    order = SampleOrder(counts, seed, spans, window)
    samples = [(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    stream = [Place(epoch, *samples[number]) for number in epoch_of(order, epoch, num_checked=0)]
    assert stream == [order.sample_at(epoch * order.num_samples + q) for q in range(order.num_samples)]
    assert len(set(stream)) == order.num_samples  # so no photo is twice in a batch of an epoch


# ---- the measures themselves ----


@given(st.integers(3, 30))
def test_the_ks_distance_of_all_pairs_is_zero(num_samples: int) -> None:
    distances = np.array([b - a for a, b in combinations(range(num_samples), 2)])
    assert ks_distance(distances, num_samples) < 1e-12
    assert ks_distance(np.ones(7, np.int64), num_samples) == pytest.approx(1 - 2 / num_samples)


def test_a_true_permutation_is_what_the_measures_take_it_for() -> None:
    epochs = list(islice(true_permutations(DATA, seed=1), 2))
    assert chi2_of_batches(epochs, DATA) == pytest.approx(1, abs=0.02)
    assert ks_distance(np.abs(np.diff(epochs[0])), DATA.num_samples) < 0.002
    assert abs(position_correlation(*epochs, DATA.num_samples)) < 0.005
    pairs, shards = shards_of_batches(DATA.shards_of(epochs[0]), DATA.num_shards)
    assert pairs == pytest.approx(0.001, rel=0.05)
    assert shards == pytest.approx(1000 * (1 - 0.999**BATCH), rel=0.01)


def test_measures_by_hand() -> None:
    assert chi2_per_dof(np.array([[4, 0], [2, 2]])) == pytest.approx((4 + 0) / 2)
    assert counts_in(np.array([[0, 2, 2], [1, 1, 1]]), 3).tolist() == [[1, 0, 2], [0, 3, 0]]
    assert most_in_use(np.array([5, 5, 1, 5, 1, 2, 2])) == 2
    assert most_in_use(np.array([0, 1, 2, 0, 1, 2])) == 3
    forward = np.arange(6)
    assert sorted(gaps_between(forward, forward[::-1], 6).tolist()) == [1, 3, 5, 7, 9, 11]
    assert gaps_between(forward, np.array([5, 2]), 6).tolist() == [5, 1]
    assert position_correlation(forward, forward[::-1], 6) == pytest.approx(-1)
    assert share_with_duplicates(np.concatenate([np.arange(BATCH), np.arange(BATCH) // 2])) == 0.5


# ---- the peer, and the benchmark as a whole ----


def test_the_peer_is_read_as_its_users_do() -> None:
    data = Data(128, 64, num_classes=8)
    one, many = webdataset_epochs(data, seed=0), webdataset_epochs_of_many(data, seed=0)
    for stream in (next(one), next(many)):
        assert (np.sort(stream) == np.arange(data.num_samples)).all()
    batches = windows(next(many), BATCH)
    assert len(batches) == data.num_samples // BATCH
    # 64 readers of 2 shards each: a batch is of the 8 ranks' readers, 32 samples of each, round by round.
    groups = [set(data.shards_of(batch).tolist()) for batch in batches[:8]]
    assert all(len(group) <= 16 for group in groups) and len(set.union(*groups)) == sum(map(len, groups))
    with pytest.raises(ValueError, match="64 readers"):
        next(webdataset_epochs_of_many(Data(63, 10), seed=0))


def test_main_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shuffling.json"
    assert main(["--samples", "25600", "--samples-per-shard", "100", "--epochs", "2", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["data"]["num_shards"] == 256
    assert list(result["orders"]) == [
        "true permutation",
        *(f"window {window:,}" for window in shuffling.WINDOWS),
        "webdataset, 1 reader",
        "webdataset, 64 readers",
    ]
    table = capsys.readouterr().out
    for title, show in shuffling.ROWS:
        assert title in table
        assert all(show(shuffling.Quality(**quality)) in table for quality in result["orders"].values())
    with pytest.raises(SystemExit):
        main(["--epochs", "1"])
