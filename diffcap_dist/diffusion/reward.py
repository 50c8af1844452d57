"""Training on a reward: masked diffusion's own captions are drawn, and the better ones of a photo made likelier.

Cross-entropy asks for each word of one caption; a reward asks whether all words together are a caption of the photo. A
denoiser draws all hidden words in one look, so that many captions of a photo cost what one does, where a left-to-right
model writes each of them word by word (of translation: Shao et al. 2021, arXiv:2106.08122).

Letters as in the objective; S captions drawn of each photo, T hidden words of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from diffcap_dist.config import DiffusionConfig
from diffcap_dist.diffusion.length import Known, foretold_lengths
from diffcap_dist.diffusion.objective import DiffusionObjective, Draws
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures

Reward = Callable[[Tensor, Sequence[Sequence[str]]], Tensor]


class RewardObjective(DiffusionObjective):
    """REINFORCE with a photo's other captions as the baseline (Kool et al. 2019; Rennie et al. 2017,
    arXiv:1612.00563). In evaluation mode it is the ``DiffusionObjective`` that it is made of.

    Of each photo a share t of the words is left hidden, the rest is what the network itself is surest of at first
    sight; so it learns to end what it has begun, as at inference. Lengths are foretold; the head that does it is not
    trained, though what it reads, the photo's projection, is.
    """

    def __init__(
        self, network: Denoiser, config: DiffusionConfig, pad_id: int, mask_id: int, sep_id: int,
        special_ids: Collection[int], reward: Reward,
    ) -> None:  # fmt: skip
        """``reward(ids_SNL, references of the photos)`` gives reward_SN."""
        super().__init__(network, config, pad_id, mask_id)
        self.sep_id, self.special_ids, self.reward = sep_id, sorted(special_ids), reward

    @property
    def noise_shape(self) -> tuple[int, ...]:
        if not self.training:
            return super().noise_shape
        return self.config.reward_samples, self.network.max_length

    def forward(
        self,
        ids_NCL: Tensor,
        image: ImageFeatures,
        draws: Draws,
        text_NCF: Tensor | None = None,
        rounding_weight: float | None = None,
        references: Sequence[Sequence[str]] = (),
    ) -> dict[str, Tensor]:
        """``reward``, the mean of the captions drawn, and ``loss``, whose gradient is that of the expected reward (its
        value means nothing). ``references``: all captions of each photo."""
        if not self.training:
            return super().forward(ids_NCL, image, draws, text_NCF, rounding_weight)
        t_B = draws.t_B
        with torch.no_grad():
            lengths_B1 = foretold_lengths(self.network.length_logits(image))
            known = Known.of_lengths(lengths_B1, ids_NCL.shape[-1], self.pad_id, self.sep_id)
            logits_TV = self._word_logits(known.ids_BL, known.open_BL, torch.ones_like(t_B), image)
            ids_BL, hidden_BL = draft(known, logits_TV, t_B)
        logits_TV = self._word_logits(ids_BL, hidden_BL, t_B, image)
        drawn_ST = draw_words(logits_TV.detach(), draws.noise.transpose(0, 1)[:, hidden_BL])
        captions_SBL = torch.stack([ids_BL.masked_scatter(hidden_BL, drawn_T) for drawn_T in drawn_ST])
        reward_SB = self.reward(captions_SBL, references)
        S = len(reward_SB)
        advantage_SB = (reward_SB - reward_SB.mean(0)) * (S / (S - 1))  # of the mean of the others
        log_probability_ST = logits_TV.log_softmax(-1).gather(1, drawn_ST.T).T
        row_T = hidden_BL.nonzero()[:, 0]
        loss = -(advantage_SB[:, row_T] * log_probability_ST).sum() / advantage_SB.numel()
        return {"reward": reward_SB.mean(), "loss": loss}

    def _word_logits(self, ids_BL: Tensor, hidden_BL: Tensor, t_B: Tensor, image: ImageFeatures) -> Tensor:
        """logits_TV of the hidden words; special tokens are none."""
        ids_BL = ids_BL.masked_fill(hidden_BL, self.mask_id)
        x_BLD = self.network.embed(ids_BL).to(image.pooled_NF.dtype)
        hidden_TD = self.network(x_BLD, t_B, image, mask_BL=ids_BL != self.pad_id)[hidden_BL]
        never = torch.tensor(self.special_ids, device=ids_BL.device)
        return self.network.logits(hidden_TD).float().index_fill(-1, never, -torch.inf)


def draft(known: Known, logits_TV: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """(ids_BL, hidden_BL): the likeliest words everywhere, and which of them, those least sure, are to be hidden again:
    a share t of each row."""
    log_probability_T, best_T = logits_TV.log_softmax(-1).max(-1)
    ids_BL = known.ids_BL.masked_scatter(known.open_BL, best_T)
    sure_BL = torch.full(ids_BL.shape, -torch.inf, device=ids_BL.device).masked_scatter(
        known.open_BL, log_probability_T
    )
    rank_BL = sure_BL.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    kept_B1 = (known.open_BL.sum(-1, keepdim=True) * (1 - t_B[:, None])).floor()
    return ids_BL, known.open_BL & (rank_BL >= kept_B1)


def draw_words(logits_TV: Tensor, noise_ST: Tensor) -> Tensor:
    """words_ST drawn from the softmax of the logits: where standard normal noise, as a quantile, falls in it."""
    up_to_TV = logits_TV.softmax(-1).cumsum(-1)
    quantile_TS = torch.special.ndtr(noise_ST.T.float()).clamp(1e-7, 1 - 1e-7) * up_to_TV[:, -1:]
    return torch.searchsorted(up_to_TV, quantile_TS.contiguous()).T
