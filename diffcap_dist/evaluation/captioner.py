"""Captioner: image features -> captions, from a denoiser in training or from an exported folder.

In: a denoiser (or ``export/``: safetensors, config, tokenizer; no DeepSpeed) and sampler settings. Out: captions and,
on request, the draft after every denoising step. The noise of a photo comes from its key and the sampler's seed, so a
caption does not depend on the batch, the rank or the other photos.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from diffcap_dist.config import Config, load_config, save_config
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.shard_format import FeatureInfo, atomic_write
from diffcap_dist.diffusion.objective import position_noise
from diffcap_dist.diffusion.sampler import ddim, x0_feedback
from diffcap_dist.diffusion.schedule import NoiseSchedule
from diffcap_dist.evaluation.protocol import consensus
from diffcap_dist.evaluation.scores import count_caption, tokenize
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures
from diffcap_dist.model.image_encoder import ImageEncoder


@dataclass
class Draft:
    """A caption on its way: the words of hat x0 after ``step``, seen at time ``t``, each with its probability."""

    step: int
    t: float
    caption: str
    confidence: list[float]


class Captioner:
    """``caption(features, keys)`` with the settings of ``config.sampler``."""

    def __init__(self, denoiser: Denoiser, config: Config, tokenizer: CaptionTokenizer) -> None:
        self.denoiser, self.config, self.tokenizer = denoiser, config, tokenizer
        self.schedule = NoiseSchedule(config.diffusion.schedule, config.diffusion.noise_scale)

    def caption(
        self, features: ImageFeatures, keys: Sequence[str], drafts: list[list[Draft]] | None = None
    ) -> list[str]:
        """One caption per photo. ``drafts``, when given, receives a list of Drafts per photo (first candidate)."""
        texts, count = self._texts(self.caption_ids(features, keys, drafts)), self.config.sampler.candidates
        return [_most_agreed(texts[i * count : (i + 1) * count]) for i in range(len(keys))]

    @torch.no_grad()
    def caption_ids(
        self, features: ImageFeatures, keys: Sequence[str], drafts: list[list[Draft]] | None = None
    ) -> Tensor:
        """ids_BL as the denoiser leaves them, special tokens and repeats included; a photo's candidates together."""
        sampler = self.config.sampler
        denoise = _GuidedDenoiser(self.denoiser, features, sampler.guidance_scale)
        shape = (sampler.candidates, self.config.data.max_length, self.denoiser.embedding_dim)
        numbers = [_key_number(key) for key in keys]
        device, dtype = features.pooled_NF.device, features.pooled_NF.dtype

        def noise(purpose: str) -> Tensor:
            return position_noise(sampler.seed, purpose, numbers, shape, device).flatten(0, 1).to(dtype)

        def on_step(step: int, t: float, _: Tensor) -> None:
            if drafts is not None:
                self._record(drafts, step, t, denoise.logits_BLV, len(keys))

        if sampler.name == "x0_feedback":
            x0_feedback(denoise, noise("x_T"), sampler.num_inference_steps, on_step=on_step)
        else:
            ddim(
                denoise,
                noise("x_T"),
                self.schedule,
                sampler.num_inference_steps,
                time_difference=sampler.time_difference,
                eta=sampler.eta,
                noise=lambda step: noise(f"step {step}"),
                on_step=on_step,
            )
        return denoise.logits_BLV.argmax(dim=-1)

    def _texts(self, ids_BL: Tensor) -> list[str]:
        texts = self.tokenizer.decode(ids_BL.cpu().numpy())
        return [remove_repeats(text) for text in texts] if self.config.sampler.remove_repeats else texts

    def _record(self, drafts: list[list[Draft]], step: int, t: float, logits_BLV: Tensor, photos: int) -> None:
        first_NLV = logits_BLV[:: self.config.sampler.candidates]
        if not drafts:
            drafts.extend([] for _ in range(photos))
        probability_NL, ids_NL = first_NLV.float().softmax(dim=-1).max(dim=-1)
        for draft, text, best_L, ids_L in zip(drafts, self._texts(ids_NL), probability_NL, ids_NL):
            kept = self.tokenizer.word_positions(ids_L.tolist())
            confidence = [round(best_L[i].item(), 4) for i in kept]
            # Word pieces and removed repeats leave no one-to-one match: then no confidence is claimed.
            draft.append(Draft(step, t, text, confidence if len(kept) == len(text.split()) else []))


