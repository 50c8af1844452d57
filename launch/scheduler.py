"""SLURM and submitit's local executor as one thing: hand a job in, ask for its state, end it.

In: scripts or a callable. Out: job ids and states in words. sacct may be missing, and errors of sbatch come whole.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from diffcap_dist.run_dir import RunDir
from launch.records import add_record, read_records

LIVE = frozenset({"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "UNKNOWN"})
EVALUATE_STEPS = "evaluate-steps"  # the kind of a job that scores steps on the way
NICE = 1_000_000  # below all else of this user, whatever weights the site gives to age and size
POLL_SECONDS = 1.0
LOCAL_WARNING_SECONDS = 30


class SubmissionError(ValueError):
    """The scheduler refused; the message is its own."""


@dataclass(frozen=True)
class Submitted:
    """A job that was handed in."""

    kind: str  # train, evaluate, evaluate-steps, preflight
    cluster: str  # slurm, local, debug
    job: str
    ranks: int
    gpus: int = 0
    evaluates: bool = False  # in the same job
    script: str = ""

    def log(self, run: RunDir, rank: int = 0) -> Path:
        if self.cluster == "slurm":
            return run.logs / f"{self.kind}.{self.job}.{rank}.log"
        return run.logs / "local" / f"{self.job}_{rank}_log.out"

    def job_log(self, run: RunDir) -> Path:
        """What the batch script says: starts, requeues, who failed first."""
        return run.logs / f"{self.kind}.{self.job}.log" if self.cluster == "slurm" else self.log(run)


def choose_cluster(asked: str) -> str:
    """``auto`` is SLURM where there is one. Its programs alone are none: on many machines they are installed and know
    of no cluster. One that doesn't answer now is one all the same: nothing is then started on a login node."""
    if asked != "auto":
        return asked
    if shutil.which("sbatch") is None:
        return "local"
    _, error = _ask("scontrol", "show", "hostnames", "n1")  # asks its configuration and no daemon
    return "local" if "configuration source" in error else "slurm"


# ---- SLURM ----


def sbatch(run: RunDir, kind: str, script: Path, ranks: int, *options: str) -> Submitted:
    """Raises SubmissionError with all that sbatch said."""
    command = sbatch_command(script, *options)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(os.environ))
    except FileNotFoundError:
        raise SubmissionError(
            "no sbatch here: submit from a login node of the cluster, or use --cluster local"
        ) from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        raise SubmissionError(f"sbatch refused ({' '.join(command)}):\n{said}")
    submitted = Submitted(kind, "slurm", done.stdout.strip().split(";")[0], ranks, script=str(script))
    record(run, submitted)
    return submitted


def sbatch_command(script: Path, *options: str) -> list[str]:
    return ["sbatch", "--parsable", *options, str(script)]


def after_options(job: str) -> list[str]:
    """For a job that starts when ``job`` has ended well, and is taken away when it hasn't."""
    return [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]


def low_priority_options() -> list[str]:
    """For a job that scores steps on the way, one after the other: two would score the same."""
    return [f"--nice={NICE}", "--dependency=singleton"]


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what a job or a launcher that we may be in has set: sbatch would hand it on."""
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    ours = ("SLURM_CONF",)
    return {
        name: value
        for name, value in environment.items()
        if name in ours or not (name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")) or name in ranks)
    }


def slurm_state(job: str) -> str:
    """PENDING (Reason), RUNNING, ...: from the queue, else the accounting, else 'not in the queue'. UNKNOWN while
    slurmctld doesn't answer."""
    queued, error = _ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T|%r|%M|%N")
    if queued:
        state, reason, elapsed, nodes = queued.splitlines()[0].split("|")
        if state == "PENDING":
            return f"PENDING ({reason})"
        return state + (f" for {elapsed} on {nodes}" if state == "RUNNING" else "")
    if error and "Invalid job id" not in error:
        return f"UNKNOWN ({error.splitlines()[0]})"
    accounted, _ = _ask("sacct", "-X", "-n", "-P", "-o", "State", "-j", job)
    return accounted.splitlines()[0] if accounted else "not in the queue"


