"""Around the ranks of a job, on its first node: what the batch script calls before and after srun.

``before`` notes the start and prints a free port for the ranks to meet at. ``after`` decides: finished, failed (the
first rank that failed is named, its traceback shown), or to be started again. A run is requeued when SLURM warned it of
its time limit or of a preemption, or when a rank was killed, and as long as it makes progress: three starts in a row
that saved nothing end it. Whoever cancels a job has it cancelled. Where the batch script itself is killed, beside.py
calls ``requeue_without_script``. No torch here: it has to be quick.

Why not in the ranks, as submitit does: a requeue kills the step that asks for it, and submitit's ``checkpoint`` runs on
one rank in the middle of a step. Here all ranks have saved together and ended before anybody asks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffcap_dist.run_dir import RunDir
from launch.records import add_record, read_records
from launch.sbatch import WARNING_SECONDS

SELF = "python launch/submit.py"
STARTS_WITHOUT_PROGRESS = 3
PORTS = range(12000, 32000)  # below those that systems hand out for outgoing connections
TAIL_LINES = 40
WARNED = ("User defined signal 2", "Terminated")
NODE_FAILURE = re.compile(r"Node failure on (\S+)")
LOST = re.compile(r"LostRank|Connection (closed|reset) by peer|Broken pipe|remote process exited|ncclRemoteError")


@dataclass(frozen=True)
class Culprit:
    """The first rank that failed, as srun said it, or a whole node (rank None)."""

    rank: int | None
    node: str
    how: str

    @property
    def was_killed(self) -> bool:
        """By a signal, so that another start may go better; an error of its own would come again."""
        return not self.how.startswith("Exited with exit code")

    def __str__(self) -> str:
        whole = f"node {self.node}" if self.rank is None else f"rank {self.rank} on {self.node}"
        return f"{whole}: {self.how}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.job", description=__doc__)
    parser.add_argument("what", choices=("before", "after"))
    parser.add_argument("kind")
    parser.add_argument("run", type=Path)
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--said", type=Path)
    parser.add_argument("--warning", type=int, default=WARNING_SECONDS, help="seconds before the time limit")
    args = parser.parse_args(argv)
    run = RunDir(args.run)
    if args.what == "before":
        before(run, args.kind)
        return 0
    return after(run, args.kind, args.status, args.said, args.warning)


def before(run: RunDir, kind: str) -> None:
    job, restarts = _job()
    note_lost_start(run, kind, job, restarts)
    add_record(run, {"event": "start", "kind": kind, "job": job, "restarts": restarts, "step": saved_step(run)})
    print(free_port())


def note_lost_start(run: RunDir, kind: str, job: str, restarts: int) -> None:
    """Say how the start before this one ended, where nobody was left to say it: with a node."""
    events = [r for r in read_records(run) if r.get("job") == job and r["event"] in ("start", "end")]
    if not events or events[-1]["event"] == "end":
        return
    restarts = events[-1]["restarts"]
    lost = lost_node(read_log(_srun_log(run, kind, job, restarts)))
    how = f"SLURM ended it and started it again: {lost or 'its first node was lost, or had no time for a word'}"
    end = {"event": "end", "kind": kind, "job": job, "restarts": restarts, "step": saved_step(run)}
    add_record(run, {**end, "how": how, "culprit": str(lost) if lost else None})
    print(f"the start before this one: {how}", file=sys.stderr)


def after(run: RunDir, kind: str, status: int, said: Path, warning: int = WARNING_SECONDS) -> int:
    """The job's exit status. 0 lets the jobs that wait for it start."""
    job, restarts = _job()
    words = read_log(said)
    print(words, file=sys.stderr)
    found = first_to_fail(run, kind, job, words)
    end = {"event": "end", "kind": kind, "job": job, "restarts": restarts, "status": status, "step": saved_step(run)}
    if status == 0 and (kind != "train" or is_finished(run)):
        add_record(run, {**end, "how": "finished"})
        return 0
    state = job_state(job)
    if found is not None:
        print(describe_failure(run, kind, job, found), file=sys.stderr)
    how = _verdict(run, kind, job, status, found, state, warning)
    add_record(run, {**end, "how": how, "culprit": str(found) if found else None})
    say(f"{kind} of {run.root}: {how}")
    if not how.startswith("requeued"):
        return 0 if how.startswith("SLURM") else status or 75  # 75: EX_TEMPFAIL
    if _requeue(job):
        time.sleep(300)  # it ends this process
    return 75


