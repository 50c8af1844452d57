"""ZeRO stages and world sizes, by the real deepspeed launcher: the same gradients, exact resume, one to another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffcap_dist.training import checkpoint
from tests.conftest import TINY_SETTINGS, launch
from tests.ranks.resume import losses

pytestmark = pytest.mark.slow


def test_gradients_of_one_rank_equal_those_of_two(tiny_config: Path, tmp_path: Path) -> None:
    """One batch on one rank, its halves on two, and the same in micro batches: the same gradients at every stage."""
    launch(1, "tests.ranks.gradients", str(tiny_config), str(tmp_path / "one"))
    launch(2, "tests.ranks.gradients", str(tiny_config), str(tmp_path / "two"))
    launch(2, "tests.ranks.gradients", str(tiny_config), str(tmp_path / "micro"), "training.micro_batch_size=4")
    reference = torch.load(tmp_path / "one", weights_only=True)[0]
    assert len(reference["gradients"]) > 20
    for name in ("one", "two", "micro"):
        for stage, result in torch.load(tmp_path / name, weights_only=True).items():
            assert result["loss"] == pytest.approx(reference["loss"], rel=1e-6), (name, stage)
            assert result["gradients"].keys() == reference["gradients"].keys()
            for parameter, gradient in result["gradients"].items():
                torch.testing.assert_close(
                    gradient,
                    reference["gradients"][parameter],
                    rtol=1e-4,
                    atol=1e-6,
                    msg=lambda m, w=(name, stage, parameter): f"{w}: {m}",
                )


@pytest.fixture(scope="module")
def runs_of_two(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At each ZeRO stage a run in one go (``wholeN``) and one that crashed (``partsN``), on 2 ranks."""
    folder = tmp_path_factory.mktemp("two")
    config = folder / "tiny.yaml"
    config.write_text(TINY_SETTINGS.format(run=folder / "run", shards=scene_shards))
    launch(2, "tests.ranks.resume", str(config), str(folder), timeout=280)
    return folder


def test_resume_is_exact_at_every_zero_stage(runs_of_two: Path) -> None:
    """20 steps == 10 + crash + 10, bit for bit: losses, parameters, EMA and the next batch."""
    report = json.loads((runs_of_two / "report.json").read_text())
    assert set(report) == {"0", "1", "2", "3"}
    for stage, result in report.items():
        assert result["resumed_at"] == 10, stage
        assert result["different"] == [], stage
        assert result["tensors"] > 60
        assert result["losses_equal"] and result["num_losses"] == 20, stage


def goes_on_in(ranks: int, folder: Path, cases: dict[str, tuple[Path, int, int, str]], out: Path) -> None:
    """Each case (source, step it stands at, step to go to, settings) in a world of ``ranks``: losses and samples."""
    words = [f"{name}={source}:{at}:{to}:{more}" for name, (source, at, to, more) in cases.items()]
    launch(ranks, "tests.ranks.relayout", str(folder / "tiny.yaml"), str(out), *words, timeout=400)
    expected = losses(folder / "whole0")
    averages = load_file(folder / "whole0" / "checkpoints" / "step_00000020" / "ema.safetensors")
    for name, result in json.loads((out / f"report{ranks}.json").read_text()).items():
        _, at, to, more = cases[name]
        tolerance = 2e-2 if "bf16" in name else 1e-6
        assert result["started_at"] == at and result["aside"] == [], name
        assert result["losses"] == pytest.approx(expected[:to], rel=tolerance), name
        assert result["positions"] == list(range(16 * at, 16 * to)), name
        saved = out / name / "checkpoints" / f"step_{to:08d}"
        assert checkpoint.damage(saved) is None
        if "stage=3" in more:  # whole again (DeepSpeed #7546)
            kinds = ("model_states", "optim_states")
            assert [len(list(saved.glob(f"*zero_pp_rank_*_{kind}.pt"))) for kind in kinds] == [ranks, ranks], name
        if to == 20:
            got = load_file(saved / "ema.safetensors")
            off = sum((got[key] - averages[key]).square().sum() for key in averages)
            assert off < 1e-8 * sum(value.square().sum() for value in averages.values()), name


@pytest.mark.timeout(900)
def test_another_world_size_and_stage_continue(runs_of_two: Path, tmp_path: Path) -> None:
    """2 -> 1 -> 2 and 2 -> 4 ranks at each ZeRO stage, and stages changed on the way: losses of the unbroken run."""

    def zero(stage: int) -> str:
        return f"training.zero_stage={stage}"

    pairs = [(0, 0), (1, 1), (2, 2), (3, 3), (0, 3), (3, 2), (1, 0)]
    one = {f"{a}to{b}": (runs_of_two / f"whole{a}", 10, 12, zero(b)) for a, b in pairs}
    goes_on_in(1, runs_of_two, one, tmp_path)
    two = {f"back{n}": (tmp_path / f"{n}to{n}", 12, 20 if n % 2 else 14, zero(n)) for n in range(4)}
    bf16 = "training.precision=bf16"
    two |= {"bf16_2": (runs_of_two / "whole2", 10, 12, f"{zero(2)}:{bf16}")}
    two |= {"bf16_1": (tmp_path / "bf16_2", 12, 14, f"{zero(1)}:{bf16}")}
    two |= {"bf16_0": (tmp_path / "bf16_1", 14, 16, f"{zero(0)}:{bf16}")}
    two |= {"from_bf16": (tmp_path / "bf16_0", 16, 18, zero(3))}
    goes_on_in(2, runs_of_two, two, tmp_path)
    goes_on_in(4, runs_of_two, {f"four{n}": (runs_of_two / f"whole{n}", 10, 12, zero(n)) for n in range(4)}, tmp_path)
