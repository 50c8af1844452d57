"""The time of a training step on 8 ... 1024 GPUs, reckoned from measured pieces and named assumptions.

In: what a step at DistilBERT's size computes and communicates (counted by `benchmarks/scaling.py`, which prints this
with fresh counts; the ones of its last run are kept below), and the assumptions, each an option. Out: step time,
samples a second and efficiency at ZeRO 0-3, as Markdown. Nothing here was measured on a GPU or a network.

    step     = compute + exposed(input, input_overlap, compute) + exposed(communication, overlap, backward)
    compute  = rows of a rank x TFLOP of a row / TFLOP/s;  backward = 2/3 of it
    exposed(c, o, h) = c - min(o c, h): the share o of a cost c may hide behind h seconds of work
    communication    = sum over collectives of bytes sent / bandwidth + latency

    python -m benchmarks.step_time --samples-per-gpu 32 --timesteps 1
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.traffic import RING_PASSES

STAGES = (0, 1, 2, 3)
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
# By kind: (calls, payload bytes).
Traffic = Mapping[str, tuple[int, float]]


def assumed(default: float, source: str) -> Any:
    return field(default=default, metadata={"help": f"{source} (default {default:g})"})


@dataclass(frozen=True)
class Assumptions:
    """Each one is an option; its source is in its help."""

    tflops: float = assumed(100, "TFLOP/s that a GPU sustains: a third of an A100's 312 (its data sheet, dense bf16)")
    gpus_per_node: int = assumed(8, "as in a DGX A100 or H100")
    intra_bandwidth: float = assumed(230, "GB/s, ring of one node: what 8 A100 on NVLink 3 reach of their 300")
    inter_bandwidth: float = assumed(20, "GB/s between nodes, of a whole node: one 200 Gbit/s adapter at 80%%")
    intra_latency: float = assumed(3.4, "us of a hop in a node: NCCL's own table (tuning.cc), NVLink, ring, Simple")
    inter_latency: float = assumed(14, "us of a hop between nodes: the same table, network, ring, Simple")
    overlap: float = assumed(0, "share of communication beside the backward pass: DeepSpeed's overlap_comm is off")
    samples_per_gpu: int = assumed(8, "captions a rank and step: the paper's batch; the global one grows with GPUs")
    timesteps: int = assumed(100, "of a caption: the paper's")
    tflop_per_row: float = assumed(5.29 / 800, "forward, backward, AdamW of a caption at a timestep: paper_hours.py")
    workers: int = assumed(2, "loader processes of a rank: data.num_workers")
    input_rate: float = assumed(0, "samples/s of a worker core; 0: as measured, from stored features, no photo decoded")
    input_overlap: float = assumed(1, "share of the input that loaders may do beside the computation")


@dataclass(frozen=True)
class Pieces:
    """What `benchmarks/scaling.py` measures."""

    traffic: Mapping[int, Traffic]  # by ZeRO stage, of a step at DistilBERT's size in bf16, with the trainer's flags
    input_rate: float  # samples a second and worker core


@dataclass(frozen=True)
class Step:
    """Seconds of a step, and what is left exposed of them."""

    compute: float
    input: float
    communication: float

    @property
    def seconds(self) -> float:
        return self.compute + self.input + self.communication


def exposed(cost: float, overlap: float, behind: float) -> float:
    return cost - min(overlap * cost, behind)


def step_of(num_gpus: int, traffic: Traffic, input_rate: float, a: Assumptions) -> Step:
    """A step of ``num_gpus`` ranks."""
    compute = a.samples_per_gpu * a.timesteps * a.tflop_per_row / a.tflops
    loading = a.samples_per_gpu / (input_rate * a.workers)
    talking = sum(collective_seconds(kind, *of_kind, num_gpus, a) for kind, of_kind in traffic.items())
    return Step(compute, exposed(loading, a.input_overlap, compute), exposed(talking, a.overlap, compute * 2 / 3))


def collective_seconds(kind: str, calls: int, payload: float, num_gpus: int, a: Assumptions) -> float:
    """Bandwidth: a ring through all nodes, as fast as its slowest link. Latency: NCCL's formulae, rings, and for
    all-reduce the tree where that is shorter."""
    nodes, in_node = math.ceil(num_gpus / a.gpus_per_node), min(num_gpus, a.gpus_per_node)
    bandwidth = min(a.intra_bandwidth, a.inter_bandwidth) if nodes > 1 else a.intra_bandwidth
    sent = RING_PASSES[kind] * payload * (num_gpus - 1) / num_gpus
    ring = (num_gpus - nodes) * a.intra_latency + (nodes - 1) * a.inter_latency
    if kind == "all-reduce":
        tree = (in_node - 1) * a.intra_latency + math.log2(nodes) * a.inter_latency
        ring = 2 * min(ring, tree)
    return sent / (bandwidth * 1e9) + calls * ring * 1e-6


def efficiency(num_gpus: int, traffic: Traffic, input_rate: float, a: Assumptions) -> float:
    """Samples a second of ``num_gpus``, over ``num_gpus`` times those of one."""
    alone, together = (step_of(n, traffic, input_rate, a).seconds for n in (1, num_gpus))
    return alone / together


def as_markdown(pieces: Pieces, a: Assumptions) -> str:
    rate = a.input_rate or pieces.input_rate
    alone = step_of(1, pieces.traffic[0], rate, a)
    lines = [
        f"{a.samples_per_gpu} captions × {a.timesteps} timesteps a GPU: {1000 * alone.compute:.3g} ms of computation; "
        f"input {rate:,.0f} samples/s a worker core. Step in ms · samples/s · efficiency:",
        "",
        "| GPUs | captions a step | " + " | ".join(f"ZeRO {stage}" for stage in STAGES) + " |",
        "|---" * (2 + len(STAGES)) + "|",
    ]
    for num_gpus in GPUS:
        cells = []
        for stage in STAGES:
            traffic = pieces.traffic[stage]
            seconds, share = step_of(num_gpus, traffic, rate, a).seconds, efficiency(num_gpus, traffic, rate, a)
            cells.append(f"{1000 * seconds:.3g} · {num_gpus * a.samples_per_gpu / seconds:,.0f} · {share:.2f}")
        lines.append(f"| {num_gpus} | {num_gpus * a.samples_per_gpu:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def add_assumptions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("assumptions of the step-time model")
    for one in dataclasses.fields(Assumptions):
        kind = int if one.type == "int" else float
        group.add_argument(f"--{one.name.replace('_', '-')}", type=kind, default=one.default, **one.metadata)


def assumptions_of(args: argparse.Namespace) -> Assumptions:
    return Assumptions(**{one.name: getattr(args, one.name) for one in dataclasses.fields(Assumptions)})


PSI = 43_959_808 * 2  # bytes: DistilBERT's body and our projections, trained, in bf16
LAST_COUNTED = Pieces(
    {
        0: {"all-reduce": (2, PSI)},
        1: {"all-reduce": (4, PSI), "all-gather": (1, PSI)},
        2: {"all-reduce": (4, PSI), "all-gather": (1, PSI)},
        3: {"all-reduce": (2, 32), "all-gather": (1, PSI), "reduce-scatter": (1, PSI)},
    },
    input_rate=10_000,
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_assumptions(parser)
    print(as_markdown(LAST_COUNTED, assumptions_of(parser.parse_args(argv))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
