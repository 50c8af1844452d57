"""How good the windowed shuffle is, beside a true permutation and webdataset's shuffle buffer: order alone, no files.

In: how many samples, in shards of how many (``--samples``, ``--samples-per-shard``). Out: on the screen and as JSON
(``--json``) one column for each order of the same data. The data are the worst case: 100 classes lie in the shards one
after the other, so that nearly every shard holds one class.

Ours is the order of the training: ``epoch_of`` lays it out at once and compares it with ``SampleOrder.sample_at``.
webdataset is its own code, on integers in place of tar files: "1 reader" is one worker with the defaults of
``detshuffle`` and ``shuffle(1000)``; "64 readers" are 8 ranks x 8 workers with open_clip's settings, a batch of a rank
from one worker at a time, ended where the first of them has no more.

A photo is one sample (one position), whatever its number of captions. N: samples.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from diffcap_dist.data.order import Place, SampleOrder
from diffcap_dist.data.shard_format import atomic_write

BATCH = 256  # samples of a global batch
LONG = 4096  # samples: the longer windows of positions in which classes are counted
WINDOWS = (1_000, 4_096, 10_000, 100_000)
SPANS = 64
RANKS, WORKERS = 8, 8  # of "webdataset, 64 readers"


@dataclass(frozen=True)
class Data:
    """Samples 0 ... N-1, shard after shard, class after class."""

    num_shards: int
    samples_per_shard: int
    num_classes: int = 100

    @property
    def num_samples(self) -> int:
        return self.num_shards * self.samples_per_shard

    def shards_of(self, stream: np.ndarray) -> np.ndarray:
        return stream // self.samples_per_shard

    def classes_of(self, stream: np.ndarray) -> np.ndarray:
        return stream * self.num_classes // self.num_samples


# ---- the orders: each gives the epochs 0, 1, ... as arrays of sample numbers ----


def our_epochs(data: Data, window: int, seed: int, spans: int = SPANS) -> Iterator[np.ndarray]:
    order = SampleOrder([data.samples_per_shard] * data.num_shards, seed, spans, window)
    epoch = 0
    while True:
        yield epoch_of(order, epoch)
        epoch += 1


def epoch_of(order: SampleOrder, epoch: int, num_checked: int = 200) -> np.ndarray:
    """Sample numbers (through all shards, in their order) at the positions of an epoch: ``sample_at`` for all at once.

    From the order's own line and windows; ``num_checked`` positions, the first and the last are asked of ``sample_at``.
    """
    num_samples, spans = order.num_samples, order.canonical_spans
    shard_order, ends = map(np.asarray, order._line(epoch))
    first_of_shard = np.concatenate([[0], np.cumsum(order.counts)[:-1]])
    line = np.repeat(first_of_shard[shard_order] - (ends - order.counts[shard_order]), order.counts[shard_order])
    line += np.arange(num_samples)
    stream = np.empty(num_samples, np.int64)
    for slot, span in enumerate(order._span_of_slot):
        of_span = line[order._span_start[span] : order._span_start[span + 1]]
        places, begin = [np.empty(0, np.int64)], 0
        while begin < len(of_span):
            window, _, end = order.window_at(slot, begin)
            places.append(of_span[begin:end][order._make_window(epoch, slot, window, end - begin)])
            begin = end
        stream[slot::spans] = np.concatenate(places)
    chosen = np.random.default_rng(epoch).integers(num_samples, size=num_checked).tolist()
    for q in [0, num_samples - 1, *chosen]:
        place = order.sample_at(epoch * num_samples + q)
        assert place == Place(epoch, place.shard, int(stream[q] - first_of_shard[place.shard])), f"not the order at {q}"
    return stream


def true_permutations(data: Data, seed: int) -> Iterator[np.ndarray]:
    chance = np.random.default_rng(seed)
    while True:
        yield chance.permutation(data.num_samples)


def webdataset_epochs(data: Data, seed: int) -> Iterator[np.ndarray]:
    """One node, one worker, the defaults of both shuffles."""
    pipeline = _webdataset(data, wds.detshuffle(seed=seed), wds.shuffle(1000, rng=random.Random(seed)))
    while True:
        yield np.fromiter(pipeline, np.int64)


def webdataset_epochs_of_many(data: Data, seed: int) -> Iterator[np.ndarray]:
    """The global batches of 8 ranks x 8 workers: every rank's share of batch k is from its worker k mod 8."""
    if data.num_shards < RANKS * WORKERS:
        raise ValueError(f"{RANKS * WORKERS} readers need as many shards; there are {data.num_shards}")
    readers = []
    for reader in range(RANKS * WORKERS):
        # What split_by_node and split_by_worker do, which know their numbers from the environment.
        part = _EveryNth(reader, RANKS * WORKERS)
        shards = wds.detshuffle(bufsize=2000, initial=500, seed=seed)
        samples = wds.shuffle(5000, initial=1000, rng=random.Random(seed + 1 + reader))
        readers.append(_webdataset(data, shards, samples, part))
    share = BATCH // RANKS
    while True:
        streams = [np.fromiter(reader, np.int64) for reader in readers]
        rounds = min(map(len, streams)) // share
        # [worker, rank, round, sample] -> batches in the order of round, worker
        blocks = np.stack([stream[: rounds * share] for stream in streams]).reshape(WORKERS, RANKS, rounds, share)
        yield blocks.transpose(2, 0, 1, 3).ravel()


