"""The frontier: all kinds beside each other, scored as `diffcap evaluate` scores them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

import diffcap_dist.__main__ as diffcap
from diffcap_dist.config import load_config
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.stream import ShardReader, all_records
from diffcap_dist.diffusion.objective import build_network
from diffcap_dist.evaluation.captioner import export_captioner
from diffcap_dist.evaluation.trained_run import code_commit
from diffcap_dist.frontier import as_svg
from diffcap_dist.run_dir import RunDir

KINDS = {
    "continuous": ["diffusion.kind=continuous"],
    "masked": [],
    "control": ["model.kind=autoregressive"],
}


@pytest.fixture
def runs(tiny_config: Path, tmp_path: Path) -> list[Path]:
    """A run of each kind, untrained."""
    found = []
    for name, words in KINDS.items():
        run = RunDir(tmp_path / name)
        config = load_config(tiny_config, [*words, f"run_dir={run.root}"])
        run.begin(config)
        records = all_records(ShardReader(config.data.shards, "train", config.data.features))
        tokenizer = CaptionTokenizer.from_captions(c for _, record in records for c in record["captions"])
        network = build_network(config, tokenizer.vocab_size, (24, None))
        about = {"step": 0, "feature_widths": [24, None], "features": "oracle", "encoder_sha256": None}
        export_captioner(run.export, network.state_dict(), network, config, tokenizer, about)
        found.append(run.root)
    return found


def test_all_kinds_beside_each_other(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--out", str(out), "--steps", "1,2", "--photos", "12", "--rounds", "2", "--batch-size", "5"]
    assert diffcap.main(["frontier", *map(str, runs), *words]) == 0
    result = json.loads((out / "frontier.json").read_text())
    points = result["points"]
    assert [(p["run"], p["num_inference_steps"]) for p in points] == [
        *(("continuous", steps) for _ in range(4) for steps in (1, 2)),
        *(("masked", steps) for _ in range(2) for steps in (1, 2)),
        *(("control", None) for _ in range(2)),
    ]
    assert all(len(p["seconds"]) == 2 and min(p["seconds"]) > 0 for p in points)
    assert result["photos"] == 12 and result["precision"] == "fp32"
    assert result["commit"] is None or f"commit {result['commit']}." in (out / "frontier.md").read_text()
    said = capsys.readouterr().out
    assert said.count("\n| ") == len(points)
    assert (out / "frontier.md").read_text() in said
    drawn = ElementTree.fromstring((out / "frontier.svg").read_text())
    assert len(drawn.findall(".//{*}circle")) == 12 + 14  # the control has no steps
    assert diffcap.main(["evaluate", str(runs[1]), "sampler.num_inference_steps=2", "--no-clip-score"]) == 0
    scores = json.loads(RunDir(runs[1]).scores.read_text())
    same = next(p for p in points if p["sampler"] == "unmasking" and p["num_inference_steps"] == 2)
    assert {name: same[name] for name in ("bleu_4", "cider_d", "scene_accuracy")} == {
        name: scores[name] for name in ("bleu_4", "cider_d", "scene_accuracy")
    }
    assert diffcap.main(["frontier", str(runs[1]), *words[:-4], "--rounds", "1", "sampler.precision=bf16"]) == 0
    assert ", bf16; medians" in (out / "frontier.md").read_text()
    assert diffcap.main(["frontier", str(runs[2]), "sampler.compile=true", *words[:-4], "--rounds", "1"]) == 0
    assert "compiled" not in (out / "frontier.md").read_text()  # the control has nothing to compile


@pytest.mark.parametrize(
    ("words", "said"),
    [(["sampler.num_inference_steps=3"], "tries, or keeps alike"), (["sampler.precision=bf16"], "no run directory")],
)
def test_words_that_make_no_frontier(
    words: list[str], said: str, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words, *([str(runs[0])] if "no run" not in said else [])]
    with pytest.raises(SystemExit):
        diffcap.main(["frontier", *given, "--out", "x"])
    assert said in capsys.readouterr().err


def test_runs_of_other_photos_are_refused(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = runs[1] / "export" / "config.yaml"
    config.write_text(config.read_text().replace("patches: false", "patches: true"))
    assert diffcap.main(["frontier", *map(str, runs), "--out", str(tmp_path / "out")]) == 2
    assert "see them differently" in capsys.readouterr().err


def test_more_curves_than_colours_are_told_apart() -> None:
    point = {"bleu_4": 0.1, "num_inference_steps": 1, "captions_per_second": 10.0}
    points = [{**point, "run": f"run {number}", "sampler": "unmasking"} for number in range(11)]
    drawn = ElementTree.fromstring(as_svg({"points": points}))
    keys = [group.get("class") for group in drawn.findall("{*}g") if group.find("{*}text") is not None]
    assert len(keys) == len(set(keys)) == 11


def test_the_commit_that_measures(tmp_path: Path) -> None:
    """With a + where code is changed, not where tables were written into docs/; none of code that is in no checkout."""
    code, table = tmp_path / "package" / "code.py", tmp_path / "docs" / "table.md"
    for file in (code, table):
        file.parent.mkdir()
        file.write_text("one")
    assert code_commit(code) is None

    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "m")
    commit = git("rev-parse", "--short", "HEAD").strip()
    table.write_text("two")
    assert code_commit(code) == commit
    code.write_text("two")
    assert code_commit(code) == f"{commit}+"
    unknown = code.with_name("unknown.py")
    unknown.write_text("")
    assert code_commit(unknown) is None