def requeue_without_script(run: RunDir) -> None:
    """What ``after`` does, where the batch script was killed and can't call it; nothing where it has."""
    job, restarts = _job()
    if any(r["event"] == "end" and (r["job"], r["restarts"]) == (job, restarts) for r in read_records(run)):
        return
    lost = lost_node(read_log(_srun_log(run, "train", job, restarts)), ask=True)
    step, found = saved_step(run), str(lost or f"the batch script on {os.environ.get('SLURMD_NODENAME')}: Killed")
    how = f"requeued, at step {step} or what the ranks save as they are ended: {found}"
    if lost:  # SLURM ended the script with the node, and starts the job again by itself
        how = f"SLURM ended it at step {step} ({found}); unless it is requeued, {_resume(run)}"
    elif idle_starts(run, job, step) >= STARTS_WITHOUT_PROGRESS:
        how = f"given up: {STARTS_WITHOUT_PROGRESS} starts in a row saved nothing new; {_resume(run)}"
    end = {"event": "end", "kind": "train", "job": job, "restarts": restarts, "step": step}
    add_record(run, {**end, "how": how, "culprit": found})
    say(f"train of {run.root}: {how}")
    if how.startswith("requeued"):
        _requeue(job)


def _verdict(
    run: RunDir, kind: str, job: str, status: int, found: Culprit | None, state: dict[str, str], warning: int
) -> str:
    """What becomes of a job whose ranks ended before the work was done."""
    step = saved_step(run)
    resume = _resume(run)
    mend = "mend it and give the same submit command again (resubmit would run the same code)"
    if state.get("JobState") not in (None, "RUNNING") and state.get("Reason") != "TimeLimit":
        why = f"{state['JobState']}, {found}" if found else state["JobState"]
        return f"SLURM ended it at step {step} ({why}); unless it is requeued, {resume}"
    if kind != "train":
        return f"failed; {resume}"
    if status and (found is None or not found.was_killed):
        return f"failed at step {step}; {mend}"
    why = why_stopped(state, warning)
    if why != "preempted" and idle_starts(run, job, step) >= STARTS_WITHOUT_PROGRESS:
        return f"given up: {STARTS_WITHOUT_PROGRESS} starts in a row saved nothing new; {resume}"
    warned = found is None or found.how in WARNED  # by the signal itself, where it came before the first step
    return f"requeued, saved at step {step}: " + (why if warned else str(found))


def _resume(run: RunDir) -> str:
    return f"continue with: {SELF} resubmit {shlex.quote(str(run.root))}"


def why_stopped(state: dict[str, str], warning: int) -> str:
    """Time limit or preemption, from what SLURM knows of the job rather than from how long it ran."""
    if state.get("PreemptTime", "None") not in ("None", "Unknown"):
        return "preempted"
    try:
        left = time.mktime(time.strptime(state["EndTime"], "%Y-%m-%dT%H:%M:%S")) - time.time()
    except (KeyError, ValueError):
        return "a signal"
    # SLURM may send the signal a minute early.
    return "its time limit" if left <= warning + 60 and state.get("TimeLimit") != "UNLIMITED" else "a signal"


def idle_starts(run: RunDir, job: str, step: int) -> int:
    """Starts of this job, the newest ones, that began at the step that is saved now."""
    starts = [r for r in read_records(run) if r["event"] == "start" and r["kind"] == "train" and r["job"] == job]
    count = 0
    for record in reversed(starts):
        if record["step"] < step:
            break
        count += 1
    return count


def saved_step(run: RunDir) -> int:
    """The step of the newest checkpoint, 0 without one."""
    names = [path.parent.name for path in run.checkpoints.glob("step_*/state.json")]
    return max((int(name.removeprefix("step_")) for name in names if not name.endswith(".tmp")), default=0)


def is_finished(run: RunDir) -> bool:
    """Whether training has come to its end, and not to a stop."""
    step = saved_step(run)
    try:
        state: dict[str, Any] = json.loads((run.checkpoints / f"step_{step:08d}" / "state.json").read_text())
        return bool(step >= run.load_config().training.num_steps or state.get("early_stopped"))
    except (OSError, ValueError):
        return False


