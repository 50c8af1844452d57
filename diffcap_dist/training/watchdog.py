"""Watchdog: a rank whose loop stands still ends, and says where.

In: a limit in seconds. A thread looks when the loop last said ``alive``; past the limit it prints the rank and the
stacks of all its threads and ends the process, so that the launcher ends the others. Ranks that wait for the stalled
one stand still too and print as well: the one to blame is not in a collective.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

from diffcap_dist.training.distributed import Ranks

STDERR = 2  # the descriptor, whatever stands in sys.stderr's place
GRACE = 3.0  # seconds between the words and the end: all ranks get to print before a launcher ends them


class Watchdog:
    """``with Watchdog(seconds, ranks) as watchdog: ... watchdog.alive(step)``; 0 seconds watch nothing."""

    def __init__(self, seconds: float, ranks: Ranks) -> None:
        self._limit, self._ranks = seconds, ranks
        self._step, self._since = -1, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def alive(self, step: int) -> None:
        self._step, self._since = step, time.monotonic()

    def __enter__(self) -> Watchdog:
        self._since = time.monotonic()
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._over.set()
        if self._limit:
            self._thread.join()

    def _watch(self) -> None:
        while (left := self._since + self._limit - time.monotonic()) > 0:
            # For a main thread stuck in C with the interpreter's lock, where this one can't run: no name, but stacks.
            faulthandler.dump_traceback_later(left + 2 * GRACE, exit=True, file=STDERR)
            if self._over.wait(left):
                faulthandler.cancel_dump_traceback_later()
                return
        print(
            f"rank {self._ranks.rank} of {self._ranks.world_size} made no step for {self._limit:g} s after step "
            f"{self._step} (training.stall_seconds), and ends. The stacks of its threads follow; a rank whose stack is "
            "in a collective waits for another one:",
            file=sys.__stderr__,
            flush=True,
        )
        faulthandler.dump_traceback(STDERR, all_threads=True)
        time.sleep(GRACE)
        os._exit(1)