class _GuidedDenoiser:
    """The ``denoise`` function of the samplers: the denoiser with classifier-free guidance (Ho & Salimans 2022).

    hidden = without + scale (with - without), where "without" hides the image. Keeps the last logits_BLV.
    """

    def __init__(self, denoiser: Denoiser, features: ImageFeatures, guidance_scale: float) -> None:
        self.denoiser, self.features, self.guidance_scale = denoiser, features, guidance_scale
        self.logits_BLV = torch.empty(0)

    def __call__(self, x_BLD: Tensor, t: float, previous_x0_BLD: Tensor | None) -> Tensor:
        t_B = torch.full(x_BLD.shape[:1], t, device=x_BLD.device)
        hidden_BLD = self.denoiser(x_BLD, t_B, self.features, previous_x0_BLD)
        if self.guidance_scale != 1.0:
            hide_N = torch.ones(len(self.features.pooled_NF), dtype=torch.bool, device=x_BLD.device)
            without_BLD = self.denoiser(x_BLD, t_B, self.features, previous_x0_BLD, hide_N)
            hidden_BLD = without_BLD + self.guidance_scale * (hidden_BLD - without_BLD)
        self.logits_BLV = self.denoiser.logits(hidden_BLD)
        return self.denoiser.clean_estimate(hidden_BLD, self.logits_BLV)


def remove_repeats(text: str) -> str:
    """Of every run of equal words the first is kept (the paper, section 5)."""
    return " ".join(word for word, _ in groupby(text.split()))


def export_captioner(
    folder: Path,
    state: dict[str, Tensor],
    denoiser: Denoiser,
    config: Config,
    tokenizer: CaptionTokenizer,
    about: dict,
) -> None:
    """Write everything ``load_captioner`` needs; ``state`` is the denoiser's whole state, ``about`` goes to about.json.

    The weights come last and by rename: an export is either the old one or the new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer")
    save_config(_standalone(config, denoiser), folder / "config.yaml")
    atomic_write(folder / "about.json", json.dumps(about, indent=2).encode())
    atomic_write(folder / "model.safetensors", save({name: t.contiguous() for name, t in state.items()}))


def load_captioner(folder: Path, overrides: Sequence[str] = (), device: torch.device | None = None) -> Captioner:
    """An exported captioner, with ``key=value`` changes to its sampler. Raises ValueError when there is none."""
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} holds no exported captioner (model.safetensors): train one with diffcap train")
    config = load_config(folder / "config.yaml", overrides)
    tokenizer = CaptionTokenizer.load(str(folder / "tokenizer"))
    pooled, patches = about_export(folder)["feature_widths"]
    denoiser = Denoiser(config.model, tokenizer.vocab_size, config.data.max_length, (pooled, patches))
    denoiser.load_state_dict(load_file(folder / "model.safetensors"))
    denoiser.eval().requires_grad_(False)
    return Captioner(denoiser.to(device or torch.device("cpu")), config, tokenizer)


def about_export(folder: Path) -> dict:
    """What ``export_captioner`` was told: step, validation scores, feature widths, the encoder of the features."""
    return json.loads((folder / "about.json").read_text())


def encode_images(folder: Path, config: Config, images: Sequence[Image.Image]) -> ImageFeatures:
    """Features of pictures by the encoder that the captioner was trained with; an error if it is another one."""
    about = about_export(folder)
    if about["encoder_sha256"] is None:
        raise ValueError(
            f"this captioner was trained on imported features ({about['features']}): there is no encoder to see new "
            "pictures with. Give it the shards of such features: diffcap evaluate"
        )
    encoder = ImageEncoder(config.encoder.name, config.encoder.pretrained)
    if encoder.weights_sha256 != about["encoder_sha256"]:
        raise ValueError(
            f"encoder {encoder.source} has weights {encoder.weights_sha256[:12]}, the captioner was trained "
            f"on features of weights {about['encoder_sha256'][:12]}: set encoder.name / encoder.pretrained to those"
        )
    pooled_NF, patches_NPF = encoder(encoder.load_images(images))
    return ImageFeatures(pooled_NF, patches_NPF if config.encoder.patches else None)


def feature_identity(info: FeatureInfo | None, encoder: ImageEncoder | None) -> dict:
    """What ties an export to its features, for ``about.json``."""
    if info is not None:
        return {"features": info.name, "encoder_sha256": info.weights_sha256}
    assert encoder is not None
    return {"features": encoder.name, "encoder_sha256": encoder.weights_sha256}


def _standalone(config: Config, denoiser: Denoiser) -> Config:
    """The config with the sizes of a pretrained body written out: the exported weights replace its values."""
    config, body = copy.deepcopy(config), denoiser.body.config
    model = config.model
    model.body = model.embeddings = "random"
    model.width, model.num_layers, model.num_heads = body.dim, body.n_layers, body.n_heads
    model.ffn_width, model.embedding_dim = body.hidden_dim, denoiser.embedding_dim
    return config


def _most_agreed(texts: list[str]) -> str:
    """Minimum Bayes risk: the candidate nearest to the others."""
    if len(texts) == 1:
        return texts[0]
    return texts[consensus([count_caption(tokenize(text)) for text in texts])]


def _key_number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
