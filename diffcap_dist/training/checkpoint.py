"""Checkpoints: everything a run needs to continue exactly, complete on disk or not there.

In: the engine, the EMA and a ``TrainState``. Out: ``checkpoints/step_00001000/`` with DeepSpeed's files, the whole EMA
(safetensors), ``state.json`` and a ``manifest.json`` of sizes and checksums, written aside and renamed. ``load_latest``
takes the newest complete one and names those it passes over; one of another number of ranks, ZeRO stage or precision
is converted.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from diffcap_dist.data.shard_format import atomic_write, file_sha256
from diffcap_dist.training import distributed
from diffcap_dist.training.distributed import Ranks
from diffcap_dist.training.ema import EMA
from diffcap_dist.training.engine import full_state, piece_of
from diffcap_dist.training.universal import load_universal

log = logging.getLogger(__name__)

PREFIX = "step_"


@dataclass
class TrainState:
    """All that is neither parameter, optimizer state nor EMA. Global: the same on every rank, for any world size."""

    step: int = 0
    samples_seen: int = 0
    best_bleu_4: float = -1.0
    best_val_loss: float = 1e30  # decides between equal BLEU-4: early on, or on hard data, it is 0 for long
    best_step: int = -1
    rounding_weight: float = 0.0  # lambda of the next step, where it is dynamic
    loss_sum: float = 0.0  # training losses since the last validation, where the early stop compares them
    loss_steps: int = 0
    early_stopped: bool = False
    seconds: float = 0.0  # spent in training, over all starts
    schedule_knots: list[float] = field(default_factory=list)  # where the schedule is learned
    bad_samples: dict[str, int] = field(default_factory=dict)  # what was damaged, and how many samples that is


def save(engine: Any, ema: EMA, state: TrainState, folder: Path, ranks: Ranks, keep_last: int) -> Path:
    """Write ``folder/step_N``; all ranks enter. Afterwards only the newest ``keep_last`` and the best one are kept."""
    final = folder / f"{PREFIX}{state.step:08d}"
    aside = final.with_name(final.name + ".tmp")
    if ranks.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    distributed.barrier()
    engine.save_checkpoint(str(folder), tag=aside.name, save_latest=False)
    with ema.swapped():
        averages = full_state(engine.module)
    if ranks.is_first:
        trained = {name: averages[name] for name in ema.averages}
        save_file(trained, aside / "ema.safetensors")
        (aside / "state.json").write_text(json.dumps(asdict(state) | _layout(engine, ranks), indent=2))
    distributed.barrier()  # every rank's file is written
    if ranks.is_first:
        _seal(aside, final)
        _remove_old(folder, keep_last, state.best_step)
    distributed.barrier()
    return final


def load_latest(engine: Any, ema: EMA, folder: Path, ranks: Ranks) -> TrainState:
    """Continue from the newest complete checkpoint in ``folder``; a fresh TrainState when there is none."""
    found = distributed.from_first(_newest_complete(folder) if ranks.is_first else None)
    if ranks.is_first:
        _remove_leftovers(folder)
    if found is None:
        return TrainState()
    path = folder / found
    content = json.loads((path / "state.json").read_text())
    layout = _layout(engine, ranks)
    saved = {name: content.pop(name, layout[name]) for name in layout}
    differing = {name for name in layout if saved[name] != layout[name]}
    if layout["zero_stage"] == 0:
        differing.discard("world_size")  # its files are the same for any
    if differing:
        if ranks.is_first:
            log.info("%s is converted from %s to %s", path, _in_words(saved), _in_words(layout))
        load_universal(engine, path, saved["zero_stage"], ranks)
        engine.global_steps, engine.global_samples = content["step"], content["samples_seen"]
    else:
        loaded, _ = engine.load_checkpoint(str(folder), tag=found)
        if loaded is None:
            raise ValueError(f"DeepSpeed could not load {path} although its manifest is complete")
    averages = load_file(path / "ema.safetensors")
    parameters = dict(engine.module.named_parameters())
    with torch.no_grad():
        for name, piece in ema.averages.items():
            piece.copy_(piece_of(averages[name], parameters[name]))
    return TrainState(**content)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Renamed checkpoint folders, oldest first (their content is not checked)."""
    return sorted(p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and not p.name.endswith(".tmp"))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: each file of the manifest is there with its size and sha256."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        return f"manifest.json is missing or broken ({error})"
    for name, (size, sha256) in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, the manifest says {size}"
        if file_sha256(file) != sha256:
            return f"{name} does not have the checksum of the manifest"
    return None


def _layout(engine: Any, ranks: Ranks) -> dict[str, Any]:
    """What decides how DeepSpeed lays its files out."""
    dtype = str(next(engine.module.parameters()).dtype).removeprefix("torch.")
    return {"world_size": ranks.world_size, "zero_stage": engine.zero_optimization_stage(), "dtype": dtype}


def _in_words(layout: dict[str, Any]) -> str:
    return f"{layout['world_size']} ranks at ZeRO stage {layout['zero_stage']} in {layout['dtype']}"


def _newest_complete(folder: Path) -> str | None:
    for path in reversed(complete_checkpoints(folder)):
        found = damage(path)
        if found is None:
            return path.name
        log.warning("checkpoint %s is passed over: %s", path, found)
    return None


def _remove_leftovers(folder: Path) -> None:
    """What a killed save or conversion left aside."""
    for leftover in folder.glob("*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _seal(aside: Path, final: Path) -> None:
    """Checksums, fsync, then the rename that makes it a checkpoint."""
    files = sorted(p for p in aside.rglob("*") if p.is_file())
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    manifest = {str(p.relative_to(aside)): (p.stat().st_size, file_sha256(p)) for p in files}
    atomic_write(aside / "manifest.json", json.dumps(manifest, indent=1).encode())
    old = final.with_name(final.name + ".old.tmp")
    if final.exists():  # the same step, saved again by a run that continued from an older checkpoint
        final.rename(old)
    aside.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    atomic_write(final.parent / "latest", final.name.encode())


def _remove_old(folder: Path, keep_last: int, best_step: int) -> None:
    best = folder / f"{PREFIX}{best_step:08d}"
    for path in complete_checkpoints(folder)[: -max(1, keep_last)]:
        if path != best:
            shutil.rmtree(path)
    if best.exists():
        atomic_write(folder / "best", best.name.encode())
