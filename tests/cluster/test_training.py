"""Training by launch/submit.py on the real SLURM: two nodes, ZeRO-2, and what clusters do to a job on its way.

Whatever happens, the weights at the end are those of a run that nothing happened to, bit for bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffcap_dist import __main__ as diffcap
from diffcap_dist.run_dir import RunDir
from launch.records import read_records
from launch.scheduler import EVALUATE_STEPS, NICE
from tests.cluster.slurm import Cluster
from tests.conftest import TINY_SETTINGS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS = 120
WORDS = [f"training.num_steps={STEPS}", "training.validate_every=1000", "training.save_every=20"]
WORDS += ["training.zero_stage=2"]


class Submitted:
    """A run that submit.py has handed in."""

    def __init__(self, slurm: Cluster, folder: Path, shards: Path, *options: str) -> None:
        folder.mkdir(parents=True)
        config = folder / "tiny.yaml"
        config.write_text(TINY_SETTINGS.format(run=folder / "run", shards=shards))
        resources = ["--cluster", "slurm", "--nodes", "2", "--cpus-per-task", "1", "--time", "10"]
        command = [sys.executable, str(ROOT / "launch" / "submit.py"), *resources, str(config), *WORDS, *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        self.slurm, self.run = slurm, RunDir(folder / "run")
        self.jobs = {r["kind"]: r["job"] for r in read_records(self.run) if r["event"] == "submit"}
        self.job = self.jobs["train"]

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: any(r["step"] >= step for r in self.run.read_metrics()), f"step {step}")

    def wait_until(self, holds: Callable[[], bool], what: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            ended = self.slurm.job_state(self.job) in ("FAILED", "CANCELLED", "TIMEOUT")
            if ended or time.monotonic() > deadline:
                words = "\n".join(f"{p}: {p.read_text()[-3000:]}" for p in self.run.logs.glob("*"))
                raise AssertionError(f"{what} not in {seconds:g} s; {self.slurm.job_state(self.job)}\n{words}")
            time.sleep(0.1)

    def wait(self) -> None:
        self.wait_until(lambda: self.slurm.job_state(self.job) == "COMPLETED", "the end of training", 180)

    def starts(self) -> list[int]:
        """The steps at which training was begun and gone on with."""
        return [r["step"] for r in self.run.read_metrics() if r["kind"] == "start"]

    def ends(self) -> list[str]:
        return [r["how"] for r in read_records(self.run) if r["event"] == "end" and r["kind"] == "train"]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.run.checkpoints / f"step_{STEPS:08d}" / "ema.safetensors")

    def losses(self) -> dict[int, float]:
        """By step; of steps that were done twice, the second time."""
        return {r["step"]: r["loss"] for r in self.run.read_metrics() if r["kind"] == "training"}


@pytest.fixture(scope="module")
def unbroken(_running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, scene_shards: Path) -> Submitted:
    """The run that nothing happens to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(_running_cluster.conf))
        folder = tmp_path_factory.mktemp("unbroken") / "a run"
        run = Submitted(_running_cluster, folder, scene_shards, "--evaluate-every", "40")
        run.wait()
        for job in handed_in(run, "evaluate") + handed_in(run, EVALUATE_STEPS):
            run.slurm.wait_for_job(job, "COMPLETED", 90)
    return run


def handed_in(run: Submitted, kind: str) -> list[str]:
    return [r["job"] for r in read_records(run.run) if r["event"] == "submit" and r["kind"] == kind]


def check_equal(broken: Submitted, unbroken: Submitted) -> None:
    expected, got = unbroken.weights(), broken.weights()
    assert expected.keys() == got.keys() and len(expected) > 20
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert broken.losses() == unbroken.losses() and len(broken.losses()) == STEPS


def test_trained_on_two_nodes_and_scored(unbroken: Submitted) -> None:
    """The dependent evaluation on two nodes has the scores of one process."""
    run = unbroken.run
    two = json.loads(run.scores.read_text())
    captions = (run.predictions / "test.jsonl").read_bytes()
    assert diffcap.main(["evaluate", str(run.root)]) == 0
    one = json.loads(run.scores.read_text())
    assert (two["world_size"], one["world_size"], one["step"]) == (2, 1, two["step"])
    assert (run.predictions / "test.jsonl").read_bytes() == captions
    for name in ("bleu_1", "bleu_4", "cider_d", "rouge_l", "scene_accuracy"):
        assert one[name] == two[name], name


