"""A small CLIP trained from nothing in about a minute, for where no pretrained one can be fetched.

In: pixels and captions of photos. Out: open_clip's own ``CLIP``, and a folder that open_clip loads as
``local-dir:FOLDER``. It learns from captions alone, never from a scene's ground truth; it reads no shards and knows
no ranks.

N photos, B of them in a batch, C captions of a photo, L caption length, V vocabulary, E embedding width, P patches,
F their width, T phrases.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from open_clip.transform import image_transform
from safetensors.torch import save
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import Optimizer

from diffcap_dist.data.captions import SEP, CaptionTokenizer
from diffcap_dist.data.pixels import PixelTransform, parted
from diffcap_dist.data.shard_format import atomic_write

IMAGE_SIZE = 64
BATCH_SIZE = 128
MAX_CONTEXT = 77  # CLIP's own

# A ModifiedResNet with attention pooling: at equal time it learned shapes several times faster than ViTs, and than
# towers with average pooling. Layer 3 is 4x4 cells: the patch tokens.
_VISION: dict[str, Any] = {"image_size": IMAGE_SIZE, "layers": [1, 2, 2, 1], "width": 8, "head_width": 32}
_PATCH_WIDTH = 16 * _VISION["width"]
_EMBED_DIM = 128
# One narrow layer: the images are the task, and a text tower as large would take half of the time.
_TEXT: dict[str, Any] = {"width": 64, "heads": 2, "layers": 1, "pool_type": "eos"}

_MUON_RATE, _ADAMW_RATE = 0.05, 5e-3
_WARMUP_STEPS = 20
_FINAL_RATE = 0.02  # of the peak
_MAX_GRAD_NORM = 1.0
_PHRASE_WEIGHT = 0.25
# Phrases of fewer photos are not learned in a minute; those of nearly all say nothing.
_PHRASE_SHARES = (0.005, 0.95)


@dataclass(frozen=True)
class CaptionedPhotos:
    """A split in memory: 12 kB a photo."""

    pixels_NCHW: Tensor  # uint8
    captions: list[list[str]]

    def __post_init__(self) -> None:
        if len(self.pixels_NCHW) != len(self.captions):
            raise ValueError(f"{len(self.pixels_NCHW)} photos with captions of {len(self.captions)}")
        bare = [n for n, texts in enumerate(self.captions) if not texts]
        if bare or not self.captions:
            raise ValueError(f"{len(bare) or 'all'} photos have no captions (first: {bare[:1]}): nothing to learn from")


def pixel_transform() -> PixelTransform:
    """The exported encoder's: resized by the shorter side and cropped."""
    steps, _ = parted(image_transform(IMAGE_SIZE, is_train=False))
    return PixelTransform(steps)


