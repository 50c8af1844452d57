"""The reference of ``tests/reference`` against hand-computed values, the library's parts, and the audit's calibration.

DIFFCAP_DATA names the folder of the real captions and the word-piece vocabulary; without it those tests are skipped.
"""

from __future__ import annotations

import csv
import math
import os
import random
from pathlib import Path

import pytest
import torch
from transformers import DistilBertConfig, DistilBertForMaskedLM

from tests.reference import forward, inference, losses, noising, rules, schedule, seed_metric

B, L, D, F, V, K = 3, 6, 16, 8, 40, 4
PAD = 0


@pytest.fixture
def weights() -> forward.Weights:
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=V, dim=D, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=32)
    made = forward.Weights(DistilBertForMaskedLM(config), feature_dim=F).eval()
    forward.freeze_words(made)
    with torch.no_grad():  # larger than DistilBERT's 0.02, so that differences show
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return made


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids_BL = torch.randint(1, V, (B, L), generator=generator)
    ids_BL[1, 4:] = PAD
    return {
        "ids_BL": ids_BL,
        "mask_BL": (ids_BL != PAD).long(),
        "image_BF": torch.randn(B, F, generator=generator),
        "t_KB": schedule.draw_timesteps_shared(K, B, generator=generator),
        "noise_KBLD": noising.draw_noise(K, (B, L, D), shared_over_timesteps=True, generator=generator),
        "noise_first_BLD": torch.randn(B, L, D, generator=generator),
        "alpha_bar": schedule.alpha_bar_closed(),
    }


# ---- schedule and noising ----


def test_schedule_known_values() -> None:
    closed, product = schedule.alpha_bar_closed(), schedule.alpha_bar_product()
    assert closed.shape == product.shape == (1001,)
    assert closed[0] == product[0] == 1
    assert round(closed[1].item(), 5) == 0.99996  # item 8
    torch.testing.assert_close(closed[:-1], product[:-1], rtol=1e-9, atol=0)
    assert closed[-1].item() < 1e-30 and product[-1].item() == pytest.approx(2.43e-9, rel=1e-3)
    assert (closed.diff() < 0).all()


def test_timesteps() -> None:
    t_KB = schedule.draw_timesteps_shared(100, 8)
    assert t_KB.shape == (100, 8) and (t_KB == t_KB[:, :1]).all() and t_KB.min() >= 0 and t_KB.max() < 1000
    assert len(schedule.draw_timesteps_shared(2000, 1, num_steps=10).unique()) == 10  # with replacement
    t_KB = schedule.draw_timesteps_per_caption(100, 8)
    assert t_KB.shape == (100, 8) and (t_KB[:, 0] != t_KB[:, 1]).any()
    assert len(t_KB[:, 0].unique()) == 100 and t_KB.min() >= 1


def test_noising_by_hand() -> None:
    x_BLD, noise_KBLD = torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    alpha_bar, t_KB = torch.tensor([1.0, 0.64, 0.36]), torch.tensor([[0], [1], [2]])
    code = noising.noised_code(x_BLD, noise_KBLD, t_KB, alpha_bar).flatten()
    paper = noising.noised_paper(x_BLD, noise_KBLD, t_KB, alpha_bar).flatten()
    torch.testing.assert_close(code, torch.tensor([2.0, 0.8 * 2 + 0.6 * 3, 0.6 * 2 + 0.8 * 3]))
    torch.testing.assert_close(paper, torch.tensor([2.0, 0.8 * 2 + 0.36 * 3, 0.6 * 2 + 0.64 * 3]))
    earlier = noising.target_earlier(x_BLD, noise_KBLD, t_KB, alpha_bar, n=1).flatten()
    torch.testing.assert_close(earlier, torch.tensor([2.0, 2.0, 0.8 * 2 + 0.6 * 3]))


