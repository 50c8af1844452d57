"""The control: the denoiser's own body, features and embedding table, writing left to right.

In: caption ids (training), or image features (writing). Out: hidden_BLD, where position i sees the photo and the words
before it; or ids_BL, by beam search with a cache of keys and values. What is the same as in ``Denoiser`` is its code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffcap_dist.config import ModelConfig
from diffcap_dist.model import packed
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures

Choose = Callable[[int, Tensor], Tensor]


class AutoregressiveModel(Denoiser):
    """p(w_i | photo, w_1 ... w_i-1). The photo's tokens stand behind the caption's, as in the denoiser, and see only
    each other; every word sees them."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, max_length: int, feature_widths: tuple[int, int | None]
    ) -> None:
        config = dataclasses.replace(
            config,
            fusion="concat",  # added to each word, features could not be cached
            time_embedding=False,
            self_conditioning=False,
            length_head=False,
            text_token=False,
            shifted=True,
        )
        super().__init__(config, vocab_size, max_length, feature_widths)

    def forward(self, ids_BL: Tensor, image: ImageFeatures, mask_BL: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_BLD: at position i, what foretells word i; nothing is there where ``mask_BL`` is False, behind a
        caption's end. Rows of one photo stand together, as in the denoiser."""
        B, L = ids_BL.shape
        words_BLD = torch.cat([self._begin(B)[:, None], self.embed(ids_BL[:, :-1])], dim=1)
        photo_BPH = self._photo_tokens(image, B)
        tokens_BSH = torch.cat([self._word_tokens(words_BLD.to(photo_BPH.dtype)), photo_BPH], dim=1)
        sees_SS = torch.ones(tokens_BSH.shape[1], tokens_BSH.shape[1], dtype=torch.bool, device=ids_BL.device)
        sees_SS[:, :L] = sees_SS[:, :L].tril()
        sees_SS[L:, :L] = False
        counts_BS = torch.cat([mask_BL, torch.ones_like(mask_BL[:, :1]).expand(-1, photo_BPH.shape[1])], dim=1)
        at_S = torch.arange(tokens_BSH.shape[1], device=ids_BL.device)
        hidden_BSH = packed.hidden_states(self.body, tokens_BSH, counts_BS, sees_SS, at_S)
        return self.output_projection(hidden_BSH[:, :L])

    def _photo_tokens(self, image: ImageFeatures, rows: int) -> Tensor:
        assert self.segments is not None
        tokens_NPH = self._image_tokens(image, None)
        tokens_NPH = tokens_NPH + self.segments(torch.ones_like(tokens_NPH[..., 0], dtype=torch.long))
        return tokens_NPH.repeat_interleave(rows // len(tokens_NPH), dim=0)

    def _word_tokens(self, words_BLD: Tensor) -> Tensor:
        assert self.segments is not None
        return self.input_projection(words_BLD) + self.segments(torch.zeros_like(words_BLD[..., 0], dtype=torch.long))

    @torch.no_grad()
    def write(
        self,
        image: ImageFeatures,
        end_id: int,
        pad_id: int,
        num_beams: int = 1,
        never: Sequence[int] = (),
        choose: Choose | None = None,
        rows_per_photo: int = 1,
    ) -> Tensor:
        """ids_BL of ``rows_per_photo`` captions of each photo, [PAD] behind [SEP] (``end_id``).

        Greedy, or beam search for the highest mean log-probability of a token, or with ``choose(position, logits_BV)``
        whatever that takes; ``never`` are ids that may not be written.
        """
        k = num_beams
        rows = image.pooled_NF.shape[0] * rows_per_photo
        cache = _Cache(self, self._photo_tokens(image, rows * k))
        ids_BL = torch.full((rows * k, self.max_length), pad_id, device=image.pooled_NF.device)
        score_B = torch.zeros(rows * k, device=ids_BL.device)
        ended_B = torch.zeros_like(score_B, dtype=torch.bool)
        word_BD = self._begin(rows * k)
        for position in range(self.max_length):
            logits_BV = self.logits(cache.next(word_BD, position)).float()
            logits_BV[:, [*never, pad_id]] = -math.inf
            if position == self.max_length - 1:  # no caption is longer
                logits_BV = torch.full_like(logits_BV, -math.inf)
                logits_BV[:, end_id] = 0
            if k > 1:
                parent_B, next_B, score_B = _best_beams(logits_BV, score_B, ended_B, position, pad_id, k)
                ids_BL, ended_B = ids_BL[parent_B], ended_B[parent_B]
                cache.reorder(parent_B)
            else:
                next_B = logits_BV.argmax(-1) if choose is None else choose(position, logits_BV)
                next_B = torch.where(ended_B, pad_id, next_B)
            ids_BL[:, position] = next_B
            ended_B = ended_B | (next_B == end_id)
            if ended_B.all():
                break
            word_BD = self.embed(next_B).to(image.pooled_NF.dtype)
        return ids_BL.view(rows, k, -1)[torch.arange(rows), score_B.view(rows, k).argmax(-1)]


def _best_beams(
    logits_BV: Tensor, score_B: Tensor, ended_B: Tensor, position: int, pad_id: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(parent_B, next word_B, score_B) of the k best continuations of each row; scores are means over tokens. A caption
    that has ended goes on with [PAD] and keeps its score."""
    V = logits_BV.shape[1]
    total_BV = (score_B[:, None] * position + logits_BV.log_softmax(-1)) / (position + 1)
    if position == 0:  # the beams of a row are still alike: one of them branches
        total_BV.view(-1, k, V)[:, 1:] = -math.inf
    kept_BV = torch.full_like(total_BV, -math.inf)
    kept_BV[:, pad_id] = score_B
    candidates = torch.where(ended_B[:, None], kept_BV, total_BV).view(-1, k * V)
    best, index = candidates.topk(k, dim=-1)
    first = torch.arange(0, len(score_B), k, device=index.device)[:, None]
    return (first + index // V).flatten(), (index % V).flatten(), best.flatten()


class _Cache:
    """Keys and values of the photo and of the words written, per layer; the layers are the body's own."""

    def __init__(self, model: AutoregressiveModel, photo_BPH: Tensor) -> None:
        self.model = model
        self.layers: list[Any] = list(model.body.transformer.layer)
        B, P, H = photo_BPH.shape
        heads = self.layers[0].attention.n_heads
        shape = (len(self.layers), 2, B, heads, P + model.max_length, H // heads)
        self.keys_values = torch.empty(shape, device=photo_BPH.device, dtype=photo_BPH.dtype)
        self.filled = 0
        at_P = torch.arange(model.max_length, model.max_length + P, device=photo_BPH.device)
        self._run(photo_BPH, at_P[None])

    def next(self, word_BD: Tensor, position: int) -> Tensor:
        """hidden_BD behind one more word (``begin`` at position 0)."""
        tokens_B1H = self.model._word_tokens(word_BD[:, None].to(self.keys_values.dtype))
        at_1 = torch.tensor([[position]], device=word_BD.device)
        return self.model.output_projection(self._run(tokens_B1H, at_1)[:, 0])

    def reorder(self, parent_B: Tensor) -> None:
        self.keys_values[..., : self.filled, :] = self.keys_values[:, :, parent_B, :, : self.filled]

    def _run(self, tokens_BSH: Tensor, position_ids: Tensor) -> Tensor:
        start, self.filled = self.filled, self.filled + tokens_BSH.shape[1]
        hidden_BSH = self.model.body.embeddings(input_ids=None, inputs_embeds=tokens_BSH, position_ids=position_ids)
        for layer, (keys, values) in zip(self.layers, self.keys_values):
            hidden_BSH = packed.layer_output(layer, hidden_BSH, partial(self._attend, keys, values, start))
        return hidden_BSH

    def _attend(self, keys: Tensor, values: Tensor, start: int, *query_key_value: Tensor) -> Tensor:
        query, key, value = (x.unflatten(-1, (keys.shape[1], -1)).transpose(1, 2) for x in query_key_value)
        keys[:, :, start : self.filled], values[:, :, start : self.filled] = key, value
        seen = F.scaled_dot_product_attention(query, keys[:, :, : self.filled], values[:, :, : self.filled])
        return seen.transpose(1, 2).flatten(2)
