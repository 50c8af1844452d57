"""Training on a reward: what is drawn, what is hidden, and whose gradient it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from diffcap_dist.config import ConfigError, DiffusionConfig, load_config
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.diffusion.length import Known, foretold_lengths
from diffcap_dist.diffusion.objective import DiffusionObjective, Draws
from diffcap_dist.diffusion.reward import RewardObjective, draft, draw_words
from diffcap_dist.evaluation.captioner import load_captioner
from diffcap_dist.evaluation.reward import CiderReward
from diffcap_dist.evaluation.scores import cider_d, tokenize
from diffcap_dist.run_dir import RunDir
from diffcap_dist.train import Metrics
from diffcap_dist.training.checkpoint import TrainState
from diffcap_dist.training.distributed import Ranks
from tests.conftest import launch
from tests.test_objective import CPU, L, V, captions_of, features, small_denoiser

PAD, SEP, MASK, WORD = 0, 1, 2, 7
CONFIG = DiffusionConfig(kind="masked", reward_samples=8)


def share_of_a_word(ids_SNL: Tensor, references: Sequence[Sequence[str]]) -> Tensor:
    return (ids_SNL == WORD).float().sum(-1) / (ids_SNL > MASK).sum(-1).clamp(min=1)


def objective_of(reward=share_of_a_word, config: DiffusionConfig = CONFIG, **changes: object) -> RewardObjective:
    denoiser = small_denoiser(length_head=True, **changes)
    return RewardObjective(denoiser, config, PAD, MASK, SEP, {PAD, SEP, MASK}, reward).train()


def draws_of(objective: RewardObjective, positions: list[int], seed: int = 0) -> Draws:
    return Draws.at(positions, 1, 1, objective.noise_shape, seed, 0, objective.config, CPU)


def terms_of(objective: RewardObjective, positions: list[int], ids_NCL: Tensor | None = None, seed: int = 0) -> dict:
    photos = len(positions)
    ids_NCL = captions_of([L] * photos) if ids_NCL is None else ids_NCL
    return objective(ids_NCL, features(photos=photos), draws_of(objective, positions, seed), references=[[]] * photos)


def test_words_are_drawn_as_often_as_their_probability_says() -> None:
    logits_TV = torch.tensor([[-torch.inf, 0.0, 1.0, 2.0], [0.0, -torch.inf, -3.0, 0.5]])
    noise_ST = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    words_ST = draw_words(logits_TV, noise_ST)
    shares_TV = torch.stack([(words_ST == word).float().mean(0) for word in range(4)], dim=1)
    torch.testing.assert_close(shares_TV, logits_TV.softmax(-1), atol=0.01, rtol=0)
    assert (shares_TV[logits_TV == -torch.inf] == 0).all()
    at_the_ends = draw_words(logits_TV, torch.tensor([[-9.0, -9.0], [9.0, 9.0]]))
    assert at_the_ends.tolist() == [[1, 0], [3, 3]]


def test_a_draft_hides_the_least_sure_share_of_its_words() -> None:
    known = Known.of_lengths(torch.tensor([[6], [4], [1]]), 6, PAD, SEP)
    logits_TV = torch.zeros(int(known.open_BL.sum()), V)
    sureness_T = torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0, 9.0, 7.0, 8.0])
    logits_TV[torch.arange(8), torch.arange(8) + 10] = sureness_T
    ids_BL, hidden_BL = draft(known, logits_TV, torch.tensor([0.4, 1.0, 0.5]))
    assert ids_BL.tolist() == [[10, 11, 12, 13, 14, SEP], [15, 16, 17, SEP, PAD, PAD], [SEP, *[PAD] * 5]]
    assert hidden_BL[0].tolist() == [False, True, False, True, False, False]  # 3 of 5 stay
    assert hidden_BL[1].tolist() == [True, True, True, False, False, False]
    assert not hidden_BL[2].any()


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """Of one photo, everything hidden: over many draws, beside the reward's exact expectation."""
    objective = objective_of(config=dataclasses.replace(CONFIG, reward_samples=4000))
    objective.network.requires_grad_(False)
    weight = objective.network.output_projection.weight.requires_grad_(True)
    image, ids_NCL = features(photos=1), captions_of([L])
    draws = dataclasses.replace(draws_of(objective, [5]), t_B=torch.ones(1))
    objective(ids_NCL, image, draws, references=[[]])["loss"].backward()
    drawn, weight.grad = weight.grad, None

    lengths_11 = foretold_lengths(objective.network.length_logits(image))
    known = Known.of_lengths(lengths_11, L, PAD, SEP)
    logits_TV = objective._word_logits(known.ids_BL, known.open_BL, torch.ones(1), image)
    (-logits_TV.softmax(-1)[:, WORD].mean()).backward()
    assert drawn is not None and weight.grad is not None
    cosine = torch.nn.functional.cosine_similarity(drawn.flatten(), weight.grad.flatten(), dim=0)
    assert cosine > 0.9
    assert 0.8 < drawn.norm() / weight.grad.norm() < 1.25


