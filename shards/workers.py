"""Worker processes: function(item) of each item, in the items' order, a few ahead of the reader and no more.

In: a function and items that pickle. Out: its results, or the first error. With one worker it all happens in this
process. It knows nothing of shards.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 3  # items handed out for each worker: one at work, and no wait behind a slow one


def in_processes(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    initializer: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Results in order. New processes and not forks: a forked copy of a process that has threads can hang.
    `initializer(*arguments)` runs once in each. Raises ValueError where a worker was killed."""
    if workers < 1:
        raise ValueError(f"the number of workers is {workers}, it must be at least 1")
    if workers == 1:
        if initializer is not None:
            initializer(*arguments)
        yield from map(function, items)
        return
    waiting = iter(items)
    running: deque[Future[Result]] = deque()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (initializer, arguments))
    try:
        while True:
            for item in islice(waiting, AHEAD * workers - len(running)):
                running.append(pool.submit(function, item))
            if not running:
                return
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed (by the system, for want of memory?). What is finished is kept: run this "
            "again, with fewer workers perhaps"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def end_with_parent() -> None:
    """A worker whose parent was killed would go on beside the next run and write the same files."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    if initializer is not None:
        initializer(*arguments)
