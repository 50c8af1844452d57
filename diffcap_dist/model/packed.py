"""DistilBERT's transformer without padding: every layer sees the tokens that count, one behind the other.

In: a body, token rows of unequal length and which tokens count. Out: hidden states in the same place. Only attention
puts the tokens back into rows. Captions are about two thirds as long as the longest of their batch: so much less work,
on a CPU; on a GPU the kernels that take tokens out and put them back cost more than that, up to 512 rows at least.

Letters: B rows, S tokens a row, T tokens that count of all rows, H body width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DistilBertModel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def hidden_states(
    body: DistilBertModel,
    tokens_BSH: Tensor,
    counts_BS: Tensor,
    sees: Tensor,
    position_S: Tensor,
    pack: bool | None = None,
) -> Tensor:
    """hidden_BSH; it means nothing where ``counts_BS`` is False. ``sees``, a mask of booleans that broadcasts to (B,
    heads, S, S), says which tokens a token attends to; it has to leave out those that don't count. ``pack``: whether
    these are taken out; if not said, where it saves time. Compiled code wants shapes that don't depend on captions."""
    B, S, H = tokens_BSH.shape
    if pack is None:
        pack = not tokens_BSH.is_cuda and not torch.compiler.is_compiling()
    at_T = counts_BS.flatten().nonzero().squeeze(1) if pack else slice(None)

    def in_rows(x_TH: Tensor) -> Tensor:
        rows = x_TH.new_zeros(B * S, H).index_copy(0, at_T, x_TH) if isinstance(at_T, Tensor) else x_TH
        return rows.view(B, S, H)

    def attend(heads: int, dropout: float, *query_key_value: Tensor) -> Tensor:
        query, key, value = (in_rows(x_TH).unflatten(-1, (heads, -1)).transpose(1, 2) for x_TH in query_key_value)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=sees, dropout_p=dropout)
        return attended.transpose(1, 2).reshape(B * S, H)[at_T]

    hidden_1TH = body.embeddings(
        input_ids=None,  # type: ignore[arg-type]
        inputs_embeds=tokens_BSH.flatten(0, 1)[at_T][None],
        position_ids=position_S.repeat(B)[at_T][None],  # type: ignore[arg-type]
    )
    hidden_TH, layers = hidden_1TH[0], cast(Any, body.transformer.layer)
    for layer in layers:
        own = layer.attention
        dropout = own.dropout.p if own.training else 0.0
        hidden_TH = layer_output(layer, hidden_TH, partial(attend, own.n_heads, dropout))
    return in_rows(hidden_TH)


def layer_output(layer: Any, hidden: Tensor, attend: Attend) -> Tensor:
    """What one of DistilBERT's layers makes of hidden (..., H); ``attend(query, key, value)`` is its attention."""
    own = layer.attention
    attended = attend(own.q_lin(hidden), own.k_lin(hidden), own.v_lin(hidden))
    hidden = layer.sa_layer_norm(own.out_lin(attended) + hidden)
    return layer.output_layer_norm(layer.ffn(hidden) + hidden)
