"""A foretold length: how many tokens a caption is to have, and so which of them are given before any is denoised.

Letters as in the denoiser; a caption's length counts its [SEP].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def foretold_lengths(logits_NL: Tensor, candidates: int = 1) -> Tensor:
    """lengths_B1 of each photo's candidates, which stand together: candidate c of C takes the (c + 1/2) / C quantile
    of the length head's distribution, one candidate its median."""
    up_to_NL = logits_NL.float().softmax(-1).cumsum(-1)
    quantile_C = (torch.arange(candidates, device=up_to_NL.device) + 0.5) / candidates
    lengths_NC = 1 + (up_to_NL[:, None] < quantile_C[None, :, None]).sum(-1).clamp(max=up_to_NL.shape[1] - 1)
    return lengths_NC.flatten()[:, None]


def open_positions(lengths_B1: Tensor, max_length: int) -> Tensor:
    """open_BL: the words of captions of so many tokens, [SEP] (the last of them) and [PAD] left out."""
    return torch.arange(max_length, device=lengths_B1.device)[None] < lengths_B1 - 1


@dataclass(frozen=True)
class Known:
    """What is given at the start: ids_BL, but where ``open_BL``. Where ``words_BL`` is False there is padding."""

    open_BL: Tensor
    ids_BL: Tensor
    words_BL: Tensor | None = None

    @classmethod
    def of_lengths(cls, lengths_B1: Tensor, width: int, pad_id: int, sep_id: int) -> Known:
        """[SEP] and [PAD] behind the words of captions of these lengths, in rows ``width`` wide."""
        open_BL = open_positions(lengths_B1, width)
        ids_BL = torch.full_like(open_BL, pad_id, dtype=torch.long).scatter(1, lengths_B1 - 1, sep_id)
        return cls(open_BL, ids_BL, open_BL | (ids_BL == sep_id))

    def put(self, ids_BL: Tensor) -> Tensor:
        """``ids_BL`` where something is open, else what is given."""
        return torch.where(self.open_BL, ids_BL, self.ids_BL)
