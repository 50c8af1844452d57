"""Ours against the paper written a second time (tests/reference): losses, gradients and tokens, setting by setting.

The reference was written from the paper and the audit of its code by somebody who had not read ours. Weights are
random; the full DistilBERT size is run for a few settings, a tiny one for all.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DistilBertConfig, DistilBertForMaskedLM

from diffcap_dist.config import DiffusionConfig, ModelConfig, OptimizerConfig
from diffcap_dist.diffusion.objective import DiffusionObjective, Draws
from diffcap_dist.diffusion.sampler import x0_feedback
from diffcap_dist.diffusion.schedule import NoiseSchedule
from diffcap_dist.evaluation.captioner import remove_repeats
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures
from diffcap_dist.training.learning_rate import learning_rate
from tests.reference import forward, inference, losses, rules, schedule

F, B, PAD = 12, 3, 0
TINY = DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24, initializer_range=0.3)
FULL = DistilBertConfig()  # distilbert-base-uncased
# The published code, as a setting of ours.
PAPER = DiffusionConfig(
    kind="continuous", noise_scale=1.0, timesteps_per_caption=4, timesteps="shared", shared_noise=True,
    restore_loss="l1", restore_weight=1.0, first_step_weight=1.0, rounding_weight=0.3,
    loss_reduction="series_sum_sample_mean", image_drop_rate=0.0, self_conditioning_rate=0.0,
)  # fmt: skip
PAPER_MODEL = ModelConfig(
    length_head=False, x0_from="head", embedding_std=0.0, normalize_features=False, mask_padding=True,
    time_embedding=False, self_conditioning=False,
)  # fmt: skip


@dataclasses.dataclass
class Pair:
    """The same weights in both, and one batch."""

    weights: forward.Weights
    denoiser: Denoiser
    ids_BL: Tensor
    image_BF: Tensor
    text_BF: Tensor


def pair(folder: Path, size: DistilBertConfig, model: ModelConfig, L: int = 16) -> Pair:
    torch.manual_seed(0)
    body = DistilBertForMaskedLM(size).eval()
    with torch.no_grad():
        body.vocab_projector.bias.zero_()
    body.save_pretrained(folder)
    weights = forward.Weights(body, F)
    forward.freeze_words(weights)
    model = dataclasses.replace(model, body=str(folder), embeddings=str(folder))
    denoiser = Denoiser(model, size.vocab_size, L, (F, None)).eval()
    copied = [(denoiser.pooled_projection, weights.image_projection)]
    copied += [(denoiser.segments, weights.segment_embedding)] if denoiser.segments is not None else []
    copied += [(denoiser.text_projection, weights.text_projection)] if denoiser.text_projection is not None else []
    for ours, theirs in copied:
        ours.load_state_dict(theirs.state_dict())  # type: ignore[union-attr]
    ids_BL = torch.randint(1, size.vocab_size, (B, L))
    ids_BL[0, 5:] = PAD
    ids_BL[1, 11:] = PAD
    return Pair(weights, denoiser, ids_BL, torch.randn(B, F), torch.randn(B, F))


def draws_of(both: Pair, config: DiffusionConfig) -> Draws:
    shape = (both.denoiser.max_length, both.denoiser.embedding_dim)
    return Draws.at([7, 8, 9], 1, config.timesteps_per_caption, shape, 0, 5, config, torch.device("cpu"))


def ours(both: Pair, config: DiffusionConfig) -> dict[str, Tensor]:
    objective = DiffusionObjective(both.denoiser, config, PAD)
    text_NCF = both.text_BF[:, None] if config.text_guidance else None
    return objective(both.ids_BL[:, None], ImageFeatures(both.image_BF), draws_of(both, config), text_NCF)


def theirs(both: Pair, config: DiffusionConfig, model: ModelConfig) -> dict[str, Tensor]:
    """The reference on the very draws; its rows go K first, ours caption first."""
    draws, K = draws_of(both, config), config.timesteps_per_caption
    t_KB = (draws.t_B * config.num_timesteps).round().long().view(B, K).T
    noise_KBLD = draws.noise.unflatten(0, (B, K)).transpose(0, 1)
    guidance = None
    if config.text_guidance:
        assert draws.text_kept_B is not None
        kept_KB = draws.text_kept_B.view(B, K).T
        guidance = losses.Guidance(config.text_guidance, both.text_BF, kept_KB, kept_KB[0])
    terms = losses.training_terms(
        both.weights,
        both.ids_BL,
        (both.ids_BL != PAD).long() if model.mask_padding else None,
        both.image_BF,
        t_KB,
        noise_KBLD,
        noise_KBLD[0],
        schedule.alpha_bar_closed(config.num_timesteps),
        noising="paper" if config.noising == "as_printed" else "code",
        norm={"l1": "l1", "l2": "l2_squared"}[config.restore_loss],
        reduction="series_sum_sample_mean" if config.loss_reduction == "mean" else config.loss_reduction,
        predict_earlier_by=config.predict_steps_back or None,
        with_x_1=config.first_step_weight > 0,
        guidance=guidance,
        fusion=model.fusion,
        output="head_norm" if model.x0_from == "head" else "last_block",
    )
    named = {"restore": terms.x_t, "rounding": terms.rounding, "loss": terms.total(config.rounding_weight)}
    if config.first_step_weight:
        named["first_step"] = terms.x_1
    divisor = both.denoiser.max_length if config.loss_reduction == "mean" else 1
    return {name: value / divisor for name, value in named.items()}


def assert_alike(both: Pair, config: DiffusionConfig, model: ModelConfig) -> None:
    mine, reference = ours(both, config), theirs(both, config, model)
    assert mine.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    mine["loss"].backward()
    reference["loss"].backward()
    found = {name: p.grad for name, p in both.denoiser.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in both.weights.named_parameters() if p.grad is not None}
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    pairs = gradient_pairs(found, expected)
    assert len(pairs) > 20
    for name, gradient in pairs.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def gradient_pairs(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameter's name -> the reference's gradient of it; every one that the reference trains is there."""
    renamed = {
        "pooled_projection": "image_projection",
        "segments": "segment_embedding",
        "head.0": "body.vocab_transform",
    }
    renamed |= {"head.2": "body.vocab_layer_norm", "body": "body.distilbert"}
    pairs = {}
    assert found["no_image"].abs().max() == 0  # no photo is hidden
    for name in found.keys() - {"no_image"}:
        start = max((old for old in renamed if name.startswith(old + ".")), key=len, default="")
        other = renamed[start] + name[len(start) :] if start else name
        pairs[name] = expected.pop(other)
    assert not [name for name, gradient in expected.items() if gradient.abs().max() > 0], expected.keys()
    return pairs


