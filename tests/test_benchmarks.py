"""The benchmark's plain step is one more reference of the objective: the same loss and gradients, and a void comparison
is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import make_shards, train_step
from benchmarks.train_step import SIZES, Batch, build, check_same_loss, main, peak_bytes, peaks_apart, write_clip
from diffcap_dist.diffusion import objective

CPU = torch.device("cpu")
TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_clip(TINY, folder)
    return folder


@pytest.mark.parametrize("variant", ["plain", "plain_encoding_once"])
@pytest.mark.parametrize("small_logits", [objective.SMALL_LOGITS, 0])
def test_both_steps_give_the_same_loss_and_gradients(
    variant: str, small_logits: int, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "SMALL_LOGITS", small_logits)
    batch, gradients = Batch.random(TINY, CPU), {}
    for name in ("ours", variant):
        step = build(name, TINY, clip_folder, CPU)
        loss = step(batch)
        loss.backward()
        trained = {n.removeprefix("objective.denoiser."): p for n, p in step.named_parameters() if p.requires_grad}
        gradients[name] = {"loss": loss.detach()} | {n: p.grad for n, p in trained.items()}
    not_dropped = gradients["ours"].pop("no_image")  # the published model has no vector for a hidden photo
    assert not not_dropped.any()
    torch.testing.assert_close(gradients["ours"], gradients[variant], rtol=1e-4, atol=1e-6)


def test_different_losses_are_refused(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {name: build(name, TINY, clip_folder, CPU) for name in ("ours", "plain")}
    batch = Batch.random(TINY, CPU)
    assert check_same_loss(steps, batch).keys() == steps.keys()
    monkeypatch.setattr(train_step, "ROUNDING_WEIGHT", 0.31)
    with pytest.raises(ValueError, match="different losses"):
        check_same_loss(steps, batch)


def test_main_writes_the_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process: starting two takes most of the time. The slow test below starts them.
    monkeypatch.setattr(train_step, "peaks_apart", lambda names, *rest: {n: 1 + peak_bytes(n, *rest) for n in names})
    out = tmp_path / "train_step.json"
    assert main(["--size", "tiny", "--rounds", "2", "--device", "cpu", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    for ratio in ("time_ratio", "time_ratio_encoding_once", "peak_memory_ratio"):
        assert result[ratio] > 0
    assert result["peak_memory_ratio"] == result["peak_bytes"]["plain"] / result["peak_bytes"]["ours"]
    assert all(len(seconds) == 2 for seconds in result["seconds_of_rounds"].values())
    assert "plain / ours: time" in capsys.readouterr().out


@pytest.mark.slow
def test_the_peak_of_the_plain_step_holds_all_logits(clip_folder: Path) -> None:
    large = dataclasses.replace(TINY, vocab_size=30522, num_timesteps=50)
    logits_bytes = large.num_photos * large.num_timesteps * large.max_length * large.vocab_size * 4
    peaks = peaks_apart(("ours", "plain"), large, clip_folder, CPU)
    assert peaks["plain"] > 2 * logits_bytes  # and their gradient
    assert peaks["ours"] < logits_bytes


@pytest.mark.slow
def test_the_benchmark_of_make_shards_writes_the_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "make_shards.json"
    assert make_shards.main(["--photos", "12", "--size", "300", "280", "--rounds", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    speed = result["mb_per_second"]
    assert result["ratios"]["ours / tar cf"] == speed["ours, 1 worker"] / speed["tar cf"]
    assert set(result["seconds_to_open"]) == {"1000", "100000"} and "ours / ShardWriter" in capsys.readouterr().out
