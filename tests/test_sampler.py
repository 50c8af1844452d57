"""Samplers on toy denoisers with known answers."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffcap_dist.diffusion.sampler import ddim, unmask, words_to_write, x0_feedback
from diffcap_dist.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule("cosine", 2.0)


def gaussian_denoiser(mean: float, std: float, seen: list[float] | None = None):  # type: ignore[no-untyped-def]
    """E[x0 | x_t] for x0 ~ N(mean, std^2): the exact denoiser of that distribution."""

    def denoise(x_BLD: Tensor, t: float, previous: Tensor | None) -> Tensor:
        if seen is not None:
            seen.append(t)
        alpha_bar = SCHEDULE.alpha_bar(torch.tensor(t, dtype=torch.float64)).item()
        gain = alpha_bar**0.5 * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        return mean + gain * (x_BLD - alpha_bar**0.5 * mean)

    return denoise


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_data_distribution_is_recovered(eta: float) -> None:
    torch.manual_seed(0)
    x_T = torch.randn(20000, 1, 1, dtype=torch.float64)
    fresh = lambda step: torch.randn_like(x_T)  # noqa: E731
    x0 = ddim(gaussian_denoiser(1.0, 0.5), x_T, SCHEDULE, 200, eta=eta, noise=fresh)
    assert x0.mean().item() == pytest.approx(1.0, abs=0.02)
    assert x0.std().item() == pytest.approx(0.5, abs=0.03)


def test_ddim_follows_the_probability_flow() -> None:
    """For Gaussian data the deterministic sampler is the map mean + std x_T, in the limit of many steps."""
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None]
    x0 = ddim(gaussian_denoiser(1.0, 0.5), x_T, SCHEDULE, 2000)
    torch.testing.assert_close(x0, 1.0 + 0.5 * x_T, atol=0.02, rtol=0)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_certain_denoiser_is_believed(steps: int) -> None:
    target = torch.randn(2, 3, 4)
    torch.testing.assert_close(ddim(lambda x, t, p: target, torch.randn(2, 3, 4), SCHEDULE, steps), target)


def test_one_step_of_ddpm_has_the_posterior_variance() -> None:
    """eta = 1 is Ho et al.'s posterior: variance beta-tilde between two times."""
    torch.manual_seed(0)
    target = torch.zeros(50000, 1, 1, dtype=torch.float64)
    seen: list[Tensor] = []

    def denoise(x: Tensor, t: float, previous: Tensor | None) -> Tensor:
        seen.append(x)
        return target

    ddim(denoise, torch.randn_like(target), SCHEDULE, 2, eta=1.0, noise=lambda step: torch.randn_like(target))
    half = SCHEDULE.alpha_bar(torch.tensor(0.5, dtype=torch.float64)).item()
    assert seen[1].var().item() == pytest.approx(1 - half, rel=0.03)  # marginal q(x_1/2 | x_0 = 0)


def test_times_and_time_difference() -> None:
    seen: list[float] = []
    ddim(gaussian_denoiser(0, 1, seen), torch.randn(1, 1, 1), SCHEDULE, 4)
    assert seen == pytest.approx([1.0, 0.75, 0.5, 0.25])
    seen.clear()
    ddim(gaussian_denoiser(0, 1, seen), torch.randn(1, 1, 1), SCHEDULE, 4, time_difference=0.3)
    assert seen == pytest.approx([1.0, 1.0, 0.8, 0.55])


def test_self_conditioning_sees_the_estimate_before() -> None:
    previous: list[Tensor | None] = []

    def denoise(x: Tensor, t: float, p: Tensor | None) -> Tensor:
        previous.append(p)
        return torch.full_like(x, float(len(previous)))

    ddim(denoise, torch.randn(1, 1, 1), SCHEDULE, 3)
    assert previous[0] is None
    assert [p.item() for p in previous[1:] if p is not None] == [1.0, 2.0]


def test_x0_feedback_is_iteration() -> None:
    drafts: list[tuple[int, float]] = []
    x = x0_feedback(
        lambda x, t, p: x / 2, torch.full((1, 1, 1), 32.0), 5, on_step=lambda s, t, x: drafts.append((s, t))
    )
    assert x.item() == 1.0
    assert [step for step, _ in drafts] == [0, 1, 2, 3, 4]


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        ddim(gaussian_denoiser(0, 1), torch.zeros(1, 1, 1), SCHEDULE, 0)
    with pytest.raises(ValueError, match="fresh noise"):
        ddim(gaussian_denoiser(0, 1), torch.zeros(1, 1, 1), SCHEDULE, 2, eta=0.5)


# ---- masked diffusion ----

MASK = 9


def certain(words_BL: Tensor, confidence_BL: Tensor, seen: list[Tensor] | None = None):  # type: ignore[no-untyped-def]
    """Predicts ``words_BL``, each with its given probability; the rest of it goes to word 8."""

    def predict(ids_BL: Tensor, masked_BL: Tensor, t: float) -> Tensor:
        assert torch.equal(masked_BL, ids_BL == MASK)
        if seen is not None:
            seen.append(ids_BL.clone())
        probability = torch.full((*words_BL.shape, 9), 1e-9)
        probability.scatter_(-1, words_BL[..., None], confidence_BL[..., None])
        probability[..., 8] = 1 - confidence_BL
        return probability.log()[masked_BL]

    return predict


