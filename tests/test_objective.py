"""The loss terms against a plain, materialised reference; the denoiser's promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffcap_dist.config import DiffusionConfig, ModelConfig
from diffcap_dist.diffusion import objective as module
from diffcap_dist.diffusion.objective import (
    DiffusionObjective,
    Draws,
    position_noise,
    restore_loss,
    rounding_loss,
    splitmix64,
)
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures, resultant_length

L, V, N = 6, 40, 3
CPU = torch.device("cpu")
SMALL = ModelConfig(width=32, num_layers=2, num_heads=2, ffn_width=48, embedding_dim=24, length_head=False)


def small_denoiser(patches: int | None = 7, **changes: object) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(dataclasses.replace(SMALL, **changes), V, L, (10, patches))  # type: ignore[arg-type]


def features(patches: int | None = 7, photos: int = N) -> ImageFeatures:
    generator = torch.Generator().manual_seed(1)
    pooled = torch.randn(photos, 10, generator=generator)
    return ImageFeatures(pooled, torch.randn(photos, 4, patches, generator=generator) if patches else None)


def draws_for(positions: list[int], rows: int, denoiser: Denoiser, config: DiffusionConfig, step: int = 0) -> Draws:
    K = config.timesteps_per_caption
    return Draws.at(positions, rows // K, K, (L, denoiser.embedding_dim), 0, step, config, CPU)


# ---- rounding ----


@pytest.mark.parametrize("path", ["one piece", "fused", "chunks"])
def test_rounding_equals_materialised_cross_entropy(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path != "one piece":
        monkeypatch.setattr(module, "SMALL_LOGITS", 0)
    if path == "chunks":
        monkeypatch.setattr(module, "CHUNK_TOKENS", 5)
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    torch.manual_seed(0)
    hidden = torch.randn(4, L, 24, requires_grad=True)
    table = torch.randn(V, 24, requires_grad=True)
    ids = torch.randint(0, V, (4, L))
    loss = rounding_loss(hidden, table, ids)
    got = torch.autograd.grad(loss, (hidden, table))
    logits = hidden.flatten(0, 1) @ table.T
    reference = -logits.log_softmax(-1)[torch.arange(4 * L), ids.flatten()].mean()
    torch.testing.assert_close(loss, reference)
    for mine, theirs in zip(got, torch.autograd.grad(reference, (hidden, table))):
        torch.testing.assert_close(mine, theirs)


def test_rounding_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens x vocabulary would be 2048 x 20000 floats (164 MB); no tensor near that size is ever made."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    monkeypatch.setattr(module, "CHUNK_TOKENS", 128)
    hidden = torch.randn(128, 16, 8, requires_grad=True)
    with Watch():
        rounding_loss(hidden, torch.randn(20000, 8), torch.randint(0, 20000, (128, 16))).backward()
    assert largest <= 128 * 20000


def test_restore_loss() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(restore_loss(a, b, "l1"), (a - b).abs().mean())
    torch.testing.assert_close(restore_loss(a, b, "l2"), ((a - b) ** 2).mean())


# ---- the whole objective ----


@pytest.mark.parametrize("x0_from", ["body", "logits"])
@pytest.mark.parametrize("self_conditioning", [True, False])
def test_objective_equals_a_plain_reference(x0_from: str, self_conditioning: bool) -> None:
    """One row at a time, features repeated, logits materialised: the same terms and gradients."""
    config = DiffusionConfig(
        kind="continuous", restore_weight=0.7, first_step_weight=0.2, rounding_weight=0.3, restore_loss="l1",
        timesteps_per_caption=3, self_conditioning_rate=float(self_conditioning), image_drop_rate=0.4,
    )  # fmt: skip
    denoiser = small_denoiser(x0_from=x0_from, self_conditioning=self_conditioning)
    ids_NCL = torch.randint(0, V, (N, 2, L))
    draws = draws_for([5, 6, 7], 6, denoiser, config)
    terms = DiffusionObjective(denoiser, config, pad_id=0)(ids_NCL, features(), draws)
    terms["loss"].backward()
    mine = {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}
    denoiser.zero_grad()
    reference = plain_reference(denoiser, config, ids_NCL, features(), draws)
    reference["loss"].backward()
    for name, value in reference.items():
        torch.testing.assert_close(terms[name], value, msg=lambda m, name=name: f"{name}: {m}")
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, dict(denoiser.named_parameters())[name].grad, rtol=1e-4, atol=1e-6)


def test_training_goes_through_the_times_that_the_knots_say() -> None:
    knots, plain = (
        DiffusionConfig(kind="continuous", schedule_knots=[0.0, 0.7, 1.0]),
        DiffusionConfig(kind="continuous"),
    )
    denoiser = small_denoiser()
    ids_NCL = torch.randint(0, V, (N, 1, L), generator=torch.Generator().manual_seed(5))
    draws = draws_for(list(range(N)), 1, denoiser, plain)
    spread = dataclasses.replace(draws, t_B=torch.where(draws.t_B < 0.5, draws.t_B * 1.4, 0.4 + draws.t_B * 0.6))
    found = DiffusionObjective(denoiser, knots, PAD)(ids_NCL, features(), draws)["loss"]
    torch.testing.assert_close(found, DiffusionObjective(denoiser, plain, PAD)(ids_NCL, features(), spread)["loss"])


def plain_reference(
    denoiser: Denoiser, config: DiffusionConfig, ids_NCL: Tensor, image: ImageFeatures, draws: Draws
) -> dict[str, Tensor]:
    from diffcap_dist.diffusion.schedule import NoiseSchedule

    schedule, table = NoiseSchedule(config.schedule, config.noise_scale), denoiser.embedding_matrix()
    rows_per_photo = len(draws.t_B) // len(ids_NCL)
    timesteps = rows_per_photo // ids_NCL.shape[1]
    sums = {"rounding": 0.0, "restore": 0.0, "first_step": 0.0}
    for row in range(len(draws.t_B)):
        photo = row // rows_per_photo
        caption = (row % rows_per_photo) // (rows_per_photo // ids_NCL.shape[1])
        ids = ids_NCL[photo, caption]
        seen = ImageFeatures(image.pooled_NF[photo : photo + 1], image.patches_NPF[photo : photo + 1])  # type: ignore
        hide, noise = draws.image_dropped_N[photo : photo + 1], draws.noise[row]

        def estimate(t: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
            alpha_bar = schedule.alpha_bar(t)
            x = alpha_bar.sqrt() * table[ids] + (1 - alpha_bar).sqrt() * noise  # noqa: B023
            hidden = denoiser(x[None], t[None], seen, previous, hide)  # noqa: B023
            scale = 1.0 if denoiser.config.x0_from == "body" else denoiser.embedding_dim**-0.5
            logits = hidden[0] * scale @ table.T
            return (hidden if denoiser.config.x0_from == "body" else (logits.softmax(-1) @ table)[None]), logits

        previous = None
        if draws.self_condition and denoiser.config.self_conditioning:
            previous = estimate(draws.t_B[row], None)[0].detach()
        x0_hat, logits = estimate(draws.t_B[row], previous)
        x1_hat, _ = estimate(torch.tensor(1 / config.num_timesteps), None)
        sums["rounding"] += F.cross_entropy(logits, ids)  # type: ignore[assignment]
        sums["restore"] += (x0_hat[0] - table[ids]).abs().mean()  # type: ignore[assignment]
        if row % timesteps == 0:  # the x_1 term stands once per caption
            sums["first_step"] += timesteps * (x1_hat[0] - table[ids]).abs().mean()  # type: ignore[assignment]
    means: dict[str, Tensor] = {name: torch.as_tensor(total) / len(draws.t_B) for name, total in sums.items()}
    means["loss"] = 0.3 * means["rounding"] + 0.7 * means["restore"] + 0.2 * means["first_step"]
    return means


# ---- draws ----


def test_draws_are_a_function_of_the_position_alone() -> None:
    config = DiffusionConfig(image_drop_rate=0.5)
    denoiser = small_denoiser()
    together = draws_for([8, 9, 10, 11], 2, denoiser, config, step=4)
    apart = [draws_for([p], 2, denoiser, config, step=4) for p in (8, 9, 10, 11)]
    for name in ("t_B", "noise", "image_dropped_N"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(d, name) for d in apart]))
    assert {d.self_condition for d in apart} == {together.self_condition}


def test_times_cover_the_interval_evenly() -> None:
    config, denoiser = DiffusionConfig(), small_denoiser()
    t_B = draws_for(list(range(700, 828)), 2, denoiser, config).t_B
    gaps = t_B.sort().values.diff()
    assert t_B.min() < 0.02 and t_B.max() > 0.98
    assert gaps.max() < 4 / 256  # independent uniform draws would leave about 6 / 256


@pytest.mark.parametrize("device", [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])])
def test_noise_is_standard_normal_and_differs(device: torch.device) -> None:
    """In each place and in each row: their share below a level (the masks are made of that), and no correlation."""
    noise_NI = position_noise(0, "noise", list(range(4000)), (7, 9), device).cpu().flatten(1)
    assert noise_NI.shape == (4000, 63) and noise_NI.dtype == torch.float32 and noise_NI.isfinite().all()
    for level in (-2.0, -1.0, 0.0, 0.5, 1.5):
        share = torch.special.ndtr(torch.tensor(level)).item()
        error = (share * (1 - share)) ** 0.5
        assert abs((noise_NI < level).double().mean().item() - share) < 4 * error / noise_NI.numel() ** 0.5
        for axis in (0, 1):  # five deviations: 63 and 4,000 shares
            off = ((noise_NI < level).double().mean(axis) - share).abs().max().item()
            assert off < 5 * error / noise_NI.shape[axis] ** 0.5
    correlation = torch.corrcoef(noise_NI.T) - torch.eye(63)
    assert correlation.abs().max() < 5 / 4000**0.5
    rows = torch.corrcoef(noise_NI[:200]) - torch.eye(200)
    assert rows.abs().max() < 5.5 / 63**0.5
    other_NI = position_noise(0, "other", list(range(4000)), (7, 9), device).cpu().flatten(1)
    assert abs((noise_NI * other_NI).mean().item()) < 4 / noise_NI.numel() ** 0.5
    torch.testing.assert_close(noise_NI, position_noise(0, "noise", list(range(4000)), (63,), CPU))


def test_splitmix64_is_the_published_one() -> None:
    """The first numbers from seed 1234567, as in the reference lists of its implementations."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    got = splitmix64(torch.tensor(1234567), torch.arange(1, 6)).tolist()
    assert [number % (1 << 64) for number in got] == expected


