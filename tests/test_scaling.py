"""The scaling benchmark: its counter of bytes is right about known collectives, and about DDP and DeepSpeed on two gloo
ranks, where the kernel's own count agrees; its model of the step time has the limits that it must have."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import scaling, step_time
from benchmarks.step_time import GPUS, LAST_COUNTED, STAGES, Assumptions, efficiency, step_of
from benchmarks.traffic import Collectives, kind_of, ring_bytes

FREE = dataclasses.replace(
    Assumptions(), intra_bandwidth=1e30, inter_bandwidth=1e30, intra_latency=0, inter_latency=0, input_overlap=0
)
ONE_MIB = 1 << 20


@pytest.mark.parametrize("stage", STAGES)
def test_the_model_of_the_step_time_has_its_limits(stage: int) -> None:
    traffic, rate = LAST_COUNTED.traffic[stage], LAST_COUNTED.input_rate
    serial = dataclasses.replace(Assumptions(), input_overlap=0)
    alone = step_of(1, traffic, rate, serial)
    assert alone.communication == 0 and alone.seconds == pytest.approx(alone.compute + 8 / (2 * rate))
    assert alone.compute == pytest.approx(5.29 / 100)
    for gpus in GPUS:
        assert efficiency(gpus, traffic, rate, FREE) == pytest.approx(1)
        assert step_of(gpus, traffic, rate, FREE).seconds == pytest.approx(alone.seconds)
    falling = [efficiency(gpus, traffic, rate, Assumptions()) for gpus in (1, 2, 4, *GPUS)]
    assert falling[0] == 1 and falling == sorted(falling, reverse=True) and falling[-1] < 0.9
    hidden = dataclasses.replace(Assumptions(), overlap=1)
    assert efficiency(1024, traffic, rate, hidden) == pytest.approx(1)  # 20 ms behind 35 ms of backward
    starved = step_of(8, traffic, 1.0, Assumptions())
    assert starved.compute + starved.input == pytest.approx(8 / 2)  # loaders work beside the computation


def test_the_model_follows_the_ring() -> None:
    """2 psi (W - 1) / W over the slower of both links; psi / bandwidth is one second here."""
    a = dataclasses.replace(FREE, intra_bandwidth=4, inter_bandwidth=1)
    times = {gpus: step_time.collective_seconds("all-reduce", 1, 1e9, gpus, a) for gpus in (1, 2, 8, 16)}
    assert times == pytest.approx({1: 0, 2: 2 / 2 / 4, 8: 2 * 7 / 8 / 4, 16: 2 * 15 / 16})
    assert step_time.collective_seconds("all-gather", 1, 1e9, 16, a) == pytest.approx(15 / 16)


def test_assumptions_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_time.main(["--inter-bandwidth", "1e12", "--inter-latency", "0", "--intra-latency", "0"]) == 0
    fast = capsys.readouterr().out
    assert step_time.main(["--timesteps", "1"]) == 0
    slow = capsys.readouterr().out
    last = [float(re.findall(r"· (\d\.\d\d) \|", text.splitlines()[-1])[0]) for text in (fast, slow)]
    assert last[0] > 0.95 and last[1] < 0.2


def test_every_collective_is_known_by_its_operator() -> None:
    for operator, kind in {
        "allreduce_.default": "all-reduce",
        "_allgather_base_.default": "all-gather",
        "_reduce_scatter_base_.default": "reduce-scatter",
        "reduce_.default": "reduce",
    }.items():
        assert kind_of(operator) == kind
    with pytest.raises(KeyError, match=r"traffic\.py"):
        kind_of("alltoall_base_.default")
    assert ring_bytes({"all-reduce": 800, "all-gather": 400}, 4) == 2 * 600 + 300
    assert ring_bytes({"all-reduce": 800}, 1) == 0


def test_collectives_are_counted_in_one_process() -> None:
    if dist.is_initialized():
        pytest.skip("another test left its process group")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Collectives() as counted:
            dist.all_reduce(torch.ones(10))
            dist.all_gather_into_tensor(torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16))
            dist.barrier()
        dist.all_reduce(torch.ones(10))
    finally:
        dist.destroy_process_group()
    assert counted.calls["all-reduce"] == counted.calls["all-gather"] == 1
    assert counted.payload == {"all-reduce": 40, "all-gather": 6}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[scaling.World]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two ranks need two cores; there is one")
    with scaling.World(cores[:2], tmp_path_factory.mktemp("ranks")) as world:
        yield world


@pytest.mark.slow
def test_known_collectives_on_two_ranks(two: scaling.World) -> None:
    """The kernel's count is the ring's, but for a few hundred bytes; gloo sends a reduce-scatter as an all-reduce."""
    for kind, ring, sent in (("all-reduce", 1, 1), ("all-gather", 0.5, 0.5), ("reduce-scatter", 0.5, 1)):
        for answer in two.ask("collective", kind=kind, size=ONE_MIB, repeats=1):
            assert answer["traffic"]["payload"] == {kind: ONE_MIB}
            assert answer["traffic"]["ring"] == ring * ONE_MIB
            assert sent * ONE_MIB <= answer["traffic"]["sockets"] < 1.01 * sent * ONE_MIB


@pytest.mark.slow
def test_a_trainers_step_on_two_ranks(two: scaling.World, tmp_path: Path) -> None:
    """DDP communicates the theory's volume; ZeRO-2 half as much again: DeepSpeed all-reduces where it may reduce."""
    config = scaling.write_data(tmp_path)
    words = next(iter(scaling.SIZES.values())).words(2)
    for engine, factor in (("ddp", 1.0), ("2", 1.5)):
        two.ask("build", name=engine, engine=engine, config=str(config), words=[*words, f"run_dir={tmp_path / engine}"])
        assert len(two.ask("steps", name=engine, count=2)[0]["step"]) == 2
        for traffic in two.ask("traffic", name=engine):
            theory = scaling.THEORY[engine] * 4 * traffic["parameters"] / 2
            assert traffic["engine"]["ring"] == pytest.approx(factor * theory, rel=0.001)
            assert traffic["engine"]["sockets"] == pytest.approx(factor * theory, rel=0.02)
            assert traffic["flags"]["payload"] == {"all-reduce": 24}


@pytest.mark.slow
def test_the_kept_counts_are_those_of_the_installed_deepspeed(two: scaling.World) -> None:
    full = two.ask("full", stage=3, more={})[0]
    kept = dict(LAST_COUNTED.traffic[3])
    kept["all-reduce"] = (kept["all-reduce"][0] - 1, kept["all-reduce"][1] - 24)  # the trainer's flags
    assert {kind: (calls, full["payload"][kind]) for kind, calls in full["calls"].items()} == kept
