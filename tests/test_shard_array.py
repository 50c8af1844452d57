"""The job array of make-shards, with submitit's local executor: real processes, one dataset."""

import subprocess
import sys
from pathlib import Path

import pytest

from shards.make_shards import main
from tests.test_image_encoder import saved_clip
from tests.test_writer import contents

ARRAY = Path(__file__).resolve().parents[1] / "launch" / "shard_array.py"
SCENES = ["scenes", "--train", "90", "--val", "10", "--test", "10", "--samples-per-shard", "20", "--workers", "1"]


def array(folder: Path, tasks: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ARRAY), "--tasks", str(tasks), "--cluster", "local", "--logs", str(folder / "logs")]
    return subprocess.run([*command, "--", *words], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_an_array_makes_the_dataset_of_one_process(tmp_path: Path) -> None:
    assert main([*SCENES, "--out", str(tmp_path / "one")]) == 0
    done = array(tmp_path, 3, *SCENES, "--out", str(tmp_path / "many"))
    assert done.returncode == 0, done.stderr
    assert "3 tasks, job" in done.stdout and "7 shards" in done.stdout
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    again = array(tmp_path, 2, *SCENES, "--out", str(tmp_path / "many"))
    assert again.returncode == 0 and contents(tmp_path / "one") == contents(tmp_path / "many")
    saved_clip("resnet", tmp_path / "clip")
    words = ["--encoder", str(tmp_path / "clip"), "--workers", "1"]
    assert main(["features", str(tmp_path / "one"), *words]) == 0
    done = array(tmp_path, 2, "features", str(tmp_path / "many"), *words)
    assert done.returncode == 0 and "the last registers all" in done.stdout, done.stdout + done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.slow
def test_a_task_that_fails_is_shown(tmp_path: Path) -> None:
    done = array(tmp_path, 2, *SCENES, "--out", str(tmp_path / "out"), "--image-size", "3")
    assert done.returncode == 1 and "image_size >= 16" in done.stderr and "tasks that failed: 0, 1" in done.stdout