def test_posterior_mean() -> None:
    alpha_bar = schedule.alpha_bar_product()
    x_BLD, noise_KBLD = torch.randn(2, 3, 4).double(), torch.randn(3, 2, 3, 4).double()
    t_KB = torch.tensor([[1, 1], [500, 2], [1000, 999]])
    x_t = noising.noised_code(x_BLD, noise_KBLD, t_KB, alpha_bar)
    mean = noising.target_posterior_mean(x_BLD, x_t, t_KB, alpha_bar)
    torch.testing.assert_close(mean[0], x_BLD)  # at t = 1
    # In expectation over q(x_t | x_0) it is the mean of q(x_{t-1} | x_0).
    clean = noising.noised_code(x_BLD, torch.zeros(1, 1, 1, 1).double(), t_KB, alpha_bar)
    of_clean = noising.target_posterior_mean(x_BLD, clean, t_KB, alpha_bar)
    expected = noising.noised_code(x_BLD, torch.zeros(1, 1, 1, 1).double(), t_KB - 1, alpha_bar)
    torch.testing.assert_close(of_clean, expected)


# ---- forward ----


def test_logits_are_the_models_own(weights: forward.Weights) -> None:
    """The stage and the head together are DistilBertForMaskedLM on the fused tokens."""
    x_NLD, image_NF = torch.randn(B, L, D), torch.randn(B, F)
    fused_NSD = forward.fused_concat(weights, x_NLD, image_NF, None)
    assert fused_NSD.shape == (B, L + 1, D)
    expected_NLV = weights.body(inputs_embeds=fused_NSD).logits[:, :L]
    torch.testing.assert_close(forward.word_logits(weights, forward.denoise(weights, x_NLD, image_NF)), expected_NLV)


@pytest.mark.parametrize("output", ["head_norm", "last_block"])
@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_dropped_text_is_no_text(weights: forward.Weights, fusion: str, output: str) -> None:
    x_NLD, image_NF, text_NF = torch.randn(B, L, D), torch.randn(B, F), torch.randn(B, F)
    mask_NL = torch.ones(B, L, dtype=torch.long)
    mask_NL[0, 3:] = 0
    given = {"mask_NL": mask_NL, "fusion": fusion, "output": output}
    without = forward.denoise(weights, x_NLD, image_NF, **given)
    with_text = forward.denoise(weights, x_NLD, image_NF, text_NF, **given)
    keep_N = torch.tensor([True, False, True])
    mixed = forward.denoise(weights, x_NLD, image_NF, text_NF, keep_text_N=keep_N, **given)
    assert without.shape == (B, L, D) and (without - with_text).abs().max() > 1e-3
    torch.testing.assert_close(mixed[keep_N], with_text[keep_N])
    torch.testing.assert_close(mixed[~keep_N], without[~keep_N])
    guided = forward.denoise_guided(weights, x_NLD, image_NF, text_NF, keep_N, 0.3, **given)
    torch.testing.assert_close(guided, torch.where(keep_N[:, None, None], 1.3 * with_text - 0.3 * without, without))


def test_mask_and_position_matter(weights: forward.Weights) -> None:
    x_NLD, image_NF = torch.randn(1, L, D), torch.randn(1, F)
    mask_NL = torch.tensor([[1, 1, 1, 1, 0, 0]])
    masked = forward.denoise(weights, x_NLD, image_NF, mask_NL=mask_NL)
    changed = x_NLD.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(forward.denoise(weights, changed, image_NF, mask_NL=mask_NL)[:, :4], masked[:, :4])
    all_ones = forward.denoise(weights, x_NLD, image_NF)
    assert (all_ones - masked).abs().max() > 1e-3
    flipped = forward.denoise(weights, x_NLD.flip(1), image_NF).flip(1)
    assert (flipped - all_ones).abs().max() > 1e-3  # DistilBERT's own position embeddings


# ---- losses ----


def test_reductions_by_hand() -> None:
    """K = 2, B = 1, L = 2, D = 2: sums and means small enough to do on paper."""
    restore_KBLD = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[5.0, 6.0], [7.0, 8.0]]]])
    first_BLD, ce_KBL = torch.tensor([[[1.0, 1.0], [1.0, 3.0]]]), torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    usual = losses.reduced(restore_KBLD, first_BLD, ce_KBL, "series_sum_sample_mean")
    # Sums over positions: (4, 6) and (12, 14), mean 9; (2, 4), mean 3; 3 and 7, mean 5.
    assert (usual.x_t.item(), usual.x_1.item(), usual.rounding.item()) == (9, 3, 5)
    assert usual.total(0.5).item() == 9 + 3 + 2.5 and usual.simple().item() == 12
    series_sum = losses.reduced(restore_KBLD, first_BLD, ce_KBL, "series_sum")
    assert (series_sum.x_t.item(), series_sum.x_1.item(), series_sum.rounding.item()) == (9, 1.5, 10)
    printed = losses.reduced(restore_KBLD, first_BLD, ce_KBL, "printed")
    assert (printed.x_t.item(), printed.x_1.item(), printed.rounding.item()) == (36, 6, 10)


def test_distances_and_cross_entropy() -> None:
    predicted, target = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])
    assert losses.distance(predicted, target, "l1").tolist() == [2, 3]
    assert losses.distance(predicted, target, "l2_squared").tolist() == [4, 9]
    ce_NL = losses.cross_entropy(torch.zeros(2, 3, V), torch.zeros(2, 3, dtype=torch.long))
    torch.testing.assert_close(ce_NL, torch.full((2, 3), math.log(V)))


def test_training_terms_are_a_plain_loop(weights: forward.Weights, batch: dict[str, torch.Tensor]) -> None:
    """The batched loss equals one caption and one timestep at a time."""
    terms = losses.training_terms(weights, **batch)
    x_BLD = forward.embed_words(weights, batch["ids_BL"])
    restore, rounding = [], []
    for t in batch["t_KB"][:, 0].tolist():
        for b in range(B):
            a = batch["alpha_bar"][t].item()
            x_t = math.sqrt(a) * x_BLD[b] + math.sqrt(1 - a) * batch["noise_KBLD"][0, b]
            one = slice(b, b + 1)
            seen = forward.denoise(weights, x_t[None], batch["image_BF"][one], mask_NL=batch["mask_BL"][one])
            restore.append((seen[0] - x_BLD[b]).abs().sum().item() / D)
            logits_LV = seen[0] @ weights.body.vocab_projector.weight.T
            rounding.append(-logits_LV.log_softmax(-1)[torch.arange(L), batch["ids_BL"][b]].sum().item())
    assert terms.x_t.item() == pytest.approx(sum(restore) / len(restore), rel=1e-5)
    assert terms.rounding.item() == pytest.approx(sum(rounding) / len(rounding), rel=1e-5)
    noise_first = batch["noise_first_BLD"]
    x_1 = math.sqrt(batch["alpha_bar"][1]) * x_BLD + math.sqrt(1 - batch["alpha_bar"][1]) * noise_first
    seen = forward.denoise(weights, x_1, batch["image_BF"], mask_NL=batch["mask_BL"])
    assert terms.x_1.item() == pytest.approx((seen - x_BLD).abs().sum().item() / (B * D), rel=1e-5)


def test_training_terms_settings(weights: forward.Weights, batch: dict[str, torch.Tensor]) -> None:
    usual = losses.training_terms(weights, **batch)
    assert losses.training_terms(weights, **batch, with_x_1=False).x_1 == 0
    for changed in (
        {"noising": "paper"},
        {"norm": "l2_squared"},
        {"predict_earlier_by": 100},
        {"fusion": "add"},
        {"output": "last_block"},
        {"reduction": "printed"},
    ):
        assert losses.training_terms(weights, **batch, **changed).x_t != usual.x_t, changed
    far = losses.training_terms(weights, **batch, predict_earlier_by=1000)
    assert far.x_t == usual.x_t and far.rounding == usual.rounding  # every t - n is x_0
    keep_KB, keep_B, text_BF = torch.zeros(K, B).bool(), torch.zeros(B).bool(), torch.randn(B, F)
    dropped = losses.training_terms(weights, **batch, guidance=losses.Guidance(1.0, text_BF, keep_KB, keep_B))
    torch.testing.assert_close(dropped.total(0.3), usual.total(0.3))
    kept = losses.training_terms(weights, **batch, guidance=losses.Guidance(1.0, text_BF, ~keep_KB, ~keep_B))
    assert kept.x_t != usual.x_t and kept.x_1 != usual.x_1


