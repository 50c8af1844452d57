"""The training loss (equations 4 and 5; items 7-9, 20): x_t term + x_1 term + lambda * rounding term.

Which reduction the code has can be read off the logged sizes. A model that knows nothing has a cross-entropy of
ln 30522 = 10.33 a word; times 16 words times lambda 0.3 that is 49.6, and the run that failed logs 51.5 (file 20). So
the rounding term is a sum over positions and a mean over captions and timesteps, logged after lambda (item 9).
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

from tests.reference.forward import Weights, denoise, denoise_guided, embed_words, word_logits
from tests.reference.noising import noised_code, noised_paper, target_earlier


@dataclasses.dataclass(frozen=True)
class Terms:
    """x_t and x_1 restoring terms and the rounding term before lambda, each a number."""

    x_t: torch.Tensor
    x_1: torch.Tensor
    rounding: torch.Tensor

    def simple(self) -> torch.Tensor:
        """L'_simple (section 3.1). The paper's tables print the x_t term alone under this name (item 9)."""
        return self.x_t + self.x_1

    def total(self, rounding_weight: float) -> torch.Tensor:
        """Equation 5."""
        return self.simple() + rounding_weight * self.rounding


def distance(predicted: torch.Tensor, target: torch.Tensor, norm: str = "l1") -> torch.Tensor:
    """Per element: |difference| (section 3.1, item 7) or its square (equation 4); same shape."""
    difference = predicted - target
    return {"l1": difference.abs, "l2_squared": difference.square}[norm]()


def restore_code(distance_KBLD: torch.Tensor) -> torch.Tensor:
    """Item 7, ``series_sum_sample_mean``: sum over positions, mean over timesteps, captions and channels.

    "Series" is the sequence, "sample" everything else: the logged 3.5-5.0 are 0.2-0.3 an element. PAD counts.
    """
    return distance_KBLD.sum(dim=-2).mean()


def restore_printed(distance_KBLD: torch.Tensor) -> torch.Tensor:
    """Equations 4 and 5: a sum over timesteps of the norm of an L x D matrix, in expectation (mean over captions)."""
    return distance_KBLD.sum(dim=(-2, -1)).mean(dim=-1).sum()


def cross_entropy(logits_NLV: torch.Tensor, ids_NL: torch.Tensor) -> torch.Tensor:
    """-log p(w_i | x_i) of each word, PAD included (item 7); ce_NL."""
    return functional.cross_entropy(logits_NLV.transpose(1, 2), ids_NL, reduction="none")


def rounding_code(ce_KBL: torch.Tensor) -> torch.Tensor:
    """Sum over positions (L_R of section 3.1), mean over timesteps and captions (see the top of this file)."""
    return ce_KBL.sum(dim=-1).mean()


def rounding_printed(ce_KBL: torch.Tensor) -> torch.Tensor:
    """Equation 5: the rounding term stands inside the sum over timesteps."""
    return ce_KBL.sum(dim=-1).mean(dim=-1).sum()


def reduced(restore_KBLD: torch.Tensor, first_BLD: torch.Tensor, ce_KBL: torch.Tensor, reduction: str) -> Terms:
    """The three terms under a reduction.

    ``series_sum_sample_mean``: the code of all result files but one.
    ``series_sum``: by item 20 the code's last version of it divides the x_1 term by K and multiplies the rounding term
    by K. The baseline, which was run under this name, cannot have had that (its logs have the usual sizes); what it
    had is unknown, and its sizes are those of ``series_sum_sample_mean``. Assumption: the x_t term is unchanged.
    ``printed``: equation 5. Assumption: the x_1 term counts once, as one more timestep.
    """
    num_drawn = restore_KBLD.shape[0]
    if reduction == "printed":
        return Terms(restore_printed(restore_KBLD), restore_printed(first_BLD[None]), rounding_printed(ce_KBL))
    terms = Terms(restore_code(restore_KBLD), restore_code(first_BLD[None]), rounding_code(ce_KBL))
    if reduction == "series_sum":
        return Terms(terms.x_t, terms.x_1 / num_drawn, terms.rounding * num_drawn)
    if reduction == "series_sum_sample_mean":
        return terms
    raise ValueError(f"reduction is {reduction!r}: series_sum_sample_mean, series_sum or printed")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Section 5.1. ``keep_KB`` and ``keep_first_B`` are false where p_uncond dropped the text."""

    w: float
    text_BF: torch.Tensor
    keep_KB: torch.Tensor
    keep_first_B: torch.Tensor


def training_terms(
    weights: Weights,
    ids_BL: torch.Tensor,
    mask_BL: torch.Tensor | None,
    image_BF: torch.Tensor,
    t_KB: torch.Tensor,
    noise_KBLD: torch.Tensor,
    noise_first_BLD: torch.Tensor,
    alpha_bar: torch.Tensor,
    *,
    noising: str = "code",
    norm: str = "l1",
    reduction: str = "series_sum_sample_mean",
    predict_earlier_by: int | None = None,
    with_x_1: bool = True,
    guidance: Guidance | None = None,
    fusion: str = "concat",
    output: str = "head_norm",
) -> Terms:
    """The terms of one batch. ``noise_KBLD`` may be (1, B, L, D), shared by the timesteps (item 8).

    x_1 is x_0 noised at t = 1 (item 8) and its target is x_0 (for x_{t-n} too, by the clamp). Assumptions: it has its
    own noise, it passes through guidance like the others, and the rounding term looks at the x_t predictions only, at
    whatever they predict.
    """
    add_noise = {"code": noised_code, "paper": noised_paper}[noising]
    x_BLD = embed_words(weights, ids_BL)
    num_drawn, batch_size = t_KB.shape
    target_KBLD = x_BLD.expand(num_drawn, *x_BLD.shape)
    if predict_earlier_by is not None:
        target_KBLD = target_earlier(x_BLD, noise_KBLD, t_KB, alpha_bar, predict_earlier_by)

    def predict(x_t_KBLD: torch.Tensor, keep_KB: torch.Tensor | None) -> torch.Tensor:
        times = len(x_t_KBLD)
        mask_NL = None if mask_BL is None else mask_BL.repeat(times, 1)
        inputs = (weights, x_t_KBLD.flatten(0, 1), image_BF.repeat(times, 1))
        if guidance is None or keep_KB is None:
            x_NLD = denoise(*inputs, mask_NL=mask_NL, fusion=fusion, output=output)
        else:
            text = (guidance.text_BF.repeat(times, 1), keep_KB.flatten())
            x_NLD = denoise_guided(*inputs, *text, guidance.w, mask_NL=mask_NL, fusion=fusion, output=output)
        return x_NLD.unflatten(0, (times, batch_size))

    x_t_KBLD = add_noise(x_BLD, noise_KBLD, t_KB, alpha_bar)
    predicted_KBLD = predict(x_t_KBLD, None if guidance is None else guidance.keep_KB)
    ce_NL = cross_entropy(word_logits(weights, predicted_KBLD.flatten(0, 1)), ids_BL.repeat(num_drawn, 1))
    first_BLD = torch.zeros_like(x_BLD)
    if with_x_1:
        x_1_KBLD = add_noise(x_BLD, noise_first_BLD[None], torch.ones_like(t_KB[:1]), alpha_bar)
        keep = None if guidance is None else guidance.keep_first_B[None]
        first_BLD = distance(predict(x_1_KBLD, keep)[0], x_BLD, norm)
    restore_KBLD = distance(predicted_KBLD, target_KBLD, norm)
    return reduced(restore_KBLD, first_BLD, ce_NL.unflatten(0, (num_drawn, batch_size)), reduction)
