"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from diffcap_dist.config import OptimizerConfig


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """The rate of optimizer step ``step`` (0 .. num_steps - 1).

    Linear warm-up to ``learning_rate``, then constant, or linear / log / log_steps / cosine down to
    ``final_learning_rate`` at the last step. The paper's "log" (section 5.2) is not defined: ``log`` is straight in the
    logarithm of the rate, ``log_steps`` falls with the logarithm of the step, "significantly more rapidly". With
    ``hold_steps`` all this counts in blocks of so many steps: epochs, in the paper.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    start, end = config.learning_rate, config.final_learning_rate
    block = (step - config.warmup_steps) // config.hold_steps
    last = max(1, -(-(num_steps - config.warmup_steps) // config.hold_steps) - 1)
    done = min(1.0, block / last)
    if config.schedule == "linear":
        return start + (end - start) * done
    if config.schedule == "log":
        return math.exp(math.log(start) + (math.log(end) - math.log(start)) * done)
    if config.schedule == "log_steps":
        return start + (end - start) * math.log1p(block) / math.log1p(last)
    if config.schedule == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
    return start
