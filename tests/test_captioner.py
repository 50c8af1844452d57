"""The captioner: captions depend on the photo alone; export and load; picture files; no reference length leaks in."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffcap_dist import caption as caption_command
from diffcap_dist.config import Config, DataConfig, DiffusionConfig, ModelConfig, SamplerConfig
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.diffusion.objective import build_network
from diffcap_dist.evaluation.captioner import (
    Captioner,
    Draft,
    begin_with,
    export_captioner,
    load_captioner,
    remove_repeats,
)
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures

TOKENIZER = CaptionTokenizer.from_captions(["a small red circle above a large blue star on the green grass"])


@pytest.fixture
def captioner() -> Captioner:
    config = Config(
        run_dir="r",
        data=DataConfig(shards="s", max_length=8),
        model=ModelConfig(width=32, num_layers=2, num_heads=2, ffn_width=32, embedding_dim=16, length_head=False),
        diffusion=DiffusionConfig(kind="continuous", image_drop_rate=0.1),
        sampler=SamplerConfig(num_inference_steps=4, guidance_scale=2.0),
    )
    torch.manual_seed(0)
    denoiser = Denoiser(config.model, TOKENIZER.vocab_size, 8, (10, None)).eval()
    with torch.no_grad():  # untrained weights are too small to tell photos apart, or to prefer one word
        denoiser.pooled_projection[1].weight.mul_(4)  # type: ignore[union-attr, operator]
        denoiser.output_projection.weight.mul_(10)  # type: ignore[union-attr, operator]
    return Captioner(denoiser, config, TOKENIZER)


def with_sampler(captioner: Captioner, **changes: object) -> Captioner:
    sampler = dataclasses.replace(captioner.config.sampler, **changes)  # type: ignore[arg-type]
    return Captioner(captioner.network, dataclasses.replace(captioner.config, sampler=sampler), TOKENIZER)


KINDS = {
    "continuous, lengths foretold": (ModelConfig(self_conditioning=True), DiffusionConfig(kind="continuous")),
    "masked": (ModelConfig(self_conditioning=True, length_head=False), DiffusionConfig()),
    "masked, lengths foretold": (ModelConfig(), DiffusionConfig()),
    "masked, shifted, lengths foretold": (ModelConfig(shifted=True, time_embedding=False), DiffusionConfig()),
    "autoregressive": (ModelConfig(kind="autoregressive"), DiffusionConfig()),
}


def captioner_of(kind: str, **sampler: object) -> Captioner:
    model, diffusion = KINDS[kind]
    small = {"width": 32, "num_layers": 2, "num_heads": 2, "ffn_width": 32, "embedding_dim": 16}
    config = Config(
        run_dir="r",
        data=DataConfig(shards="s", max_length=8),
        model=dataclasses.replace(model, **small),  # type: ignore[arg-type]
        diffusion=diffusion,
        sampler=SamplerConfig(num_inference_steps=4, **sampler),  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    network = build_network(config, TOKENIZER.vocab_size, (10, None)).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return Captioner(network, config, TOKENIZER)


PHOTOS = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
KEYS = [f"photo{i}" for i in range(6)]


@pytest.mark.parametrize("changes", [{}, {"eta": 1.0}, {"candidates": 3}, {"name": "x0_feedback"}])
def test_a_caption_depends_on_its_photo_alone(captioner: Captioner, changes: dict) -> None:
    captioner = with_sampler(captioner, **changes)
    together = captioner.caption(ImageFeatures(PHOTOS), KEYS)
    apart = [captioner.caption(ImageFeatures(PHOTOS[i : i + 1]), [KEYS[i]])[0] for i in range(6)]
    backwards = captioner.caption(ImageFeatures(PHOTOS.flip(0)), KEYS[::-1])[::-1]
    assert together == apart == backwards
    assert len(set(together)) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", [{}, {"temperature": 1.0}, {"candidates": 3, "temperature": 1.0}, {"num_beams": 2}])
def test_each_kind_captions_a_photo_for_itself(kind: str, sampler: dict) -> None:
    captioner = captioner_of(kind, **sampler)
    together = captioner.caption(ImageFeatures(PHOTOS), KEYS)
    apart = [captioner.caption(ImageFeatures(PHOTOS[i : i + 1]), [KEYS[i]])[0] for i in range(6)]
    assert together == apart
    drafts: list[list[Draft]] = []
    captioner.caption(ImageFeatures(PHOTOS), KEYS, drafts)
    if captioner.config.sampler.candidates == 1:
        assert [part[-1].caption for part in drafts] == together
    if sampler.get("temperature") and kind != "continuous, lengths foretold":
        assert captioner_of(kind, **sampler, seed=1).caption(ImageFeatures(PHOTOS), KEYS) != together


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_exported_and_loaded(kind: str, tmp_path: Path) -> None:
    captioner = captioner_of(kind)
    about = {"step": 3, "feature_widths": [10, None], "features": "f", "encoder_sha256": None}
    export_captioner(
        tmp_path / "export", captioner.network.state_dict(), captioner.network, captioner.config, TOKENIZER, about
    )
    again = load_captioner(tmp_path / "export")
    assert again.caption(ImageFeatures(PHOTOS), KEYS) == captioner.caption(ImageFeatures(PHOTOS), KEYS)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, tmp_path: Path) -> None:
    """An export computes in bf16 where it is told to, and writes nearly the same words."""
    captioner = captioner_of(kind)
    about = {"step": 3, "feature_widths": [10, None], "features": "f", "encoder_sha256": None}
    export_captioner(
        tmp_path / "export", captioner.network.state_dict(), captioner.network, captioner.config, TOKENIZER, about
    )
    one_step = "sampler.num_inference_steps=1"  # one other word changes all later ones
    whole = load_captioner(tmp_path / "export", [one_step])
    half = load_captioner(tmp_path / "export", [one_step, "sampler.precision=bf16"])
    assert (whole.network.dtype, half.network.dtype) == (torch.float32, torch.bfloat16)
    words, others = (c.caption_ids(ImageFeatures(PHOTOS), KEYS) for c in (whole, half))
    assert (words == others).float().mean() > 0.75


@pytest.mark.slow  # of which the compiler takes most
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_code_writes_the_same_words(tmp_path: Path) -> None:
    captioner = captioner_of("masked, lengths foretold")
    words = ["diffusion.image_drop_rate=0.1", "sampler.guidance_scale=2.0"]
    about = {"step": 3, "feature_widths": [10, None], "features": "f", "encoder_sha256": None}
    export_captioner(
        tmp_path / "export", captioner.network.state_dict(), captioner.network, captioner.config, TOKENIZER, about
    )
    plain = load_captioner(tmp_path / "export", words)
    compiled = load_captioner(tmp_path / "export", [*words, "sampler.compile=true"])
    for count in (len(KEYS), 2):  # a last batch is smaller
        expected, got = (c.caption_ids(ImageFeatures(PHOTOS[:count]), KEYS[:count]) for c in (plain, compiled))
        assert torch.equal(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_network_begins_with_the_weights_of_another_kind(tmp_path: Path) -> None:
    """The control's body, table and photo projection in a denoiser; what it has no weights for is named and left."""
    control = captioner_of("autoregressive")
    about = {"step": 3, "feature_widths": [10, None], "features": "f", "encoder_sha256": None}
    export_captioner(
        tmp_path / "export", control.network.state_dict(), control.network, control.config, TOKENIZER, about
    )
    denoiser = captioner_of("masked, lengths foretold").network
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    new = begin_with(denoiser, tmp_path)
    assert {name.split(".")[0] for name in new} == {"time_mlp", "length_head"}
    for name, value in denoiser.state_dict().items():
        assert torch.equal(value, before[name] if name in new else control.network.state_dict()[name]), name
    other = Denoiser(ModelConfig(width=64, num_heads=2, embedding_dim=16), TOKENIZER.vocab_size, 8, (10, None))
    with pytest.raises(ValueError, match=r"init_from=.*has shape .* here, shape .* there"):
        begin_with(other, tmp_path)
    with pytest.raises(ValueError, match="no exported captioner"):
        begin_with(denoiser, tmp_path / "nothing")