class ContrastiveTraining:
    """``for losses in training.steps()`` trains ``clip``; the same photos, steps and seed give the same weights."""

    def __init__(self, photos: CaptionedPhotos, num_steps: int, seed: int) -> None:
        if num_steps < 1:
            raise ValueError(f"number of steps is {num_steps}: expected at least 1")
        self.num_steps = num_steps
        self.tokenizer = CaptionTokenizer.from_captions(text for texts in photos.captions for text in texts)
        self.ids_NCL, self.counts_N = caption_ids(self.tokenizer, photos.captions)
        self.phrases_NT = phrase_targets(self.ids_NCL, self.tokenizer.vocab_size)
        self.pixels_NCHW = photos.pixels_NCHW.contiguous(memory_format=torch.channels_last)
        self.config = model_config(self.tokenizer, self.ids_NCL.shape[-1])
        self._generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.clip = CLIP(**self.config)
            self.clip.visual.to(memory_format=torch.channels_last)  # what CPUs convolve fastest
            self._phrase_heads = _phrase_heads(self.phrases_NT)
        self._optimizers = _optimizers(self.clip, self._phrase_heads)
        self._bf16 = native_bf16()

    def described(self) -> str:
        """What follows from the data and this machine, in a line."""
        image, text = (sum(p.numel() for p in m.parameters()) for m in (self.clip.visual, self.clip.transformer))
        return (
            f"a CLIP of {image:,} parameters for images and {text:,} for text, {self.tokenizer.vocab_size} tokens, "
            f"{len(self.pixels_NCHW)} photos, {self.phrases_NT.shape[1]} phrases, "
            f"{self.num_steps} steps of {min(BATCH_SIZE, len(self.pixels_NCHW))} in {'bf16' if self._bf16 else 'fp32'}"
        )

    def steps(self) -> Iterator[dict[str, float]]:
        """One optimizer step for each item, which is its losses. Leaves ``clip`` in evaluation mode at the end."""
        self.clip.train()
        batches = self._batches()
        for step in range(self.num_steps):
            contrastive, phrases = self._losses(next(batches))
            (contrastive + phrases).backward()
            nn.utils.clip_grad_norm_([*self.clip.parameters(), *self._phrase_heads.parameters()], _MAX_GRAD_NORM)
            self._update(step)
            yield {"contrastive": contrastive.item(), "phrases": phrases.item()}
        self.clip.eval()

    def _batches(self) -> Iterator[Tensor]:
        """Endless rows_B, each epoch in an order of its own, its uneven rest left out."""
        num_photos = len(self.pixels_NCHW)
        size = min(BATCH_SIZE, num_photos)
        while True:
            order_N = torch.randperm(num_photos, generator=self._generator)
            yield from order_N[: num_photos // size * size].view(-1, size)

    def _losses(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """The contrastive loss of one caption of each photo, and that of the phrases of all of them."""
        chosen_B = (torch.rand(len(rows_B), generator=self._generator) * self.counts_N[rows_B]).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            seen = self.clip.visual.forward_intermediates(normalised(self.pixels_NCHW[rows_B]), indices=2)
            text_BE = self.clip.encode_text(self.ids_NCL[rows_B, chosen_B], normalize=True)
        image_BE = seen["image_features"].float()
        patches_BPF = seen["image_intermediates"][0].flatten(2).transpose(1, 2).float()
        contrastive = contrastive_loss(image_BE, text_BE.float(), self.clip.logit_scale.exp())
        logits_BT = self._phrase_heads["pooled"](image_BE)
        # A phrase is in the picture when some patch shows it: logsumexp is the smooth "some".
        local_logits_BT = self._phrase_heads["patches"](patches_BPF).logsumexp(1)
        targets_BT = self.phrases_NT[rows_B]
        phrases = phrase_loss(logits_BT, targets_BT) + phrase_loss(local_logits_BT, targets_BT)
        return contrastive, _PHRASE_WEIGHT * phrases

    def _update(self, step: int) -> None:
        factor = _rate_factor(step, self.num_steps)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            self.clip.logit_scale.clamp_(0, math.log(100))  # as CLIP does


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy (Radford et al. 2021, figure 3); ``text_BE`` of unit length."""
    logits_BB = scale * functional.normalize(image_BE, dim=-1) @ text_BE.T
    own_B = torch.arange(len(logits_BB))
    return (functional.cross_entropy(logits_BB, own_B) + functional.cross_entropy(logits_BB.T, own_B)) / 2


def phrase_loss(logits_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Binary cross-entropy of every phrase, summed over phrases: each one has the same say however many there are."""
    return functional.binary_cross_entropy_with_logits(logits_BT, targets_BT, reduction="sum") / len(logits_BT)


def caption_ids(tokenizer: CaptionTokenizer, captions: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """ids_NCL (rows of padding where a photo has fewer captions) and the counts_N of captions."""
    flat = [text for texts in captions for text in texts]
    ids_ML, mask_ML = tokenizer.encode(flat, MAX_CONTEXT)
    length = int(mask_ML.sum(1).max())
    counts_N = torch.tensor([len(texts) for texts in captions])
    ids_NCL = torch.full((len(captions), int(counts_N.max()), length), tokenizer.pad_id)
    present_NC = torch.arange(ids_NCL.shape[1]) < counts_N[:, None]
    ids_NCL[present_NC] = torch.from_numpy(ids_ML[:, :length])
    return ids_NCL, counts_N


def phrase_targets(ids_NCL: Tensor, vocab_size: int) -> Tensor:
    """targets_NT: which words and pairs of neighbouring words the captions of each photo hold.

    The contrastive loss alone is met by colours and grounds, which tell most photos of a batch apart, long before
    shapes are seen. "red", "circle" and "red circle" ask for each of them at every step.
    """
    pairs_NCK = vocab_size + ids_NCL[..., :-1] * vocab_size + ids_NCL[..., 1:]
    codes_NK = torch.cat([ids_NCL, pairs_NCK], dim=-1).flatten(1).sort(dim=1).values
    is_first_NK = torch.ones_like(codes_NK, dtype=torch.bool)
    is_first_NK[:, 1:] = codes_NK[:, 1:] != codes_NK[:, :-1]
    codes, photos_with = codes_NK[is_first_NK].unique(return_counts=True)
    low, high = _PHRASE_SHARES
    kept_T = codes[(photos_with > low * len(ids_NCL)) & (photos_with < high * len(ids_NCL))]
    if not len(kept_T):
        raise ValueError(f"no word tells any of the {len(ids_NCL)} photos from the others: captions all alike?")
    column_NK = torch.searchsorted(kept_T, codes_NK).clamp_(max=len(kept_T) - 1)
    photo_M, place_M = (kept_T[column_NK] == codes_NK).nonzero(as_tuple=True)
    targets_NT = torch.zeros(len(ids_NCL), len(kept_T))
    targets_NT[photo_M, column_NK[photo_M, place_M]] = 1
    return targets_NT


def model_config(tokenizer: CaptionTokenizer, context_length: int) -> dict[str, Any]:
    """open_clip's ``model_cfg``."""
    text = {
        **_TEXT,
        "context_length": context_length,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "eos_id": tokenizer.sep_id,
        "hf_tokenizer_name": "words",  # any name: of a local folder open_clip reads the folder's own files
    }
    return {"embed_dim": _EMBED_DIM, "vision_cfg": dict(_VISION), "text_cfg": text}


def normalised(pixels_BCHW: Tensor) -> Tensor:
    """uint8 pixels as the exported preprocessing hands them to the tower."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (pixels_BCHW.float() / 255 - mean) / std


@torch.no_grad()
def retrieval_recall(training: ContrastiveTraining, photos: CaptionedPhotos) -> float:
    """R@1: the share of ``photos`` that are nearer to their own first caption than to any other photo's."""
    clip, length = training.clip, training.ids_NCL.shape[-1]
    ids_NL = torch.from_numpy(training.tokenizer.encode([texts[0] for texts in photos.captions], length)[0])
    rows = range(0, len(ids_NL), BATCH_SIZE)
    text_NE = torch.cat([clip.encode_text(ids_NL[i : i + BATCH_SIZE], normalize=True) for i in rows])
    pixels = (normalised(photos.pixels_NCHW[i : i + BATCH_SIZE]) for i in rows)
    nearest_N = torch.cat([(clip.encode_image(x) @ text_NE.T).argmax(1) for x in pixels])
    return (nearest_N == torch.arange(len(ids_NL))).float().mean().item()


def export_clip(training: ContrastiveTraining, folder: Path) -> None:
    """The files that make ``folder`` an open_clip model: configuration, weights, tokenizer."""
    tokenizer = training.tokenizer.tokenizer
    # open_clip reads captions through plain calls, and pools where [SEP] stands.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {SEP}", special_tokens=[(SEP, training.tokenizer.sep_id)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    preprocessing = {
        "size": IMAGE_SIZE,
        "mean": OPENAI_DATASET_MEAN,
        "std": OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": training.config, "preprocess_cfg": preprocessing}
    atomic_write(folder / "open_clip_config.json", (json.dumps(config, indent=2) + "\n").encode())
    weights = {name: tensor.contiguous() for name, tensor in training.clip.state_dict().items()}
    atomic_write(folder / "open_clip_model.safetensors", save(weights))


def _phrase_heads(phrases_NT: Tensor) -> nn.ModuleDict:
    """Linear readings of the pooled and of the patch features, which start at each phrase's share of the photos."""
    num_phrases = phrases_NT.shape[1]
    heads = {"pooled": nn.Linear(_EMBED_DIM, num_phrases), "patches": nn.Linear(_PATCH_WIDTH, num_phrases)}
    share_T = phrases_NT.mean(0)
    with torch.no_grad():
        heads["pooled"].bias.copy_(share_T.logit())
        heads["patches"].bias.copy_(share_T.logit() - math.log((IMAGE_SIZE // 16) ** 2))
    return nn.ModuleDict(heads)


def _optimizers(clip: nn.Module, heads: nn.Module) -> list[Optimizer]:
    """Muon for the image tower's hidden weights; AdamW for its first layer, for vectors and for all the rest.

    With Muon on the text tower too, at this rate, the contrastive loss came back up in two of three runs.
    """
    hidden: list[nn.Parameter] = []
    others = list(heads.parameters())
    for name, parameter in clip.named_parameters():
        inside = name.startswith("visual.") and name != "visual.conv1.weight" and "embedding" not in name
        (hidden if inside and parameter.dim() >= 2 else others).append(parameter)
    optimizers = [Muon(hidden, _MUON_RATE), torch.optim.AdamW(others, _ADAMW_RATE, (0.9, 0.98), weight_decay=0.02)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _rate_factor(step: int, num_steps: int) -> float:
    """A short warm-up times a cosine to ``_FINAL_RATE``."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return min(1.0, (step + 1) / _WARMUP_STEPS) * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself; where it emulates, bf16 is over 100 times slower than fp32."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


class Muon(Optimizer):
    """Momentum whose every update is made orthogonal (Jordan et al. 2024), for weights of two and more dimensions.

    200 steps on 6,000 scenes gave R@1 0.64 with it and 0.30 with AdamW alone. torch's own takes no convolutions.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(gradient, 1 - group["momentum"])
                ahead = gradient.lerp(average, group["momentum"]).flatten(1)  # Nesterov
                update = orthogonalised(ahead) * max(1, ahead.shape[0] / ahead.shape[1]) ** 0.5
                parameter.add_(update.view_as(parameter), alpha=-group["lr"])


def orthogonalised(matrix_MN: Tensor) -> Tensor:
    """About U V^T of the matrix's U S V^T, by five Newton-Schulz steps (singular values end within 0.7 .. 1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix_MN if matrix_MN.shape[0] <= matrix_MN.shape[1] else matrix_MN.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix_MN else x.T
