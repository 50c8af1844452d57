"""The noise schedule, alpha_bar, and the timesteps a training batch draws (item 8; cosine of Nichol and Dhariwal).

One time axis everywhere: t = 0, 1, ..., T, with alpha_bar[0] = 1 (no noise). The audit settles it: t = 0 is drawn and
clean, and the "x_1" of the code has alpha_bar 0.99996, which is alpha_bar[1] here. DDPM's array, whose first entry
already holds noise, is ``alpha_bar[1:]``.
"""

from __future__ import annotations

import math

import torch

OFFSET = 0.008


def alpha_bar_closed(num_steps: int = 1000, offset: float = OFFSET) -> torch.Tensor:
    """alpha_bar(t) = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) * pi/2); (T + 1,) float64.

    Divided by f(0): without it alpha_bar(1) would be 0.99980, not the audit's 0.99996.
    """
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    f = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return f / f[0]


def alpha_bar_product(num_steps: int = 1000, offset: float = OFFSET, max_beta: float = 0.999) -> torch.Tensor:
    """Section 3.1: alpha_bar(t) = prod_{s<=t} (1 - beta_s), beta_s from the closed form, clipped; (T + 1,) float64.

    At T = 1000 only beta_1000 is clipped (beta_999 is 0.75): alpha_bar(1000) is 2.4e-9 here and 3.7e-33 in the closed
    form; at every other t the two are equal up to rounding (alpha_bar(999) is 2.4e-6).
    """
    closed = alpha_bar_closed(num_steps, offset)
    beta = (1 - closed[1:] / closed[:-1]).clamp(max=max_beta)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])


def draw_timesteps_shared(
    num_drawn: int, batch_size: int, num_steps: int = 1000, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The code (item 8): the same K timesteps, with replacement, for all captions; t_KB in 0..T-1.

    Assumption: T possible values from 0 on, so T itself (pure noise) is never drawn.
    """
    t_K = torch.randint(0, num_steps, (num_drawn,), generator=generator)
    return t_K[:, None].expand(num_drawn, batch_size)


def draw_timesteps_per_caption(
    num_drawn: int, batch_size: int, num_steps: int = 1000, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The paper (section 5): "a subset of 100 x_t ... of the total 1000", for each caption its own; t_KB in 1..T.

    Assumption: a subset has no element twice, and its elements are the paper's x_1..x_T.
    """
    columns = [torch.randperm(num_steps, generator=generator)[:num_drawn] + 1 for _ in range(batch_size)]
    return torch.stack(columns, dim=1)
