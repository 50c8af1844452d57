"""Run by ranks: on rank 1 a loss that is not finite, then a step that never ends."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from diffcap_dist.config import load_config
from diffcap_dist.train import NonFiniteLoss, Trainer
from diffcap_dist.training import distributed

NAN_AT, STALL_AT, STALL_SECONDS = 13, 3, 4


def main() -> None:
    config_path, out = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    ranks = distributed.init_ranks()

    def trainer(name: str, *words: str) -> Trainer:
        return Trainer(load_config(Path(config_path), [f"run_dir={out}/{name}", *words]), ranks)

    first = trainer("nan")
    step, keys = first._step, []

    def spoiled(batches: Any) -> Any:
        terms, *rest = step(batches)
        if first.state.step == NAN_AT - 1:
            keys.extend(first.step_keys)
            if ranks.rank == 1:
                terms["loss"] = math.nan
        return terms, *rest

    first._step = spoiled  # type: ignore[method-assign]
    try:
        first.train()
    except NonFiniteLoss as error:
        said = distributed.gather([str(error), keys])
    if ranks.is_first:
        Path(out, "nan.json").write_text(json.dumps(said))

    second = trainer("stall", f"training.stall_seconds={STALL_SECONDS}")
    going = second._step

    def stalling(batches: Any) -> Any:
        if second.state.step == STALL_AT and ranks.rank == 1:
            Path(out, "stalled_at").write_text(str(time.time()))
            sleep_of_rank_one()
        return going(batches)

    second._step = stalling  # type: ignore[method-assign]
    second.train()


def sleep_of_rank_one() -> None:
    time.sleep(600)


if __name__ == "__main__":
    main()
