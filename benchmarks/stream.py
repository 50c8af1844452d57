"""How fast the stream is beside its peers: samples/s with and without decoding, start-up, and resuming.

In: how many samples, of photos made here or of a folder (``--photos``). Out: on the screen and as JSON (``--out``)
medians over rounds in which all readers take turns, each time in a new process, their ratios, and what the machine was
doing. Run it from the repository: ``python -m benchmarks.stream``.

webdataset and a plain tarfile loop read our tars; MosaicML streaming and LitData get the same samples in their own
formats, in environments of their own that are made below ``--environments`` (6 GB each, once). What can't be installed
or run is shown as not measured. The page cache is warm, one thread is used per process, and imports are not counted.

- undecoded: a whole epoch of image bytes and parsed JSON records, shuffled, no workers, from opening the folder on
  (behind a warm-up, shuffle buffers would give away what they had read before). Ours checks all crc32s.
- decoded: JPEG -> floats of 224 x 224 in batches, steady, for photos of that size and of Flickr's. The peers decode by
  open_clip's transform. "exact" is our stream with PIL as they have it, else it decodes by torchvision. Our batches of
  uint8 are normalised within the time that is measured.
- start: from opening the folder to the first batch, undecoded, no workers. Resumed: the same at 90% of an epoch, from
  the state of readers that have one; webdataset and the tarfile loop must read and discard.
- sample_at: our order asked at the start and at 90% of an epoch of 1e9 samples in 100,000 shards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.stream_environments import PEERS, NotInstalled, environment_of
from benchmarks.stream_formats import make_photos, write_ours
from benchmarks.stream_readers import WARM_UP
from diffcap_dist.data.order import SampleOrder
from diffcap_dist.data.shard_format import atomic_write

REPOSITORY = Path(__file__).resolve().parents[1]
TITLES = {
    "ours": "this project",
    "ours_exact": "this project, exact",
    "webdataset": "webdataset",
    "tarfile": "tarfile loop",
    "mosaicml": "MosaicML streaming",
    "litdata": "LitData",
}
DISCARDING = ("webdataset", "tarfile")  # they have no state to resume from
SIZES = {"small": (224, 224), "large": (500, 375)}
LIMIT_SECONDS = 600  # of one run
Python = Path | NotInstalled


class NotMeasured(RuntimeError):
    """A run gave no result; the message says why."""


@dataclass(frozen=True)
class Scale:
    """How much is read. ``samples`` are those of an epoch, ``decoded`` those timed behind the warm-up."""

    samples: int
    decoded: int
    batch_size: int
    samples_per_shard: int
    workers: tuple[int, ...]
    rounds: int

    def __post_init__(self) -> None:
        least = self.warm_up + max(self.decoded, self.batch_size)
        if self.samples % self.batch_size or self.decoded % self.batch_size or self.samples < least:
            raise ValueError(
                f"{self.samples} samples, {self.decoded} of them decoded, in batches of {self.batch_size}: both must "
                f"be multiples of the batch, and the samples at least {least}, for {WARM_UP} batches come first"
            )

    @property
    def warm_up(self) -> int:
        return WARM_UP * self.batch_size

    @property
    def seen(self) -> int:
        """Samples before the place where runs resume: 90% of an epoch, in whole batches."""
        return self.samples * 9 // 10 // self.batch_size * self.batch_size


@dataclass(frozen=True)
class Question:
    """What all readers are asked in turn. ``figure``: which of a run's figures is shown."""

    title: str
    data: str  # which of SIZES
    figure: str
    num_samples: int
    workers: int = 0
    decode: bool = False
    skip: int = 0


def questions_of(scale: Scale) -> dict[str, Question]:
    rate, steady, first = "samples_per_second", "steady_samples_per_second", "first_batch_seconds"
    questions = {
        "undecoded": Question("undecoded, samples/s", "small", rate, scale.samples),
        "start": Question("start, seconds to the first batch", "small", first, scale.batch_size),
        "resumed": Question(
            "resumed at 90%, seconds to the first batch", "small", first, scale.batch_size, skip=scale.seen
        ),
    }
    for data, (width, height) in SIZES.items():
        for workers in scale.workers:
            title = f"decoded from {width}x{height}, {workers} workers, samples/s"
            num_samples = scale.warm_up + scale.decoded
            questions[f"decoded {data} {workers}"] = Question(title, data, steady, num_samples, workers, True)
    return questions


# ---- the data ----


def write_datasets(
    scratch: Path, scale: Scale, photos: Path | None, pythons: dict[str, Python]
) -> tuple[dict[tuple[str, str], Path], dict[str, Python]]:
    """Folders by (size, reader), and the Pythons again, where a peer could not write its format without it."""
    folders: dict[tuple[str, str], Path] = {}
    pythons = dict(pythons)
    for data, size in SIZES.items():
        # No reader of decoded samples comes to the end of its epoch, where workers idle.
        count = scale.samples if data == "small" else 2 * scale.warm_up + scale.decoded
        ours = scratch / f"{data}-tars"
        write_ours(make_photos(scratch / f"{data}-photos", size, photos), count, scale.samples_per_shard, ours)
        for reader, python in pythons.items():
            folders[data, reader] = scratch / f"{data}-{reader}" if reader in PEERS else ours
            if reader in PEERS and isinstance(python, Path):
                try:
                    run_module(python, "benchmarks.stream_formats", [reader, ours, folders[data, reader]], scratch)
                except NotMeasured as error:
                    pythons[reader] = NotInstalled(f"its dataset could not be written: {error}")
    return folders, pythons


