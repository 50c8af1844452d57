"""Beside the ranks of a training job, in a step of its own on the first node: what needs an eye on it meanwhile.

``training.evaluate_every`` leaves a captioner in RUN/evaluations now and then: its scoring is handed in here, as a job
of low priority. Not by a rank, which knows no SLURM; not as a chain of dependent jobs from the start, since no
dependency is on a step; and never more than one job that waits, since each scores all that is there when it starts.

A batch script that is killed leaves nobody to ask for a requeue: SLURM ends the job as failed. Its steps still have
KillWait seconds then, in which ranks save, and this asks. It does so only where the script is gone without a word about
the end: whoever cancels a job, or ends it at its limit, signals all steps while the script lives.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from diffcap_dist.run_dir import RunDir
from launch import job, scheduler
from launch.scheduler import EVALUATE_STEPS, SubmissionError

POLL_SECONDS = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.beside", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--script", type=int, required=True, help="the process of the batch script")
    parser.add_argument("--evaluation", type=Path, help="what to hand in for steps that wait to be scored")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SLURM's warning is for the ranks
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # waited for below
    stay(RunDir(args.run), args.script, args.evaluation)
    return 0


def stay(run: RunDir, script: int, evaluation: Path | None) -> None:
    """Until the batch script is gone, or SLURM ends the job."""
    begun = begin_of(script)
    handed_in: set[Path] = set()
    while True:
        told = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS) is not None
        gone = begin_of(script) != begun  # looked at after the signal: a script that lives now was not what ended
        if gone:
            job.requeue_without_script(run)
        if evaluation is not None:
            hand_in(run, evaluation, handed_in)
        if gone or told:
            return


def begin_of(process: int) -> str | None:
    """When it began, in ticks, which tells it from a later one of the same number; None where it has ended."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else fields[18]


def hand_in(run: RunDir, evaluation: Path, handed_in: set[Path]) -> None:
    """A job for what has come to wait since the last call, unless one waits that will score it too."""
    waiting = {step.root for step in run.waiting_evaluations()}
    if waiting <= handed_in:
        return
    handed_in |= waiting
    jobs = scheduler.submitted_jobs(run)
    before = [one for one in jobs if one.kind == EVALUATE_STEPS]
    if before and scheduler.state(before[-1], run).startswith("PENDING"):
        return
    ranks = max((one.ranks for one in jobs), default=0)  # as many as train
    try:
        scheduler.sbatch(run, EVALUATE_STEPS, evaluation, ranks, *scheduler.low_priority_options())
    except SubmissionError as error:  # training goes on; the next step's job scores this one too
        job.say(str(error))


if __name__ == "__main__":
    sys.exit(main())
