"""Ranks: who this process is among the others, and the few reductions a run needs.

The only reader of the rank variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_*), which `deepspeed` and
`torchrun` set; below `srun` they follow from SLURM's own, and without any this is a run of one process. gloo on CPUs,
NCCL on GPUs.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# A rank that dies is noticed by the launcher; this bounds the wait when there is none.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """This process's place. ``rank`` 0 writes files; all ranks enter collectives."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def init_ranks() -> Ranks:
    """Join the process group (once per process) and take this rank's share of cores or its GPU."""
    of_slurm = {} if "RANK" in os.environ else slurm_rank_variables(os.environ, torch.cuda.device_count())
    os.environ.update(of_slurm)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    local_rank, world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size)))
        share = max(1, len(os.sched_getaffinity(0)) // ranks_here)  # a task of srun may be bound to its share already
        torch.set_num_threads(int(os.environ.get("SLURM_CPUS_PER_TASK", share)) if of_slurm else share)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=COLLECTIVE_TIMEOUT)
    return Ranks(int(os.environ["RANK"]), local_rank, world_size, device)


def slurm_rank_variables(environment: Mapping[str, str], visible_gpus: int) -> dict[str, str]:
    """The rank variables of a task of ``srun``; none outside of one: a batch script has a SLURM_PROCID too."""
    if "SLURM_STEP_NUM_TASKS" not in environment or "SLURM_STEP_NODELIST" not in environment:
        return {}
    tasks = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])  # 2(x3),1
    here = [int(count) for count, nodes in tasks for _ in range(int(nodes or 1))]
    variables = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if visible_gpus == 1 else environment["SLURM_LOCALID"],  # bound to one GPU, it sees it as 0
        "LOCAL_WORLD_SIZE": str(here[int(environment["SLURM_NODEID"])]),
    }
    if variables["WORLD_SIZE"] == "1":
        return variables
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])  # n[01-03,7],m
    assert first is not None
    number = int(environment["SLURM_JOB_ID"]) * 31 + int(environment["SLURM_STEP_ID"])
    meeting = {"MASTER_ADDR": first[1] + (first[2] or ""), "MASTER_PORT": str(12000 + number % 20000)}
    return variables | {name: environment.get(name, value) for name, value in meeting.items()}


def finish() -> None:
    """Leave the process group; without it gloo warns, and NCCL may hang, at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise maximum over ranks: how one rank's flag reaches all of them at the same step."""
    tensor = torch.tensor(values, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def mean(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise mean over ranks."""
    tensor = torch.tensor(values, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    dist.all_reduce(tensor)
    return (tensor / dist.get_world_size()).tolist()


def gather_to_first(value: Any, ranks: Ranks) -> list[Any] | None:
    """The values of all ranks, in rank order, on rank 0; None elsewhere."""
    gathered = [None] * ranks.world_size if ranks.is_first else None
    dist.gather_object(value, gathered, dst=0)
    return gathered


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
