"""The whole demo, small: every stage by its real command, on two ranks; and again, where nothing is left to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import rank_environment

pytestmark = pytest.mark.slow

SMALL = ["training.num_steps=6", "training.validate_every=6", "training.validation_images=8", "sampler.candidates=1"]


def test_the_demo_in_small(tmp_path: Path) -> None:
    out = tmp_path / "a demo"  # a space in the path
    command = [sys.executable, "-m", "diffcap_dist", "demo", "--out", str(out), "--train", "200", "--clip-steps", "5"]
    first = subprocess.run([*command, *SMALL], capture_output=True, text=True, env=rank_environment(), timeout=280)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-6000:]
    scores = json.loads((out / "scores.json").read_text())
    keys = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider_d", "rouge_l", "scene_accuracy", "scene_all_true")
    for row in (scores, scores["floor"], scores["human"]):
        assert all(0 <= row[key] <= 10 for key in keys)
    assert scores["num_inference_steps"] == 10 and scores["world_size"] == 2 and scores["photos"] == 100
    stages = json.loads((out / "stages.json").read_text())
    assert list(stages) == ["scenes", "clip", "features", "train", "evaluate", "report"]
    assert scores["seconds"] == pytest.approx(sum(stages.values()) - stages["report"], abs=0.1)
    assert "MISSED" in first.stdout  # six steps reach no goal, and the demo says so
    assert str((out / "report.html").resolve()) in first.stdout
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 24

    second = subprocess.run([*command, *SMALL], capture_output=True, text=True, env=rank_environment(), timeout=60)
    assert second.returncode == 0 and second.stdout.count("done before") == 6
    assert json.loads((out / "scores.json").read_text()) == scores
