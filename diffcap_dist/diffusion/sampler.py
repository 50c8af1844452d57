"""Samplers: from noise to a caption, each a pure function of a denoising function.

Continuous diffusion: ``denoise(x_BLD, t, previous_x0_BLD) -> hat x0_BLD`` with t a float in (0, 1], and x_T, give the
last hat x0_BLD; ``on_step(step, t, x0_hat_BLD)`` sees every estimate on the way (the report draws them emerging with
it). Masked diffusion: ``predict(ids_BL, masked_BL, t) -> logits_TV``, of the T positions that are masked, row by row,
gives ids_BL. Nothing here knows of images, embeddings or guidance: those live in the function passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffcap_dist.diffusion.schedule import NoiseSchedule

Denoise = Callable[[Tensor, float, Tensor | None], Tensor]
OnStep = Callable[[int, float, Tensor], None]
Noise = Callable[[int], Tensor]
Predict = Callable[[Tensor, Tensor, float], Tensor]

SURE = 0.9  # of a word's probability; 0.7 to 0.99 make no difference that is more than one of seeds


def ddim(
    denoise: Denoise,
    x_BLD: Tensor,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    time_difference: float = 0.0,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (Song et al. 2020, arXiv:2010.02502, eq. 12 and 16) on a uniform grid of times from 1 to 0, or spread as the
    schedule says.

    ``eta`` 0 is deterministic, 1 is the ancestral DDPM sampler; with eta > 0, ``noise(step)`` gives the fresh Gaussian
    noise_BLD of a step. ``time_difference`` tells the denoiser min(1, t + difference): asymmetric time intervals
    (Chen et al. 2022, arXiv:2208.04202, section 3.3).
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}; at least 1 is needed")
    if eta > 0 and noise is None:
        raise ValueError(f"eta is {eta}: a source of fresh noise is needed")
    x0_BLD = None
    times = schedule.spread(torch.linspace(1.0, 0.0, num_inference_steps + 1, dtype=torch.float64))
    alpha_bars = schedule.alpha_bar(times).tolist()
    for step in range(num_inference_steps):
        t, alpha_bar, next_alpha_bar = times[step].item(), alpha_bars[step], alpha_bars[step + 1]
        x0_BLD = denoise(x_BLD, min(1.0, t + time_difference), x0_BLD)
        if on_step is not None:
            on_step(step, t, x0_BLD)
        noise_BLD = (x_BLD - alpha_bar**0.5 * x0_BLD) / (1 - alpha_bar) ** 0.5
        variance = eta**2 * (1 - next_alpha_bar) / (1 - alpha_bar) * (1 - alpha_bar / next_alpha_bar)
        variance = min(max(0.0, variance), 1 - next_alpha_bar)
        x_BLD = next_alpha_bar**0.5 * x0_BLD + (1 - next_alpha_bar - variance) ** 0.5 * noise_BLD
        if variance > 0 and noise is not None:
            x_BLD = x_BLD + variance**0.5 * noise(step)
    assert x0_BLD is not None
    return x0_BLD


def x0_feedback(denoise: Denoise, x_BLD: Tensor, num_inference_steps: int, *, on_step: OnStep | None = None) -> Tensor:
    """The paper's inference: hat x0 is fed straight back as the next input, without noise (section 5).

    The published denoiser has no time input; one that has is told t = 1 - step / steps.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}; at least 1 is needed")
    for step in range(num_inference_steps):
        t = 1.0 - step / num_inference_steps
        x_BLD = denoise(x_BLD, t, None)
        if on_step is not None:
            on_step(step, t, x_BLD)
    return x_BLD


def unmask(
    predict: Predict,
    ids_BL: Tensor,
    open_BL: Tensor,
    mask_id: int,
    num_inference_steps: int,
    *,
    revise: bool = True,
    choice: Noise | None = None,
    on_step: Callable[[int, float, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Absorbing-state diffusion backwards: all ``open_BL`` positions begin as ``mask_id``; each step writes words there
    and leaves those of least confidence masked, as many of each row as ``words_to_write`` leaves. It ends early where
    every row has fewer words than there are steps.

    ``revise``: words written earlier can be masked again (mask-predict: Ghazvininejad et al. 2019, arXiv:1904.09324);
    else a word stays once it has stayed (MaskGIT: Chang et al. 2022, arXiv:2202.04200). ``choice(step)`` is added to
    the log-probabilities before the best is taken (Gumbel noise makes that a draw); confidence is the word's own
    probability. ``on_step(step, t, ids_BL, confidence_BL)`` sees whole drafts. Positions that are not open keep their
    ids.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}; at least 1 is needed")
    masked_BL = open_BL
    confidence_BL = torch.ones(ids_BL.shape, device=ids_BL.device)
    for step in range(num_inference_steps):
        if not masked_BL.any():
            break
        t = 1.0 - step / num_inference_steps
        logits_TV = predict(ids_BL.masked_fill(masked_BL, mask_id), masked_BL, t).float()
        drawn_T = (logits_TV if choice is None else logits_TV + choice(step)[masked_BL]).argmax(-1)
        ids_BL = ids_BL.masked_scatter(masked_BL, drawn_T)
        if step == num_inference_steps - 1 and on_step is None:
            break  # nobody asks how sure they are
        drawn_logits_T = logits_TV.gather(-1, drawn_T[:, None])[:, 0]
        confidence_BL = confidence_BL.masked_scatter(masked_BL, (drawn_logits_T - logits_TV.logsumexp(-1)).exp())
        if on_step is not None:
            on_step(step, t, ids_BL, confidence_BL)
        masked_B1, sure_B1 = (
            some_BL.sum(-1, keepdim=True) for some_BL in (masked_BL, masked_BL & (confidence_BL > SURE))
        )
        left_B1 = masked_B1 - words_to_write(masked_B1, sure_B1, num_inference_steps - step)
        can_go_BL = open_BL if revise else masked_BL
        rank_BL = confidence_BL.masked_fill(~can_go_BL, math.inf).argsort(dim=-1, stable=True).argsort(-1)
        masked_BL = can_go_BL & (rank_BL < left_B1)
    return ids_BL


def words_to_write(masked: Tensor, sure: Tensor, steps_left: int) -> Tensor:
    """How many of the ``masked`` words of a row a step writes: one, or all that are ``sure`` as long as a word is left
    for each of the steps to come, or what it takes to be done in time.

    Two words of one step don't see each other. So where there are more words than steps, these wait for words that can
    hardly be others, and else for the last steps, which see most.
    """
    at_least = (masked // steps_left).clamp(min=1)
    at_most = (masked - steps_left + 1).clamp(min=1)
    return sure.maximum(at_least).minimum(at_most).minimum(masked)