@dataclass(frozen=True)
class _EveryNth:
    first: int
    step: int

    def __call__(self, shards: Iterator[dict]) -> Iterator[dict]:
        return islice(shards, self.first, None, self.step)


def _webdataset(data: Data, shards: Callable, samples: Callable, part: Callable = iter) -> wds.DataPipeline:
    def read(urls: Iterator[dict]) -> Iterator[int]:
        for url in urls:
            first = int(url["url"]) * data.samples_per_shard
            yield from range(first, first + data.samples_per_shard)

    names = [str(shard) for shard in range(data.num_shards)]
    return wds.DataPipeline(wds.SimpleShardList(names), shards, part, read, samples)


# ---- the measures ----


@dataclass
class Quality:
    """What is measured of an order: means over its epochs, where nothing else is said."""

    distance_quantiles: list[float]  # 5, 25, 50, 75, 95 %, of |i - j| / N for neighbours i, j in the stream
    distance_ks: float  # Kolmogorov-Smirnov distance of the same to that of two random samples
    neighbours_of_one_shard: float  # share of neighbours
    pairs_of_one_shard: float  # share of the pairs in a batch, over its expectation under a true permutation
    shards_in_a_batch: float
    class_chi2_of_batches: float  # chi-square / degrees of freedom; a true permutation gives 1
    class_chi2_of_long_windows: float
    largest_class_share: float  # of the worst batch
    closest_visits: int  # fewest positions from one visit of a photo to the next
    early_revisits: float  # photos seen again within 4,096 positions, over their expectation under true permutations
    batches_with_duplicates: float  # share
    epoch_correlation: float  # root mean square, over successive epochs, of Spearman's for a photo's positions
    shards_in_use: int  # most shards begun and not finished at a time, by all readers together
    memory: str = ""  # what the shuffle itself keeps


def measure(epochs: Sequence[np.ndarray], data: Data) -> Quality:
    def mean(of: Callable[[np.ndarray], Any]) -> Any:
        return np.mean([of(epoch) for epoch in epochs], axis=0).tolist()

    def class_chi2(length: int) -> float:
        return mean(lambda epoch: chi2_per_dof(counts_in(windows(data.classes_of(epoch), length), data.num_classes)))

    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    gaps = [gaps_between(a, b, data.num_samples) for a, b in pairwise(epochs)]
    correlations = [position_correlation(a, b, data.num_samples) for a, b in pairwise(epochs)]
    of_shards = mean(lambda epoch: shards_of_batches(data.shards_of(epoch), data.num_shards))
    of_classes = [counts_in(windows(data.classes_of(epoch), BATCH), data.num_classes) for epoch in epochs]
    return Quality(
        distance_quantiles=mean(lambda epoch: np.quantile(np.abs(np.diff(epoch)), quantiles) / data.num_samples),
        distance_ks=mean(lambda epoch: ks_distance(np.abs(np.diff(epoch)), data.num_samples)),
        neighbours_of_one_shard=mean(lambda epoch: (np.diff(data.shards_of(epoch)) == 0).mean()),
        pairs_of_one_shard=of_shards[0] / ((data.samples_per_shard - 1) / (data.num_samples - 1)),
        shards_in_a_batch=of_shards[1],
        class_chi2_of_batches=class_chi2(BATCH),
        class_chi2_of_long_windows=class_chi2(LONG),
        largest_class_share=float(max(counts.max() for counts in of_classes) / BATCH),
        closest_visits=int(min(found.min() for found in gaps)),
        early_revisits=float(np.mean([(found < LONG).sum() for found in gaps]) / expected_revisits(data.num_samples)),
        batches_with_duplicates=share_with_duplicates(np.concatenate(epochs)),
        epoch_correlation=float(np.sqrt(np.mean(np.square(correlations)))),
        shards_in_use=max(most_in_use(data.shards_of(epoch)) for epoch in epochs),
    )