@pytest.mark.parametrize("revise", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_certain_predictor_is_believed_where_it_may_write(steps: int, revise: bool) -> None:
    words = torch.randint(0, 8, (4, 6))
    open_BL = torch.tensor([[True] * n + [False] * (6 - n) for n in (6, 4, 1, 0)])
    given = torch.full((4, 6), 7)
    ids = unmask(certain(words, torch.full((4, 6), 0.9)), given, open_BL, MASK, steps, revise=revise)
    assert torch.equal(ids, torch.where(open_BL, words, given))


def test_the_most_confident_words_are_written_first() -> None:
    words, confidence = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0.6, 0.9, 0.7, 0.8]])
    seen: list[Tensor] = []
    unmask(certain(words, confidence, seen), torch.zeros(1, 4).long(), torch.ones(1, 4, dtype=torch.bool), MASK, 4)
    M = MASK
    assert [ids.tolist()[0] for ids in seen] == [[M, M, M, M], [M, 2, M, M], [M, 2, M, 4], [M, 2, 3, 4]]


@pytest.mark.parametrize(
    ("confidence", "steps", "written"),
    [
        ([0.95, 0.96, 0.5, 0.97, 0.6], 3, [3, 1, 1]),  # the sure ones together; a word is left for each step to come
        ([0.95, 0.96, 0.92, 0.97, 0.98], 3, [3, 1, 1]),
        ([0.5, 0.6, 0.7, 0.8, 0.85], 3, [1, 2, 2]),  # none is sure: the last steps, which see most, write two
        ([0.5, 0.6, 0.95, 0.8, 0.85], 2, [2, 3]),
        ([0.95, 0.6], 7, [1, 1]),  # one a step, and no step more than there are words
        ([0.5, 0.6, 0.7, 0.8], 1, [4]),
    ],
)
def test_how_many_words_a_step_writes(confidence: list[float], steps: int, written: list[int]) -> None:
    seen: list[Tensor] = []
    words = torch.arange(len(confidence))[None]
    open_BL = torch.ones_like(words, dtype=torch.bool)
    ids = unmask(certain(words, torch.tensor([confidence]), seen), words * 0, open_BL, MASK, steps, revise=False)
    masked = [int((ids == MASK).sum()) for ids in seen] + [0]
    assert [before - after for before, after in itertools.pairwise(masked)] == written
    assert torch.equal(ids, words)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_every_word_is_written_in_time(words: int, sure: int, steps: int) -> None:
    """However sure they are: no step writes nothing before the last word, and none is left after the last step."""
    left = torch.tensor([[words]])
    for step in range(steps):
        now = words_to_write(left, left.clamp(max=sure), steps - step)
        assert 0 <= now <= left and (now > 0) == (left > 0)
        assert left - now >= min(steps - step, left) - 1 or left == 0  # something is there for the steps to come
        left = left - now
    assert left == 0


@pytest.mark.parametrize("revise", [True, False])
def test_a_word_of_little_confidence_is_written_again(revise: bool) -> None:
    """Word 0 is written first, at 0.5; the others are then surer, and in their sight it becomes another word."""

    def predict(ids_BL: Tensor, masked_BL: Tensor, t: float) -> Tensor:
        alone = [[0.5, 0.4, 0.1], [0.3, 0.4, 0.3], [0.3, 0.4, 0.3]]
        together = [[0.2, 0.1, 0.7], [0.05, 0.9, 0.05], [0.1, 0.8, 0.1]]
        return torch.tensor([alone if masked_BL.all() else together]).log()[masked_BL]

    seen: list[list[int]] = []
    unmask(
        predict,
        torch.zeros(1, 3).long(),
        torch.ones(1, 3, dtype=torch.bool),
        MASK,
        3,
        revise=revise,
        on_step=lambda step, t, ids_BL, confidence_BL: seen.append(ids_BL[0].tolist()),
    )
    assert seen == [[0, 1, 1], [0, 1, 1], [2, 1, 1] if revise else [0, 1, 1]]


def test_choice_makes_a_draw() -> None:
    probability = torch.tensor([0.7, 0.2, 0.1])
    predict = lambda ids_BL, masked_BL, t: probability.log().expand(*ids_BL.shape, 3)[masked_BL]  # noqa: E731
    torch.manual_seed(0)
    gumbel = -torch.log(-torch.log(torch.rand(20000, 1, 3)))
    ids = unmask(
        predict, torch.zeros(20000, 1).long(), torch.ones(20000, 1, dtype=torch.bool), MASK, 1, choice=lambda s: gumbel
    )
    torch.testing.assert_close(ids.flatten().bincount() / 20000, probability, atol=0.015, rtol=0)