def _ask(*command: str) -> tuple[str, str]:
    """(what it says, its error); neither where there is no such program."""
    if shutil.which(command[0]) is None:
        return "", ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} did not answer for a minute"
    return (done.stdout.strip(), "") if done.returncode == 0 else ("", done.stderr.strip())


# ---- this machine ----


def start_local(run: RunDir, like: Submitted, minutes: float, code: Path, call: Any) -> Submitted:
    """``call`` on each rank, by submitit: in the background (local), or here and now (debug). It imports ``code``."""
    executor = {"local": submitit.LocalExecutor, "debug": submitit.DebugExecutor}[like.cluster](run.logs / "local")
    executor.update_parameters(timeout_min=minutes, tasks_per_node=like.ranks, gpus_per_node=like.gpus)
    executor.update_parameters(signal_delay_s=LOCAL_WARNING_SECONDS, stderr_to_stdout=True)
    path = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])
    with _left_alone(), _changed(PYTHONPATH=path, PYTHONSAFEPATH="1", PYTHONUNBUFFERED="1"):
        job = executor.submit(call)
    submitted = dataclasses.replace(like, job=job.job_id)
    record(run, submitted)
    if like.cluster == "debug":
        job.result()
    return submitted


def local_state(submitted: Submitted, run: RunDir) -> str:
    if submitted.cluster == "debug":
        return "ended"
    if _alive(int(submitted.job)):
        return "RUNNING"
    return "FAILED" if failures(submitted, run) else "COMPLETED"


def failures(submitted: Submitted, run: RunDir) -> list[int]:
    """Ranks of a local job that ended with an error, or without a word."""
    bad = []
    for rank in range(submitted.ranks):
        path = submitit.core.utils.JobPaths(run.logs / "local", submitted.job, rank).result_pickle
        outcome = submitit.core.utils.pickle_load(path)[0] if path.is_file() else "killed"
        bad += [rank] if outcome != "success" else []
    return bad


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z" and "submitit" in command  # ids are given out again


@contextmanager
def _left_alone() -> Iterator[None]:
    """What is started inside lives on: no Ctrl-C or hang-up of this terminal is for it, and it has no pipe of ours."""
    ignored = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    sys.stdout.flush()
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, nowhere):
            os.close(descriptor)
        for number, handler in ignored.items():
            signal.signal(number, handler)


@contextmanager
def _changed(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# ---- both ----


def record(run: RunDir, submitted: Submitted) -> None:
    add_record(run, {"event": "submit", **vars(submitted)})


def submitted_jobs(run: RunDir) -> list[Submitted]:
    """All jobs of the run, oldest first."""
    names = Submitted.__dataclass_fields__
    return [
        Submitted(**{name: r[name] for name in names if name in r}) for r in read_records(run) if r["event"] == "submit"
    ]


def current_jobs(run: RunDir) -> list[Submitted]:
    """Those whose state is worth asking for. Of jobs that score steps, one runs and one waits at most."""
    jobs = submitted_jobs(run)
    old = [job for job in jobs if job.kind == EVALUATE_STEPS][:-2]
    return [job for job in jobs if job not in old]


def state(submitted: Submitted, run: RunDir) -> str:
    return slurm_state(submitted.job) if submitted.cluster == "slurm" else local_state(submitted, run)


def is_live(state: str) -> bool:
    return state.split(" ")[0] in LIVE


def cancel(submitted: Submitted) -> None:
    """A run saves at its next step and ends; it is not started again."""
    if submitted.cluster != "slurm":
        os.kill(int(submitted.job), signal.SIGTERM)
        return
    done = subprocess.run(["scancel", submitted.job], capture_output=True, text=True)
    if done.returncode:
        raise SubmissionError(f"scancel {submitted.job}: {(done.stdout + done.stderr).strip()}")


def wait(submitted: Submitted, run: RunDir) -> str:
    """The state in which it ended."""
    while is_live(now := state(submitted, run)):
        time.sleep(POLL_SECONDS)
    return now