# ---- runs ----


def run_module(python: Path, module: str, words: Sequence[object], scratch: Path) -> list[str]:
    """The lines that a program of this folder prints, in a process of its own."""
    caches = ("LITDATA_CACHE_DIR", "DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER")
    environment = os.environ | {name: str(scratch / name.lower()) for name in caches}  # else below the home folder
    command = [str(python), "-m", module, *map(str, words)]
    try:
        run = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise NotMeasured(f"it gave nothing in {LIMIT_SECONDS} s") from error
    if run.returncode:
        raise NotMeasured((run.stderr.strip().splitlines() or [f"it ended with {run.returncode}"])[-1])
    return run.stdout.splitlines()


def run_reader(python: Path, reader: str, words: Sequence[object], scratch: Path) -> dict[str, Any]:
    lines = run_module(python, "benchmarks.stream_readers", [reader, *words], scratch)
    return json.loads(lines[-1])


class Runs:
    """The runs of all readers, and what is known of each: its figures, or why there are none."""

    def __init__(self, scratch: Path, scale: Scale, pythons: dict[str, Python], folders: dict) -> None:
        self.scratch, self.scale, self.pythons, self.folders = scratch, scale, pythons, folders
        self.questions = questions_of(scale)
        self.runs: dict[str, dict[str, list[dict]]] = {name: {} for name in self.questions}
        self.missing: dict[str, dict[str, str]] = {name: {} for name in self.questions}
        self.next_batch: dict[str, str] = {}  # of each reader: what a resumed one must begin with

    def save_states(self) -> None:
        for reader, python in self.pythons.items():
            if isinstance(python, Path) and reader != "ours_exact":
                words = [self.folders["small", reader], "--batch-size", self.scale.batch_size]
                words += ["--skip", self.scale.seen, "--save-state", self._state(reader)]
                try:
                    self.next_batch[reader] = run_reader(python, reader, words, self.scratch)["next_batch"]
                except NotMeasured as error:
                    self.missing["resumed"][reader] = f"no state: {error}"

    def round(self) -> None:
        """Each question once to each reader; a slow minute is slow for all of them."""
        for name, question in self.questions.items():
            for reader, python in self.pythons.items():
                if reader == "ours_exact" and not question.decode:
                    continue  # the same as ours
                if isinstance(python, NotInstalled):
                    self.missing[name][reader] = python.reason
                elif reader not in self.missing[name]:
                    try:
                        run = run_reader(python, reader, self._words(reader, question), self.scratch)
                        self._check(reader, question, run)
                        self.runs[name].setdefault(reader, []).append(run)
                        print(f"{question.title}: {TITLES[reader]} {_number(run[question.figure])}", file=sys.stderr)
                    except NotMeasured as error:
                        self.missing[name][reader] = str(error)

    def figures(self, name: str) -> dict[str, list[float]]:
        """By reader: the figure of each round, of those that have one for all."""
        figure = self.questions[name].figure
        return {
            reader: [run[figure] for run in runs]
            for reader, runs in self.runs[name].items()
            if reader not in self.missing[name]
        }

    def _words(self, reader: str, question: Question) -> list[object]:
        words = [self.folders[question.data, reader], "--samples", question.num_samples, "--workers", question.workers]
        words += ["--batch-size", self.scale.batch_size, "--skip", question.skip]
        words += ["--decode"] if question.decode else []
        words += ["--state", self._state(reader)] if question.skip and self._state(reader).exists() else []
        return words

    def _state(self, reader: str) -> Path:
        return self.scratch / f"{reader}.state"

    def _check(self, reader: str, question: Question, run: dict[str, Any]) -> None:
        """A reader that gave other samples than it was asked for was not measured."""
        if run["different_samples"] < question.num_samples:
            raise NotMeasured(f"it gave {run['different_samples']} different samples of {question.num_samples}")
        if question.skip and run["first_batch"] != self.next_batch[reader]:
            raise NotMeasured("it resumed at another batch than the one that came next")


