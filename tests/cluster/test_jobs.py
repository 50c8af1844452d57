"""submitit on the real SLURM: ranks on two nodes, and the job arrays of shards and of runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import submitit
import torch
import torch.distributed as dist

from diffcap_dist.training import distributed
from shards.make_shards import main
from tests.cluster.slurm import NODES, Cluster
from tests.conftest import TINY_SETTINGS
from tests.test_shard_array import ARRAY, SCENES
from tests.test_writer import contents

pytestmark = pytest.mark.slow


def rank_and_sum() -> tuple[str, int, int, float]:
    """A rank on a node: where it ran, its rank, how many there were, the sum over ranks of rank + 1."""
    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    ranks = distributed.init_ranks()
    value = torch.tensor(ranks.rank + 1.0)
    dist.all_reduce(value)
    distributed.finish()
    return os.environ["SLURMD_NODENAME"], ranks.rank, ranks.world_size, float(value)


def test_ranks_of_two_nodes_meet(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # of tests that joined a process group before this one
    executor = submitit.AutoExecutor(tmp_path)
    assert executor.cluster == "slurm"
    executor.update_parameters(nodes=2, tasks_per_node=1, cpus_per_task=1, timeout_min=5)
    job = executor.submit(rank_and_sum)
    assert job.results() == [(node, rank, 2, 3.0) for rank, node in enumerate(NODES)]
    slurm.wait_for_job(job.job_id, "COMPLETED")
    states = {row["JobID"]: row["State"] for row in slurm.sacct(job.job_id)}
    assert states[job.job_id] == states[f"{job.job_id}.0"] == "COMPLETED"


def test_a_job_array_makes_the_dataset_of_one_process(slurm: Cluster, tmp_path: Path) -> None:
    assert main([*SCENES, "--out", str(tmp_path / "one")]) == 0
    options = ["--tasks", "4", "--cluster", "slurm", "--cpus-per-task", "1", "--logs", str(tmp_path / "logs")]
    options += ["--slurm", "nice=5", "--slurm", "no-kill"]  # submitit knows neither
    command = [sys.executable, str(ARRAY), *options, "--", *SCENES, "--out", str(tmp_path / "many")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "4 tasks, job" in done.stdout and "on slurm" in done.stdout and "7 shards" in done.stdout
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_a_sweep_of_four_cells(slurm: Cluster, scene_shards: Path, tmp_path: Path) -> None:
    """One array, two cells at once; the same line again has nothing to do."""
    (tmp_path / "tiny.yaml").write_text(TINY_SETTINGS.format(run=tmp_path / "unused", shards=scene_shards))
    rows = "rows:\n  - {name: a}\n  - {name: b, settings: {optimizer: {learning_rate: 1e-3}}}\n"
    (tmp_path / "table.yaml").write_text(f"title: T\nbase: tiny.yaml\nseeds: [0, 1]\n{rows}")
    command = [sys.executable, str(ARRAY.parent / "sweep.py"), str(tmp_path / "table.yaml")]
    command += ["--out", str(tmp_path / "out"), "--cluster", "slurm", "--cpus-per-task", "1", "--max-parallel", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [f"{row}/seed-{seed}" for row in "ab" for seed in (0, 1)]
    said = done.stdout.splitlines()
    assert [" ".join(line.split()[:3]) for line in said[-5:-1]] == [f"{cell} done BLEU-4" for cell in cells]
    array = next(line.split()[-1] for line in said if line.startswith("job array"))
    for number in range(4):  # the scores are on disk a little before SLURM has the end of the task in its books
        slurm.wait_for_job(f"{array}_{number}", "COMPLETED")
    rows_of_jobs = slurm.sacct(array, "JobID,State,Start,End")
    tasks = [row for row in rows_of_jobs if "." not in row["JobID"]]
    assert [task["JobID"] for task in tasks] == [f"{array}_{number}" for number in range(4)]
    assert {task["State"] for task in tasks} == {"COMPLETED"}
    assert sorted(task["Start"] for task in tasks)[2] >= min(task["End"] for task in tasks)
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "4 cells in" in again.stdout and "4 done before" in again.stdout
