"""The control: the cache changes nothing, words see what they may, beam search finds the best caption there is."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffcap_dist.config import DiffusionConfig, ModelConfig
from diffcap_dist.diffusion.objective import AutoregressiveObjective, Draws
from diffcap_dist.model.autoregressive import AutoregressiveModel
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures

V, L, PAD, END = 7, 5, 0, 3
MODEL = ModelConfig(kind="autoregressive", width=32, num_layers=2, num_heads=2, ffn_width=48, embedding_dim=24)


def small_model(patches: int | None, length: int = L) -> AutoregressiveModel:
    torch.manual_seed(0)
    model = AutoregressiveModel(MODEL, V, length, (10, patches)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # fresh weights are so small that neither the photo nor the words before matter
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.4 if "projection" in name else 0.3, generator=generator)
    return model


def photos(patches: int | None, count: int = 3) -> ImageFeatures:
    generator = torch.Generator().manual_seed(1)
    pooled = torch.randn(count, 10, generator=generator)
    return ImageFeatures(pooled, torch.randn(count, 4, patches, generator=generator) if patches else None)


def log_probabilities(model: AutoregressiveModel, ids_BL: Tensor, image: ImageFeatures, never: list[int]) -> Tensor:
    logits_BLV = model.logits(model(ids_BL, image, ids_BL != PAD))
    logits_BLV[..., [PAD, *never]] = -torch.inf
    return logits_BLV.log_softmax(-1)


@pytest.mark.parametrize("patches", [None, 7])
def test_the_cache_changes_nothing(patches: int | None) -> None:
    """What is foretold word by word is what one forward over the whole caption foretells."""
    model, image = small_model(patches), photos(patches)
    ids_BL = torch.randint(4, V, (3, L), generator=torch.Generator().manual_seed(2))
    ids_BL[:, -1] = END
    seen: list[Tensor] = []

    def choose(position: int, logits_BV: Tensor) -> Tensor:
        seen.append(logits_BV.log_softmax(-1))
        return ids_BL[:, position]

    assert torch.equal(model.write(image, END, PAD, never=[1], choose=choose), ids_BL)
    whole_BLV = log_probabilities(model, ids_BL, image, [1])
    torch.testing.assert_close(torch.stack(seen, dim=1)[:, :-1], whole_BLV[:, :-1], atol=1e-5, rtol=1e-5)


def test_a_greedy_caption_is_the_likeliest_words_and_ends() -> None:
    model, image = small_model(None, 9), photos(None, 4)
    ids_BL = model.write(image, END, PAD, never=[1])
    best_BL = log_probabilities(model, ids_BL, image, [1]).argmax(-1)
    for ids, best in zip(ids_BL.tolist(), best_BL.tolist()):
        end = ids.index(END)
        assert ids[:end] == best[:end] and set(ids[end + 1 :]) <= {PAD}


@pytest.mark.parametrize("patches", [None, 7])
def test_a_word_sees_its_photo_and_the_words_before_it(patches: int | None) -> None:
    model, image = small_model(patches), photos(patches)
    ids_BL = torch.randint(1, V, (3, L), generator=torch.Generator().manual_seed(2))
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    before = model(ids_BL, image, mask_BL)
    changed_BL = ids_BL.clone()
    changed_BL[:, 2] = (ids_BL[:, 2] % (V - 1)) + 1
    after = model(changed_BL, image, mask_BL)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3:] - before[:, 3:]).abs().amax(dim=(1, 2)).min() > 1e-4
    other = ImageFeatures(image.pooled_NF.clone(), image.patches_NPF)
    other.pooled_NF[1] *= -1  # a constant would not pass its LayerNorm
    seen = (model(ids_BL, other, mask_BL) - before).abs().amax(dim=2)
    assert seen[1].min() > 1e-5 and seen[[0, 2]].max() == 0


def test_beam_search_finds_the_best_caption() -> None:
    """With as many beams as there are captions: the one of the highest mean log-probability, by trying them all."""
    length = 3
    model, image = small_model(None, length), photos(None, 2)
    words = [w for w in range(V) if w not in (PAD, END)]
    captions = [(*c, END) for n in range(length) for c in itertools.product(words, repeat=n)]
    rows = torch.tensor([[*c, *[PAD] * (length - len(c))] for c in captions])
    found_BL = model.write(image, END, PAD, num_beams=len(captions))
    greedy_BL = model.write(image, END, PAD)
    for photo in range(2):
        one = ImageFeatures(image.pooled_NF[photo : photo + 1])
        p = log_probabilities(model, rows, one, []).gather(-1, rows[..., None])[..., 0]
        p[:, length - 1] = 0  # there the end is certain
        means = torch.stack([p[i, : len(c)].mean() for i, c in enumerate(captions)])
        best = captions[int(means.argmax())]
        assert found_BL[photo].tolist() == rows[captions.index(best)].tolist()
        of_greedy = captions.index(tuple(w for w in greedy_BL[photo].tolist() if w != PAD))
        assert means[of_greedy] <= means.max()
    assert torch.equal(model.write(image, END, PAD, num_beams=1), greedy_BL)


def test_the_loss_is_each_words_given_those_before() -> None:
    model, image = small_model(None), photos(None, 2)
    ids_NCL = torch.tensor(
        [[[4, 5, END, PAD, PAD], [6, END, PAD, PAD, PAD]], [[4, 4, 5, 6, END], [5, END, PAD, PAD, PAD]]]
    )
    objective = AutoregressiveObjective(model, DiffusionConfig(), PAD)
    draws = Draws.at([0, 1], 2, 1, objective.noise_shape, 0, 0, DiffusionConfig(), torch.device("cpu"))
    loss = objective(ids_NCL, image, draws)["loss"]
    total = torch.tensor(0.0)
    for photo, captions in enumerate(ids_NCL):
        one = ImageFeatures(image.pooled_NF[photo : photo + 1])
        for ids in captions:
            logits = model.logits(model(ids[None], one, ids[None] != PAD))[0]
            total = total + F.cross_entropy(logits, ids, ignore_index=PAD, reduction="sum")
    torch.testing.assert_close(loss, total / (4 * L))
    parts = [
        objective(
            ids_NCL[i : i + 1],
            ImageFeatures(image.pooled_NF[i : i + 1]),
            Draws.at([i], 2, 1, (), 0, 0, DiffusionConfig(), torch.device("cpu")),
        )["loss"]
        for i in range(2)
    ]
    torch.testing.assert_close(sum(parts) / 2, loss)  # however a batch is cut over ranks


def test_a_shifted_denoiser_begins_as_the_control_whose_weights_it_has() -> None:
    """Before any word, both see the begin and the photo alone; then the denoiser looks both ways."""
    control = small_model(7)
    torch.manual_seed(3)
    config = dataclasses.replace(control.config, time_embedding=False, length_head=True)
    denoiser = Denoiser(config, V, L, (10, 7))
    missing = denoiser.load_state_dict(control.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"length_head"}
    ids_BL, image = torch.randint(4, V, (2, L)), photos(7, 2)
    nothing_BL = torch.zeros(2, L, dtype=torch.bool)
    t_B = torch.ones(2)
    first_BLD = denoiser(denoiser.embed(ids_BL), t_B, image, mask_BL=nothing_BL)
    torch.testing.assert_close(first_BLD[:, 0], control(ids_BL, image, ~nothing_BL)[:, 0])
    whole_BLD = denoiser(denoiser.embed(ids_BL), t_B, image, mask_BL=~nothing_BL)
    other_BL = ids_BL.clone()
    other_BL[:, -1] = ids_BL[:, -1] - 1
    changed_BLD = denoiser(denoiser.embed(other_BL), t_B, image, mask_BL=~nothing_BL)
    assert ((whole_BLD - changed_BLD).abs().amax(dim=-1) > 1e-5).all()  # every place sees the last word
    cut_BLD = denoiser(denoiser.embed(ids_BL[:, :3]), t_B, image, mask_BL=~nothing_BL[:, :3])
    padded_BL = torch.arange(L)[None].expand(2, -1) < 3
    torch.testing.assert_close(cut_BLD, denoiser(denoiser.embed(ids_BL), t_B, image, mask_BL=padded_BL)[:, :3])
