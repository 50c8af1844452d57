"""The forward process: x_t from x_0 and noise, and the three things a model may be asked to restore from it."""

from __future__ import annotations

import torch


def scaled(factor_KB: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Factor times x, one factor per caption and timestep; x_KBLD.

    Factors stay float64 until here: in float32 1 - alpha_bar(1) = 4.1e-5 would be wrong in its third digit.
    """
    return factor_KB.to(x.dtype)[..., None, None] * x


def noised_code(
    x_BLD: torch.Tensor, noise_KBLD: torch.Tensor, t_KB: torch.Tensor, alpha_bar: torch.Tensor
) -> torch.Tensor:
    """Item 8: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps; x_KBLD.

    The noise broadcasts: (1, B, L, D) is the code's one tensor for all K timesteps of a caption.
    """
    a_KB = alpha_bar[t_KB]
    return scaled(a_KB.sqrt(), x_BLD) + scaled((1 - a_KB).sqrt(), noise_KBLD)


def noised_paper(
    x_BLD: torch.Tensor, noise_KBLD: torch.Tensor, t_KB: torch.Tensor, alpha_bar: torch.Tensor
) -> torch.Tensor:
    """Section 3.1, as printed: x_t = sqrt(alpha_bar_t) x_0 + (1 - alpha_bar_t) eps; x_KBLD.

    The print also draws the root over x_0, which is negative half the time; read as sqrt(alpha_bar_t) * x_0.
    """
    a_KB = alpha_bar[t_KB]
    return scaled(a_KB.sqrt(), x_BLD) + scaled(1 - a_KB, noise_KBLD)


def draw_noise(
    num_drawn: int,
    shape_BLD: tuple[int, int, int],
    *,
    shared_over_timesteps: bool,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Item 8: one tensor per caption for all its timesteps, (1, B, L, D); the paper: its own each, (K, B, L, D)."""
    return torch.randn(1 if shared_over_timesteps else num_drawn, *shape_BLD, generator=generator)


def target_earlier(
    x_BLD: torch.Tensor, noise_KBLD: torch.Tensor, t_KB: torch.Tensor, alpha_bar: torch.Tensor, n: int = 100
) -> torch.Tensor:
    """Section 5.4: x_{max(t - n, 0)}, so that t <= n asks for x_0; x_KBLD.

    Assumptions: n counts steps of the T, not of the K drawn; the earlier point has the same eps as x_t (one path, as
    in the code's shared noise) and the code's scale of noise.
    """
    return noised_code(x_BLD, noise_KBLD, (t_KB - n).clamp(min=0), alpha_bar)


def target_posterior_mean(
    x_BLD: torch.Tensor, x_t_KBLD: torch.Tensor, t_KB: torch.Tensor, alpha_bar: torch.Tensor
) -> torch.Tensor:
    """Equation 4's mu_hat(x_t, x_0), the mean of q(x_{t-1} | x_t, x_0), for t >= 1 (DDPM, equation 7); x_KBLD.

    At t = 1 it is x_0 itself, which is why the x_1 term below restores x_0. The paper's models do not use it
    otherwise: section 5 predicts x_0 "directly".
    """
    a_KB, before_KB = alpha_bar[t_KB], alpha_bar[t_KB - 1]
    alpha_KB = a_KB / before_KB
    of_x_0_KB = before_KB.sqrt() * (1 - alpha_KB) / (1 - a_KB)
    of_x_t_KB = alpha_KB.sqrt() * (1 - before_KB) / (1 - a_KB)
    return scaled(of_x_0_KB, x_BLD) + scaled(of_x_t_KB, x_t_KBLD)