def test_training_raises_the_reward_and_a_reward_that_is_the_same_for_all_changes_nothing() -> None:
    objective = objective_of()
    optimizer = torch.optim.Adam(objective.parameters(), 3e-3)
    rewards = []
    for step in range(60):
        terms = terms_of(objective, [8 * step + i for i in range(8)])
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        rewards.append(terms["reward"].item())
    assert rewards[0] < 0.2 and rewards[-1] > 0.9
    indifferent = objective_of(lambda ids_SNL, references: torch.ones(ids_SNL.shape[:2]))
    terms_of(indifferent, [0, 1, 2])["loss"].backward()
    assert all((p.grad is None) or bool((p.grad == 0).all()) for p in indifferent.parameters())


def test_a_photo_is_drawn_for_alike_in_every_batch_and_its_own_caption_is_not_looked_at() -> None:
    objective = objective_of()
    photos = features(photos=4)
    draws = draws_of(objective, [0, 1, 2, 3])
    seen: list[Tensor] = []
    objective.reward = lambda ids_SNL, references: seen.append(ids_SNL) or share_of_a_word(ids_SNL, references)
    objective(captions_of([L] * 4), photos, draws, references=[[]] * 4)["loss"].backward()
    together = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
    objective.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        part = type(photos)(photos.pooled_NF[half], photos.patches_NPF[half])  # type: ignore[index]
        draws = draws_of(objective, [0, 1, 2, 3][half])
        (objective(captions_of([3, 1]), part, draws, references=[[]] * 2)["loss"] / 2).backward()
    apart = [p.grad for p in objective.parameters() if p.grad is not None]
    torch.testing.assert_close(seen[0], torch.cat(seen[1:], dim=1))
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-4)
    assert not (seen[0] == MASK).any() and ((seen[0] == SEP).sum(-1) == 1).all()
    assert (seen[0] != seen[0][:1]).any()


def test_in_evaluation_it_is_the_plain_objective() -> None:
    objective = objective_of().eval()
    plain = DiffusionObjective(objective.network, CONFIG, PAD, MASK)
    assert objective.noise_shape == plain.noise_shape
    draws = Draws.at([0, 1, 2], 1, 1, plain.noise_shape, 0, 0, CONFIG, CPU)
    given = (captions_of([L, 4, 1]), features(), draws)
    assert objective(*given)["loss"] == plain(*given)["loss"]


def test_the_reward_is_cider_d_with_the_idf_of_the_training_captions() -> None:
    training = [["a red circle", "the red circle"], ["a blue square"], ["a dog on grass", "a dog"]]
    tokenizer = CaptionTokenizer.from_captions([text for texts in training for text in texts])
    reward = CiderReward(tokenizer, training)
    drawn = [["a red circle", "a blue dog", "a dog"], ["a dog", "a blue square", "a dog on grass"]]
    ids_SNL = torch.stack([torch.from_numpy(tokenizer.encode(texts, 6)[0]) for texts in drawn])
    reward_SN = reward(ids_SNL, training)
    for texts, found_N in zip(drawn, reward_SN):
        expected = cider_d([tokenize(t) for t in texts], [[tokenize(r) for r in refs] for refs in training])
        assert found_N.tolist() == pytest.approx(expected)
    assert reward(ids_SNL[:, 2:], training[2:]).tolist() == reward_SN[:, 2:].tolist()  # not of the batch's
    with pytest.raises(ValueError, match="without references"):
        reward(ids_SNL[:, :1], [[]])
    with pytest.raises(ValueError, match="captions of 3 photos, references of 2"):
        reward(ids_SNL, training[:2])


