"""The pieces around the loop: batch split, learning rate, EMA, checkpoints on disk, signals, precision."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from diffcap_dist.config import OptimizerConfig, TrainingConfig, load_config
from diffcap_dist.run_dir import RunDir
from diffcap_dist.train import Trainer
from diffcap_dist.training import checkpoint, distributed
from diffcap_dist.training.distributed import Ranks
from diffcap_dist.training.ema import EMA
from diffcap_dist.training.engine import BatchSplit, choose_precision, deepspeed_config, split_batch
from diffcap_dist.training.learning_rate import learning_rate
from diffcap_dist.training.preemption import StopFlag
from tests.conftest import rank_environment

# ---- the batch ----


def test_the_global_batch_is_fixed() -> None:
    config = TrainingConfig(global_batch_size=96, micro_batch_size=8)
    assert split_batch(config, 1) == BatchSplit(8, 12, 1)
    assert split_batch(config, 4) == BatchSplit(8, 3, 4)
    assert split_batch(TrainingConfig(global_batch_size=96), 4) == BatchSplit(24, 1, 4)
    with pytest.raises(ValueError, match="can't be shared equally by 5 ranks"):
        split_batch(config, 5)
    with pytest.raises(ValueError, match="micro_batch_size=7 does not divide the 48 photos"):
        split_batch(TrainingConfig(global_batch_size=96, micro_batch_size=7), 2)


def test_deepspeed_is_told_the_same_numbers() -> None:
    told = deepspeed_config(TrainingConfig(zero_stage=2), OptimizerConfig(), BatchSplit(8, 3, 4), torch.bfloat16)
    sizes = told["train_batch_size"], told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"]
    assert sizes == (96, 8, 3)
    assert told["bf16"]["enabled"] and told["zero_optimization"]["stage"] == 2


def test_precision_says_why() -> None:
    assert choose_precision("auto", torch.device("cpu"))[0] == torch.float32
    assert choose_precision("bf16", torch.device("cpu")) == (torch.bfloat16, "as set")


# ---- the learning rate ----


@pytest.mark.parametrize("schedule", ["constant", "linear", "log", "cosine"])
def test_rates_start_and_end_where_they_should(schedule: str) -> None:
    config = OptimizerConfig(1e-4, 5e-5, schedule, warmup_steps=10)  # type: ignore[arg-type]
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4 / 11)
    assert rates[10] == pytest.approx(1e-4) == max(rates)
    assert rates[-1] == pytest.approx(1e-4 if schedule == "constant" else 5e-5)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[10:]))


def test_rates_half_way() -> None:
    half = {
        name: learning_rate(50, 101, OptimizerConfig(1e-3, 1e-5, name, warmup_steps=0))  # type: ignore[arg-type]
        for name in ("linear", "log", "cosine")
    }
    assert half == pytest.approx({"linear": 5.05e-4, "log": 1e-4, "cosine": 5.05e-4})


# ---- EMA ----


def test_ema_is_the_recursion_and_swaps_back_exactly() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = EMA(module, decay=0.5)
    expected = module[0].weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            module[0].weight.add_(torch.randn(3, 3))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module[0].weight.detach()
        ema.update(step)
    live = module[0].weight.detach().clone()
    with ema.swapped():
        torch.testing.assert_close(module[0].weight.detach(), expected)
    assert torch.equal(module[0].weight, live)
    assert set(ema.averages) == {name for name, _ in module.named_parameters()}  # no buffers


# ---- checkpoints on disk ----


def sealed(folder: Path, step: int) -> Path:
    aside, final = folder / f"step_{step:08d}.tmp", folder / f"step_{step:08d}"
    aside.mkdir(parents=True)
    (aside / "weights.pt").write_bytes(os.urandom(2000))
    (aside / "state.json").write_text(json.dumps({"step": step}))
    checkpoint._seal(aside, final)
    return final


def test_a_sealed_checkpoint_is_whole(tmp_path: Path) -> None:
    path = sealed(tmp_path, 10)
    assert checkpoint.damage(path) is None
    assert (tmp_path / "latest").read_text() == path.name
    assert not list(tmp_path.glob("*.tmp"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm, found",
    [
        (lambda p: truncate(p / "weights.pt"), "1999 bytes, the manifest says 2000"),
        (lambda p: flip(p / "weights.pt"), "checksum"),
        (lambda p: (p / "weights.pt").unlink(), "weights.pt is missing"),
        (lambda p: (p / "state.json").unlink(), "state.json is missing"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "broken"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(harm, found: str, tmp_path: Path, caplog) -> None:  # type: ignore
    sealed(tmp_path, 10)
    harm(sealed(tmp_path, 20))
    (tmp_path / "latest").write_text("")  # an empty pointer must not matter
    (tmp_path / "step_00000030.tmp").mkdir()  # a save that was killed
    assert found in (checkpoint.damage(tmp_path / "step_00000020") or "")
    assert checkpoint._newest_complete(tmp_path) == "step_00000010"
    assert "step_00000020" in caplog.text and found in caplog.text


class PlainEngine:
    """What ``checkpoint`` asks of DeepSpeed's engine; the files are two ranks'."""

    def __init__(self, value: float) -> None:
        self.module = nn.Linear(2, 2)
        nn.init.constant_(self.module.weight, value)

    def zero_optimization_stage(self) -> int:
        return 0

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        for rank in range(2):
            torch.save(self.module.state_dict(), Path(folder) / tag / f"rank{rank}.pt")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict]:
        self.module.load_state_dict(torch.load(Path(folder) / tag / "rank1.pt", weights_only=True))
        return tag, {}


def save_in_a_process_killed_at(event: int, folder: Path) -> bool:
    """Save step 20 in a fork that SIGKILLs itself at its ``event``-th touch of the disk; True: it had fewer."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    count = 0

    def touched() -> None:
        nonlocal count
        count += 1
        if count == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def torn(write):  # type: ignore[no-untyped-def]
        """Writers outside Python's own files: killed before, in the middle, and after."""

        def writing(content, path, *rest):  # type: ignore[no-untyped-def]
            touched()
            write(content, path, *rest)
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            touched()
            Path(path).write_bytes(whole)

        return writing

    def hook(name: str, words: tuple) -> None:
        if name in TOUCHES and any(str(folder) in str(word) for word in words):
            touched()

    torch.save, checkpoint.save_file, fsync = torn(torch.save), torn(checkpoint.save_file), os.fsync
    os.fsync = lambda number: (touched(), fsync(number))[1]
    sys.addaudithook(hook)
    save_step(20, folder)
    os._exit(0)


TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.link", "os.truncate"}
ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def save_step(step: int, folder: Path) -> None:
    engine = PlainEngine(step)
    checkpoint.save(engine, EMA(engine.module, 0.9), checkpoint.TrainState(step), folder, ALONE, keep_last=1)


@pytest.mark.parametrize("before", [(10,), (10, 20)])  # 20: broken, so that the run comes by step 20 again
def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint(before, tmp_path: Path, monkeypatch) -> None:  # type: ignore
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "from_first", lambda value: value)
    for step in before:
        save_step(step, tmp_path / f"before{step}")
    loaded = []
    for event in itertools.count(1):
        folder = tmp_path / str(event)
        for step in before:
            shutil.copytree(tmp_path / f"before{step}", folder, dirs_exist_ok=True)
        if 20 in before:
            (folder / "step_00000020" / "rank1.pt").unlink()
        if save_in_a_process_killed_at(event, folder):
            break
        engine = PlainEngine(0)
        ema = EMA(engine.module, 0.9)
        state = checkpoint.load_latest(engine, ema, folder, ALONE)
        loaded.append(state.step)
        assert engine.module.weight[0, 0].item() == ema.averages["weight"][0, 0].item() == state.step, event
        assert not list(folder.glob("*.tmp"))
        save_step(30, folder)
        assert [path.name for path in checkpoint.complete_checkpoints(folder)] == ["step_00000030"]
    assert loaded == sorted(loaded) and set(loaded) == {10, 20} and len(loaded) > 40


def test_old_checkpoints_go_the_best_stays(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        sealed(tmp_path, step)
    checkpoint._remove_old(tmp_path, keep_last=2, best_step=10)
    assert [p.name[-2:] for p in checkpoint.complete_checkpoints(tmp_path)] == ["10", "30", "40"]
    assert (tmp_path / "best").read_text() == "step_00000010"


# ---- signals ----


def test_a_signal_only_sets_the_flag() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    try:
        flag = StopFlag().install()
        assert flag.requested is None
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.requested == "SIGUSR2"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_a_signal_before_the_model_is_built(tiny_config: Path, tmp_path: Path) -> None:
    """While torch is imported: the run ends at its first step, saved, and not by the signal."""
    command = [sys.executable, "-m", "diffcap_dist.train", str(tiny_config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=rank_environment()) as process:
        status, deadline = Path(f"/proc/{process.pid}/status"), time.monotonic() + 60
        while not caught(status.read_text(), signal.SIGUSR2):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGUSR2)
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped by SIGUSR2 at step 1, saved" in said, said
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000001"]


def caught(status: str, number: signal.Signals) -> bool:
    """By /proc/PID/status: whether the process has a handler for it."""
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_step_that_changes_no_weight_is_said(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bf16 DeepSpeed passes over gradients that are not finite: here step 3's."""
    run = RunDir(tmp_path / "run")
    words = [f"run_dir={run.root}", "training.precision=bf16", "training.zero_stage=1", "training.num_steps=4"]
    ranks = distributed.init_ranks()
    try:
        trainer = Trainer(load_config(tiny_config, words), ranks)
        parameter = next(p for p in trainer.objective.network.body.parameters() if p.requires_grad)
        parameter.register_hook(lambda gradient: gradient * math.nan if trainer.state.step == 2 else gradient)
        before = parameter.detach().clone()
        trainer.train()
    finally:
        distributed.finish()
    assert [(r["step"], r["positions"]) for r in run.read_metrics() if r["kind"] == "skipped"] == [(3, [32, 47])]
    assert "step 3 changed no weight" in capsys.readouterr().out
    assert parameter.isfinite().all() and not torch.equal(parameter, before)


def test_one_process_needs_no_port() -> None:
    """Many single runs start at once (a sweep): a port that was free a moment ago may be another's."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code = (
            "from diffcap_dist.training import distributed; ranks = distributed.init_ranks();"
            "assert distributed.largest([3.0], ranks.device) == [3.0]; distributed.finish()"
        )
        environment = {**os.environ, "MASTER_PORT": str(taken.getsockname()[1]), "CUDA_VISIBLE_DEVICES": ""}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
