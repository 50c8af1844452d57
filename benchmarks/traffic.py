"""What ranks say to each other, measured twice: the payload of every collective, and the bytes on the sockets.

``Collectives`` sees torch's own c10d operators, below torch.distributed and deepspeed.comm alike; so it also sees those
that DistributedDataParallel starts from C++. ``sent_on_sockets`` asks the kernel, so it includes what a backend really
does for a collective (gloo has no reduce-scatter of its own: it sends an all-reduce), and its headers.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Bytes that a rank of W sends of a collective over b bytes, in units of b (W - 1) / W, where it goes round a ring; of
# reduce and broadcast, the mean over ranks.
RING_PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "reduce": 1, "broadcast": 1, "barrier": 0}
KINDS = {  # what c10d's operators are called
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "reduce": "reduce",  # behind the longer name
    "broadcast": "broadcast",
    "barrier": "barrier",
}
TCP_BYTES_SENT = 200  # where tcpi_bytes_sent is in Linux's struct tcp_info (4.19 and later); tcpi_bytes_retrans follows


class Collectives(TorchDispatchMode):
    """Inside, every collective of this thread is counted: ``calls`` and ``payload`` bytes by kind.

    A payload is the whole that a collective is about: what is reduced, or what is gathered from all ranks together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.payload: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = kind_of(func.__name__)
            self.calls[kind] += 1
            if kind != "barrier":
                self.payload[kind] += max(_bytes_of(args[0]), _bytes_of(args[1]))
        return func(*args, **(kwargs or {}))


def kind_of(operator: str) -> str:
    """The kind of a c10d operator by its name. KeyError for one that no ring formula is known for here."""
    name = operator.split(".")[0].strip("_")
    for prefix, kind in KINDS.items():
        if name.startswith(prefix):
            return kind
    raise KeyError(f"c10d.{operator} was not foreseen: add it to benchmarks/traffic.py")


def _bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_of, value)) if isinstance(value, list | tuple) else 0


def ring_bytes(payload: Mapping[str, int], world_size: int) -> float:
    """Bytes that each rank would send if every collective went round a ring."""
    return sum(RING_PASSES[kind] * size for kind, size in payload.items()) * (world_size - 1) / world_size


def sent_on_sockets() -> int:
    """Bytes that this process has sent so far on the TCP sockets that it has open."""
    return sum(_sent(int(path.name)) for path in list(Path("/proc/self/fd").iterdir()))


def _sent(descriptor: int) -> int:
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return 0
        twin = socket.socket(fileno=os.dup(descriptor))
    except OSError:  # the descriptor of the listing itself, closed by now
        return 0
    with twin:
        if twin.type != socket.SOCK_STREAM or twin.family not in (socket.AF_INET, socket.AF_INET6):
            return 0
        info = twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_BYTES_SENT + 16)
    sent, sent_again = struct.unpack_from("=QQ", info, TCP_BYTES_SENT)
    return int(sent - sent_again)
