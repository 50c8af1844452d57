"""Two real ranks through the real deepspeed launcher: gradients, resume, the whole road, signals and crashes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
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
from tests.conftest import TINY_SETTINGS, free_port, launch, launch_command, rank_environment
from tests.ranks.failing import NAN_AT, STALL_AT, STALL_SECONDS
from tests.ranks.resume import losses
from tests.test_image_encoder import saved_clip

pytestmark = pytest.mark.slow

SHARED_MEMORY = Path("/dev/shm")


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


def test_the_road_end_to_end(tiny_config: Path, tmp_path: Path) -> None:
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


def test_sigkill_then_the_same_command_continues_exactly(tiny_config: Path, tmp_path: Path) -> None:
    """Rank 0 dies past step 10: the other names it and ends; started again, the weights equal an unbroken run's."""
    left = set(SHARED_MEMORY.glob("deepspeed*"))
    launch(2, "diffcap_dist.train", str(tiny_config), f"run_dir={tmp_path / 'whole'}")
    broken = RunDir(tmp_path / "broken")
    command = launch_command(2, "diffcap_dist.train", str(tiny_config), f"run_dir={broken.root}")
    process = subprocess.Popen(
        command, env=rank_environment(), start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: any(r["step"] >= 12 for r in broken.read_metrics()), process)
    killed = process_of_rank(0, tiny_config, broken.root)
    os.kill(killed, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and f"rank 1 lost rank 0 (process {killed})" in errors, errors[-4000:]
    assert subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout == ""
    launch(2, "diffcap_dist.train", str(tiny_config), f"run_dir={broken.root}")
    whole = RunDir(tmp_path / "whole")
    ema = "checkpoints/step_00000020/ema.safetensors"
    expected, got = load_file(whole.root / ema), load_file(broken.root / ema)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    starts = [r["step"] for r in broken.read_metrics() if r["kind"] == "start"]
    assert starts == [0, 10]
    assert set(SHARED_MEMORY.glob("deepspeed*")) <= left, "memory that stays taken after the run"


def process_of_rank(rank: int, *words: object) -> int:
    pattern = ".*".join([f"local_rank={rank}", *map(str, words)])
    return int(subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()[0])


def test_a_loss_that_is_not_finite_and_a_step_that_never_ends(tiny_config: Path, tmp_path: Path) -> None:
    """Both ranks stop at the same step, the keys written down; a stalled rank ends all, its stack on screen."""
    command = launch_command(2, "tests.ranks.failing", str(tiny_config), str(tmp_path))
    failed = subprocess.run(command, capture_output=True, text=True, timeout=240, env=rank_environment())
    ended = time.time()
    (first_said, _), (second_said, keys) = json.loads((tmp_path / "nan.json").read_text())
    run = RunDir(tmp_path / "nan")
    last = list(run.read_metrics())[-1]
    assert first_said == second_said and f"at step {NAN_AT} on rank 1;" in first_said and str(run.metrics) in first_said
    assert (
        last["kind"] == "not_finite" and last["step"] == NAN_AT and last["keys"] == {"rank 1": keys} and len(keys) == 8
    )
    assert checkpoint._newest_complete(run.checkpoints) == "step_00000010"

    assert failed.returncode != 0 and "in sleep_of_rank_one" in failed.stderr, failed.stderr[-4000:]
    for rank in (0, 1):
        assert f"rank {rank} of 2 made no step for {STALL_SECONDS} s after step {STALL_AT}" in failed.stderr
    assert ended - float((tmp_path / "stalled_at").read_text()) < STALL_SECONDS + 10


def test_sigterm_to_one_rank_saves_on_all(tiny_config: Path, tmp_path: Path) -> None:
    """The flag of one rank reaches the others at the step boundary: a checkpoint at once, and exit status 0."""
    run = RunDir(tmp_path / "run")
    words = ["training.num_steps=100000", "training.validate_every=100000", "training.save_every=100000"]
    command = launch_command(2, "diffcap_dist.train", str(tiny_config), *words)
    process = subprocess.Popen(command, env=rank_environment(), start_new_session=True, stderr=subprocess.DEVNULL)
    wait_until(lambda: any(r["step"] >= 5 for r in run.read_metrics()), process)
    os.kill(process_of_rank(1, tiny_config), signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    saved = [p.name for p in run.checkpoints.iterdir() if p.name.startswith("step_")]
    assert len(saved) == 1 and not saved[0].endswith(".tmp")


def test_ctrl_c_saves_and_takes_the_loader_workers_along(tiny_config: Path, tmp_path: Path) -> None:
    """A terminal's SIGINT reaches the run and its workers alike: saved, exit status 0, no traceback, nobody left."""
    run = RunDir(tmp_path / "run")
    words = ["training.num_steps=100000", "training.validate_every=100000", "data.num_workers=2"]
    command = [sys.executable, "-m", "diffcap_dist", "train", str(tiny_config), *words]
    process = subprocess.Popen(
        command, env=rank_environment(), start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: any(r["step"] >= 5 for r in run.read_metrics()), process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGINT" in errors and "Traceback" not in errors, errors[-2000:]
    assert len(list(run.checkpoints.glob("step_*"))) == 1
    assert subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout == ""


def wait_until(condition, process: subprocess.Popen, timeout: float = 120) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"the run ended early with status {process.returncode}"
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.05)


def test_bad_runs_say_why(tiny_config: Path, tmp_path: Path, scene_shards: Path) -> None:
    """One process, the real command: the message, exit status 2 and no traceback."""
    cases = {
        "data.features=none": "none",
        "data.val_split=nowhere": "nowhere",
        "data.shards=/no/such/folder": "/no/such/folder does not exist",
        "training.global_batch_size=15 training.micro_batch_size=4": "does not divide",
        "encoder.patches=true": "patch tokens",
    }
    for number, (words, message) in enumerate(cases.items()):
        command = [sys.executable, "-m", "diffcap_dist", "train", str(tiny_config), f"run_dir={tmp_path / str(number)}"]
        done = subprocess.run([*command, *words.split()], capture_output=True, text=True, env=rank_environment())
        assert done.returncode == 2, (words, done.stderr[-2000:])
        assert message in done.stderr and "Traceback" not in done.stderr, (words, done.stderr[-2000:])


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
