"""Ablations: a table of changes as rows, and what the finished cells say that each change is worth."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from diffcap_dist import ablate
from diffcap_dist.config import ConfigError, differences, load_config
from diffcap_dist.run_dir import RunDir
from diffcap_dist.sweep_dir import START, Overlay, added_row, cell_config, left_out_row, load_table
from tests.test_sweep import finish, planned

OURS = Path(__file__).resolve().parents[1] / "configs" / "diffcap"
TABLE = """
title: "from <one> to the other"
base: tiny.yaml
seeds: [0, 1]
changes:
  - {name: wide, settings: {model: {width: 64}}, why: "more room"}
  - {name: dropout, settings: {model: {dropout: 0.5}}}
  - {name: Gaussian, settings: {diffusion: {kind: continuous}}}
rows:
  - {name: the control, settings: {model: {kind: autoregressive}}}
"""
BLEU = {
    START: (0.10, 0.12),
    "+ wide": (0.20, 0.22),
    "+ dropout": (0.21, 0.21),
    "+ Gaussian": (0.40, 0.42),
    "all but wide": (0.30, 0.30),
    "the control": (0.5, 0.5),
}


@pytest.fixture
def table(tiny_config: Path) -> Path:
    path = tiny_config.parent / "table.yaml"
    path.write_text(TABLE)
    return path


def test_changes_become_rows(table: Path) -> None:
    """Each on top of those before it, then all but one; all but the last is the row before the last."""
    _, cells = planned(table, "--seeds", "0")
    told = {c.row.name: (c.config.model.width, c.config.model.dropout, c.config.diffusion.kind) for c in cells}
    assert told == {
        START: (32, 0.0, "masked"),
        "+ wide": (64, 0.0, "masked"),
        "+ dropout": (64, 0.5, "masked"),
        "+ Gaussian": (64, 0.5, "continuous"),
        "all but wide": (32, 0.5, "continuous"),
        "all but dropout": (64, 0.0, "continuous"),
        "the control": (32, 0.0, "masked"),
    }
    changes = load_table(table).changes
    assert (
        left_out_row(changes, changes[-1]) == added_row(changes[1]) and left_out_row(changes[:1], changes[0]) == START
    )


def test_gains_and_losses(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, cells = planned(table)
    for cell in cells:
        if cell.row.name in BLEU:
            finish(cell, bleu_4=BLEU[cell.row.name][cell.seed], cider_d=1.0)
            speed = 50.0 if cell.row.name == "+ wide" else 100.0
            cell.run.log({"kind": "start", "step": 0, "commit": f"a1b2c3{cell.seed}"})
            cell.run.log({"kind": "training", "step": 1, "samples_per_second": None})
            cell.run.log({"kind": "training", "step": 2, "samples_per_second": speed})
    out = folder.root / "result"
    assert ablate.main([str(folder.root), "--out", str(out)]) == 0
    result = json.loads((out / "ablation.json").read_text())
    wide, dropout, gaussian = result["changes"]
    assert wide["gain"]["bleu_4"][0] == pytest.approx(0.10) and dropout["gain"]["bleu_4"][0] == pytest.approx(0.0)
    # Two seeds each, 0.02 apart: the pooled deviation is sqrt(0.0002), and t with two degrees of freedom 4.30.
    assert wide["gain"]["bleu_4"][1] == pytest.approx(4.30 * 0.0002**0.5)
    assert wide["loss"]["bleu_4"][0] == pytest.approx(0.11) and gaussian["loss"]["bleu_4"][0] == pytest.approx(0.20)
    assert dropout["loss"]["bleu_4"] is None and "scene_accuracy" not in wide["added"]
    text = (out / "ablation.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    rows = {name: cells for name, *cells in lines}
    assert rows["+ wide"] == ["0.210 ± 0.014", "1.000 ± 0.000", "+0.100 ± 0.061", "+0.110 ± 0.043", "2.00"]
    assert "- by commits: a1b2c30, a1b2c31, not recorded\n" in text  # what trained them; `finish` scores without one
    assert rows["+ dropout"][3] == "" and rows["the control"][0] == "0.500 ± 0.000" and "- wide: more room" in text
    drawn = ElementTree.fromstring((out / "ablation.svg").read_text())
    assert len(drawn.findall(".//{*}circle")) == 14  # a dot for each seed; twice where a recipe is in both panels
    assert text in capsys.readouterr().out


def test_of_an_unfinished_sweep_the_rest_is_blank(table: Path) -> None:
    folder, cells = planned(table, "--seeds", "0")
    finish(next(cell for cell in cells if cell.row.name == "+ wide"), bleu_4=0.25)
    assert ablate.main([str(folder.root)]) == 0
    rows = [line.split("|")[1:-1] for line in (folder.root / "ablation.md").read_text().splitlines() if "|" in line]
    assert [cell.strip() for cell in rows[0]] == [
        "recipe",
        "BLEU-4",
        "gain in BLEU-4",
        "lost without it",
        "a photo's cost",
    ]
    assert [[cell.strip() for cell in row] for row in rows[2:4]] == [
        [START, *[""] * 4],
        ["+ wide", "0.250", "", "", ""],
    ]


@pytest.mark.parametrize("name", ["ablation_scenes", "ablation_flickr8k"])
def test_our_own_tables(name: str, tmp_path: Path) -> None:
    """Every cell is a sound config; the last recipe is the one that stands beside the table."""
    path = OURS / f"{name}.yaml"
    table = load_table(path)
    settings = {row.name: cell_config(path, table, row, 0, RunDir(tmp_path / "x"), Overlay()) for row in table.rows}
    recipe = OURS / {"ablation_scenes": "scenes_ours.yaml", "ablation_flickr8k": "flickr8k_features.yaml"}[name]
    last = settings[added_row(table.changes[-1])]
    differing = {line.split(":")[0] for line in differences(last, load_config(recipe, [f"run_dir={tmp_path / 'x'}"]))}
    unused = {"sampler.name", "sampler.eta", "diffusion.self_conditioning_rate", "diffusion.restore_loss"}
    # A row of its own: recipes with Gaussian noise can't be shifted.
    unused |= {"model.shifted", "model.time_embedding"}
    told = {"training.log_every", "training.validate_every", "training.validation_images", "training.save_every"}
    assert differing <= unused | told | {"training.export", "training.zero_stage", "training.keep_last"}, differing


def test_what_is_no_ablation(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no sweep\.json there"):
        ablate.main([str(tmp_path / "nothing")])
    table.write_text(TABLE.split("changes:")[0] + "rows:\n  - {name: one}\n")
    with pytest.raises(ConfigError, match="no ablation"):
        ablate.main([str(planned(table)[0].root)])