class Bar(tqdm):
    def set_postfix(self, ordered_dict=None, refresh=True, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.shown = dict(ordered_dict)


def test_the_bar_of_a_reward_run_leaves_out_the_loss_which_means_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffcap_dist.train.distributed.mean", lambda values, device: values)  # one rank, no group
    metrics = Metrics(RunDir(tmp_path), Ranks(0, 0, 1, CPU))
    bar = Bar(total=9, disable=True)
    metrics.training(TrainState(step=1), {"reward": 3.5, "loss": -0.1}, 1.0, 1e-3, bar)
    assert bar.shown["reward"] == "3.500" and "loss" not in bar.shown
    metrics.training(TrainState(step=2), {"rounding": 3.0, "loss": 2.0}, 1.0, 1e-3, bar)
    assert bar.shown["loss"] == "2.000"
    assert [record["loss"] for record in RunDir(tmp_path).read_metrics()] == [pytest.approx(-0.1), 2.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["diffusion.reward_samples=1"], "at least 2 captions to compare"),
        (["diffusion.reward_samples=4", "model.length_head=false"], "foretells lengths"),
        (["diffusion.reward_samples=4", "diffusion.kind=continuous"], "masked diffusion"),
        (["diffusion.reward_samples=4", "model.kind=autoregressive"], "masked diffusion"),
        (["diffusion.reward_samples=4", "data.captions_per_image=5"], "captions_per_image=1"),
        (["diffusion.reward_samples=4", "data.flip_rate=0.5", "data.features="], "flip_rate=0"),
        (["diffusion.reward_samples=4", "diffusion.dynamic_rounding=1"], "dynamic_rounding=0"),
        (["diffusion.reward_samples=4", "diffusion.image_drop_rate=0.1"], "image_drop_rate=0"),
        (["diffusion.reward_samples=4", "training.early_stop_ratio=1"], "early_stop_ratio=0"),
        (["model.shifted=true", "model.kind=autoregressive"], "set model.kind=denoiser"),
    ],
)
def test_what_no_reward_goes_with_is_refused(words: list[str], message: str, tiny_config: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tiny_config, words)


@pytest.mark.slow
def test_a_second_stage_is_the_same_on_two_ranks_at_stage_3_and_after_a_restart(
    tiny_config: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    launch(1, "diffcap_dist.train", str(tiny_config), "training.num_steps=4", f"run_dir={first}")
    fresh = ["diffusion.reward_samples=4", f"run_dir={tmp_path / 'fresh'}"]
    with pytest.raises(AssertionError, match=r"captions of fresh weights are equally bad; set model\.init_from"):
        launch(1, "diffcap_dist.train", str(tiny_config), *fresh)
    words = [f"model.init_from={first}", "diffusion.reward_samples=4", f"data.tokenizer={first}/tokenizer"]
    words += ["training.validate_every=2", "training.save_every=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    zero_3 = "training.zero_stage=3"
    launch(2, "diffcap_dist.train", str(tiny_config), *words, zero_3, "training.num_steps=4", f"run_dir={whole}")
    for steps in (2, 4):
        settings = [*words, "training.zero_stage=0", f"training.num_steps={steps}", f"run_dir={parts}"]
        launch(1, "diffcap_dist.train", str(tiny_config), *settings)
    found = []
    for run in (whole, parts):
        records = [r for r in RunDir(run).read_metrics() if r["kind"] in ("training", "validation")]
        found.append([r.get("val_loss", r.get("reward")) for r in records] + [records[-1]["cider_d"]])
    assert len(found[0]) == 7
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    load_captioner(RunDir(whole).export)
