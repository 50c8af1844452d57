"""RunDir: every path of a run, and its append-only metrics.

In: the folder a run was given. Out: paths, and ``metrics.jsonl`` lines. The one place that knows where things lie;
what they hold is their owners' business.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffcap_dist.config import Config, ConfigError, differences, load_config, save_config

# Settings that may change between two starts of one run: how long it goes on, how it looks up, how it is spread.
FREE_TO_CHANGE = frozenset(
    {"run_dir", "data.num_workers"}
    | {f"sampler.{k}" for k in ("name", "num_inference_steps", "guidance_scale", "time_difference", "eta")}
    | {f"sampler.{k}" for k in ("candidates", "remove_repeats", "seed")}
    | {f"training.{k}" for k in ("num_steps", "micro_batch_size", "zero_stage", "precision", "log_every")}
    | {f"training.{k}" for k in ("validate_every", "validation_images", "save_every", "keep_last", "stall_seconds")}
    | {"training.evaluate_every"}
)


class RunDir:
    """Paths under one run's folder; nothing is created before it is needed."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.checkpoints = self.root / "checkpoints"
        self.tokenizer = self.root / "tokenizer"
        self.export = self.root / "export"
        self.predictions = self.root / "predictions"
        self.scores = self.root / "scores.json"
        self.evaluations = self.root / "evaluations"
        self.report = self.root / "report.html"
        self.logs = self.root / "logs"
        self.jobs = self.root / "jobs.jsonl"
        self.snapshots = self.root / "snapshots"

    def begin(self, config: Config) -> None:
        """Write ``config.yaml``, or check that the run already here is of the same config.

        Raises ConfigError listing the settings that differ.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        if self.config.exists():
            changed = differences(load_config(self.config), config, FREE_TO_CHANGE)
            if changed:
                raise ConfigError(
                    f"{self.root} holds a run of another config: " + "; ".join(changed) + ". "
                    "Choose another run_dir, or give back the old values to continue it."
                )
        save_config(config, self.config)

    def evaluation(self, step: int) -> RunDir:
        """Of one step on the way: a small run directory, its captioner there until it is scored."""
        return RunDir(self.evaluations / f"step_{step:08d}")

    def waiting_evaluations(self) -> list[RunDir]:
        """Steps whose captioner is complete and waits to be scored, oldest first."""
        found = self.evaluations.glob("step_*/export/model.safetensors")  # the last file of an export
        return [RunDir(file.parents[1]) for file in sorted(found)]

    def load_config(self) -> Config:
        """The config of the run here. Raises ConfigError when there is none."""
        if not self.config.is_file():
            raise ConfigError(f"{self.root} is not a run directory (no config.yaml); train one with: diffcap train")
        return load_config(self.config)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl`` (rank 0 only). NaN is written as null: the file stays JSON."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self.metrics.open("ab+") as file:
            if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":  # a line that a kill cut short
                file.write(b"\n")
            file.write(json.dumps(clean).encode() + b"\n")

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """All records, oldest first; a line cut short by a kill is passed over."""
        if not self.metrics.exists():
            return
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue
