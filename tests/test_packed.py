"""With and without padding the body gives what transformers' own forward gives, at every token that counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DistilBertConfig, DistilBertModel

from diffcap_dist.model import packed

B, S, H = 5, 9, 24


def body_and_tokens(dropout: float = 0.0) -> tuple[DistilBertModel, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1, "dim": H, "n_layers": 3, "n_heads": 4, "hidden_dim": 40, "initializer_range": 0.3}
    body = DistilBertModel(DistilBertConfig(**sizes, dropout=dropout, attention_dropout=dropout))
    counts_BS = torch.arange(S) < torch.tensor([9, 1, 4, 7, 0])[:, None]
    counts_BS[:, -1] = True  # a photo's token, behind the caption
    return body, torch.randn(B, S, H, requires_grad=True), counts_BS


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_tokens_that_count_and_their_gradients(causal: bool, pack: bool) -> None:
    body, tokens_BSH, counts_BS = body_and_tokens()
    body.eval()
    sees_B1SS = counts_BS[:, None, None].expand(-1, -1, S, -1)
    if causal:
        sees_B1SS = sees_B1SS & (torch.ones(S, S, dtype=torch.bool).tril() | (torch.arange(S) == S - 1))
    at_S = torch.arange(S) + 2
    got_BSH = packed.hidden_states(body, tokens_BSH, counts_BS, sees_B1SS, at_S, pack)
    hidden_BSH = body.embeddings(input_ids=None, inputs_embeds=tokens_BSH, position_ids=at_S[None])
    bias_B1SS = torch.zeros(sees_B1SS.shape).masked_fill(~sees_B1SS, -torch.inf)
    for layer in body.transformer.layer:
        hidden_BSH = layer(hidden_BSH, bias_B1SS)
    torch.testing.assert_close(got_BSH[counts_BS], hidden_BSH[counts_BS], atol=1e-5, rtol=1e-5)
    assert not pack or (got_BSH[~counts_BS] == 0).all()
    weights = torch.randn(int(counts_BS.sum()), H)
    parameters = [tokens_BSH, *(p for p in body.transformer.parameters())]
    got, expected = (
        torch.autograd.grad((x_BSH[counts_BS] * weights).sum(), parameters, retain_graph=True)
        for x_BSH in (got_BSH, hidden_BSH)
    )
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_dropout_in_training_alone() -> None:
    body, tokens_BSH, counts_BS = body_and_tokens(dropout=0.5)
    sees = counts_BS[:, None, None]
    once, again = (packed.hidden_states(body.train(), tokens_BSH, counts_BS, sees, torch.arange(S)) for _ in range(2))
    assert (once - again)[counts_BS].abs().max() > 0.1
    once, again = (packed.hidden_states(body.eval(), tokens_BSH, counts_BS, sees, torch.arange(S)) for _ in range(2))
    assert torch.equal(once, again)