def test_scored_on_the_way(unbroken: Submitted) -> None:
    """Beside the training, by jobs of low priority; checkpoints of those steps are long gone, and now the weights."""
    run, jobs = unbroken.run, handed_in(unbroken, EVALUATE_STEPS)
    assert 1 <= len(jobs) <= 3
    assert all(f"Nice={NICE}" in unbroken.slurm.scontrol("show", "job", job) for job in jobs)
    assert not (run.checkpoints / "step_00000040").exists() and not run.waiting_evaluations()
    scores = {step: json.loads(run.evaluation(step).scores.read_text()) for step in (40, 80, STEPS)}
    assert [one["step"] for one in scores.values()] == list(scores) and scores[40]["world_size"] == 2
    final = json.loads(run.scores.read_text())
    assert final["step"] == STEPS and scores[40]["cider_d"] != final["cider_d"] == scores[STEPS]["cider_d"]


def test_requeued_and_preempted(slurm: Cluster, unbroken: Submitted, scene_shards: Path, tmp_path: Path) -> None:
    """Saved where it stood each time: no checkpoint was due."""
    run = Submitted(
        slurm, tmp_path / "r", scene_shards, "--partition", "low", "--no-evaluate-after", "training.save_every=1000"
    )
    run.wait_for_step(25)
    slurm.scontrol("requeue", run.job)
    run.wait_until(lambda: len(run.starts()) == 2, "the second start")
    run.wait_for_step(run.starts()[1] + 5)
    slurm.sbatch("--nodes=2", "--exclusive", f"--output={tmp_path}/above", "--wrap=srun hostname")
    run.wait()
    first, second, third = run.starts()
    assert first == 0 and 25 <= second < third < STEPS and "preempted" in run.ends()[1]
    check_equal(run, unbroken)


def test_the_time_limit(slurm: Cluster, scene_shards: Path, tmp_path: Path) -> None:
    """Warned, saved, requeued, continued from there; cancelled with the evaluation that waits for it."""
    words = ["training.num_steps=1000000", "training.validate_every=1000000", "training.save_every=1000000"]
    run = Submitted(slurm, tmp_path / "r", scene_shards, *words)
    run.wait_for_step(5)
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 100))  # it is warned 120 s before
    slurm.scontrol("update", f"JobId={run.job}", f"EndTime={soon}")
    run.wait_until(lambda: len(run.starts()) == 2, "the second start")
    assert run.starts()[1] >= 5 and "its time limit" in run.ends()[0]
    run.wait_for_step(run.starts()[1] + 5)
    slurm.scancel(run.job)
    slurm.wait_for_job(run.job, "CANCELLED")
    assert slurm.job_state(run.jobs["evaluate"]) == "CANCELLED"


@pytest.mark.timeout(600)  # four starts, and the other one's where it is alone: minutes on a machine that is busy
def test_a_killed_batch_script_then_rank_then_node(
    slurm: Cluster, unbroken: Submitted, scene_shards: Path, tmp_path: Path
) -> None:
    run = Submitted(slurm, tmp_path / "r", scene_shards)
    run.wait_for_step(5)
    os.kill(process_of(run, b"slurm_script", "SLURM_PROCID=0"), 9)
    run.wait_until(lambda: len(run.ends()) == 1, "a word about the end", 60)
    assert "requeued" in run.ends()[0] and "the batch script on n1: Killed" in run.ends()[0]
    run.wait_until(lambda: len(run.starts()) == 2, "the second start")
    assert run.starts()[1] >= 5  # its ranks saved as SLURM ended them; the evaluation goes on waiting
    assert slurm.job_state(run.jobs["evaluate"]) == "PENDING"
    run.wait_for_step(25)
    os.kill(process_of(run, b"diffcap_dist.train", "SLURM_PROCID=1"), 9)
    run.wait_until(lambda: len(run.ends()) == 2, "the end of the other rank", 60)
    assert "requeued" in run.ends()[1] and "rank 1 on n2" in run.ends()[1]
    run.wait_until(lambda: len(run.starts()) == 3, "the third start")
    run.wait_for_step(45)
    slurm.kill_node("n2")
    slurm.wait_for_job(run.job, "PENDING", 90)
    slurm.start_node("n2")
    run.wait()
    assert run.starts()[2] == 20 and run.starts()[-1] >= 40 and run.ends()[-1] == "finished"
    # Whoever notices first: SLURM, or rank 0, which misses its neighbour.
    assert any("node n2: lost" in end for end in run.ends()), run.ends()
    check_equal(run, unbroken)


def process_of(run: Submitted, word: bytes, *marks_of_it: str) -> int:
    """Of the job: the one with this in its command line, and these variables."""
    marks = {
        *(mark.encode() for mark in marks_of_it),
        f"SLURM_JOB_ID={run.job}".encode(),
        f"SLURM_CONF={run.slurm.conf}".encode(),
    }
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            if word in words and marks <= set((folder / "environ").read_bytes().split(b"\0")):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"no process {word!r} with {marks_of_it}")
