"""The reward of a drawn caption: CIDEr-D against the photo's own captions, with the idf of the training photos'.

In: caption ids and what people wrote. Out: a number for each caption (Rennie et al. 2017, arXiv:1612.00563).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.evaluation.scores import CiderD, CountedReferences, count_caption, count_references, tokenize


class CiderReward:
    """``reward(ids_SNL, references of the N photos) -> reward_SN``."""

    def __init__(self, tokenizer: CaptionTokenizer, references: Iterable[Sequence[str]]) -> None:
        """``references``: the captions of each training photo."""
        self.tokenizer = tokenizer
        self._cider_d = CiderD(_counted(texts) for texts in references)

    def __call__(self, ids_SNL: Tensor, references: Sequence[Sequence[str]]) -> Tensor:
        N = ids_SNL.shape[1]
        if len(references) != N:
            raise ValueError(f"captions of {N} photos, references of {len(references)}: expected those of each photo")
        texts = self.tokenizer.decode(ids_SNL.flatten(0, 1).cpu().numpy())
        reward_SN = torch.empty(ids_SNL.shape[:2])
        for photo, of_people in enumerate(references):
            drawn = texts[photo::N]
            different = list(dict.fromkeys(drawn))  # many of a confident model's are alike
            counted = [count_caption(tokenize(text)) for text in different]
            scores = dict(zip(different, self._cider_d(counted, _counted(of_people))))
            reward_SN[:, photo] = torch.tensor([scores[text] for text in drawn])
        return reward_SN.to(ids_SNL.device)


def _counted(texts: Sequence[str]) -> CountedReferences:
    return count_references([tokenize(text) for text in texts])
