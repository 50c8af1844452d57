"""The cluster of the tests itself: jobs, accounting, requeue, preemption, a lost node."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cluster.slurm import GRACE, Cluster

pytestmark = pytest.mark.slow

# Says every start and every signal; ends at once when it is started for the second time.
ENDURING = """#!/bin/bash
trap 'echo USR2' USR2
trap 'echo TERM' TERM
echo start $SLURM_RESTART_COUNT
[ "$SLURM_RESTART_COUNT" ] && exit 0
while true; do sleep 0.1; done
"""


def test_two_idle_nodes(slurm: Cluster) -> None:
    assert slurm.node_states() == {"n1": "idle", "n2": "idle"}


def test_the_accounting_knows_a_job(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.sbatch("--nodes=2", f"--output={tmp_path}/%j", "--wrap=srun hostname; exit 3")
    slurm.wait_for_job(job, "FAILED")
    states = {row["JobID"]: row for row in slurm.sacct(job)}
    assert states[job]["ExitCode"] == "3:0" and states[f"{job}.0"]["State"] == "COMPLETED"


def test_a_requeued_job_starts_again(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.sbatch(f"--output={tmp_path}/out", "--open-mode=append", script=ENDURING)
    slurm.wait_for_job(job, "RUNNING")
    slurm.scontrol("requeue", job)
    slurm.wait_for_job(job, "COMPLETED")
    assert (tmp_path / "out").read_text().splitlines()[-1] == "start 1"
    states = [row["State"] for row in slurm.sacct(job, duplicates=True) if row["JobID"] == job]
    assert states == ["REQUEUED", "COMPLETED"]


def test_main_preempts_low(slurm: Cluster, tmp_path: Path) -> None:
    words = ["--partition=low", "--nodes=2", "--exclusive", "--signal=B:USR2@30"]
    low = slurm.sbatch(*words, f"--output={tmp_path}/out", "--open-mode=append", script=ENDURING)
    slurm.wait_for_job(low, "RUNNING")
    started = time.monotonic()
    high = slurm.sbatch("--nodes=2", f"--output={tmp_path}/high", "--wrap=hostname")
    slurm.wait_for_job(high, "COMPLETED")
    assert time.monotonic() - started < GRACE + 15
    slurm.wait_for_job(low, "COMPLETED")
    said = [line for line in (tmp_path / "out").read_text().splitlines() if line.startswith(("start", "USR2", "TERM"))]
    assert said == ["start", "USR2", "TERM", "start 1"]


def test_a_lost_node_requeues_its_jobs(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.sbatch("--nodelist=n2", f"--output={tmp_path}/out", "--open-mode=append", script=ENDURING)
    slurm.wait_for_job(job, "RUNNING")
    slurm.kill_node("n2")
    slurm.wait_for_job(job, "PENDING")
    assert slurm.node_states()["n2"].startswith("down")
    slurm.start_node("n2")
    slurm.wait_for_job(job, "COMPLETED")
