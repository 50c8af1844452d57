"""Run by ranks: one backward at each ZeRO stage by the real engine; rank 0 writes the whole gradients and the loss."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from diffcap_dist.config import load_config
from diffcap_dist.train import Trainer
from diffcap_dist.training import distributed


def main() -> None:
    config_path, out, *settings = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    ranks = distributed.init_ranks()
    results = {}
    for stage in (0, 1, 2, 3):
        words = [f"training.zero_stage={stage}", f"run_dir={out}_run{stage}", *settings]
        trainer = Trainer(load_config(Path(config_path), words), ranks)
        trainer.engine.train()
        losses = []
        batches = iter(trainer.stream)
        for _ in range(trainer.split.accumulation):
            batch = next(batches)
            terms = trainer.engine(batch.ids_NCL, trainer._features(batch), trainer._draws(batch, 0))
            trainer.engine.backward(terms["loss"])
            losses.append(terms["loss"].item())
            if len(losses) < trainer.split.accumulation:
                trainer.engine.step()
        gradients = {n: safe_get_full_grad(p) for n, p in trainer.engine.module.named_parameters() if p.requires_grad}
        results[stage] = {
            "loss": distributed.mean([sum(losses) / len(losses)], ranks.device)[0],
            "gradients": {n: g.clone() for n, g in gradients.items() if g is not None},
        }
    if ranks.is_first:
        torch.save(results, out)
    distributed.finish()


if __name__ == "__main__":
    main()
