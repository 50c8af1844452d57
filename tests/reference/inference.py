"""From noise to words (section 5, items 12 and 13)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TypeVar

import torch

from tests.reference.forward import Weights, denoise, word_logits

Word = TypeVar("Word")


@torch.no_grad()
def generate(
    weights: Weights,
    x_T_BLD: torch.Tensor,
    image_BF: torch.Tensor,
    num_iterations: int = 5,
    *,
    mask_BL: torch.Tensor | None = None,
    fusion: str = "concat",
    output: str = "head_norm",
) -> torch.Tensor:
    """x_T ~ N(0, I), the output fed straight back, the likeliest word at each position of the last; ids_BL.

    No noise is added again and there is no time (item 12), no text and no guidance (item 10). ``mask_BL``: None, all
    ones, for BLEU; the true caption's padding mask for the samples the code prints (item 14).
    """
    x_BLD = x_T_BLD
    for _ in range(num_iterations):
        x_BLD = denoise(weights, x_BLD, image_BF, mask_NL=mask_BL, fusion=fusion, output=output)
    return word_logits(weights, x_BLD).argmax(dim=-1)


def without_repeats_paper(words: Sequence[Word]) -> list[Word]:
    """Section 5: "all but the first element from every consecutive group of repeated words are removed"."""
    return [word for word, _ in groupby(words)]


def without_repeats_code(ids_BL: torch.Tensor) -> torch.Tensor:
    """Item 13: a column goes only where *all* rows of the batch repeat the column before it; fewer columns."""
    repeats_L = (ids_BL[:, 1:] == ids_BL[:, :-1]).all(dim=0)
    return torch.cat([ids_BL[:, :1], ids_BL[:, 1:][:, ~repeats_L]], dim=1)