# ---- who failed ----


def culprit(said: str) -> Culprit | None:
    """The first rank that srun names. Later ones were ended by srun, or lost their neighbour."""
    found = re.search(r"^srun: error: (\S+): tasks? (\d+)[^:]*: (.+)$", said, flags=re.MULTILINE)
    return Culprit(int(found[2]), found[1], found[3].strip()) if found else None


def first_to_fail(run: RunDir, kind: str, job: str, said: str) -> Culprit | None:
    """A rank that failed by itself; else a node that is gone, which takes the ranks of the others with it; else a rank
    that was killed, or that missed another one which left no words."""
    found = culprit(said)
    missed = LOST.search(last_traceback(run.logs / f"{kind}.{job}.{found.rank}.log")) if found else None
    if found and not found.was_killed and not missed:
        return found
    if lost := lost_node(said, ask=True):
        return lost
    if not found or not missed or found.was_killed:
        return found
    # srun tells of every rank that fails or is ended, but of none whose node can't be reached.
    told = hostnames(",".join(re.findall(r"^srun: error: (\S+): tasks? \d", said, flags=re.MULTILINE)))
    silent = [node for node in hostnames(os.environ.get("SLURM_JOB_NODELIST", "")) if node not in told]
    if silent:
        return Culprit(None, ", ".join(silent), "lost")
    return Culprit(found.rank, found.node, "lost another rank")


def lost_node(said: str, ask: bool = False) -> Culprit | None:
    """The node, or nodes, whose loss SLURM told srun of; or, where it is to be asked, that it has as down now."""
    lost = NODE_FAILURE.findall(said) or (down_nodes() if ask else [])
    return Culprit(None, ", ".join(dict.fromkeys(lost)), "lost") if lost else None


def describe_failure(run: RunDir, kind: str, job: str, found: Culprit) -> str:
    if found.rank is None:
        return f"first to fail: {found}; its ranks left no last words"
    log = run.logs / f"{kind}.{job}.{found.rank}.log"
    return f"first to fail: {found} ({log})\n{last_traceback(log)}"


def last_traceback(log: Path) -> str:
    """The last traceback in a log, or its last lines where there is none."""
    lines = re.split(r"[\r\n]+", read_log(log)) if log.is_file() else ["it left no words"]
    begins = [number for number, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    return "\n".join("  " + line for line in lines[begins[-1] if begins else -10 :][-TAIL_LINES:])


def read_log(file: Path) -> str:
    """Its text, empty where there is none yet."""
    return file.read_text(errors="replace").rstrip() if file.is_file() else ""


def _srun_log(run: RunDir, kind: str, job: str, restarts: int) -> Path:
    return run.logs / f"{kind}.{job}.{restarts}.srun"  # as the batch script has it


# ---- SLURM ----


def hostnames(listed: str) -> list[str]:
    """SLURM's short form of node names, n[1-3],m, spelled out; none where it can't be asked."""
    if not listed:
        return []
    return _scontrol("show", "hostnames", listed).split()


def down_nodes() -> list[str]:
    """Those of this job that SLURM has given up; none where it can't be asked."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    return re.findall(r"^NodeName=(\S+) .*?\bState=DOWN", _scontrol("-o", "show", "node", nodes), re.M) if nodes else []


def job_state(job: str) -> dict[str, str]:
    """What ``scontrol show job`` says; empty where it can't be asked."""
    return dict(word.split("=", 1) for word in _scontrol("-o", "show", "job", job).split() if "=" in word)


def _scontrol(*words: str) -> str:
    """What it prints; nothing where it can't be asked."""
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _requeue(job: str) -> bool:
    """Ask for another start: of a job that runs, or that SLURM is about to end. Whether it was granted."""
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        say(f"scontrol requeue {job} was refused: {done.stderr.strip()}. Resubmit the run by hand")
    return done.returncode == 0


def _job() -> tuple[str, int]:
    return os.environ.get("SLURM_JOB_ID", "0"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def free_port() -> int:
    """One that nobody on this node listens at."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise OSError(f"no free port among 100 of {PORTS.start} to {PORTS.stop}")


def say(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S ") + text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
