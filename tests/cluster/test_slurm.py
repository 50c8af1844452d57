"""The cluster of the tests itself: jobs, accounting, and all that ends a job and starts it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster, ClusterUnavailable, install

pytestmark = pytest.mark.slow

# Says every start and every signal; ends at SIGTERM, and at once when it is started for the second time.
ENDURING = """#!/bin/bash
trap 'echo USR2; [ "$REQUEUE" ] && scontrol requeue $SLURM_JOB_ID' USR2
trap 'echo TERM; exit 1' TERM
echo start $SLURM_RESTART_COUNT
[ "$SLURM_RESTART_COUNT" ] && exit 0
while true; do sleep 0.1; done
"""


def test_where_it_is_impossible_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ClusterUnavailable, match="no apt-get"):
        install()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(ClusterUnavailable, match="need root"):
        install()


def test_two_idle_nodes(slurm: Cluster) -> None:
    assert slurm.node_states() == {"n1": "idle", "n2": "idle"}


def test_the_accounting_knows_a_job(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.sbatch("--nodes=2", f"--output={tmp_path}/%j", "--wrap=srun hostname; exit 3")
    slurm.wait_for_job(job, "FAILED")
    states = {row["JobID"]: row for row in slurm.sacct(job)}
    assert states[job]["ExitCode"] == "3:0" and states[f"{job}.0"]["State"] == "COMPLETED"


def test_jobs_start_again(slurm: Cluster, tmp_path: Path) -> None:
    """After a time limit whose signal requeues, a preemption, a lost node: side by side, since each takes its time."""

    def submit(name: str, *words: str) -> str:
        job = slurm.sbatch(f"--output={tmp_path / name}", "--open-mode=append", *words, script=ENDURING)
        slurm.wait_for_job(job, "RUNNING")
        return job

    limited = submit("limited", "--nodelist=n1", "--export=ALL,REQUEUE=1", "--time=2", "--signal=B:USR2@110")
    preempted = submit("preempted", "--nodelist=n1", "--partition=low", "--signal=B:USR2@30")
    lost = submit("lost", "--nodelist=n2")
    slurm.kill_node("n2")
    # Of both CPUs: it has to preempt, even where the first job has left n1 by then.
    above = slurm.sbatch("--nodelist=n1", "--cpus-per-task=2", f"--output={tmp_path}/above", "--wrap=hostname")
    slurm.wait_for_job(lost, "PENDING")
    assert slurm.node_states()["n2"].startswith("down")
    slurm.start_node("n2")
    for job in (limited, above, preempted, lost):
        slurm.wait_for_job(job, "COMPLETED")
    assert said(tmp_path / "limited") == ["start", "USR2", "TERM", "start 1"]
    assert said(tmp_path / "preempted") == ["start", "USR2", "TERM", "start 1"]
    assert said(tmp_path / "lost") == ["start", "start 1"]
    for job, end in ((limited, "REQUEUED"), (preempted, "PREEMPTED"), (lost, "NODE_FAIL")):
        rows = slurm.sacct(job, duplicates=True)
        assert [row["State"] for row in rows if row["JobID"] == job] == [end, "COMPLETED"]


def said(output: Path) -> list[str]:
    """The job's own words, without those of SLURM and bash about signals."""
    return [line for line in output.read_text().splitlines() if line.split()[0] in ("start", "USR2", "TERM")]