def test_gradients_reach_all_but_the_words(weights: forward.Weights, batch: dict[str, torch.Tensor]) -> None:
    losses.training_terms(weights, **batch).total(0.3).backward()
    without = {name for name, parameter in weights.named_parameters() if parameter.grad is None}
    assert without == {
        "body.distilbert.embeddings.word_embeddings.weight",
        "body.vocab_projector.bias",
        "text_projection.weight",
        "text_projection.bias",
    }


# ---- rules ----


def test_dynamic_rounding_weight() -> None:
    assert rules.dynamic_rounding_weight(9.0, 45.0, 3.0) == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["linear", "cosine", "log", "log_of_epoch"])
def test_learning_rates(kind: str) -> None:
    rates = [rules.learning_rate(kind, epoch, 15) for epoch in range(15)]
    assert rates[0] == pytest.approx(1e-4) and rates[-1] == pytest.approx(5e-5)
    assert sorted(rates, reverse=True) == rates
    middle = {"linear": 7.5e-5, "cosine": 7.5e-5, "log": math.sqrt(5e-9), "log_of_epoch": 6.16e-5}[kind]
    assert rates[7] == pytest.approx(middle, rel=1e-3)
    after = [rules.learning_rate(kind, epoch, 15, last_epoch_at_end=False) for epoch in range(16)]
    assert after[14] > 5e-5 and after[15] == pytest.approx(5e-5)


def test_constant_learning_rate() -> None:
    assert {rules.learning_rate("constant", epoch, 15, start=5e-5) for epoch in range(15)} == {5e-5}


def test_early_stop() -> None:
    train, val = [9.0, 8.0, 7.0, 6.0, 5.0], [8.5, 7.9, 7.1, 6.5, 6.6]
    assert rules.early_stop_paper(train, val) == 2
    assert rules.early_stop_code(train, val) == (3, 5)  # 7.1 is within 1.05 of 7.0
    assert rules.early_stop_paper(train, train) is None and rules.early_stop_code(train, train) == (None, 5)


# ---- inference ----


def test_generate_feeds_back(weights: forward.Weights) -> None:
    x_BLD, image_BF = torch.randn(B, L, D), torch.randn(B, F)
    ids_BL = inference.generate(weights, x_BLD, image_BF)
    assert ids_BL.shape == (B, L) and ids_BL.dtype == torch.long
    for _ in range(4):
        x_BLD = forward.denoise(weights, x_BLD, image_BF).detach()
    assert torch.equal(inference.generate(weights, x_BLD, image_BF, num_iterations=1), ids_BL)


def test_repeats() -> None:
    assert inference.without_repeats_paper(["a", "a", "dog", "dog", "a"]) == ["a", "dog", "a"]
    ids_BL = torch.tensor([[1, 5, 5, 0, 0, 0], [1, 5, 6, 6, 0, 0]])
    assert inference.without_repeats_code(ids_BL).tolist() == [[1, 5, 5, 0, 0], [1, 5, 6, 6, 0]]
    random_BL = torch.randint(0, 2, (2, 60))
    assert torch.equal(inference.without_repeats_code(random_BL), torch.unique_consecutive(random_BL, dim=-1))


# ---- the seed's metric ----


def test_words_of_rows() -> None:
    tokens = ["[CLS]", "a", "par", "##ty", ".", "[SEP]", "[PAD]", "[PAD]"]
    assert seed_metric.hypothesis_words(tokens) == ["[CLS]", "a", "party.", "[SEP]", "[PAD]", "[PAD]"]
    expected = ["[CLS]", "a", "party", "!", ".", "[SEP]"]
    assert seed_metric.reference_words("A party ! .") == seed_metric.reference_words("A party !") == expected


