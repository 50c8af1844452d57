"""Settings: precedence, typos, wrong types; and the run directory that keeps them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffcap_dist.config import Config, ConfigError, load_config, save_config
from diffcap_dist.run_dir import RunDir
from diffcap_dist.sweep_dir import load_overlay, load_table

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: r\ndata: {shards: s}\ntraining: {num_steps: 7}\n")
    return path


def test_defaults_file_words(yaml: Path) -> None:
    config = load_config(yaml, ["training.num_steps=9", "optimizer.learning_rate=3e-4"])
    assert (config.training.num_steps, config.optimizer.learning_rate) == (9, 3e-4)
    assert load_config(yaml).training.num_steps == 7
    assert load_config(yaml, ["data.features="]).data.features == ""
    assert config.training.zero_stage == Config(run_dir="r").training.zero_stage


@pytest.mark.parametrize(
    "word, message",
    [
        ("training.num_step=3", "did you mean 'training.num_steps'"),
        ("trainin.num_steps=3", "unknown setting 'trainin'"),
        ("training.num_steps=many", "training.num_steps"),
        ("model.fusion=glue", "model.fusion"),
        ("training.zero_stage=4", "DeepSpeed knows 0, 1, 2 and 3"),
        ("model.num_heads=7", "not a multiple of model.num_heads=7"),
        ("diffusion.rounding_weight=0", "all loss weights are zero"),
        ("model.x0_from=body", "or diffusion.kind=continuous"),
        ("sampler.guidance_scale=2", "image_drop_rate > 0"),
        ("--fast", "is not a setting"),
    ],
)
def test_a_wrong_setting_is_named(yaml: Path, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(yaml, [word])


def test_missing_file_and_missing_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "c.yaml").write_text("data: {shards: s}\n")
    with pytest.raises(ConfigError, match="'run_dir' has no default"):
        load_config(tmp_path / "c.yaml")


def test_saved_config_is_the_same(yaml: Path, tmp_path: Path) -> None:
    config = load_config(yaml, ["model.dropout=0.1"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_every_config_of_the_repository_loads() -> None:
    files = sorted(CONFIGS.rglob("*.yaml"))
    files = [file for file in files if file.parent.name != "launch"]  # options of sites
    assert files
    for file in files:
        text = file.read_text()
        if "\nrows:" in text:
            load_table(file)
        elif "\nmultiply:" in text:
            load_overlay(file)
        else:
            load_config(file, ["run_dir=r", "data.shards=s"])


def test_a_run_of_another_config_is_refused(yaml: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.begin(load_config(yaml))
    run.begin(load_config(yaml, ["training.num_steps=99", "sampler.num_inference_steps=3"]))  # may change
    with pytest.raises(ConfigError, match=r"model.width: 768 -> 96"):
        run.begin(load_config(yaml, ["model.width=96"]))
    with pytest.raises(ConfigError, match="not a run directory"):
        RunDir(tmp_path / "nothing").load_config()


def test_metrics_survive_a_cut_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.log({"step": 1, "loss": float("nan")})
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "lo')  # a kill in the middle of a write
    run.log({"step": 3, "loss": 1.0})
    assert list(run.read_metrics()) == [{"step": 1, "loss": None}, {"step": 3, "loss": 1.0}]


@pytest.mark.parametrize("command", [["-m", "diffcap_dist", "--help"], ["-m", "shards.make_shards", "--help"]])
def test_help_answers_at_once(command: list[str]) -> None:
    """Heavy imports never happen for --help; measured against python itself, best of three."""

    def best(words: list[str]) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            times.append(time.perf_counter() - started)
        return min(times)

    assert best(command) < best(["-c", "pass"]) + 0.4
    code = f"import sys, runpy\nsys.argv = {command[1:]!r}\n"
    code += f"try: runpy.run_module({command[1]!r}, run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'deepspeed', 'open_clip', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    "words, message", [(["frobnicate"], "unknown verb"), ([], "usage"), (["train", "no.yaml"], "no such config file")]
)
def test_the_front_door(words: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, "-m", "diffcap_dist", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_base_is_read_first(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("run_dir: r\ndata: {shards: s, max_length: 7}\nseed: 3\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "middle.yaml").write_text("base: ../base.yaml\ndata: {max_length: 8}\n")
    (tmp_path / "top.yaml").write_text("base: deeper/middle.yaml\nseed: 4\n")
    config = load_config(tmp_path / "top.yaml", ["run_dir=other"])
    assert (config.run_dir, config.data.shards, config.data.max_length, config.seed) == ("other", "s", 8, 4)
    (tmp_path / "base.yaml").write_text("base: top.yaml\n")
    with pytest.raises(ConfigError, match="its own base"):
        load_config(tmp_path / "top.yaml")
    (tmp_path / "base.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no such config file: .*base\.yaml \(the base of .*middle\.yaml\)"):
        load_config(tmp_path / "top.yaml")
