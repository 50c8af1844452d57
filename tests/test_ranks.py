"""Two real ranks through the real deepspeed launcher: the whole road, pixels, damage, the paper's recipe."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffcap_dist import __main__ as diffcap
from diffcap_dist.data.shard_format import MemberIndex
from diffcap_dist.data.stream import read_captions
from diffcap_dist.run_dir import RunDir
from diffcap_dist.training import checkpoint
from shards import make_shards
from tests.conftest import free_port, launch, launch_command, rank_environment
from tests.test_image_encoder import saved_clip

pytestmark = pytest.mark.slow


def test_the_road_end_to_end(
    tiny_config: Path, scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train on 2 ranks, evaluate on 2 and on 1: the same captions and, as floats, the same scores; then the report."""
    run = RunDir(tmp_path / "run")
    launch(2, "diffcap_dist.train", str(tiny_config))
    launch(2, "diffcap_dist.evaluate", str(run.root))
    two = json.loads(run.scores.read_text())
    captions = (run.predictions / "test.jsonl").read_bytes()
    assert diffcap.main(["evaluate", str(run.root), "--batch-size", "5", "--retrieval"]) == 0
    one = json.loads(run.scores.read_text())
    assert (run.predictions / "test.jsonl").read_bytes() == captions
    assert (two["world_size"], one["world_size"]) == (2, 1)
    for name in ("bleu_1", "bleu_4", "cider_d", "rouge_l", "scene_accuracy", "floor", "human", "gap_closed"):
        assert one[name] == two[name], name
    assert one["photos"] == len(captions.splitlines()) == 12
    assert set(one["retrieval"]) == {"nearest neighbour", "consensus of 30"}
    assert one["human"]["scene_accuracy"] == 1.0
    assert diffcap.main(["report", str(run.root)]) == 0
    assert run.report.stat().st_size > 10_000
    teacher = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    drawing = ["--best-of", "2", "--temperature", "1", "sampler.eta=1"]
    assert diffcap.main(["distill", str(run.root), "--out", str(teacher[0]), *drawing]) == 0
    launch(2, "diffcap_dist.distill", str(run.root), "--out", str(teacher[1]), *drawing)
    assert teacher[0].read_bytes() == teacher[1].read_bytes()
    assert len(read_captions(teacher[0])) == 64
    more = tmp_path / "more"
    between = ["between", str(scene_shards), "--features", "oracle", "--count", "9", "--workers", "1"]
    assert make_shards.main([*between, "--out", str(more)]) == 0
    distill = ["distill", str(run.root), "--out", str(tmp_path / "mix.jsonl")]
    assert diffcap.main([*distill, f"data.train=[{{shards: {scene_shards}}}, {{shards: {more}}}]"]) == 0
    assert len(read_captions(tmp_path / "mix.jsonl")) == 64 + 9
    shutil.copytree(more, tmp_path / "again")
    assert diffcap.main([*distill, f"data.train=[{{shards: {more}}}, {{shards: {tmp_path / 'again'}}}]"]) == 2
    assert f"{more} and {tmp_path / 'again'} both have a photo between-0-00000000" in capsys.readouterr().err
    records = list(run.read_metrics())
    validations = [r for r in records if r["kind"] == "validation"]
    assert [r["step"] for r in validations] == [10, 20]
    best = max(validations, key=lambda r: (r["bleu_4"], -r["val_loss"]))  # BLEU-4 is 0 at both: the loss decides
    assert one["step"] == best["step"] == int((run.checkpoints / "best").read_text().removeprefix("step_"))
    assert any(run.tensorboard.iterdir())
    # torchrun goes on with what deepspeed's launcher began.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command = [*torchrun, str(free_port()), "-m", "diffcap_dist.train", str(tiny_config), "training.num_steps=22"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=rank_environment())
    assert done.returncode == 0 and "continued at step 20" in done.stderr and "over 2 ranks" in done.stderr, done.stderr
    assert checkpoint.complete_checkpoints(run.checkpoints)[-1].name == "step_00000022"


