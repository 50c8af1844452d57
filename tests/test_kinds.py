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
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    load_captioner(RunDir(two).export)
