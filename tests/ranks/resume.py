"""Run by ranks: at each ZeRO stage, 20 steps in one go, and 10 + a crash + the rest; rank 0 writes what differed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from diffcap_dist.config import load_config
from diffcap_dist.train import Trainer
from diffcap_dist.training import distributed
from diffcap_dist.training.engine import full_state

CRASH_AT = 13  # three steps past the checkpoint of step 10


class Crash(RuntimeError):
    pass


def crashing(trainer: Trainer) -> None:
    step = trainer._step

    def until_the_crash(batches):  # type: ignore[no-untyped-def]
        if trainer.state.step == CRASH_AT:
            raise Crash
        return step(batches)

    trainer._step = until_the_crash  # type: ignore[method-assign]


def final_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = full_state(trainer.engine.module)
    with trainer.ema.swapped():
        state |= {f"ema {name}": value for name, value in full_state(trainer.engine.module).items()}
    trainer.stream.load_state_dict({"samples_seen": trainer.state.samples_seen})
    batch = next(iter(trainer.stream))
    return state | {"next positions": torch.tensor(batch.positions), "next ids": batch.ids_NCL}


def losses(run: Path) -> list[float]:
    by_step = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "training":
            by_step[record["step"]] = record["loss"]
    return [by_step[step] for step in sorted(by_step)]


def main() -> None:
    config_path, out = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    ranks = distributed.init_ranks()
    report = {}
    for stage in (0, 1, 2, 3):

        def trainer(name: str, stage: int = stage) -> Trainer:
            words = [f"training.zero_stage={stage}", f"run_dir={out}/{name}{stage}"]
            return Trainer(load_config(Path(config_path), words), ranks)

        whole = trainer("whole")
        whole.train()
        first = trainer("parts")
        crashing(first)
        try:
            first.train()
            raise AssertionError("the crash did not happen")
        except Crash:
            pass
        second = trainer("parts")
        resumed_at = second.state.step
        second.train()
        a, b = final_state(whole), final_state(second)
        report[stage] = {
            "resumed_at": resumed_at,
            "different": [name for name in a if not torch.equal(a[name], b[name])],
            "tensors": len(a),
            "losses_equal": losses(Path(f"{out}/whole{stage}")) == losses(Path(f"{out}/parts{stage}")),
            "num_losses": len(losses(Path(f"{out}/whole{stage}"))),
        }
    if ranks.is_first:
        (Path(out) / "report.json").write_text(json.dumps(report))
    distributed.finish()


if __name__ == "__main__":
    main()
