"""How long does the paper's study take here? A step of configs/paper/baseline.yaml, timed, times the steps of each row.

In: a device. Out: seconds and floating-point operations of a step (forward, backward, AdamW) at the paper's size: 8
captions x 100 timesteps, DistilBERT's body, 30,522 words, random weights. Then the hours of every row of every table.
Where 800 rows in a step are too many (a CPU), ``--timesteps`` takes fewer: the time is multiplied; the output says so.

    python -m benchmarks.paper_hours
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.train_step import hardware
from diffcap_dist.config import Config, load_config
from diffcap_dist.diffusion.objective import DiffusionObjective, Draws
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures
from diffcap_dist.run_dir import RunDir
from diffcap_dist.sweep_dir import Overlay, cell_config, load_table
from diffcap_dist.training.engine import choose_precision

PAPER = Path(__file__).resolve().parents[1] / "configs" / "paper"
TABLES = ("table1", "table2", "table3", "figure4", "table4", "section54")
NUM_WORDS, IMAGE_WIDTH = 30522, 512  # distilbert-base-uncased, CLIP ViT-B/32
A30_HOURS = 5.0  # of the baseline, as the paper reports


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--timesteps", type=int, help="of a caption, instead of the paper's 100 (CPU: 2)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = torch.device(args.device)
    config = load_config(PAPER / "baseline.yaml")
    wanted = config.diffusion.timesteps_per_caption
    used = args.timesteps or (wanted if device.type == "cuda" else 2)
    seconds, operations = step_cost(config, used, device, args.rounds)
    factor = wanted / used
    reckoned = "" if factor == 1 else f" (measured with {used} timesteps of {wanted}, times {factor:g})"
    print(
        f"a step: {seconds * factor:.3g} s{reckoned}, {operations * factor / 1e12:.2f} TFLOP, "
        f"{operations / seconds / 1e12:.3g} TFLOP/s; {hardware(device)}"
    )
    told = A30_HOURS * 3600 / config.training.num_steps
    print(f"the paper's {A30_HOURS:g} hours of an A30 for the baseline are {told:.3g} s a step")
    total = 0.0
    for name in TABLES:
        table = load_table(PAPER / f"{name}.yaml")
        print(f"\n{table.title}, {len(table.seeds)} seeds")
        for row in table.rows:
            config = cell_config(PAPER / f"{name}.yaml", table, row, 0, RunDir("-"), Overlay())
            steps = config.training.num_steps
            hours = steps * seconds * factor / 3600
            total += hours * len(table.seeds)
            print(f"  {row.name:<40} {steps:>7,} steps  {hours:>8.1f} h a seed")
    print(f"\nall tables, all seeds: {total:,.0f} hours on this device")
    return 0


def step_cost(config: Config, num_timesteps: int, device: torch.device, rounds: int) -> tuple[float, float]:
    """(median seconds, floating-point operations) of an optimizer step, without the input pipeline."""
    dtype, _ = choose_precision("auto", device)
    diffusion = dataclasses.replace(config.diffusion, timesteps_per_caption=num_timesteps)
    model = dataclasses.replace(config.model, embeddings="random", embedding_std=0.05)
    L, N = config.data.max_length, config.training.global_batch_size
    objective = DiffusionObjective(Denoiser(model, NUM_WORDS, L, (IMAGE_WIDTH, None)), diffusion, pad_id=0)
    objective.to(device, dtype)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-4)
    ids_NCL = torch.randint(NUM_WORDS, (N, 1, L), device=device)
    image = ImageFeatures(torch.randn(N, IMAGE_WIDTH, device=device, dtype=dtype))
    shape = (L, objective.network.embedding_dim)

    def step(number: int) -> None:
        draws = Draws.at(list(range(N)), 1, num_timesteps, shape, 0, number, diffusion, device)
        objective(ids_NCL, image, draws)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    with FlopCounterMode(display=False) as counter:
        step(0)  # the warm-up too
    seconds = []
    for number in range(1, rounds + 1):
        started = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), float(counter.get_total_flops())


if __name__ == "__main__":
    raise SystemExit(main())
