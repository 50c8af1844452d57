"""Imports point down: layer n imports layers below n; commands never import commands (docs/design.md)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LAYERS = {
    0: ["config", "run_dir", "data.shard_format", "data.fetching", "data.photo", "data.pixels"],
    1: [
        "sweep_dir",
        "data.order", "data.captions", "data.augmentation", "data.shard_cache", "data.shard_store",
        "model.packed", "model.denoiser", "model.autoregressive", "model.image_encoder", "diffusion.schedule",
        "diffusion.length",
        "training.distributed", "training.ema", "training.learning_rate", "training.preemption",
        "evaluation.scores", "evaluation.protocol", "evaluation.scene_facts", "evaluation.text_statistics",
        "evaluation.clip_score",
    ],
    2: [
        "training.watchdog", "data.stream", "diffusion.objective", "diffusion.sampler", "training.engine",
        "training.contrastive",
        "evaluation.score_rows", "evaluation.reward",
    ],
    3: ["training.universal", "evaluation.captioner", "diffusion.reward"],
    4: ["training.checkpoint", "sweep_report", "evaluation.validation", "evaluation.seed_protocol"],
    5: ["evaluation.trained_run"],
    6: ["train", "evaluate", "caption", "distill", "frontier", "ablate", "report", "demo", "train_clip"],
    7: ["__main__"],
}  # fmt: skip
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
# protocol and text_statistics build on scores: all are pure functions over captions.
WITHIN_A_LAYER = {
    ("run_dir", "config"),
    ("data.pixels", "data.photo"),
    ("data.augmentation", "data.order"),
    ("data.shard_store", "data.shard_cache"),
    ("model.denoiser", "model.packed"),
    ("model.autoregressive", "model.packed"),
    ("model.autoregressive", "model.denoiser"),
    ("evaluation.protocol", "evaluation.scores"),
    ("evaluation.text_statistics", "evaluation.scores"),
}
DEEPSPEED_DOOR = {"training.engine"}


def modules() -> dict[str, Path]:
    package = ROOT / "diffcap_dist"
    files = [p for p in package.rglob("*.py") if p.name != "__init__.py"]
    return {".".join(p.relative_to(package).with_suffix("").parts): p for p in files}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_a_layer() -> None:
    assert set(modules()) == set(LAYER_OF)


def test_imports_point_down() -> None:
    wrong = []
    for name, path in modules().items():
        for target in imported(path):
            inner = target.removeprefix("diffcap_dist.")
            ours = inner != target and inner in LAYER_OF and inner != name
            if ours and (name, inner) not in WITHIN_A_LAYER and LAYER_OF[inner] >= LAYER_OF[name]:
                wrong.append(f"{name} (layer {LAYER_OF[name]}) imports {inner} (layer {LAYER_OF[inner]})")
    assert not wrong


def test_the_package_never_imports_shards_or_launch() -> None:
    wrong = {
        name for name, path in modules().items() for t in imported(path) if t.split(".")[0] in ("shards", "launch")
    }
    assert not wrong


def test_one_door_for_deepspeed() -> None:
    users = {name for name, path in modules().items() for t in imported(path) if t.split(".")[0] == "deepspeed"}
    assert users == DEEPSPEED_DOOR