def test_bad_runs_say_why(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message, exit status 2 and no traceback; once more from the shell."""
    cases = {
        "data.features=none": "none",
        "data.val_split=nowhere": "nowhere",
        "data.shards=/no/such/folder": "/no/such/folder does not exist",
        "training.global_batch_size=15 training.micro_batch_size=4": "does not divide",
        "encoder.patches=true": "patch tokens",
    }
    for number, (words, message) in enumerate(cases.items()):
        command = ["train", str(tiny_config), f"run_dir={tmp_path / str(number)}", *words.split()]
        status, said = diffcap.main(command), capsys.readouterr().err
        assert status == 2 and message in said and "Traceback" not in said, (words, said[-2000:])
    shell = [sys.executable, "-m", "diffcap_dist", *command]
    done = subprocess.run(shell, capture_output=True, text=True, env=rank_environment())
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]


def test_the_encoder_online_its_features_and_picture_files(
    tiny_config: Path, tmp_path: Path, scene_shards: Path
) -> None:
    """Pixels through the frozen encoder train as its stored features do; the export captions files."""
    clip, other = tmp_path / "clip", tmp_path / "other"
    saved_clip("vit", clip)
    saved_clip("vit", other)
    shards = tmp_path / "shards"
    shutil.copytree(scene_shards, shards)
    assert make_shards.main(["features", str(shards), "--encoder", str(clip), "--patches"]) == 0
    train = [sys.executable, "-m", "diffcap_dist", "train", str(tiny_config), f"data.shards={shards}"]
    train += [f"encoder.name={clip}", "encoder.patches=true", "training.num_steps=4", "training.validate_every=4"]
    runs = {"online": "", "stored": "clip"}
    for name, features in runs.items():
        words = [f"run_dir={tmp_path / name}", f"data.features={features}"]
        subprocess.run([*train, *words], check=True, env=rank_environment(), capture_output=True)
    losses = {n: [r["loss"] for r in RunDir(tmp_path / n).read_metrics() if r["kind"] == "training"] for n in runs}
    assert losses["online"] == pytest.approx(losses["stored"], rel=2e-3)  # stored features are fp16
    wrong = [*train, f"run_dir={tmp_path / 'wrong'}", "data.features=clip", f"encoder.name={other}"]
    done = subprocess.run(wrong, env=rank_environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "data.features=clip were made by encoder" in done.stderr

    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    caption = [sys.executable, "-m", "diffcap_dist", "caption", "--run", str(tmp_path / "stored" / "export")]
    words = [str(tmp_path / "red.png"), "--steps", "2", "--candidates", "2", "--json"]
    done = subprocess.run([*caption, *words], check=True, env=rank_environment(), capture_output=True, text=True)
    assert [row["picture"] for row in json.loads(done.stdout)] == [str(tmp_path / "red.png")]


def test_damage_is_replaced_counted_and_bounded(tiny_config: Path, scene_shards: Path, tmp_path: Path) -> None:
    """One flipped byte: with ``replace`` two ranks train on, and say it; above the bound both end with the list."""
    shutil.copytree(scene_shards, tmp_path / "shards")
    tar = tmp_path / "shards" / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    members = MemberIndex.load(tar)
    key = str(members.keys[3])
    content[int(members.offset[3, members.suffixes.tolist().index("json")]) + 5] ^= 1
    tar.write_bytes(content)
    words = [f"data.shards={tmp_path / 'shards'}", "training.num_steps=8", "data.damage=replace"]
    done = launch(2, "diffcap_dist.train", str(tiny_config), *words, "data.max_bad_fraction=0.02")
    assert f"train-000000/{key}" in done.stdout + done.stderr
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("step_*8/state.json")).read_text())
    assert state["bad_samples"] == {f"train-000000/{key}": 1}
    logged = [line for line in RunDir(tmp_path / "run").read_metrics() if line["kind"] == "damage"]
    assert len(logged) == 2 and "crc32" in logged[0]["found"]  # two epochs of 64
    command = launch_command(2, "diffcap_dist.train", str(tiny_config), *words, f"run_dir={tmp_path / 'strict'}")
    failed = subprocess.run(command, capture_output=True, text=True, timeout=240, env=rank_environment())
    assert failed.returncode != 0 and "1 of 64 training samples are damaged" in failed.stdout + failed.stderr


PAPERS = """
diffusion.kind=continuous model.length_head=false
data.begin_token=true model.x0_from=head model.embedding_std=0.05 model.position_init_std=0.02
model.normalize_features=false model.mask_padding=true model.time_embedding=false model.self_conditioning=false
model.text_token=true diffusion.noise_scale=1 diffusion.timesteps_per_caption=5 diffusion.timesteps=shared
diffusion.shared_noise=true diffusion.restore_loss=l1 diffusion.restore_weight=1 diffusion.first_step_weight=1
diffusion.rounding_weight=0.3 diffusion.dynamic_rounding=1 diffusion.loss_reduction=series_sum_sample_mean
diffusion.text_guidance=0.3 diffusion.image_drop_rate=0 diffusion.self_conditioning_rate=0
optimizer.schedule=constant optimizer.warmup_steps=0 optimizer.max_grad_norm=0 optimizer.hold_steps=4
training.ema_decay=0 training.export=last training.validate_every=6 training.save_every=6
sampler.name=x0_feedback sampler.num_inference_steps=5 sampler.remove_repeats=true
"""


def test_the_papers_recipe_trains_resumes_and_stops_early(
    tiny_config: Path, scene_shards: Path, tmp_path: Path
) -> None:
    """Every choice of the paper in one run: 12 steps == 6 + 6 with lambda in the state; then its early stop."""
    clip, shards = tmp_path / "clip", tmp_path / "shards"
    saved_clip("vit", clip)
    shutil.copytree(scene_shards, shards)
    assert make_shards.main(["features", str(shards), "--encoder", str(clip)]) == 0
    words = [*PAPERS.split(), f"data.shards={shards}", "data.features=clip", f"encoder.name={clip}"]

    def train(name: str, *more: str) -> tuple[dict, str]:
        command = [
            sys.executable,
            "-m",
            "diffcap_dist",
            "train",
            str(tiny_config),
            *words,
            f"run_dir={tmp_path / name}",
        ]
        done = subprocess.run([*command, *more], capture_output=True, text=True, env=rank_environment())
        assert done.returncode == 0, done.stderr[-3000:]
        newest = max((tmp_path / name / "checkpoints").glob("step_*"))
        state = json.loads((newest / "state.json").read_text())
        return {**state, "seconds": 0, "weights": load_file(newest / "ema.safetensors")}, done.stderr

    whole, _ = train("whole", "training.num_steps=12")
    train("parts", "training.num_steps=6")
    parts, _ = train("parts", "training.num_steps=12")
    expected, got = whole.pop("weights"), parts.pop("weights")
    assert whole == parts and whole["step"] == 12 and 0 < whole["rounding_weight"] != 0.3
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert any(name.startswith("network.head.") for name in expected)

    stop = ["diffusion.dynamic_rounding=0", "training.num_steps=1000", "training.early_stop_ratio=1e-6"]
    stopped, said = train("stopped", *stop)
    assert stopped["step"] == 6 and stopped["early_stopped"] and "early stop at step 6" in said
    about = json.loads((tmp_path / "stopped" / "export" / "about.json").read_text())
    assert about["step"] == 6
    again, said = train("stopped", *stop)
    assert again["step"] == 6 and "nothing to do" in said
