"""The noise schedule: how much of the signal is left at time t.

In: times t in [0, 1] (t = step / T of the papers). Out: ``alpha_bar(t)``, the share of the variance of x_t that is
signal, and ``add_noise``, the closed form of q(x_t | x_0). Pure functions of tensors; no randomness, no model.

``noise_scale`` b says how many times louder the noise is than the plain schedule: x_t is proportional to
sqrt(alpha_bar) x_0 + b sqrt(1 - alpha_bar) eps. Renormalised to unit variance this is the same schedule with its
log signal-to-noise ratio moved by -2 log b (Chen 2023, arXiv:2301.10972; Hoogeboom et al. 2023, arXiv:2301.11093),
so every sampler below stays as it is. Word embeddings need it: in D dimensions two words are sqrt(2 D) apart, and
plain noise hides which word it was only in the last few percent of the steps.

``knots`` say where on the schedule training and sampling go: ``spread`` takes even times to those where the loss rises
evenly, which ``knots_of_losses`` finds (time warping: Dieleman et al. 2022, arXiv:2211.15089; the same idea in
SeqDiffuSeq: Yuan et al. 2022, arXiv:2212.10325).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffcap_dist.config import DiffusionConfig

COSINE_OFFSET = 0.008  # s of Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17
SQRT_OFFSET = 1e-4  # s of Li et al. 2022 (Diffusion-LM, arXiv:2205.14217), appendix A

EVEN_SHARE = 0.1  # of the times that are spread evenly whatever the losses: no part of the schedule is left out

ScheduleName = Literal["cosine", "sqrt"]


@dataclass(frozen=True)
class NoiseSchedule:
    """``alpha_bar`` as a function of t in [0, 1]; ``noise_scale`` >= some small positive number, 1 = as published.

    ``knots``: the times that the even times 0, 1/n, ..., 1 are spread to, none earlier than the one before it.
    """

    name: ScheduleName = "cosine"
    noise_scale: float = 1.0
    knots: tuple[float, ...] = ()

    @classmethod
    def of(cls, config: DiffusionConfig) -> NoiseSchedule:
        return cls(config.schedule, config.noise_scale, tuple(config.schedule_knots))

    def __post_init__(self) -> None:
        if self.noise_scale <= 0:
            raise ValueError(f"diffusion.noise_scale is {self.noise_scale}; it must be positive (1 = as published)")
        if self.name not in ("cosine", "sqrt"):
            raise ValueError(f"diffusion.schedule is {self.name!r}; known schedules: cosine, sqrt")
        rises = all(early <= late for early, late in zip(self.knots, self.knots[1:]))
        if self.knots and (len(self.knots) < 2 or self.knots[0] != 0 or self.knots[-1] != 1 or not rises):
            raise ValueError(f"diffusion.schedule_knots is {list(self.knots)}; they must rise from 0 to 1")

    def spread(self, t: Tensor) -> Tensor:
        """Even times in [0, 1] (any shape) -> the times of this schedule to go through, linear between the knots."""
        if not self.knots:
            return t
        knots_K = torch.tensor(self.knots, dtype=t.dtype, device=t.device)
        place = t * (len(self.knots) - 1)
        below = place.floor().clamp(0, len(self.knots) - 2).long()
        return torch.lerp(knots_K[below], knots_K[below + 1], place - below)

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


def knots_of_losses(losses: Sequence[float]) -> list[float]:
    """From the losses at the even times 0, 1/n, ..., 1 the knots between which the loss rises by equal amounts.

    A loss below an earlier one counts as that one. ``EVEN_SHARE`` of the times stay even. Raises ValueError where a
    loss is not finite.
    """
    if len(losses) < 2 or not np.isfinite(losses).all():
        raise ValueError(f"the losses by time are {list(losses)}; expected two or more finite ones")
    even_K = np.linspace(0, 1, len(losses))
    risen_K = np.maximum.accumulate(losses) - losses[0]
    share_K = risen_K / risen_K[-1] if risen_K[-1] > 0 else even_K
    times = np.interp(even_K, (1 - EVEN_SHARE) * share_K + EVEN_SHARE * even_K, even_K)
    return [0.0, *times[1:-1].tolist(), 1.0]
