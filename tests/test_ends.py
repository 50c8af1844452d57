"""How runs end before their time, through the real deepspeed launcher: signals, crashes, losses that are not finite."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffcap_dist.evaluation.trained_run import code_commit
from diffcap_dist.run_dir import RunDir
from diffcap_dist.training import checkpoint
from tests.conftest import launch, launch_command, rank_environment
from tests.ranks.failing import NAN_AT, STALL_AT, STALL_SECONDS

pytestmark = pytest.mark.slow

SHARED_MEMORY = Path("/dev/shm")


def test_sigkill_then_the_same_command_continues_exactly(tiny_config: Path, tmp_path: Path) -> None:
    """Rank 0 dies past step 10: the other names it and ends; started again, the weights equal an unbroken run's."""
    left = set(SHARED_MEMORY.glob("deepspeed*"))
    launch(2, "diffcap_dist.train", str(tiny_config), f"run_dir={tmp_path / 'whole'}")
    broken = RunDir(tmp_path / "broken")
    command = launch_command(2, "diffcap_dist.train", str(tiny_config), f"run_dir={broken.root}")
    process = subprocess.Popen(
        command, env=rank_environment(), start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: any(r["step"] >= 12 for r in broken.read_metrics()), process)
    killed = process_of_rank(0, tiny_config, broken.root)
    os.kill(killed, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and f"rank 1 lost rank 0 (process {killed})" in errors, errors[-4000:]
    assert subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout == ""
    launch(2, "diffcap_dist.train", str(tiny_config), f"run_dir={broken.root}")
    whole = RunDir(tmp_path / "whole")
    ema = "checkpoints/step_00000020/ema.safetensors"
    expected, got = load_file(whole.root / ema), load_file(broken.root / ema)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    starts = [r for r in broken.read_metrics() if r["kind"] == "start"]
    assert [r["step"] for r in starts] == [0, 10]
    assert all(r["commit"].startswith(code_commit() or "unknown") for r in starts)
    assert set(SHARED_MEMORY.glob("deepspeed*")) <= left, "memory that stays taken after the run"


def process_of_rank(rank: int, *words: object) -> int:
    pattern = ".*".join([f"local_rank={rank}", *map(str, words)])
    return int(subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()[0])


def test_a_loss_that_is_not_finite_and_a_step_that_never_ends(tiny_config: Path, tmp_path: Path) -> None:
    """Both ranks stop at the same step, the keys written down; a stalled rank ends all, its stack on screen."""
    command = launch_command(2, "tests.ranks.failing", str(tiny_config), str(tmp_path))
    failed = subprocess.run(command, capture_output=True, text=True, timeout=240, env=rank_environment())
    ended = time.time()
    (first_said, _), (second_said, keys) = json.loads((tmp_path / "nan.json").read_text())
    run = RunDir(tmp_path / "nan")
    last = list(run.read_metrics())[-1]
    assert first_said == second_said and f"at step {NAN_AT} on rank 1;" in first_said and str(run.metrics) in first_said
    assert (
        last["kind"] == "not_finite" and last["step"] == NAN_AT and last["keys"] == {"rank 1": keys} and len(keys) == 8
    )
    assert checkpoint._newest_complete(run.checkpoints) == "step_00000010"

    assert failed.returncode != 0 and "in sleep_of_rank_one" in failed.stderr, failed.stderr[-4000:]
    for rank in (0, 1):
        assert f"rank {rank} of 2 made no step for {STALL_SECONDS} s after step {STALL_AT}" in failed.stderr
    assert ended - float((tmp_path / "stalled_at").read_text()) < STALL_SECONDS + 10


def test_sigterm_to_one_rank_saves_on_all(tiny_config: Path, tmp_path: Path) -> None:
    """The flag of one rank reaches the others at the step boundary: a checkpoint at once, and exit status 0."""
    run = RunDir(tmp_path / "run")
    words = ["training.num_steps=100000", "training.validate_every=100000", "training.save_every=100000"]
    command = launch_command(2, "diffcap_dist.train", str(tiny_config), *words)
    process = subprocess.Popen(command, env=rank_environment(), start_new_session=True, stderr=subprocess.DEVNULL)
    wait_until(lambda: any(r["step"] >= 5 for r in run.read_metrics()), process)
    os.kill(process_of_rank(1, tiny_config), signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    saved = [p.name for p in run.checkpoints.iterdir() if p.name.startswith("step_")]
    assert len(saved) == 1 and not saved[0].endswith(".tmp")


def test_ctrl_c_saves_and_takes_the_loader_workers_along(tiny_config: Path, tmp_path: Path) -> None:
    """A terminal's SIGINT reaches the run and its workers alike: saved, exit status 0, no traceback, nobody left."""
    run = RunDir(tmp_path / "run")
    words = ["training.num_steps=100000", "training.validate_every=100000", "data.num_workers=2"]
    command = [sys.executable, "-m", "diffcap_dist", "train", str(tiny_config), *words]
    process = subprocess.Popen(
        command, env=rank_environment(), start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: any(r["step"] >= 5 for r in run.read_metrics()), process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGINT" in errors and "Traceback" not in errors, errors[-2000:]
    assert len(list(run.checkpoints.glob("step_*"))) == 1
    assert subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout == ""


def wait_until(condition, process: subprocess.Popen, timeout: float = 120) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"the run ended early with status {process.returncode}"
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.05)
