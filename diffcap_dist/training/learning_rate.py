"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from diffcap_dist.config import OptimizerConfig


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """The rate of optimizer step ``step`` (0 .. num_steps - 1).

    Linear warm-up to ``learning_rate``, then constant, or linear / log / cosine down to ``final_learning_rate`` at the
    last step. ``log`` is straight in the logarithm: it falls fastest at first (section 5.2 of the paper).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    start, end = config.learning_rate, config.final_learning_rate
    done = min(1.0, (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps))
    if config.schedule == "linear":
        return start + (end - start) * done
    if config.schedule == "log":
        return math.exp(math.log(start) + (math.log(end) - math.log(start)) * done)
    if config.schedule == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
    return start
