"""Signals that ask a run to stop: SIGTERM, SIGUSR2 (SLURM's warning), SIGINT.

The handler only sets a flag; the loop reads it at a step boundary, on all ranks together, and saves there. Install it
in the main process only: loader workers take the default handlers back (``reset_in_worker``).
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType

FROM_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR2)
SIGNALS = (*FROM_SCHEDULERS, signal.SIGINT)


class StopFlag:
    """``requested`` is the name of the first signal received, or None. A second SIGINT stops at once."""

    def __init__(self) -> None:
        self.requested: str | None = None

    def install(self, signals: Sequence[signal.Signals] = SIGNALS) -> StopFlag:
        for number in signals:
            signal.signal(number, self._set)
        return self

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name


def reset_in_worker(worker_id: int) -> None:
    """``worker_init_fn``: a forked worker inherits the handlers, and would then ignore SIGTERM for ever."""
    for number in FROM_SCHEDULERS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
