"""What do more ranks give, and what do they say to each other? One and two ranks at ZeRO 0-3, torch's DDP beside them.

In: nothing; it draws scenes. Out: Markdown tables. Bytes: each rank's collectives in one step of the real trainer, what
they would send round a ring, what really left through its sockets (`benchmarks/traffic.py`), and the theory
(Rajbhandari et al. 2020, arXiv:1910.02054, section 7: 2 psi at ZeRO 0-2, 3 psi at ZeRO 3). Speed: medians over rounds,
in each of which all engines have their turn alone, as two lone ranks at once (what the cores take from each other) and
as two ranks. Then the step-time model of `benchmarks/step_time.py`: on this machine predicted against measured, and for
8 ... 1024 GPUs with traffic that is counted here at DistilBERT's size.

    python -m benchmarks.scaling
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import step_time
from benchmarks.step_time import STAGES, Pieces
from benchmarks.train_step import hardware
from diffcap_dist.data.shard_format import ShardIndex, atomic_write, open_shard
from shards import make_shards

REPOSITORY = Path(__file__).resolve().parents[1]
ENGINES = {"ddp": "DDP", "0": "ZeRO 0", "1": "ZeRO 1", "2": "ZeRO 2", "3": "ZeRO 3"}
THEORY = {"ddp": 2, "0": 2, "1": 2, "2": 2, "3": 3}  # times psi times (W - 1) / W
SETTINGS = """
run_dir: unset
data: {{shards: {folder}/shards, features: words, max_length: 16, num_workers: 0, canonical_spans: 4}}
encoder: {{name: "", pretrained: ""}}
model: {{length_head: false}}
diffusion: {{kind: continuous}}
training: {{precision: fp32}}
"""


@dataclass(frozen=True)
class Size:
    """A denoiser, the photos of a rank and step, and the steps timed in a round."""

    width: int
    num_layers: int
    photos: int
    steps: int

    def words(self, world_size: int) -> list[str]:
        heads = {"width": self.width, "embedding_dim": self.width, "num_layers": self.num_layers}
        heads |= {"num_heads": self.width // 64, "ffn_width": 4 * self.width}
        return [f"model.{k}={v}" for k, v in heads.items()] + [f"training.global_batch_size={self.photos * world_size}"]


SIZES = {"0.2 M": Size(64, 2, 16, steps=20), "5.1 M": Size(256, 6, 16, steps=5)}
LARGE, SMALL = 20 << 20, 1 << 10  # bytes of the collectives that give bandwidth and latency
# Counted at DistilBERT's size: as trained, and with the settings of DeepSpeed that explain the differences from theory.
FULL: dict[str, tuple[int, dict[str, Any]]] = {f"ZeRO {stage}": (stage, {}) for stage in STAGES} | {
    "ZeRO 2, `use_multi_rank_bucket_allreduce: false`": (2, {"use_multi_rank_bucket_allreduce": False}),
    "ZeRO 3, `stage3_max_live_parameters` and `stage3_max_reuse_distance: 0`": (
        3,
        {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
    ),
}


class World:
    """Ranks of their own process group, a process each, bound to ``cores``; they wait for orders without using them."""

    def __init__(self, cores: Sequence[int], scratch: Path) -> None:
        self.size = len(cores)
        common: dict[str, object] = {"WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size, "OMP_NUM_THREADS": 1}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "CUDA_VISIBLE_DEVICES": ""}
        self.ranks: list[subprocess.Popen[str]] = []
        self.errors: list[Path] = []
        for rank, core in enumerate(cores):
            variables = common | {"RANK": rank, "LOCAL_RANK": rank, "SCALING_CORE": core}
            self.errors.append(scratch / f"{''.join(map(str, cores))}-{self.size}-{rank}.stderr")
            with self.errors[-1].open("w") as errors:
                self.ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "benchmarks.scaling_ranks"],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                        cwd=REPOSITORY,
                        env=os.environ | {name: str(value) for name, value in variables.items()},
                    )
                )

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            with contextlib.suppress(OSError):  # it died
                rank.stdin.close()  # type: ignore[union-attr]
        for rank in self.ranks:
            try:
                rank.wait(timeout=60)
            except subprocess.TimeoutExpired:  # in a collective with a dead rank
                rank.kill()

    def ask(self, do: str, **order: Any) -> list[Any]:
        """Every rank does it; their answers. RuntimeError with the end of a rank's stderr where one failed."""
        for rank in self.ranks:
            with contextlib.suppress(OSError):
                rank.stdin.write(json.dumps({"do": do, **order}) + "\n")  # type: ignore[union-attr]
                rank.stdin.flush()  # type: ignore[union-attr]
        answers = [rank.stdout.readline() for rank in self.ranks]  # type: ignore[union-attr]
        for answer, errors in zip(answers, self.errors):
            if not answer:
                raise RuntimeError(f"a rank ended at {do} {order}:\n{errors.read_text()[-3000:]}")
        return [json.loads(answer) for answer in answers]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_data(folder: Path) -> Path:
    """Shards of scenes with features, and a config that reads them."""
    with contextlib.redirect_stdout(sys.stderr):
        sizes = ["--train", "512", "--val", "16", "--test", "16"]
        assert make_shards.main(["scenes", "--out", str(folder / "shards"), *sizes]) == 0
        write_word_features(folder / "shards", folder / "words.npz", width=512)
        assert make_shards.main(["features", str(folder / "shards"), "--npz", str(folder / "words.npz")]) == 0
    (folder / "config.yaml").write_text(SETTINGS.format(folder=folder))
    return folder / "config.yaml"