def sample_at_figures(rounds: int, num_shards: int = 100_000, calls: int = 1 << 15) -> dict[str, float]:
    """Nanoseconds of `sample_at` at the start and at 90% of an epoch, 10,000 samples per shard; caches begin empty."""
    counts = [10_000] * num_shards
    seconds: dict[int, list[float]] = {0: [], 9 * sum(counts) // 10: []}
    for _ in range(rounds):
        for first, times in seconds.items():
            order = SampleOrder(counts, seed=0)
            started = time.perf_counter()
            for position in range(first, first + calls):
                order.sample_at(position)
            times.append(time.perf_counter() - started)
    start, late = (1e9 * statistics.median(times) / calls for times in seconds.values())
    return {"start_ns": start, "at_90%_ns": late, "ratio": late / start}


# ---- the result ----


def measure(scratch: Path, scale: Scale, photos: Path | None, pythons: dict[str, Python]) -> dict[str, Any]:
    load_before = os.getloadavg()[0]
    folders, pythons = write_datasets(scratch, scale, photos, pythons)
    runs = Runs(scratch, scale, pythons, folders)
    runs.save_states()
    for _ in range(scale.rounds):
        runs.round()
    medians = {
        name: {reader: statistics.median(values) for reader, values in runs.figures(name).items()}
        for name in runs.questions
    }
    return {
        "scale": asdict(scale),
        "photo_bytes": {data: mean_bytes(scratch / f"{data}-photos") for data in SIZES},
        "figures": {name: question.figure for name, question in runs.questions.items()},
        "titles": {name: question.title for name, question in runs.questions.items()},
        "medians": medians,
        "rounds": runs.runs,
        "not_measured": runs.missing,
        "ratios": ratios_of(medians),
        "sample_at": sample_at_figures(3 * scale.rounds),
        "load_average": [load_before, os.getloadavg()[0]],
        "machine": {"cpus": len(os.sched_getaffinity(0)), "processor": platform.machine()},
        "versions": {"python": platform.python_version(), "peers": PEERS}
        | {name: version(name) for name in ("webdataset", "torch", "torchvision", "pillow")},
    }


def ratios_of(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """What is asked of the figures; a ratio is left out where one of its two was not measured."""
    ratios = {}
    for name, of_reader in medians.items():
        peers = {reader: value for reader, value in of_reader.items() if not reader.startswith("ours")}
        if name == "undecoded" and {"ours", "webdataset"} <= of_reader.keys():
            ratios["undecoded, ours / webdataset (goal 5)"] = of_reader["ours"] / of_reader["webdataset"]
        if name.startswith("decoded") and "ours" in of_reader and peers:
            best = max(peers, key=peers.__getitem__)
            what = ", ".join(name.split())
            ratios[f"{what} workers: ours / {TITLES[best]}, the best peer (goal 1.2)"] = of_reader["ours"] / peers[best]
    for reader, resumed in medians["resumed"].items():
        if reader in medians["start"]:
            goal = " (goal 1.2)" if reader == "ours" else ""
            ratios[f"resumed / start, {TITLES[reader]}{goal}"] = resumed / medians["start"][reader]
    return ratios


def mean_bytes(folder: Path) -> float:
    return statistics.mean(path.stat().st_size for path in folder.iterdir())


def as_text(result: dict[str, Any]) -> str:
    scale, (small, large) = result["scale"], result["photo_bytes"].values()
    lines = [
        f"{scale['samples']} samples of {small / 1000:.0f} KB, and of {large / 1000:.0f} KB at Flickr's size, batches "
        f"of {scale['batch_size']}, page cache warm; medians of {scale['rounds']} rounds (and their range)"
    ]
    for name, title in result["titles"].items():
        lines += ["", title]
        for reader in TITLES:
            if reader in result["not_measured"][name]:
                lines.append(f"  {TITLES[reader]:22} not measured: {result['not_measured'][name][reader]}")
            elif reader in result["medians"][name]:
                values = [run[result["figures"][name]] for run in result["rounds"][name][reader]]
                low, middle, high = (_number(value) for value in (min(values), statistics.median(values), max(values)))
                discarded = name == "resumed" and reader in DISCARDING
                note = "  by reading and discarding" if discarded else ""
                lines.append(f"  {TITLES[reader]:22} {middle:>9}   ({low} to {high}){note}")
    lines += ["", *(f"{name}: {ratio:.2f}" for name, ratio in result["ratios"].items())]
    at = result["sample_at"]
    lines.append(
        f"sample_at, 1e9 samples in 100,000 shards: {at['start_ns']:.0f} ns at the start, {at['at_90%_ns']:.0f} ns at "
        f"90%, ratio {at['ratio']:.2f} (goal 1.2)"
    )
    before, after = result["load_average"]
    lines.append(f"load average {before:.1f} before, {after:.1f} after; {result['machine']['cpus']} CPUs")
    lines.append(f"versions: {result['versions']}")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8000, help="of an epoch")
    parser.add_argument("--decoded-samples", type=int, default=1536, help="timed of each decoded run")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[0, 2], help="of the decoded runs; none: no such runs"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--readers", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs to use instead of made pictures")
    parser.add_argument("--environments", type=Path, default=REPOSITORY / "build" / "benchmark_environments")
    parser.add_argument("--dir", type=Path, help="where the datasets are written (default: the system's for scratch)")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    scale = Scale(
        args.samples, args.decoded_samples, args.batch_size, args.samples_per_shard, tuple(args.workers), args.rounds
    )
    pythons = {
        reader: environment_of(reader, args.environments) if reader in PEERS else Path(sys.executable)
        for reader in dict.fromkeys(["ours", *args.readers])
    }
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        result = measure(Path(scratch), scale, args.photos, pythons)
    print(as_text(result))
    if args.out:
        atomic_write(args.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
