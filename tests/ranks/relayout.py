"""Run by ranks: continue copies of runs in this world, up to a step; rank 0 writes what happened.

Words: CONFIG OUT, then NAME=SOURCE:FROM_STEP:TO_STEP:SETTING... for each case: SOURCE's checkpoint goes on in OUT/NAME.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from diffcap_dist.config import load_config
from diffcap_dist.train import Trainer
from diffcap_dist.training import checkpoint, distributed
from tests.ranks.resume import losses


def copy_up_to(source: Path, run: Path, step: int) -> None:
    shutil.copytree(source, run)
    for path in checkpoint.complete_checkpoints(run / "checkpoints"):
        if int(path.name.removeprefix(checkpoint.PREFIX)) > step:
            shutil.rmtree(path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines if r["step"] <= step))


def train_up_to(trainer: Trainer, last_step: int) -> list[int]:
    """Train, stop as after a signal; this rank's positions in the global batches."""
    positions: list[int] = []
    step, draws = trainer._step, trainer._draws

    def noting(batch: Any, number: int) -> Any:
        positions.extend(map(int, batch.positions))
        return draws(batch, number)

    def stopping(batches: Any) -> Any:
        if trainer.state.step == last_step - 1:
            trainer.stop.requested = "the test"
        return step(batches)

    trainer._step, trainer._draws = stopping, noting  # type: ignore[method-assign]
    trainer.train()
    return positions


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    config_path, out, *cases = words
    ranks = distributed.init_ranks()
    report = {}
    for case in cases:
        name, told = case.split("=", 1)
        source, from_step, to_step, *settings = told.split(":")
        run = Path(out) / name
        if ranks.is_first:
            copy_up_to(Path(source), run, int(from_step))
        distributed.barrier()
        trainer = Trainer(load_config(Path(config_path), [f"run_dir={run}", *settings]), ranks)
        started_at = trainer.state.step
        positions = distributed.gather(train_up_to(trainer, int(to_step)))
        report[name] = {
            "started_at": started_at,
            "positions": sorted(position for some in positions for position in some),
            "losses": losses(run),
            "aside": [path.name for path in (run / "checkpoints").iterdir() if "tmp" in path.name],
        }
    if ranks.is_first:
        (Path(out) / f"report{ranks.world_size}.json").write_text(json.dumps(report))
    distributed.finish()


if __name__ == "__main__":
    main()
