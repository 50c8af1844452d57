"""Captioner: image features -> captions, from a network in training or from an exported folder.

In: a network (or ``export/``: safetensors, config, tokenizer; no DeepSpeed) and sampler settings. Out: captions and,
on request, the draft after every denoising step. The noise of a photo comes from its key and the sampler's seed, so a
caption does not depend on the batch, the rank or the other photos (in fp32; in bf16 rounding may decide a near-tie).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from diffcap_dist.config import Config, SamplerConfig, load_config, save_config
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.shard_format import FeatureInfo, atomic_write
from diffcap_dist.diffusion.length import Known, foretold_lengths
from diffcap_dist.diffusion.objective import build_network, position_noise
from diffcap_dist.diffusion.sampler import ddim, unmask, x0_feedback
from diffcap_dist.diffusion.schedule import NoiseSchedule
from diffcap_dist.evaluation.protocol import consensus, f1_similarity
from diffcap_dist.evaluation.scores import count_caption, tokenize
from diffcap_dist.model.autoregressive import AutoregressiveModel
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

    def __init__(self, network: Denoiser | AutoregressiveModel, config: Config, tokenizer: CaptionTokenizer) -> None:
        self.network, self.config, self.tokenizer = network, config, tokenizer
        self.schedule = NoiseSchedule.of(config.diffusion)

    def caption(
        self, features: ImageFeatures, keys: Sequence[str], drafts: list[list[Draft]] | None = None
    ) -> list[str]:
        """One caption per photo. ``drafts``, when given, receives a list of Drafts per photo (middle candidate)."""
        texts, count = self._texts(self.caption_ids(features, keys, drafts)), self.config.sampler.candidates
        return [_most_agreed(texts[i * count : (i + 1) * count]) for i in range(len(keys))]

    @torch.no_grad()
    def caption_ids(
        self, features: ImageFeatures, keys: Sequence[str], drafts: list[list[Draft]] | None = None
    ) -> Tensor:
        """ids_BL as the network leaves them, special tokens and repeats included; a photo's candidates together."""
        noise = _PhotoNoise(keys, self.config.sampler, features.pooled_NF.float())
        features = features.to(features.pooled_NF.device, self.network.dtype)
        if isinstance(self.network, AutoregressiveModel):
            return self._left_to_right(self.network, features, noise, drafts)
        guidance_scale = self.config.sampler.guidance_scale
        known = self._foretold(features) if self.network.length_head is not None else None
        denoise = _GuidedDenoiser(self.network, features, guidance_scale, known)
        write = self._unmasked if self.config.diffusion.kind == "masked" else self._denoised
        ids_BL = write(denoise, noise, known, drafts)
        unwritten = self.config.data.max_length - ids_BL.shape[1]
        return torch.nn.functional.pad(ids_BL, (0, unwritten), value=self.tokenizer.pad_id)

    def _denoised(
        self, denoise: _GuidedDenoiser, noise: _PhotoNoise, known: Known | None, drafts: list[list[Draft]] | None
    ) -> Tensor:
        """Continuous diffusion: Gaussian noise over the embeddings, denoised."""
        sampler = self.config.sampler
        shape = (self.config.data.max_length, denoise.network.embedding_dim)
        length = shape[0] if known is None else known.ids_BL.shape[1]

        def noise_BLD(purpose: str) -> Tensor:  # a photo's does not depend on how long the others are
            return noise(purpose, shape)[:, :length]

        def on_step(step: int, t: float, _: Tensor) -> None:
            if drafts is not None:
                probability_BL, ids_BL = denoise.logits_BLV.float().softmax(dim=-1).max(dim=-1)
                self._record(drafts, step, t, ids_BL if known is None else known.put(ids_BL), probability_BL)

        if sampler.name == "x0_feedback":
            x0_feedback(denoise, noise_BLD("x_T"), sampler.num_inference_steps, on_step=on_step)
        else:
            ddim(
                denoise,
                noise_BLD("x_T"),
                self.schedule,
                sampler.num_inference_steps,
                time_difference=sampler.time_difference,
                eta=sampler.eta,
                noise=lambda step: noise_BLD(f"step {step}"),
                on_step=on_step,
            )
        ids_BL = denoise.logits_BLV.argmax(dim=-1)
        return ids_BL if known is None else known.put(ids_BL)

    def _unmasked(
        self, denoise: _GuidedDenoiser, noise: _PhotoNoise, known: Known | None, drafts: list[list[Draft]] | None
    ) -> Tensor:
        """Masked diffusion: words written in the order of their confidence."""
        sampler, mask_id, max_length = self.config.sampler, self.tokenizer.mask_id, self.config.data.max_length
        rows = len(noise.numbers) * sampler.candidates
        ends = set() if known else {self.tokenizer.sep_id, self.tokenizer.pad_id}
        if known is None:
            everywhere_BL = torch.ones(rows, max_length, dtype=torch.bool, device=noise.like.device)
            known = Known(everywhere_BL, torch.full_like(everywhere_BL, mask_id, dtype=torch.long))
        length = known.ids_BL.shape[1]
        never = torch.tensor(sorted(self.tokenizer.special_ids - ends), device=noise.like.device)
        previous_x0_BLD: Tensor | None = None

        def predict(ids_BL: Tensor, masked_BL: Tensor, t: float) -> Tensor:
            nonlocal previous_x0_BLD
            x_BLD = denoise.network.embed(ids_BL).to(noise.like.dtype)
            if denoise.network.config.self_conditioning:
                previous_x0_BLD = denoise(x_BLD, t, previous_x0_BLD)
                logits_TV = denoise.logits_BLV[masked_BL]
            else:  # nobody looks at the estimate, nor at words that stay
                logits_TV = denoise.network.logits(denoise.look(x_BLD, t)[masked_BL])
            return logits_TV.index_fill_(-1, never, -math.inf)

        def record(step: int, t: float, ids_BL: Tensor, confidence_BL: Tensor) -> None:
            assert drafts is not None
            self._record(drafts, step, t, ids_BL, confidence_BL)

        shape = (max_length, denoise.network.vocab_size)
        draw = sampler.temperature > 0
        return unmask(
            predict,
            known.ids_BL,
            known.open_BL,
            mask_id,
            sampler.num_inference_steps,
            revise=sampler.revise,
            choice=(lambda step: sampler.temperature * _gumbel(noise(f"step {step}", shape)[:, :length]))
            if draw
            else None,
            on_step=None if drafts is None else record,
        )

    def _left_to_right(
        self,
        network: AutoregressiveModel,
        features: ImageFeatures,
        noise: _PhotoNoise,
        drafts: list[list[Draft]] | None,
    ) -> Tensor:
        """The control: greedy, beam search or, at a temperature, drawn."""
        sampler, tokenizer = self.config.sampler, self.tokenizer
        shape, draw = (network.vocab_size,), sampler.temperature > 0

        def choose(position: int, logits_BV: Tensor) -> Tensor:
            return (logits_BV + sampler.temperature * _gumbel(noise(f"step {position}", shape))).argmax(-1)

        ids_BL = network.write(
            features,
            tokenizer.sep_id,
            tokenizer.pad_id,
            sampler.num_beams,
            [i for i in tokenizer.special_ids if i != tokenizer.sep_id],
            choose if draw else None,
            sampler.candidates if draw else 1,
        )
        if not draw:  # all candidates would be the same
            ids_BL = ids_BL.repeat_interleave(sampler.candidates, dim=0)
        if drafts is not None:
            for position in range(int((ids_BL != tokenizer.pad_id).sum(-1).max())):
                seen_BL = ids_BL.clone()
                seen_BL[:, position + 1 :] = tokenizer.pad_id
                self._record(drafts, position, 1 - position / network.max_length, seen_BL, torch.ones_like(seen_BL))
        return ids_BL

    def _foretold(self, features: ImageFeatures) -> Known:
        """How long each candidate is to be. As wide as the longest of them; compiled code is of one width."""
        lengths_B1 = foretold_lengths(self.network.length_logits(features), self.config.sampler.candidates)
        width = self.config.data.max_length if self.config.sampler.compile else int(lengths_B1.max())
        return Known.of_lengths(lengths_B1, width, self.tokenizer.pad_id, self.tokenizer.sep_id)

    def _texts(self, ids_BL: Tensor) -> list[str]:
        texts = self.tokenizer.decode(ids_BL.cpu().numpy())
        return [remove_repeats(text) for text in texts] if self.config.sampler.remove_repeats else texts

    def _record(self, drafts: list[list[Draft]], step: int, t: float, ids_BL: Tensor, confidence_BL: Tensor) -> None:
        count = self.config.sampler.candidates
        # The middle one: candidates differ in their foretold lengths.
        ids_NL, confidence_NL = ids_BL[count // 2 :: count], confidence_BL[count // 2 :: count]
        if not drafts:
            drafts.extend([] for _ in range(len(ids_NL)))
        for draft, text, best_L, ids_L in zip(drafts, self._texts(ids_NL), confidence_NL, ids_NL):
            kept = self.tokenizer.word_positions(ids_L.tolist())
            confidence = [round(best_L[i].item(), 4) for i in kept]
            # Word pieces and removed repeats leave no one-to-one match: then no confidence is claimed.
            draft.append(Draft(step, t, text, confidence if len(kept) == len(text.split()) else []))


class _PhotoNoise:
    """Gaussian noise (B, *shape) for a purpose: a function of the photo's key and the sampler's seed alone."""

    def __init__(self, keys: Sequence[str], sampler: SamplerConfig, like: Tensor) -> None:
        self.numbers, self.sampler, self.like = [_key_number(key) for key in keys], sampler, like

    def __call__(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        shape = (self.sampler.candidates, *shape)
        noise = position_noise(self.sampler.seed, purpose, self.numbers, shape, self.like.device)
        return noise.flatten(0, 1).to(self.like.dtype)


def _gumbel(noise: Tensor) -> Tensor:
    """Standard Gumbel noise of standard normal noise."""
    uniform = torch.special.ndtr(noise.double()).clamp(1e-12, 1 - 1e-12)
    return -torch.log(-torch.log(uniform)).to(noise.dtype)


class _GuidedDenoiser:
    """The ``denoise`` function of the samplers: the denoiser with classifier-free guidance (Ho & Salimans 2022).

    hidden = without + scale (with - without), where "without" hides the image. Keeps the last logits_BLV. Where there
    are ``known`` positions, they are clean in what it sees and in what it gives, and no attention goes to the padding.
    """

    def __init__(
        self, network: Denoiser, features: ImageFeatures, guidance_scale: float, known: Known | None = None
    ) -> None:
        self.network, self.features, self.guidance_scale, self.known = network, features, guidance_scale, known
        self.mask_BL = None if known is None else known.words_BL
        self.logits_BLV = torch.empty(0)

    def __call__(self, x_BLD: Tensor, t: float, previous_x0_BLD: Tensor | None) -> Tensor:
        hidden_BLD = self.look(self._with_known(x_BLD), t, previous_x0_BLD)
        self.logits_BLV = self.network.logits(hidden_BLD)
        return self._with_known(self.network.clean_estimate(hidden_BLD, self.logits_BLV).to(x_BLD.dtype))

    def look(self, x_BLD: Tensor, t: float, previous_x0_BLD: Tensor | None = None) -> Tensor:
        """hidden_BLD. The state x_BLD of a sampler is fp32, whatever the network computes in."""
        t_B = torch.full(x_BLD.shape[:1], t, device=x_BLD.device)
        x_BLD = x_BLD.to(self.network.dtype)
        hidden_BLD = self.network(x_BLD, t_B, self.features, previous_x0_BLD, None, self.mask_BL)
        if self.guidance_scale != 1.0:
            hide_N = torch.ones(len(self.features.pooled_NF), dtype=torch.bool, device=x_BLD.device)
            hidden_BLD = hidden_BLD.clone()  # a CUDA graph writes every result to the same place
            without_BLD = self.network(x_BLD, t_B, self.features, previous_x0_BLD, hide_N, self.mask_BL)
            hidden_BLD = without_BLD + self.guidance_scale * (hidden_BLD - without_BLD)
        return hidden_BLD

    def _with_known(self, x_BLD: Tensor) -> Tensor:
        if self.known is None:
            return x_BLD
        clean_BLD = self.network.embed(self.known.ids_BL).to(x_BLD.dtype)
        return torch.where(self.known.open_BL[..., None], x_BLD, clean_BLD)


def remove_repeats(text: str) -> str:
    """Of every run of equal words the first is kept (the paper, section 5)."""
    return " ".join(word for word, _ in groupby(text.split()))


def export_captioner(
    folder: Path,
    state: dict[str, Tensor],
    network: Denoiser | AutoregressiveModel,
    config: Config,
    tokenizer: CaptionTokenizer,
    about: dict,
) -> None:
    """Write everything ``load_captioner`` needs; ``state`` is the network's whole state, ``about`` goes to about.json.

    The weights come last and by rename: an export is either the old one or the new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer")
    save_config(_standalone(config, network), folder / "config.yaml")
    atomic_write(folder / "about.json", json.dumps(about, indent=2).encode())
    atomic_write(folder / "model.safetensors", save({name: t.contiguous() for name, t in state.items()}))


def load_captioner(folder: Path, overrides: Sequence[str] = (), device: torch.device | None = None) -> Captioner:
    """An exported captioner, with ``key=value`` changes to its sampler. Raises ValueError when there is none."""
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} holds no exported captioner (model.safetensors): train one with diffcap train")
    config = load_config(folder / "config.yaml", overrides)
    tokenizer = CaptionTokenizer.load(str(folder / "tokenizer"))
    pooled, patches = about_export(folder)["feature_widths"]
    network = build_network(config, tokenizer.vocab_size, (pooled, patches))
    network.load_state_dict(load_file(folder / "model.safetensors"))
    network.eval().requires_grad_(False)
    dtype = torch.bfloat16 if config.sampler.precision == "bf16" else torch.float32
    network = network.to(device or torch.device("cpu"), dtype)
    if config.sampler.compile:
        network.compile(mode="reduce-overhead" if network.no_image.is_cuda else "default", dynamic=False)
    return Captioner(network, config, tokenizer)


def begin_with(network: Denoiser, run: Path) -> list[str]:
    """Give ``network`` the weights of the same name and shape of a run's captioner; the names that it has no others of.

    Raises ValueError where the body's don't fit: the sizes differ, or the vocabulary does, or where words stand.
    """
    folder = run / "export" if (run / "export").is_dir() else run
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"model.init_from={run}: no exported captioner (model.safetensors) there")
    there = load_config(folder / "config.yaml").model
    if there.kind == network.config.kind == "denoiser" and there.shifted != network.config.shifted:
        raise ValueError(
            f"model.init_from={run} was trained with model.shifted={str(there.shifted).lower()}; set the same here, "
            "or its words stand at other places"
        )
    found, own = load_file(folder / "model.safetensors"), network.state_dict()
    fitting = {name: tensor for name, tensor in found.items() if name in own and own[name].shape == tensor.shape}
    for name in own:
        if name not in fitting and (name.startswith("body.") or name == "word_embeddings.weight"):
            given = f"shape {tuple(found[name].shape)}" if name in found else "nothing of that name"
            raise ValueError(f"model.init_from={run}: {name} has shape {tuple(own[name].shape)} here, {given} there")
    network.load_state_dict(fitting, strict=False)
    return sorted(set(own) - set(fitting))


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


def _standalone(config: Config, network: Denoiser) -> Config:
    """The config with the sizes of a pretrained body written out: the exported weights replace its values."""
    config, body = copy.deepcopy(config), network.body.config
    model = config.model
    model.body = model.embeddings = "random"
    model.init_from = ""
    model.width, model.num_layers, model.num_heads = body.dim, body.n_layers, body.n_heads
    model.ffn_width, model.embedding_dim = body.hidden_dim, network.embedding_dim
    return config


def _most_agreed(texts: list[str]) -> str:
    """Minimum Bayes risk: the candidate nearest to the others."""
    if len(texts) == 1:
        return texts[0]
    return texts[consensus([count_caption(tokenize(text)) for text in texts], f1_similarity)]


def _key_number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