# ---- the denoiser ----


@pytest.mark.parametrize("fusion, patches", [("concat", 7), ("concat", None), ("add", None)])
def test_the_denoiser_sees_its_photo_and_only_its_photo(fusion: str, patches: int | None) -> None:
    denoiser = small_denoiser(patches, fusion=fusion).eval()
    x, t = torch.randn(2 * N, L, 24), torch.rand(2 * N)
    image = features(patches)
    before = denoiser(x, t, image)
    changed = ImageFeatures(image.pooled_NF.clone(), image.patches_NPF)
    changed.pooled_NF[1] += torch.randn(10)
    after = denoiser(x, t, changed)
    rows = (before - after).abs().amax(dim=(1, 2)) > 1e-6
    assert rows.tolist() == [False, False, True, True, False, False]  # rows of one photo stand together


def test_a_dropped_photo_is_hidden() -> None:
    denoiser = small_denoiser().eval()
    x, t, hide = torch.randn(N, L, 24), torch.rand(N), torch.ones(N, dtype=torch.bool)
    other = ImageFeatures(torch.randn(N, 10), torch.randn(N, 4, 7))
    torch.testing.assert_close(denoiser(x, t, features(), None, hide), denoiser(x, t, other, None, hide))
    assert not torch.allclose(denoiser(x, t, features()), denoiser(x, t, other))


