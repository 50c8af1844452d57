"""launch/submit.py on the real SLURM: what a person does with a run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from diffcap_dist.run_dir import RunDir
from launch import job, scheduler
from tests.cluster.slurm import Cluster
from tests.conftest import TINY_SETTINGS
from tests.test_submit import checkout, run_submit

pytestmark = pytest.mark.slow


def test_examined_cancelled_and_resubmitted_on_slurm(slurm: Cluster, scene_shards: Path, tmp_path: Path) -> None:
    """Preflight; then a run that is cancelled (it saves, and is not requeued) and goes on by its snapshot's code."""
    file, folder = checkout(tmp_path / "checkout"), tmp_path / "a 5% folder"
    folder.mkdir()
    config, run = folder / "tiny.yaml", RunDir(folder / "run")
    config.write_text(TINY_SETTINGS.format(run=f'"{run.root}"', shards=scene_shards))
    words = ["--nodes", "2", "--cpus-per-task", "1", "--time", "10", str(config)]
    words += ["training.num_steps=300", "training.validate_every=300", "training.zero_stage=2"]
    examined = run_submit(file, "--preflight", *words)
    assert examined.returncode == 0 and "preflight: all well" in examined.stdout, examined.stdout + examined.stderr
    assert examined.stdout.count("all-reduce") == 2
    done = run_submit(file, *words)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 90
    while not any(r["step"] >= 5 for r in run.read_metrics()):
        assert time.monotonic() < deadline, run_submit(file, "logs", str(run.root), "--job").stdout
        time.sleep(0.1)
    assert run_submit(file, "cancel", str(run.root)).returncode == 0
    training, evaluation = (one.job for one in scheduler.submitted_jobs(run)[-2:])
    slurm.wait_for_job(training, "CANCELLED")
    assert slurm.job_state(evaluation) == "CANCELLED"
    saved = job.saved_step(run)
    assert 5 <= saved < 300
    (tmp_path / "checkout" / "diffcap_dist" / "train.py").write_text(
        'raise ValueError("broken after the submission")\n'
    )
    resumed = run_submit(file, "resubmit", str(run.root), "--follow")
    assert resumed.returncode == 0 and f"continued at step {saved}" in resumed.stdout, resumed.stdout + resumed.stderr
    said = run_submit(file, "status", str(run.root)).stdout
    assert "step 300 of 300, saved at 300 (finished)" in said and "COMPLETED; last: finished" in said
