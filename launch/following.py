"""A run's log as it grows: requeues are waited out, and at a failure the first rank that failed is shown.

In: a job that was handed in. Out: text on the screen, and an exit status.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator

from diffcap_dist.run_dir import RunDir
from launch import scheduler
from launch.job import SELF, describe_failure, first_to_fail, is_finished, last_traceback, read_log, saved_step
from launch.scheduler import Submitted


def follow(run: RunDir, job: Submitted, rank: int = 0) -> int:
    """Print a rank's log as it grows, and the job's state as it changes, until it has ended. Ctrl-C leaves the job."""
    try:
        for text in _growing(run, job, rank):
            sys.stdout.write(text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        where = shlex.quote(str(run.root))
        print(f"\nthe job goes on; {SELF} logs {where} --follow comes back, {SELF} cancel {where} ends it")
        return 0
    ended = scheduler.state(job, run)
    if is_finished(run) and ended.startswith(("COMPLETED", "not in the queue")):
        known = f"scores in {run.scores}" if run.scores.is_file() else "the evaluation is next"
        print(f"\n[{job.kind} {job.job}] finished; {known}")
        return 0
    print(f"\n[{job.kind} {job.job}] {ended} at step {saved_step(run)}\n{failure(run, job)}")
    return 1


def _growing(run: RunDir, job: Submitted, rank: int) -> Iterator[str]:
    file, offset, shown = job.log(run, rank), 0, ""
    while True:
        now = scheduler.state(job, run)
        if (kind := now.split(" ")[0]) != shown:
            yield f"\n[{job.kind} {job.job}] {now}\n"
            shown = kind
        if file.is_file() and file.stat().st_size > offset:
            with file.open("rb") as handle:
                handle.seek(offset)
                data = handle.read()
            offset += len(data)
            yield data.decode(errors="replace")
        if not scheduler.is_live(now):
            return
        time.sleep(scheduler.POLL_SECONDS)


def failure(run: RunDir, job: Submitted) -> str:
    """The first rank that failed, with its traceback."""
    if job.cluster == "slurm":
        said = sorted(run.logs.glob(f"{job.kind}.{job.job}.*.srun"), key=lambda path: path.stat().st_mtime)
        found = first_to_fail(run, job.kind, job.job, read_log(said[-1])) if said else None
        if found is not None:
            return describe_failure(run, job.kind, job.job, found)
        return "\n".join(read_log(job.job_log(run)).splitlines()[-10:])
    ranks = scheduler.failures(job, run)
    if not ranks:
        return f"stopped before its end; it continues with: {SELF} resubmit {shlex.quote(str(run.root))}"
    first = min(ranks, key=lambda rank: job.log(run, rank).stat().st_mtime if job.log(run, rank).is_file() else 0)
    return f"first to fail: rank {first} ({job.log(run, first)})\n{last_traceback(job.log(run, first))}"