def write_word_features(shards: Path, npz: Path, width: int) -> None:
    """Features that tell of the captions' words: `make-shards features` takes none that say nothing of their photos."""
    words = np.random.default_rng(0).normal(size=(4096, width)).astype(np.float32)
    names, rows = [], []
    for info in ShardIndex.load(shards).shards:
        shard = open_shard(shards, info)
        for sample in range(len(shard)):
            record = shard.record(sample)
            names.append(record["photo_id"])
            rows.append(words[[zlib.crc32(w.encode()) % 4096 for c in record["captions"] for w in c.split()]].mean(0))
    np.savez(npz, names=np.array(names), features=np.stack(rows))


# ---- measuring ----


def measure(scratch: Path, rounds: int) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ValueError("two ranks need two cores; this process may use one")
    config = write_data(scratch)
    with contextlib.ExitStack() as stack:
        places = {"alone": cores[:1], "beside": cores[1:2], "together": cores[:2]}
        worlds = {label: stack.enter_context(World(place, scratch)) for label, place in places.items()}
        together = worlds["together"]

        def build(label: str) -> None:
            for (size_name, size), engine in itertools.product(SIZES.items(), ENGINES):
                name, run = f"{size_name} {engine}", scratch / f"{size_name}-{engine}-{label}"
                words = [*size.words(worlds[label].size), f"run_dir={run}"]
                worlds[label].ask("build", name=name, engine=engine, config=str(config), words=words)
                worlds[label].ask("steps", name=name, count=2)

        with ThreadPoolExecutor(len(worlds)) as threads:
            list(threads.map(build, worlds))
        sizes: dict[str, Any] = {
            size_name: {
                engine: {"traffic": together.ask("traffic", name=f"{size_name} {engine}")[0], "rounds": []}
                for engine in ENGINES
            }
            for size_name in SIZES
        }
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}, load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
            for size_name, size in SIZES.items():
                links = measure_links(together)
                for engine in ENGINES:
                    seconds = one_round(worlds, name=f"{size_name} {engine}", count=size.steps)
                    sizes[size_name][engine]["rounds"].append({"links": links, **seconds})
    with World(cores[:2], scratch) as together:
        full = {
            name: together.ask("full", stage=stage, more=more)[0] | {"stage": stage}
            for name, (stage, more) in FULL.items()
        }
    return {"sizes": sizes, "full": full}