@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_masked_padding_may_be_cut_off(fusion: str) -> None:
    """What nothing attends to changes nothing: neither its contents nor its absence."""
    denoiser = small_denoiser(None, fusion=fusion, position_init_std=2.0).eval()
    x_BLD = torch.randn(N, L, 24, generator=torch.Generator().manual_seed(3))
    t_B, photos, mask_BL = torch.full((N,), 0.4), features(None), torch.arange(L).expand(N, -1) < 4
    whole = denoiser(x_BLD, t_B, photos, mask_BL=mask_BL)[:, :4]
    other = denoiser(torch.where(mask_BL[..., None], x_BLD, 9.0), t_B, photos, mask_BL=mask_BL)[:, :4]
    cut = denoiser(x_BLD[:, :4], t_B, photos, mask_BL=mask_BL[:, :4])
    torch.testing.assert_close(other, whole)
    torch.testing.assert_close(cut, whole)
    assert (denoiser(x_BLD, t_B, photos)[:, :4] - whole).abs().max() > 0.01


def test_trained_embeddings_keep_unit_variance() -> None:
    denoiser = small_denoiser(train_embeddings=True)
    with torch.no_grad():
        denoiser.word_embeddings.weight.mul_(50).add_(3)
    x0 = denoiser.embed(torch.arange(V)[None])
    torch.testing.assert_close(x0.var(-1, unbiased=False), torch.ones(1, V), rtol=1e-3, atol=1e-3)


