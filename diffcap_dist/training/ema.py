"""An exponential moving average of the trained parameters (no buffers: a schedule must not be averaged).

Kept in fp32 over whatever piece of each parameter this rank holds, so it works under every ZeRO stage; ``swapped``
puts the average in the model's place for validation and export.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """decay_step = min(decay, (1 + step) / (10 + step)): a short memory at first, when the average is mostly noise."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.averages = {name: local_piece(p).detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pieces = [local_piece(p).float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), pieces, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model computes with the averages; afterwards it has its own values back, bit for bit."""
        live = {name: local_piece(p).detach().clone() for name, p in self._parameters.items()}
        self.put(self.averages)
        try:
            yield
        finally:
            self.put(live)

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        """Write ``values`` into the model's parameters (this rank's pieces)."""
        for name, parameter in self._parameters.items():
            local_piece(parameter).copy_(values[name])


def local_piece(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: under ZeRO-3 its flat partition, else all of it."""
    return getattr(parameter, "ds_tensor", parameter)
