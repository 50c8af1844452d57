"""The order of samples: pure arithmetic from one integer, no I/O, no state.

In: sample counts per shard, a seed and a position p = 0, 1, 2, ... (samples over the whole run). Out: which
(epoch, shard, sample) stands at p, and which positions of a global batch a rank takes. What a global batch holds never
depends on the number of nodes, ranks or workers, so ``samples_seen`` is the whole state of a run's data.

Every random choice about a sample comes from ``draw(seed, purpose, ...)``: a hash, not a stream of random numbers,
so any of them can be asked for at any time, in any process.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

# Of SplitMix64 (Steele et al. 2014): what a state rises by, and (shift, multiplier) of its mixing.
GAMMA = 0x9E3779B97F4A7C15
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
_MASK = (1 << 64) - 1


def draw(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit integer that is a pure function of its arguments (splitmix64 chained over them).

    ``purpose`` keeps unrelated choices apart: the caption of sample 7 and its noise must not share bits.
    """
    state = _purpose_key(purpose) ^ (seed & _MASK)
    for number in (0, *numbers):
        z = (state + GAMMA + (number & _MASK)) & _MASK
        for shift, multiplier in MIXING:
            z = ((z ^ (z >> shift)) * multiplier) & _MASK
        state = z ^ (z >> LAST_SHIFT)
    return state >> 1


def draw_uniform(seed: int, purpose: str, *numbers: int) -> float:
    """``draw`` as a float in [0, 1)."""
    return draw(seed, purpose, *numbers) / (1 << 63)


@lru_cache
def _purpose_key(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "big")


class Place(NamedTuple):
    """Where the sample of a position lies: ``sample`` counts inside ``shard``; ``epoch``, its dataset's, says how often
    it was visited before."""

    epoch: int
    shard: int
    sample: int