def test_a_shifted_network_has_all_the_weights_of_the_control_and_is_begun_with_by_its_like(tmp_path: Path) -> None:
    for kind in ("autoregressive", "masked, shifted, lengths foretold"):
        captioner, about = captioner_of(kind), {"step": 3, "feature_widths": [10, None]}
        state = captioner.network.state_dict()
        export_captioner(tmp_path / kind, state, captioner.network, captioner.config, TOKENIZER, about)
    shifted = captioner_of("masked, shifted, lengths foretold").network
    assert {name.split(".")[0] for name in begin_with(shifted, tmp_path / "autoregressive")} == {"length_head"}
    assert begin_with(shifted, tmp_path / "masked, shifted, lengths foretold") == []
    with pytest.raises(ValueError, match=r"was trained with model\.shifted=true; set the same here"):
        begin_with(captioner_of("masked, lengths foretold").network, tmp_path / "masked, shifted, lengths foretold")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "foretold" in kind])
def test_the_length_comes_from_the_photo_alone(kind: str) -> None:
    """Candidates of a photo take quantiles of the length head's distribution, and every caption has its length."""
    captioner = captioner_of(kind, candidates=4)
    ids_BL = captioner.caption_ids(ImageFeatures(PHOTOS), KEYS)
    found = (ids_BL != TOKENIZER.pad_id).sum(-1).view(6, 4)
    up_to_NL = captioner.network.length_logits(ImageFeatures(PHOTOS)).softmax(-1).cumsum(-1)
    for photo in range(6):
        expected = [1 + int((up_to_NL[photo] < (c + 0.5) / 4).sum()) for c in range(4)]
        assert found[photo].tolist() == expected
    assert (ids_BL.gather(1, found.view(-1, 1) - 1) == TOKENIZER.sep_id).all()
    specials = torch.isin(ids_BL, torch.tensor(sorted(TOKENIZER.special_ids)))
    if kind.startswith("masked"):
        assert specials.sum(-1).tolist() == (8 - found.flatten() + 1).tolist()  # [SEP] and [PAD] only