def test_a_collapse_of_the_words_shows() -> None:
    spread = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)) * 7
    assert resultant_length(spread) == pytest.approx(4000**-0.5, rel=0.4)
    assert resultant_length(spread + 1000) > 0.999
    assert resultant_length(torch.cat([spread, -spread])) == pytest.approx(0, abs=1e-6)


def test_the_paper_feeds_x_t_straight_in() -> None:
    denoiser = small_denoiser(None, embedding_dim=32, self_conditioning=False, time_embedding=False, x0_from="body")
    assert isinstance(denoiser.input_projection, torch.nn.Identity)
    assert isinstance(denoiser.output_projection, torch.nn.Identity)
    x = torch.randn(N, L, 32)
    first, second = (denoiser(x, t, features(None)) for t in (torch.zeros(N), torch.ones(N)))
    torch.testing.assert_close(first, second)  # no time input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: d(torch.zeros(3, L + 1, 24), torch.zeros(3), features()), "got x"),
        (lambda d: d(torch.zeros(4, L, 24), torch.zeros(4), features()), "3 photos"),
        (lambda d: d(torch.zeros(3, L, 24), torch.zeros(3), features(None)), "patch tokens"),
        (lambda d: small_denoiser(7, fusion="add"), "encoder.patches=false"),
        (lambda d: small_denoiser(body="no-such-org/bert"), "hf download no-such-org/bert"),
        (lambda d: small_denoiser(embeddings="no-such-org/bert"), "model.embeddings"),
    ],
)
def test_bad_input_is_named(call: Callable[[Denoiser], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(small_denoiser())


def test_a_pretrained_body_and_table_are_loaded(tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(3)
    saved = DistilBertModel(DistilBertConfig(vocab_size=V, dim=16, n_layers=1, n_heads=2, hidden_dim=20))
    saved.save_pretrained(tmp_path)
    pretrained = {"body": str(tmp_path), "embeddings": str(tmp_path), "self_conditioning": False}
    unit = small_denoiser(None, **pretrained).embedding_matrix()
    torch.testing.assert_close(unit, saved.embeddings.word_embeddings.weight.detach() / 0.02, rtol=0.1, atol=0.1)
    torch.testing.assert_close(unit.std(), torch.tensor(1.0))
    with pytest.raises(ValueError, match="no language-model head"):
        small_denoiser(None, **pretrained, x0_from="head", embedding_dim=16)
    denoiser = small_denoiser(None, **pretrained, embedding_std=0.0)
    torch.testing.assert_close(denoiser.word_embeddings.weight, saved.embeddings.word_embeddings.weight.detach())
    torch.testing.assert_close(
        denoiser.body.transformer.layer[0].ffn.lin1.weight, saved.transformer.layer[0].ffn.lin1.weight
    )
    with pytest.raises(ValueError, match="40 words, the tokenizer 41"):
        Denoiser(dataclasses.replace(SMALL, embeddings=str(tmp_path)), V + 1, L, (10, None))


# ---- masked diffusion and known lengths ----

MASKED = DiffusionConfig(kind="masked", image_drop_rate=0.0)
PAD, MASK = 0, V - 1


def captions_of(lengths: list[int]) -> Tensor:
    """ids_N1L: words, [SEP] (1) as the last of so many tokens, [PAD] behind it."""
    ids = torch.randint(2, V - 1, (len(lengths), 1, L), generator=torch.Generator().manual_seed(4))
    for row, length in zip(ids, lengths):
        row[0, length - 1], row[0, length:] = 1, PAD
    return ids


def test_masks_cover_the_share_t_and_only_masked_words_are_learned() -> None:
    denoiser = small_denoiser(self_conditioning=False)
    objective = DiffusionObjective(denoiser, MASKED, PAD, MASK)
    seen: list[tuple[Tensor, Tensor]] = []
    denoiser.register_forward_hook(lambda module, given, hidden: seen.append((given[0], hidden)))
    ids_NCL = captions_of([L] * 40 + [3] * 23)
    draws = Draws.at(list(range(63)), 1, 1, objective.noise_shape, 0, 0, MASKED, CPU)
    terms = objective(ids_NCL, features(photos=63), draws)
    (x_BLD, hidden_BLD), ids_BL = seen[0], ids_NCL[:, 0]
    masked_BL = (x_BLD == denoiser.embed(torch.tensor(MASK))).all(-1)
    torch.testing.assert_close(x_BLD[~masked_BL], denoiser.embed(ids_BL)[~masked_BL])
    assert masked_BL.float().mean().item() == pytest.approx(draws.t_B.mean().item(), abs=0.06)
    low, high = draws.t_B < 0.3, draws.t_B > 0.7
    assert masked_BL[low].float().mean() < 0.3 and masked_BL[high].float().mean() > 0.7
    each = F.cross_entropy(denoiser.logits(hidden_BLD).transpose(1, 2), ids_BL, reduction="none")
    torch.testing.assert_close(terms["rounding"], (each * masked_BL).mean())


@pytest.mark.parametrize("kind", ["continuous", "masked"])
def test_where_the_length_is_foretold_only_words_are_hidden(kind: str) -> None:
    config = dataclasses.replace(MASKED, kind=kind)
    denoiser = small_denoiser(self_conditioning=False, length_head=True)
    objective = DiffusionObjective(denoiser, config, PAD, MASK)
    seen: list[Tensor] = []
    denoiser.register_forward_hook(lambda module, given, hidden: seen.append(given[0]))
    ids_NCL = captions_of([L, 4, 1])
    draws = Draws.at([0, 1, 2], 1, 1, objective.noise_shape, 0, 0, config, CPU)
    draws = dataclasses.replace(draws, t_B=torch.full((3,), 0.999))
    terms = objective(ids_NCL, features(photos=3), draws)
    clean_BL = (seen[0] == denoiser.embed(ids_NCL[:, 0])).all(-1)
    assert clean_BL.tolist() == [[place >= length - 1 for place in range(L)] for length in (L, 4, 1)]
    length = F.cross_entropy(denoiser.length_logits(features(photos=3)), torch.tensor([L, 4, 1]) - 1)
    torch.testing.assert_close(terms["length"], length)
    torch.testing.assert_close(terms["loss"], terms["rounding"] + 0.1 * length)


@pytest.mark.parametrize("kind", ["continuous", "masked"])
def test_the_last_estimate_is_clean_where_words_are_known(kind: str) -> None:
    """In training as at inference: [SEP] and [PAD] are in what self-conditioning shows."""
    config = dataclasses.replace(MASKED, kind=kind, self_conditioning_rate=1.0)
    denoiser = small_denoiser(self_conditioning=True, length_head=True)
    objective = DiffusionObjective(denoiser, config, PAD, MASK)
    shown: list[Tensor | None] = []
    denoiser.register_forward_hook(lambda module, given, hidden: shown.append(given[3]))
    ids_NCL = captions_of([L, 3, 4])
    objective(ids_NCL, features(), Draws.at([0, 1, 2], 1, 1, objective.noise_shape, 0, 0, config, CPU))
    assert len(shown) == 2 and shown[0] is None and shown[1] is not None
    ids_BL = ids_NCL[:, 0]
    known_BL = torch.arange(L)[None] >= (ids_BL != PAD).sum(-1, keepdim=True) - 1
    torch.testing.assert_close(shown[1][known_BL], denoiser.embed(ids_BL)[known_BL])
    assert (shown[1][~known_BL] - denoiser.embed(ids_BL)[~known_BL]).abs().max() > 0.1


def test_restore_terms_are_of_what_is_not_known() -> None:
    """Where the length is foretold, [SEP] and [PAD] are given: clean at every time, and 0 in the loss."""
    config = dataclasses.replace(MASKED, kind="continuous", restore_weight=0.7, first_step_weight=0.2)
    denoiser = small_denoiser(self_conditioning=False, length_head=True)
    objective = DiffusionObjective(denoiser, config, PAD, MASK)
    seen: list[tuple[Tensor, Tensor]] = []
    denoiser.register_forward_hook(lambda module, given, hidden: seen.append((given[0], hidden)))
    ids_NCL = captions_of([L, 3, 4])
    terms = objective(ids_NCL, features(), Draws.at([0, 1, 2], 1, 1, objective.noise_shape, 0, 0, config, CPU))
    ids_BL = ids_NCL[:, 0]
    x0_BLD = denoiser.embed(ids_BL)
    known_BL = torch.arange(L)[None] >= (ids_BL != PAD).sum(-1, keepdim=True) - 1
    for name, (x_BLD, hidden_BLD) in zip(("restore", "first_step"), seen, strict=True):
        torch.testing.assert_close(x_BLD[known_BL], x0_BLD[known_BL])
        off_BLD = (denoiser.clean_estimate(hidden_BLD) - x0_BLD) * ~known_BL[..., None]
        torch.testing.assert_close(terms[name], off_BLD.square().mean())


@pytest.mark.parametrize("kind", ["continuous", "masked"])
def test_a_batchs_loss_is_the_mean_of_its_parts(kind: str) -> None:
    """So it is the same on any number of ranks, though each masks another number of words."""
    config = dataclasses.replace(MASKED, kind=kind)
    objective = DiffusionObjective(small_denoiser(self_conditioning=False, length_head=True), config, PAD, MASK)
    ids_NCL, image = captions_of([L, 4, 1, 2]), features(photos=4)

    def loss(photos: slice) -> Tensor:
        draws = Draws.at([5, 6, 7, 8][photos], 1, 1, objective.noise_shape, 0, 0, config, CPU)
        assert image.patches_NPF is not None
        return objective(ids_NCL[photos], ImageFeatures(image.pooled_NF[photos], image.patches_NPF[photos]), draws)[
            "loss"
        ]

    parts = torch.stack([loss(slice(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(loss(slice(0, 4)), parts.mean())
    parts.sum().backward()  # a row without a masked word has a loss (0) and gradients too