SETTINGS: dict[str, tuple[dict, dict]] = {
    "the code": ({}, {}),
    "addition (table 4)": ({}, {"fusion": "add"}),
    "all ones for a mask": ({}, {"mask_padding": False}),
    "last block's output": ({}, {"x0_from": "body"}),
    "noise and timesteps of their own": ({"shared_noise": False, "timesteps": "subset"}, {}),
    "as printed: noise": ({"noising": "as_printed"}, {}),
    "as printed: sums, squares": ({"loss_reduction": "printed", "restore_loss": "l2"}, {}),
    "series_sum": ({"loss_reduction": "series_sum"}, {}),
    "our means": ({"loss_reduction": "mean"}, {}),
    "lambda 1 (table 3)": ({"rounding_weight": 1.0}, {}),
    "x_{t-100} (section 5.4)": ({"predict_steps_back": 100}, {}),
    "x_{t-100} without x_1": ({"predict_steps_back": 100, "first_step_weight": 0.0}, {}),
    "x_0 without x_1": ({"first_step_weight": 0.0}, {}),
    "guidance w=0.3 (table 1)": ({"text_guidance": 0.3, "text_drop_rate": 0.4}, {"text_token": True}),
    "guidance, addition": ({"text_guidance": 1.0, "text_drop_rate": 0.4}, {"text_token": True, "fusion": "add"}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_gradients_are_the_papers(name: str, tmp_path: Path) -> None:
    diffusion, model_changes = SETTINGS[name]
    config, model = dataclasses.replace(PAPER, **diffusion), dataclasses.replace(PAPER_MODEL, **model_changes)
    assert_alike(pair(tmp_path, TINY, model), config, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["the code", "addition (table 4)", "guidance w=0.3 (table 1)"])
def test_at_full_distilbert_size(name: str, tmp_path: Path) -> None:
    diffusion, model_changes = SETTINGS[name]
    config, model = dataclasses.replace(PAPER, **diffusion), dataclasses.replace(PAPER_MODEL, **model_changes)
    assert_alike(pair(tmp_path, FULL, model), config, model)


def test_some_texts_are_dropped_and_some_kept(tmp_path: Path) -> None:
    """Else the guidance settings above would not say much."""
    config = dataclasses.replace(PAPER, text_guidance=0.3, text_drop_rate=0.4)
    draws = draws_of(pair(tmp_path, TINY, dataclasses.replace(PAPER_MODEL, text_token=True)), config)
    assert draws.text_kept_B is not None and 0 < draws.text_kept_B.float().mean() < 1


@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_the_inference_loop_gives_the_same_tokens(fusion: str, tmp_path: Path) -> None:
    model = dataclasses.replace(PAPER_MODEL, fusion=fusion)  # type: ignore[arg-type]
    both = pair(tmp_path, TINY, model)
    x_T_BLD = torch.randn(B, 16, 16)
    expected_BL = inference.generate(both.weights, x_T_BLD, both.image_BF, 5, fusion=fusion)

    def denoise(x_BLD: Tensor, t: float, previous_x0_BLD: Tensor | None) -> Tensor:
        return both.denoiser(x_BLD, torch.full((B,), t), ImageFeatures(both.image_BF), previous_x0_BLD)

    with torch.no_grad():
        found_BL = both.denoiser.logits(x0_feedback(denoise, x_T_BLD, 5)).argmax(-1)
    assert found_BL.equal(expected_BL) and len(found_BL.unique()) >= 5


def test_repeated_words_go_alike() -> None:
    for words in (["a", "a", "dog", "dog", "dog", "a"], ["a"], [], ["b", "c", "c"]):
        assert remove_repeats(" ".join(words)).split() == inference.without_repeats_paper(words)


@pytest.mark.parametrize("timesteps", ["shared", "subset"])
def test_timesteps_are_drawn_as_published(timesteps: str) -> None:
    config = dataclasses.replace(PAPER, timesteps=timesteps, timesteps_per_caption=100)  # type: ignore[arg-type]
    shape, cpu = (2, 4), torch.device("cpu")
    draws = [Draws.at([p, p + 1], 2, 100, shape, 0, p, config, cpu) for p in range(0, 40, 2)]
    steps = torch.stack([(d.t_B * 1000).round().long().view(4, 100) for d in draws])
    low, high = (0, 999) if timesteps == "shared" else (1, 1000)
    assert steps.min() >= low and steps.max() <= high and abs(steps.double().mean() - 500) < 15
    rows = steps.flatten(0, 1).sort(dim=1).values
    if timesteps == "shared":
        assert (steps == steps[:, :1]).all() and (rows[:, 1:] == rows[:, :-1]).any()
    else:
        assert not (steps == steps[:, :1]).all() and not (rows[:, 1:] == rows[:, :-1]).any()
    noise_NCKLD = draws[0].noise.view(2, 2, 100, *shape)
    assert (noise_NCKLD == noise_NCKLD[:, :, :1]).all()
    assert not noise_NCKLD[0, 0, 0].equal(noise_NCKLD[0, 1, 0])


def test_the_schedule_is_the_papers() -> None:
    t = torch.arange(1001, dtype=torch.float64) / 1000
    np.testing.assert_allclose(NoiseSchedule("cosine").alpha_bar(t), schedule.alpha_bar_closed(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("constant", "constant"),
        ("linear", "linear"),
        ("log", "log"),
        ("log_steps", "log_of_epoch"),
        ("cosine", "cosine"),
    ],
)
def test_rates_by_epoch_are_the_papers(ours: str, theirs: str) -> None:
    epochs, hold = 15, 7
    config = OptimizerConfig(schedule=ours, warmup_steps=0, hold_steps=hold)  # type: ignore[arg-type]
    for step in range(epochs * hold):
        expected = rules.learning_rate(theirs, step // hold, epochs)
        assert learning_rate(step, epochs * hold, config) == pytest.approx(expected, rel=1e-12)