def test_the_seed_and_the_key_choose_the_noise(captioner: Captioner) -> None:
    first = captioner.caption(ImageFeatures(PHOTOS), KEYS)
    assert with_sampler(captioner, seed=1).caption(ImageFeatures(PHOTOS), KEYS) != first
    assert captioner.caption(ImageFeatures(PHOTOS), [k + "x" for k in KEYS]) != first


def test_guidance_of_one_is_no_guidance(captioner: Captioner) -> None:
    def drafts(guidance_scale: float) -> list[list[Draft]]:
        seen: list[list[Draft]] = []
        with_sampler(captioner, guidance_scale=guidance_scale).caption(ImageFeatures(PHOTOS), KEYS, seen)
        return seen

    plain = drafts(1.0)
    assert [[d.caption for d in part] for part in drafts(1.0 + 1e-6)] == [[d.caption for d in part] for part in plain]
    assert drafts(4.0) != plain


def test_drafts_end_in_the_caption(captioner: Captioner) -> None:
    drafts: list[list[Draft]] = []
    captions = captioner.caption(ImageFeatures(PHOTOS), KEYS, drafts)
    assert [part[-1].caption for part in drafts] == captions
    assert [draft.t for draft in drafts[0]] == [1.0, 0.75, 0.5, 0.25]
    for draft in drafts[0]:
        assert len(draft.confidence) == len(draft.caption.split())
        assert all(0 < value <= 1 for value in draft.confidence)


def test_an_export_captions_the_same_without_the_run(captioner: Captioner, tmp_path: Path) -> None:
    about = {"step": 3, "feature_widths": [10, None], "features": "f", "encoder_sha256": None}
    state = captioner.network.state_dict()
    export_captioner(tmp_path / "export", state, captioner.network, captioner.config, TOKENIZER, about)
    again = load_captioner(tmp_path / "export")
    assert again.caption(ImageFeatures(PHOTOS), KEYS) == captioner.caption(ImageFeatures(PHOTOS), KEYS)
    assert load_captioner(tmp_path / "export", ["sampler.candidates=3"]).config.sampler.candidates == 3
    with pytest.raises(ValueError, match="no exported captioner"):
        load_captioner(tmp_path / "nothing")


def test_remove_repeats() -> None:
    assert remove_repeats("a a dog dog runs a") == "a dog runs a"


def test_picture_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "note.txt").write_text("no picture")
    assert [p.name for p in caption_command.picture_files([tmp_path])] == ["a.jpg", "b.png"]
    with pytest.raises(ValueError, match="no such picture"):
        caption_command.picture_files([tmp_path / "c.jpg"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        caption_command.picture_files([tmp_path / "empty"])


def test_a_broken_picture_and_imported_features_are_named(captioner: Captioner, tmp_path: Path) -> None:
    about = {"step": 3, "feature_widths": [10, None], "features": "cnn", "encoder_sha256": None}
    export_captioner(tmp_path, captioner.network.state_dict(), captioner.network, captioner.config, TOKENIZER, about)
    Image.new("RGB", (8, 8)).save(tmp_path / "good.jpg")
    with pytest.raises(ValueError, match=r"imported features \(cnn\)"):
        caption_command.caption_files(tmp_path, [tmp_path / "good.jpg"])
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"bad\.jpg can't be decoded"):
        caption_command.caption_files(tmp_path, [tmp_path / "bad.jpg"])
    assert json.loads((tmp_path / "about.json").read_text())["step"] == 3
