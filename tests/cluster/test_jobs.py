"""What the project runs on a cluster, on the real one: submitit's ranks on two nodes, and make-shards as an array."""

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
    monkeypatch.delenv("RANK", raising=False)  # of tests that joined a process group before this one
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
    command = [sys.executable, str(ARRAY), *options, "--", *SCENES, "--out", str(tmp_path / "many")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "4 tasks, job" in done.stdout and "on slurm" in done.stdout and "7 shards" in done.stdout
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