class SampleOrder:
    """position -> Place, a window at a time: memory O(shards + windows in use), never O(samples).

    An epoch permutes the shards, lays their samples in one line, cuts the line into C = ``canonical_spans`` equal
    spans (the first ``N mod C`` are one longer) and shuffles each span in windows of about ``shuffle_window`` samples.
    Position q of the epoch is element ``q // C`` of the span that slot ``q mod C`` stands for; the last, incomplete row
    is dealt to the longer spans, so each epoch holds each sample exactly once. Slots stand for spans in digit-reversed
    order, so that any run of positions is spread evenly over the line; ``rank_positions`` gives each rank a part of it.
    """

    def __init__(self, counts: Sequence[int], seed: int, canonical_spans: int = 64, shuffle_window: int = 4096) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        if self.counts.ndim != 1 or (self.counts < 0).any() or self.counts.sum() == 0:
            raise ValueError(f"need at least one sample in the shards; got sample counts {list(counts)[:8]}")
        if canonical_spans < 1 or shuffle_window < 1:
            raise ValueError(
                f"canonical_spans ({canonical_spans}) and shuffle_window ({shuffle_window}) must be at least 1"
            )
        self.seed = seed
        self.canonical_spans = canonical_spans
        self.shuffle_window = shuffle_window
        self.num_samples = int(self.counts.sum())
        self._span_of_slot = [digit_reversal(slot, _prime_factors(canonical_spans)) for slot in range(canonical_spans)]
        length, longer = divmod(self.num_samples, canonical_spans)
        # The longer spans are those of the first slots, which the last row of an epoch is dealt to.
        self._span_length = [length] * canonical_spans
        for span in self._span_of_slot[:longer]:
            self._span_length[span] += 1
        self._span_start = [0, *accumulate(self._span_length)]
        self._last_windows = [(0, 0, 0)] * canonical_spans  # of each slot: mostly the next element is in it too
        # Kept per instance (an lru_cache on a method would keep every instance alive).
        self._line = lru_cache(maxsize=2)(self._make_line)
        self._window = lru_cache(maxsize=2 * canonical_spans)(self._make_window)

    def sample_at(self, position: int) -> Place:
        """The place of position >= 0; O(1) in the position (amortised over a window)."""
        if position < 0:
            raise ValueError(f"position {position} is negative")
        epoch, q = divmod(position, self.num_samples)
        element, slot = divmod(q, self.canonical_spans)
        window, start, end = self._last_windows[slot]
        if not start <= element < end:
            self._last_windows[slot] = window, start, end = self.window_at(slot, element)
        on_line = self._span_start[self._span_of_slot[slot]] + start
        on_line += self._window(epoch, slot, window, end - start).item(element - start)
        shard_order, ends = self._line(epoch)
        at = bisect_right(ends, on_line)
        return Place(epoch, shard_order[at], on_line - (ends[at - 1] if at else 0))

    def span_at(self, position: int) -> float:
        """Which part of the line position >= 0 lies in: its span's number over C, in [0, 1)."""
        return self._span_of_slot[position % self.num_samples % self.canonical_spans] / self.canonical_spans

    def window_at(self, slot: int, element: int) -> tuple[int, int, int]:
        """(number, first element, end) of the window that an element of the slot's span is in.

        Windows end at another element in each slot: were it the same, all spans would need new shards at one moment.
        A first or last window of less than half the size joins its neighbour, for it would hardly shuffle.
        """
        size, length = self.shuffle_window, self._span_length[self._span_of_slot[slot]]
        first_end = size * (slot + 1) // self.canonical_spans
        if 2 * first_end < size:
            first_end += size
        last = max(0, -(-(length - first_end) // size))
        if last and 2 * (length - first_end - (last - 1) * size) < size:
            last -= 1
        number = min(last, 0 if element < first_end else 1 + (element - first_end) // size)
        start = first_end + (number - 1) * size if number else 0
        return number, start, length if number == last else first_end + number * size

    def _make_line(self, epoch: int) -> tuple[list[int], list[int]]:
        """The shards in the epoch's order, and where each ends on the line. Lists: arrays are slow to look up."""
        shard_order = np.random.default_rng(draw(self.seed, "shards", epoch)).permutation(len(self.counts))
        return shard_order.tolist(), np.cumsum(self.counts[shard_order]).tolist()

    def _make_window(self, epoch: int, slot: int, window: int, length: int) -> np.ndarray:
        return np.random.default_rng(draw(self.seed, "window", epoch, slot, window)).permutation(length)


class MixedOrder:
    """Several datasets as one: dataset i gives ``round(repeat_i * samples_i)`` samples to each epoch, spread evenly.

    ``sample_at`` counts shards through all datasets, the first one's first. A dataset goes on where it stopped: with
    repeat 0.25 its own epoch lasts four of the mix. One dataset at repeat 1 is its ``SampleOrder``.
    """

    def __init__(self, orders: Sequence[SampleOrder], repeats: Sequence[float]) -> None:
        self.orders = list(orders)
        self.shares = [round(repeat * order.num_samples) for order, repeat in zip(orders, repeats, strict=True)]
        if min(self.shares, default=0) < 1:
            raise ValueError(f"each dataset of a mix must give at least one sample an epoch; these give {self.shares}")
        self.num_samples = sum(self.shares)
        self._first_shard = [0, *accumulate(len(order.counts) for order in orders)]

    def sample_at(self, position: int) -> Place:
        """The place of position >= 0."""
        dataset, own_position = self._own_position(position)
        place = self.orders[dataset].sample_at(own_position)
        return place if dataset == 0 else Place(place.epoch, self._first_shard[dataset] + place.shard, place.sample)

    def span_at(self, position: int) -> float:
        """Which part of its dataset's line position >= 0 lies in, in [0, 1)."""
        dataset, own_position = self._own_position(position)
        return self.orders[dataset].span_at(own_position)

    def _own_position(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise ValueError(f"position {position} is negative")
        epoch, q = divmod(position, self.num_samples)
        dataset, number = dataset_at(q, self.shares)
        return dataset, epoch * self.shares[dataset] + number


def dataset_at(q: int, shares: Sequence[int]) -> tuple[int, int]:
    """(dataset, how many of it came before) at position q of an epoch that holds ``shares`` of each.

    The first dataset's samples stand as evenly among all as integers allow (a Bresenham line), those of the second
    as evenly among the rest, and so on.
    """
    total = sum(shares)
    for dataset, share in enumerate(shares):
        before = q * share // total
        if (q + 1) * share // total > before:
            return dataset, before
        q, total = q - before, total - share
    raise AssertionError(f"position beyond the epoch of {shares}")


def digit_reversal(number: int, factors: Sequence[int]) -> int:
    """``number`` with its digits, in the mixed radix of ``factors`` (the lowest first), in opposite order."""
    reversed_number = 0
    for factor in factors:
        number, digit = divmod(number, factor)
        reversed_number = reversed_number * factor + digit
    return reversed_number


def _prime_factors(number: int) -> list[int]:
    factors, factor = [], 2
    while number > 1:
        while number % factor == 0:
            factors.append(factor)
            number //= factor
        factor += 1
    return factors


def rank_positions(
    order: SampleOrder | MixedOrder, start: int, rank: int, world_size: int, global_batch_size: int
) -> Iterator[int]:
    """Endless positions of ``rank`` from global position ``start`` on: of each global batch, sorted by where on the
    line its samples lie, the rank-th of ``world_size`` equal parts.

    So ranks 0, 1, 2, ... read the first, second, third part of each dataset, and a node of neighbouring ranks one
    piece: exactly where world_size divides the canonical spans; in other worlds, in mixes and where epochs meet, with
    some spans on two ranks.
    """
    if global_batch_size % world_size:
        raise ValueError(f"a global batch of {global_batch_size} can't be parted equally among {world_size} ranks")
    share = global_batch_size // world_size
    while True:
        batch = sorted(range(start, start + global_batch_size), key=order.span_at)
        yield from batch[rank * share : (rank + 1) * share]
        start += global_batch_size


def evaluation_positions(num_samples: int, rank: int, world_size: int) -> range:
    """The exact share of ``rank``: no padding, no duplicate, no sample lost."""
    return range(rank, num_samples, world_size)