def one_round(worlds: dict[str, World], **order: Any) -> dict[str, dict[str, float]]:
    """Median seconds of steps, in all and for the batch: of a rank alone, of two lone ranks at once, of two ranks."""
    alone, beside, together = worlds.values()
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda world: world.ask("steps", **order)[0], (alone, beside)))
    seconds = {
        "alone": alone.ask("steps", **order)[0],
        "beside": {what: [statistics.mean(pair) for pair in zip(*(of[what] for of in both))] for what in both[0]},
        "together": together.ask("steps", **order)[0],
    }
    return {label: {what: statistics.median(some) for what, some in of.items()} for label, of in seconds.items()}


def measure_links(together: World) -> dict[str, Any]:
    """This machine's collectives: seconds at both lengths, and what the long ones send."""
    links: dict[str, Any] = {}
    for kind in ("all-reduce", "all-gather", "reduce-scatter"):
        short, long = (together.ask("collective", kind=kind, size=size, repeats=8)[0] for size in (SMALL, LARGE))
        seconds = [statistics.median(of["seconds"]) for of in (short, long)]
        sent = [of["traffic"]["sockets"] for of in (short, long)]
        bandwidth = (sent[1] - sent[0]) / (seconds[1] - seconds[0])
        links[kind] = {"latency": seconds[0], "seconds": seconds[1], "bandwidth": bandwidth} | long["traffic"]
    return links


# ---- what follows from it ----


def predicted_seconds(beside: float, traffic: dict[str, Any], links: dict[str, Any]) -> float:
    """A step of two ranks by the model: that of a lone rank whose neighbour is as busy, and what is communicated, none
    of it hidden, for a rank has one core. Links are the all-reduce's."""
    parts = [traffic[part] for part in ("engine", "flags")]
    calls, sent = sum(sum(part["calls"].values()) for part in parts), sum(part["sockets"] for part in parts)
    return beside + sent / links["all-reduce"]["bandwidth"] + calls * links["all-reduce"]["latency"]


def speed_row(size: Size, of_engine: dict[str, Any], of_ddp: dict[str, Any]) -> dict[str, float]:
    """Medians over rounds; each ratio is taken within a round."""
    rounds, traffic = of_engine["rounds"], of_engine["traffic"]
    alone, beside, together = ([one[label]["step"] for one in rounds] for label in ("alone", "beside", "together"))
    ddp = [one["together"]["step"] for one in of_ddp["rounds"]]
    predicted = [predicted_seconds(seconds, traffic, one["links"]) for seconds, one in zip(beside, rounds)]

    def ratio(above: Sequence[float], below: Sequence[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below))

    return {
        "samples/s, 1 rank": size.photos / statistics.median(alone),
        "2 ranks": 2 * size.photos / statistics.median(together),
        "2 ranks / 2 × 1 rank": ratio(alone, together),
        "2 ranks / two lone ranks at once": ratio(beside, together),
        "2 ranks / DDP's": ratio(ddp, together),
        "step time predicted / measured": ratio(predicted, together),
    }


def traffic_row(engine: str, traffic: dict[str, Any]) -> list[str]:
    counted, theory = traffic["engine"], THEORY[engine] * 4 * traffic["parameters"] / 2
    what = ", ".join(f"{calls} {kind} {_mega(counted['payload'][kind])}" for kind, calls in counted["calls"].items())
    cells = [ENGINES[engine], what, *map(_mega, (counted["ring"], counted["sockets"], theory))]
    return [*cells, f"{counted['ring'] / theory:.2f}", f"{counted['sockets'] / theory:.2f}"]


def _mega(size: float) -> str:
    return f"{size / 1e6:.2f}"


def pieces_of(result: dict[str, Any]) -> Pieces:
    """What the step-time model takes: DistilBERT's collectives and the trainer's flags; the input's speed."""
    size_name, size = list(SIZES.items())[-1]
    some = result["sizes"][size_name]["0"]
    flags, traffic = some["traffic"]["flags"], {}
    for stage, full in ((stage, result["full"][f"ZeRO {stage}"]) for stage in STAGES):
        kinds = full["calls"].keys() | flags["calls"].keys()
        sums = {
            kind: [sum(of[what].get(kind, 0) for of in (full, flags)) for what in ("calls", "payload")]
            for kind in sorted(kinds)
        }
        traffic[stage] = {kind: (calls, payload) for kind, (calls, payload) in sums.items()}
    seconds = statistics.median(one["alone"]["input"] for one in some["rounds"])
    return Pieces(traffic, size.photos / seconds)


