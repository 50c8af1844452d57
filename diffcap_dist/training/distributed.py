"""Ranks: who this process is among the others, and the few reductions a run needs.

The only reader of the rank variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_*), which `deepspeed` and
`torchrun` set; below `srun` they follow from SLURM's own, and without any this is a run of one process. gloo on CPUs,
NCCL on GPUs.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A rank that dies is noticed at once, for its connections close; this bounds the wait for one that hangs or is busy.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


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

    @property
    def no_progress(self) -> bool | None:
        """``disable`` of tqdm: bars are rank 0's, and only on a terminal."""
        return None if self.is_first else True


class LostRank(RuntimeError):
    """Another rank is gone."""


def init_ranks(stall_seconds: float = 0) -> Ranks:
    """Join the process group (once per process) and take this rank's share of cores or its GPU.

    Collectives wait twice ``stall_seconds`` at least: the watchdog, which shows stacks, shall be first.
    """
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
    timeout = max(COLLECTIVE_TIMEOUT, timedelta(seconds=2 * stall_seconds))
    if not dist.is_initialized():
        # One process meets nobody: a free port that two runs find at once is then taken by neither.
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world_size == 1 else {}
        of_gpu: dict[str, Any] = {"device_id": device} if on_gpu else {}  # else NCCL guesses at the first barrier
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, **alone, **of_gpu)
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


@contextmanager
def naming_lost_ranks(ranks: Ranks) -> Iterator[None]:
    """A collective that fails because a process of this machine is gone becomes a LostRank with its rank.

    deepspeed's launcher shows the command line of its last rank, whichever it was that died.
    """
    places = gather((socket.gethostname(), os.getpid()))
    try:
        yield
    except RuntimeError as error:
        if type(error) is not RuntimeError and not isinstance(error, dist.DistError):
            raise  # our own errors, and torch's that are about this rank
        here = {rank: pid for rank, (host, pid) in enumerate(places) if host == socket.gethostname()}
        if lost := _ended(here):
            names = ", ".join(f"rank {rank} (process {here[rank]})" for rank in lost)
            raise LostRank(
                f"rank {ranks.rank} lost {names} on {socket.gethostname()}: it died. Its own last words say why; there "
                "are none where the system killed it (memory?). The same command continues from the last checkpoint"
            ) from error
        raise


def _ended(processes: dict[int, int], patience: float = 5.0) -> list[int]:
    """The ranks (rank -> process) of this machine that are no more, as soon as there is one."""
    deadline = time.monotonic() + patience
    while True:
        lost = [rank for rank, pid in processes.items() if _is_gone(pid)]
        if lost or time.monotonic() > deadline:
            return lost
        time.sleep(0.2)


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
    except OSError:
        return True


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