def windows(stream: np.ndarray, length: int) -> np.ndarray:
    """[window, position]; the incomplete last one is left out."""
    return stream[: len(stream) // length * length].reshape(-1, length)


def ks_distance(distance: np.ndarray, num_samples: int) -> float:
    """Largest gap between the distribution of |i - j| and a random pair's, P(<= d) = d (2N - d - 1) / (N (N - 1))."""
    d = np.arange(num_samples, dtype=np.float64)
    expected = d * (2 * num_samples - d - 1) / (num_samples * (num_samples - 1.0))
    found = np.cumsum(np.bincount(distance, minlength=num_samples)) / len(distance)
    return float(np.abs(found - expected).max())


def counts_in(windows_: np.ndarray, num_kinds: int) -> np.ndarray:
    """[window, kind]: how often each kind 0 ... num_kinds-1 stands in each window."""
    cells = np.arange(len(windows_))[:, None] * num_kinds + windows_
    return np.bincount(cells.ravel(), minlength=len(windows_) * num_kinds).reshape(-1, num_kinds)


def shards_of_batches(shards: np.ndarray, num_shards: int) -> tuple[float, float]:
    """(share of the pairs in a batch that come from one shard, shards in a batch), means over batches."""
    counts = counts_in(windows(shards, BATCH), num_shards)
    return float((counts * (counts - 1)).sum(1).mean() / (BATCH * (BATCH - 1))), float((counts > 0).sum(1).mean())


def chi2_per_dof(counts: np.ndarray) -> float:
    """Pearson's chi-square against equal shares, over its degrees of freedom, mean over the windows."""
    if not len(counts):
        return float("nan")
    expected = counts.sum(1, keepdims=True) / counts.shape[1]
    return float(((counts - expected) ** 2 / expected).sum(1).mean() / (counts.shape[1] - 1))


def gaps_between(epoch: np.ndarray, following: np.ndarray, num_samples: int) -> np.ndarray:
    """Positions from the visit of each photo in one epoch to that in the next, of the photos that both hold."""
    before, after = positions_of(epoch, num_samples), positions_of(following, num_samples)
    return (after + len(epoch) - before)[(before >= 0) & (after >= 0)]


def expected_revisits(num_samples: int) -> float:
    """Photos with a gap below LONG, between two true permutations: LONG (LONG - 1) / 2 pairs of places, each 1 / N."""
    return LONG * (LONG - 1) / 2 / num_samples


def position_correlation(epoch: np.ndarray, following: np.ndarray, num_samples: int) -> float:
    """Spearman's: of the ranks of the positions, among the photos that both epochs hold."""
    before, after = positions_of(epoch, num_samples), positions_of(following, num_samples)
    both = (before >= 0) & (after >= 0)
    ranks = [np.cumsum(np.bincount(positions[both]))[positions[both]] for positions in (before, after)]
    return float(np.corrcoef(*ranks)[0, 1])


def positions_of(stream: np.ndarray, num_samples: int) -> np.ndarray:
    """Position of each sample, -1 where the epoch has left it out."""
    positions = np.full(num_samples, -1)
    positions[stream] = np.arange(len(stream))
    return positions


def share_with_duplicates(stream: np.ndarray) -> float:
    batches = np.sort(windows(stream, BATCH), axis=1)
    return float((np.diff(batches, axis=1) == 0).any(1).mean())


def most_in_use(shards: np.ndarray) -> int:
    """Shards between their first and their last sample in an epoch: what is open, or held by a node that reads all."""
    begun = np.unique(shards, return_index=True)[1]
    ended = len(shards) - np.unique(shards[::-1], return_index=True)[1]
    change = np.bincount(begun, minlength=len(shards) + 1) - np.bincount(ended, minlength=len(shards) + 1)
    return int(np.cumsum(change).max())


# ---- the table ----


@dataclass(frozen=True)
class Candidate:
    """An order to be measured."""

    epochs: Iterator[np.ndarray]
    memory: str  # what the shuffle itself keeps, in a process
    readers: int | None = None  # each of which reads a shard from end to end; None: shards are entered anywhere


def candidates(data: Data, seed: int) -> dict[str, Candidate]:
    found = {"true permutation": Candidate(true_permutations(data, seed), f"{8 * data.num_samples / 1e6:.1f} MB")}
    for window in WINDOWS:
        # SampleOrder keeps 2 windows of each span, 8 bytes a number; a span is no longer than N / SPANS.
        kept = 8 * 2 * SPANS * min(window, data.num_samples / SPANS)
        found[f"window {window:,}"] = Candidate(our_epochs(data, window, seed), f"{kept / 1e6:.1f} MB")
    found["webdataset, 1 reader"] = Candidate(webdataset_epochs(data, seed), "1k samples", 1)
    many = RANKS * WORKERS
    found[f"webdataset, {many} readers"] = Candidate(webdataset_epochs_of_many(data, seed), "5k samples", many)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--samples-per-shard", type=int, default=1_000)
    parser.add_argument("--epochs", type=int, default=5, help="at least 2: what happens between them is measured too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 2:
        parser.error(f"--epochs {arguments.epochs}: at least 2, what happens between them is measured too")
    data = Data(arguments.samples // arguments.samples_per_shard, arguments.samples_per_shard)
    qualities = {}
    for name, candidate in candidates(data, arguments.seed).items():
        qualities[name] = measure(list(islice(candidate.epochs, arguments.epochs)), data)
        qualities[name].memory = candidate.memory
        qualities[name].shards_in_use = candidate.readers or qualities[name].shards_in_use
    print(as_text(qualities, data, arguments.epochs))
    if arguments.json:
        result = {
            "data": asdict(data),
            "epochs": arguments.epochs,
            "seed": arguments.seed,
            "orders": {name: asdict(quality) for name, quality in qualities.items()},
            "versions": {name: version(name) for name in ("webdataset", "numpy")},
        }
        atomic_write(arguments.json, (json.dumps(result, indent=1) + "\n").encode())
    return 0


ROWS: list[tuple[str, Callable[[Quality], str]]] = [
    ("distance of neighbours, 5 %", lambda q: f"{q.distance_quantiles[0]:.3f} N"),
    ("                       25 %", lambda q: f"{q.distance_quantiles[1]:.3f} N"),
    ("                       50 %", lambda q: f"{q.distance_quantiles[2]:.3f} N"),
    ("                       75 %", lambda q: f"{q.distance_quantiles[3]:.3f} N"),
    ("                       95 %", lambda q: f"{q.distance_quantiles[4]:.3f} N"),
    ("  KS to a random pair's", lambda q: f"{q.distance_ks:.4f}"),
    ("neighbours of one shard", lambda q: f"{q.neighbours_of_one_shard:.2%}"),
    ("pairs of one shard, x random", lambda q: f"{q.pairs_of_one_shard:.2f}"),
    ("shards in a batch", lambda q: f"{q.shards_in_a_batch:.1f}"),
    ("classes, chi2/dof of batches", lambda q: f"{q.class_chi2_of_batches:.2f}"),
    (f"  of {LONG:,} positions", lambda q: f"{q.class_chi2_of_long_windows:.2f}"),
    ("  largest share in a batch", lambda q: f"{q.largest_class_share:.1%}"),
    ("closest visits of a photo", lambda q: f"{q.closest_visits:,}"),
    (f"again within {LONG:,}, x random", lambda q: f"{q.early_revisits:.2f}"),
    ("batches with a photo twice", lambda q: f"{q.batches_with_duplicates:.2%}"),
    ("epochs' correlation, rms", lambda q: f"{q.epoch_correlation:.4f}"),
    ("shards in use at once", lambda q: f"{q.shards_in_use:,}"),
    ("a process keeps", lambda q: q.memory),
]


def as_text(qualities: dict[str, Quality], data: Data, num_epochs: int) -> str:
    lines = [
        f"{data.num_samples:,} samples in {data.num_shards:,} shards, {data.num_classes} classes one after the other; "
        f"batches of {BATCH}; {num_epochs} epochs"
    ]
    heads = [name.split(" ", 1) for name in qualities]
    lines += [" " * 29 + "".join(f"{head[line]:>13}" for head in heads) for line in (0, 1)]
    lines += [f"{title:29}" + "".join(f"{show(q):>13}" for q in qualities.values()) for title, show in ROWS]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