# ---- the tables ----


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    first, *others = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return [first, "|---" * len(header) + "|", *others]


def as_markdown(result: dict[str, Any], assumptions: step_time.Assumptions) -> str:
    lines = ["Communication of a step, MB sent by a rank of 2, fp32:"]
    for size_name, engines in result["sizes"].items():
        header = [f"{size_name} parameters", "collectives (payload, MB)", "round a ring", "on its sockets", "theory"]
        rows = [traffic_row(engine, of["traffic"]) for engine, of in engines.items()]
        lines += ["", *table([*header, "ring / theory", "sockets / theory"], rows)]
    lines += ["", trainers_own(next(iter(result["sizes"].values()))["0"]["traffic"])]
    for size_name, engines in result["sizes"].items():
        size = SIZES[size_name]
        of_engines = [speed_row(size, of, engines["ddp"]) for of in engines.values()]
        header = [f"{size_name} parameters, {size.photos} photos a rank", *of_engines[0]]
        rows = [[name, *map(_figure, row.values())] for name, row in zip(ENGINES.values(), of_engines)]
        lines += ["", *table(header, rows)]
    lines += ["", links_in_words([one["links"] for of in engines.values() for one in of["rounds"]])]
    lines += ["", "A step at DistilBERT's size, bf16, in units ψ of its trained parameters:", ""]
    lines += table(
        ["", "collectives (payload, ψ)", "sent by a rank of many", "theory", "ratio"],
        [full_row(name, full) for name, full in result["full"].items()],
    )
    before, after = result["load_average"]
    lines += ["", step_time.as_markdown(pieces_of(result), assumptions), ""]
    lines += [
        f"{result['rounds']} rounds; load average {before:.1f} before, {after:.1f} after; {result['hardware']}, one "
        f"core and one thread a rank, gloo; {', '.join(' '.join(item) for item in result['versions'].items())}"
    ]
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def trainers_own(traffic: dict[str, Any]) -> str:
    flags, log = (f"{traffic[p]['ring']:.0f} B ({traffic[p]['sockets']} on its sockets)" for p in ("flags", "log"))
    return f"The trainer adds its flags, {flags} a step, and where it logs, the losses, {log}."


def full_row(name: str, full: dict[str, Any]) -> list[str]:
    psi, theory = full["parameters"] * full["bytes_per_parameter"], THEORY[str(full["stage"])]
    what = ", ".join(f"{calls} {kind} {full['payload'][kind] / psi:.2f}" for kind, calls in full["calls"].items())
    sent = 2 * full["ring"] / psi  # of two ranks each sends (W - 1) / W = 1/2 of what one of many does
    return [name, what, f"{sent:.2f}", str(theory), f"{sent / theory:.2f}"]


def links_in_words(links: Sequence[dict[str, Any]]) -> str:
    reduce, scatter = ([one[kind] for one in links] for kind in ("all-reduce", "reduce-scatter"))
    bandwidth, latency = (statistics.median(one[what] for one in reduce) for what in ("bandwidth", "latency"))
    longer = statistics.median(s["seconds"] / r["seconds"] for s, r in zip(scatter, reduce))
    return (
        f"gloo between the 2 ranks: an all-reduce sends {bandwidth / 1e9:.2f} GB/s and takes {1e6 * latency:.0f} µs at "
        f"least. A reduce-scatter sends {scatter[0]['sockets'] / scatter[0]['ring']:.2f} times what a ring would and "
        f"takes {longer:.2f} times as long as an all-reduce of the same bytes."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="everything measured")
    step_time.add_assumptions(parser)
    args = parser.parse_args(argv)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch), args.rounds)
    result |= {
        "rounds": args.rounds,
        "load_average": [load_before, os.getloadavg()[0]],
        "hardware": f"2 of {os.cpu_count()} CPU cores ({hardware(torch.device('cpu'))['cpu']})",
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
    }
    print(as_markdown(result, step_time.assumptions_of(args)))
    if args.out:
        atomic_write(args.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
