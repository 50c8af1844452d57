"""Continuous diffusion and the control through the real trainer, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffcap_dist.evaluation.captioner import load_captioner
from diffcap_dist.run_dir import RunDir
from tests.conftest import launch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "kind",
    [
        ["model.kind=autoregressive", "sampler.num_beams=2"],
        [
            *("diffusion.kind=continuous", "model.length_head=false"),
            *("model.self_conditioning=true", "model.train_embeddings=true"),
        ],
    ],
    ids=["autoregressive", "continuous"],
)
def test_each_kind_is_the_same_on_one_rank_and_on_two_at_stage_3(
    kind: list[str], tiny_config: Path, tmp_path: Path
) -> None:
    """Losses of the steps, of validation, and its captions' scores."""
    words = [*kind, "training.num_steps=4", "training.validate_every=4"]
    found = []
    one, two = tmp_path / "one", tmp_path / "two"
    launch(1, "diffcap_dist.train", str(tiny_config), *words, "training.zero_stage=0", f"run_dir={one}")
    launch(2, "diffcap_dist.train", str(tiny_config), *words, "training.zero_stage=3", f"run_dir={two}")
    for run in (one, two):
        records = [r for r in RunDir(run).read_metrics() if r["kind"] in ("training", "validation")]
        found.append([r.get("val_loss", r.get("loss")) for r in records] + [records[-1]["cider_d"]])
        assert ("resultant_length" in records[-1]) == ("model.train_embeddings=true" in kind)
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    load_captioner(RunDir(two).export)


def test_a_learned_schedule_is_the_same_on_two_ranks_and_after_a_restart(tiny_config: Path, tmp_path: Path) -> None:
    words = ["diffusion.kind=continuous", "diffusion.learn_schedule=true", "training.validate_every=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(2, "diffcap_dist.train", str(tiny_config), *words, "training.num_steps=8", f"run_dir={whole}")
    for steps in (4, 8):
        launch(1, "diffcap_dist.train", str(tiny_config), *words, f"training.num_steps={steps}", f"run_dir={parts}")
    found = []
    for run in (whole, parts):
        records = list(RunDir(run).read_metrics())
        schedules = [record for record in records if record["kind"] == "schedule"]
        assert [record["step"] for record in schedules] == [2, 4, 6, 8]
        assert schedules[0]["knots"] != schedules[-1]["knots"]
        losses = [r["loss"] for r in records if r["kind"] == "training"]
        assert len(losses) == 8
        found.append([*losses, *(value for record in schedules for value in record["knots"] + record["losses"])])
        best = max((r for r in records if r["kind"] == "validation"), key=lambda r: (r["bleu_4"], -r["val_loss"]))
        exported = load_captioner(RunDir(run).export).schedule
        assert exported.knots == tuple(next(s["knots"] for s in schedules if s["step"] == best["step"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