def made_rows(num_rows: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    rng = random.Random(0)
    rows = [[rng.choices("abc", k=rng.randint(4, 12)) for _ in range(6)] for _ in range(num_rows)]
    return [row[0] for row in rows], [row[1:] for row in rows]


def test_bleu_by_hand_and_by_torchmetrics() -> None:
    from torchmetrics.functional.text import bleu_score

    counts = seed_metric.bleu_counts(list("abcdx"), [list("abcdefg"), ["x"]])
    assert counts == [5, 3, 2, 1, 5, 4, 3, 2, 5, 7]
    score = (5 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 7 / 5)
    assert seed_metric.bleu_of_counts([counts]) == pytest.approx(score)
    assert seed_metric.bleu_of_counts([seed_metric.bleu_counts(list("abc"), [list("abc")])]) == 0
    hypotheses, references = made_rows(20)
    theirs = [
        bleu_score([" ".join(words) for words in hypotheses[i : i + 8]], [[" ".join(r) for r in refs] for refs in some])
        for i, some in ((0, references[:8]), (8, references[8:16]))
    ]
    assert seed_metric.seed_bleu(hypotheses, references) == pytest.approx(sum(theirs).item() / 2, abs=1e-6)
    with pytest.raises(ValueError, match="7 rows"):
        seed_metric.seed_bleu(hypotheses[:7], references[:7])


def test_row_split_leaks_photos() -> None:
    """Item 2: nearly every validation caption has another caption of its photo in training (1 - 0.2^4 = 0.9984)."""
    train, val = seed_metric.caption_row_split(8091 * 5, generator=torch.Generator().manual_seed(0))
    assert (len(train), len(val)) == (32364, 8091) and sorted(train + val) == list(range(8091 * 5))
    seen = {row // 5 for row in train}
    assert sum(row // 5 in seen for row in val) / len(val) == pytest.approx(0.9984, abs=0.0015)


needs_data = pytest.mark.skipif("DIFFCAP_DATA" not in os.environ, reason="needs the real captions: set DIFFCAP_DATA")


@needs_data
def test_calibration_on_the_real_captions() -> None:
    """Item 4's table: a human caption scores 0.165 (corpus 0.174, without PAD 0.197), a constant one 0.063."""
    from tokenizers import BertWordPieceTokenizer

    data = Path(os.environ["DIFFCAP_DATA"])
    tokenizer = BertWordPieceTokenizer(str(data / "bert-base-uncased-vocab.txt"), lowercase=True)
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    photos: dict[str, list[str]] = {}
    with (data / "flickr8k" / "captions.txt").open(encoding="utf-8", newline="") as file:
        for name, caption in list(csv.reader(file))[1:]:
            photos.setdefault(name, []).append(caption)
    captions = random.Random(0).sample(sorted(photos.values()), 3000)
    references = [[seed_metric.reference_words(one) for one in five] for five in captions]
    human = [seed_metric.hypothesis_words(tokenizer.encode(five[0]).tokens) for five in captions]
    others = [five[1:] for five in references]
    assert seed_metric.seed_bleu(human, others) == pytest.approx(0.165, abs=0.01)
    counts = [seed_metric.bleu_counts(words, refs) for words, refs in zip(human, others)]
    assert seed_metric.bleu_of_counts(counts) == pytest.approx(0.174, abs=0.01)
    unpadded = [[word for word in words if word != "[PAD]"] for words in human]
    assert seed_metric.seed_bleu(unpadded, others) == pytest.approx(0.197, abs=0.01)
    constant = seed_metric.hypothesis_words(tokenizer.encode("a man in a blue shirt is standing on a rock .").tokens)
    # The audit does not name its constant caption; plausible ones score 0.01 to 0.09.
    assert seed_metric.seed_bleu([constant] * len(captions), references) == pytest.approx(0.063, abs=0.02)
    echo = seed_metric.seed_bleu(human, references)
    assert echo == pytest.approx(0.667, abs=0.03)
