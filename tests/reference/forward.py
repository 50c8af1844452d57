"""One diffusion stage (section 4, 5.5): caption and CLIP features fused, through DistilBERT, to the restored caption.

There is no time input (item 6). The caption reaches DistilBERT as ``inputs_embeds``, so its own embedding layer adds
position embeddings and a LayerNorm. Dropout is DistilBERT's: put the model in eval mode to compare.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import DistilBertForMaskedLM


class Weights(nn.Module):
    """The parameters of the captioner, and no computation."""

    def __init__(self, body: DistilBertForMaskedLM, feature_dim: int = 512):
        super().__init__()
        width = body.config.dim
        self.body = body
        self.image_projection = nn.Linear(feature_dim, width)  # item 6: nn.Linear; the paper says "a MLP layer"
        self.text_projection = nn.Linear(feature_dim, width)
        self.segment_embedding = nn.Embedding(2, width)  # section 5.5: 0 caption, 1 CLIP feature


def freeze_words(weights: Weights) -> None:
    """Section 4 and item 5: word embedding and head are one frozen matrix, the head's bias is zero."""
    body = weights.body
    assert body.vocab_projector.weight is body.distilbert.embeddings.word_embeddings.weight
    with torch.no_grad():
        body.vocab_projector.bias.zero_()
    body.vocab_projector.requires_grad_(False)


def embed_words(weights: Weights, ids_BL: torch.Tensor) -> torch.Tensor:
    """x_0: the rows of the word embedding as they are, without position embedding or LayerNorm; x_BLD."""
    return weights.body.distilbert.embeddings.word_embeddings.weight[ids_BL]


def word_logits(weights: Weights, x_NLD: torch.Tensor) -> torch.Tensor:
    """Section 3.1, p(w_i | x_i) before its softmax: x times the word embedding, plus the zero bias; logits_NLV."""
    return x_NLD @ weights.body.vocab_projector.weight.T + weights.body.vocab_projector.bias


def fused_concat(
    weights: Weights, x_NLD: torch.Tensor, image_NF: torch.Tensor, text_NF: torch.Tensor | None
) -> torch.Tensor:
    """Section 5.5 and item 6: the image is the token behind the L of the caption, the text the one behind it; x_NSD."""
    of_caption, of_feature = weights.segment_embedding.weight
    tokens = [x_NLD + of_caption, (weights.image_projection(image_NF) + of_feature)[:, None]]
    if text_NF is not None:
        tokens.append((weights.text_projection(text_NF) + of_feature)[:, None])
    return torch.cat(tokens, dim=1)


def fused_add(
    weights: Weights,
    x_NLD: torch.Tensor,
    image_NF: torch.Tensor,
    text_NF: torch.Tensor | None,
    keep_text_N: torch.Tensor | None,
) -> torch.Tensor:
    """Section 5.5: the projected features are added to every caption position, like a position embedding; x_NLD.

    Assumption: no segment embedding, there being nothing to tell apart.
    """
    x_NLD = x_NLD + weights.image_projection(image_NF)[:, None]
    if text_NF is None:
        return x_NLD
    text_ND = weights.text_projection(text_NF)
    if keep_text_N is not None:
        text_ND = text_ND * keep_text_N[:, None].to(text_ND.dtype)
    return x_NLD + text_ND[:, None]


def mask_concat(mask_NL: torch.Tensor, *, has_text: bool, keep_text_N: torch.Tensor | None) -> torch.Tensor:
    """The caption's mask with a one for the image and, where the text is kept, for the text; mask_NS.

    Assumption: feature tokens are always attended to.
    """
    one_N1 = torch.ones_like(mask_NL[:, :1])
    if not has_text:
        return torch.cat([mask_NL, one_N1], dim=1)
    text_N1 = one_N1 if keep_text_N is None else keep_text_N[:, None].to(mask_NL.dtype)
    return torch.cat([mask_NL, one_N1, text_N1], dim=1)


def denoise(
    weights: Weights,
    x_NLD: torch.Tensor,
    image_NF: torch.Tensor,
    text_NF: torch.Tensor | None = None,
    *,
    mask_NL: torch.Tensor | None = None,
    keep_text_N: torch.Tensor | None = None,
    fusion: str = "concat",
    output: str = "head_norm",
) -> torch.Tensor:
    """mu(x_t): the restored caption embedding; x_NLD.

    ``mask_NL`` is the padding mask of the true caption (item 14: training) or None for all ones (item 14: BLEU).
    ``keep_text_N`` drops the text of some rows. Assumption: a dropped text is one nothing attends to (concat: its mask
    is 0, which gives exactly the output without the token) or one not added (add).
    ``output`` says which LayerNorm's output is x (item 12 says only "LayerNorm output"): "head_norm", what the
    DistilBertForMaskedLM of item 5 multiplies by the word embedding, i.e. behind vocab_transform, activation and
    vocab_layer_norm; or "last_block", the last transformer layer's. Assumption: head_norm.
    """
    length = x_NLD.shape[1]
    mask_NL = x_NLD.new_ones(x_NLD.shape[:2], dtype=torch.long) if mask_NL is None else mask_NL
    if fusion == "concat":
        fused_NSD = fused_concat(weights, x_NLD, image_NF, text_NF)
        mask_NS = mask_concat(mask_NL, has_text=text_NF is not None, keep_text_N=keep_text_N)
    elif fusion == "add":
        fused_NSD, mask_NS = fused_add(weights, x_NLD, image_NF, text_NF, keep_text_N), mask_NL
    else:
        raise ValueError(f"fusion is {fusion!r}: concat or add")
    body = weights.body
    hidden_NLD = body.distilbert(inputs_embeds=fused_NSD, attention_mask=mask_NS).last_hidden_state[:, :length]
    if output == "last_block":
        return hidden_NLD
    return body.vocab_layer_norm(body.activation(body.vocab_transform(hidden_NLD)))


def denoise_guided(
    weights: Weights,
    x_NLD: torch.Tensor,
    image_NF: torch.Tensor,
    text_NF: torch.Tensor,
    keep_text_N: torch.Tensor,
    w: float,
    *,
    mask_NL: torch.Tensor | None = None,
    fusion: str = "concat",
    output: str = "head_norm",
) -> torch.Tensor:
    """Section 5.1 as item 10 has it: (1 + w) f(x, text of the true caption) - w f(x, no text), in training; x_NLD.

    From the paper: w, p_uncond, and that the guide is the CLIP text feature of the true caption. From the audit: that
    the sum stands inside the training loss and that nothing of it is left at test. Assumption: p_uncond is the chance
    that a row's text is dropped (``keep_text_N`` false) from the first f, which leaves that row with f(x, no text).
    """
    with_text = denoise(
        weights, x_NLD, image_NF, text_NF, mask_NL=mask_NL, keep_text_N=keep_text_N, fusion=fusion, output=output
    )
    without = denoise(weights, x_NLD, image_NF, mask_NL=mask_NL, fusion=fusion, output=output)
    return (1 + w) * with_text - w * without


def draw_kept_texts(batch_size: int, p_uncond: float = 0.2, generator: torch.Generator | None = None) -> torch.Tensor:
    """True where the text is kept, probability 1 - p_uncond; keep_B. Assumption: one draw per caption, not per t."""
    return torch.rand(batch_size, generator=generator) >= p_uncond
