"""The noise schedule: how much of the signal is left at time t.

In: times t in [0, 1] (t = step / T of the papers). Out: ``alpha_bar(t)``, the share of the variance of x_t that is
signal, and ``add_noise``, the closed form of q(x_t | x_0). Pure functions of tensors; no randomness, no model.

``noise_scale`` b says how many times louder the noise is than the plain schedule: x_t is proportional to
sqrt(alpha_bar) x_0 + b sqrt(1 - alpha_bar) eps. Renormalised to unit variance this is the same schedule with its
log signal-to-noise ratio moved by -2 log b (Chen 2023, arXiv:2301.10972; Hoogeboom et al. 2023, arXiv:2301.11093),
so every sampler below stays as it is. Word embeddings need it: in D dimensions two words are sqrt(2 D) apart, and
plain noise hides which word it was only in the last few percent of the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

COSINE_OFFSET = 0.008  # s of Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17
SQRT_OFFSET = 1e-4  # s of Li et al. 2022 (Diffusion-LM, arXiv:2205.14217), appendix A

ScheduleName = Literal["cosine", "sqrt"]


@dataclass(frozen=True)
class NoiseSchedule:
    """``alpha_bar`` as a function of t in [0, 1]; ``noise_scale`` >= some small positive number, 1 = as published."""

    name: ScheduleName = "cosine"
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.noise_scale <= 0:
            raise ValueError(f"diffusion.noise_scale is {self.noise_scale}; it must be positive (1 = as published)")
        if self.name not in ("cosine", "sqrt"):
            raise ValueError(f"diffusion.schedule is {self.name!r}; known schedules: cosine, sqrt")

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Share of signal variance at t (any shape, values in [0, 1]); falls from about 1 to about 0."""
        if self.name == "cosine":
            angle = (t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2
            start = math.cos(COSINE_OFFSET / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
            plain = torch.cos(angle) ** 2 / start
        else:
            plain = 1 - torch.sqrt(t + SQRT_OFFSET)
        plain = plain.clamp(1e-12, 1.0)
        return plain / (plain + self.noise_scale**2 * (1 - plain))

    def add_noise(self, x0_BLD: Tensor, noise_BLD: Tensor, t_B: Tensor, as_printed: bool = False) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020, eq. 4).

        ``as_printed``: (1 - alpha_bar) eps, as section 3.1 of CLIP-Diffusion-LM has it and its code has not.
        """
        if x0_BLD.shape != noise_BLD.shape or t_B.shape != x0_BLD.shape[:1]:
            raise ValueError(
                f"expected x0 and noise of one shape (B, L, D) and t of shape (B,); got {tuple(x0_BLD.shape)}, "
                f"{tuple(noise_BLD.shape)}, {tuple(t_B.shape)}"
            )
        alpha_bar_B = self.alpha_bar(t_B.double())  # in single precision 1 - alpha_bar(1/T) is off in its third digit
        of_noise_B = 1 - alpha_bar_B if as_printed else (1 - alpha_bar_B).sqrt()
        signal_B11, noise_B11 = (factor_B.float()[:, None, None] for factor_B in (alpha_bar_B.sqrt(), of_noise_B))
        return (signal_B11 * x0_BLD + noise_B11 * noise_BLD).to(x0_BLD.dtype)
