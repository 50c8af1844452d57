"""The frozen image encoder: pixels_BCHW -> pooled_BF and patches_BPF, by open_clip.

In: an open_clip model name with a pretrained tag or weights file, a hub id (``hf-hub:org/model``), or a local folder
with ``open_clip_config.json`` and weights; then uint8 pixels. Out: features, and what identifies them (a slug for file
names, a hash of the weights, the preprocessing). Never trains, never writes; text is its business only through
``encode_text``.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose

from diffcap_dist.data.pixels import PixelTransform, parted

# Convolution towers end in maps too coarse to say where things are (2x2 at 64 pixels): patch tokens are taken from
# the last map with at least 4x4 cells. In a ViT every block has the same grid, so that is its last block.
MIN_PATCHES = 16

_SCHEMES = ("local-dir:", "hf-hub:")


class ImageEncoder(nn.Module):
    """A frozen CLIP in evaluation mode. ``name``/``pretrained`` as the settings ``encoder.*`` give them."""

    clip: Any  # open_clip's models are untyped
    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, name: str, pretrained: str = "") -> None:
        super().__init__()
        self._model_name = f"local-dir:{name}" if Path(name).is_dir() else name
        _check_name(self._model_name, pretrained)
        self.source = f"{name}" + (f" / {pretrained}" if pretrained else "")
        self.clip, transform = _load(self._model_name, pretrained)
        self.clip.eval().requires_grad_(False)
        self.clip.visual.to(memory_format=torch.channels_last)  # halves the time of a convolution tower on a CPU
        self.name = slug(name, pretrained)
        self.weights_sha256 = _weights_sha256(self.clip)
        self.preprocessing = " | ".join(_described(step) for step in transform.transforms)
        self._picture_steps, normalise = parted(transform)
        self.register_buffer("mean_C11", torch.tensor(normalise.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(normalise.std).view(-1, 1, 1), persistent=False)
        size = self.clip.visual.image_size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        with torch.no_grad():
            example_BCHW = torch.zeros(1, 3, *self.image_size, dtype=torch.uint8)
            maps = self.clip.visual.forward_intermediates(example_BCHW.float(), indices=None)["image_intermediates"]
        self._num_last_maps = _maps_from_the_end([m.shape[-2] * m.shape[-1] for m in maps])
        pooled_BF, patches_BPF = self(example_BCHW)
        self.pooled_dim = pooled_BF.shape[1]
        self.patches_shape = (patches_BPF.shape[1], patches_BPF.shape[2])

    def train(self, mode: bool = True) -> ImageEncoder:
        """Stays in evaluation mode whatever the module that holds it does: it is frozen."""
        return super().train(False)

    @torch.no_grad()  # not inference_mode: a trained projection must be able to save the features for its backward
    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 pixels_BCHW (of ``pixel_transform``) -> L2-normalised pooled_BF and patches_BPF (P = H' x W')."""
        if pixels_BCHW.dtype != torch.uint8 or pixels_BCHW.shape[1:] != (3, *self.image_size):
            raise ValueError(
                f"expected uint8 pixels of shape (B, 3, {self.image_size[0]}, {self.image_size[1]}), made by "
                f"pixel_transform(); got {pixels_BCHW.dtype} {tuple(pixels_BCHW.shape)}"
            )
        images_BCHW = self.normalised(pixels_BCHW).contiguous(memory_format=torch.channels_last)
        output = self.clip.visual.forward_intermediates(images_BCHW, indices=self._num_last_maps)
        pooled_BF = nn.functional.normalize(output["image_features"].float(), dim=-1)
        return pooled_BF, output["image_intermediates"][0].flatten(2).transpose(1, 2).float()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised text features_BF of the same CLIP."""
        tokens_BL = self._tokenize(list(texts))
        device = next(self.clip.parameters()).device
        return self.clip.encode_text(tokens_BL.to(device), normalize=True).float()

    @cached_property
    def _tokenize(self) -> Any:
        return open_clip.get_tokenizer(self._model_name)  # 0.15 s for open_clip's own

    def pixel_transform(self, exact: bool = False) -> PixelTransform:
        """A photo's bytes -> the uint8 pixels_CHW that ``forward`` takes."""
        return PixelTransform(self._picture_steps, exact)

    def normalised(self, pixels_BCHW: Tensor) -> Tensor:
        """What the tower sees of uint8 pixels: the floats of the encoder's own preprocessing."""
        # In place: a batch's temporaries took three times as long as the arithmetic.
        return pixels_BCHW.float().div_(255).sub_(self.mean_C11).div_(self.std_C11)

    def load_images(self, images: Sequence[Image.Image]) -> Tensor:
        """pixels_BCHW of pictures, the exact way."""
        transform = self.pixel_transform(exact=True)
        return torch.stack([transform.of_picture(image) for image in images])


def slug(name: str, pretrained: str = "") -> str:
    """The encoder's name in feature file names: ``ViT-B-32_openai``; a folder or weights file by its last part."""
    parts = [Path(name).name if "/" in name else name]
    if pretrained:
        parts.append(Path(pretrained).stem if "/" in pretrained else pretrained)
    return re.sub(r"[^A-Za-z0-9_-]+", "-", "_".join(parts)).strip("-")


def _check_name(model_name: str, pretrained: str) -> None:
    """What can be told before anything is read. open_clip would list its 150 models, ignore ``pretrained`` beside a
    folder or hub id, and hand out an untrained model without it."""
    if model_name.startswith(_SCHEMES):
        if pretrained:
            raise ValueError(
                f"encoder.pretrained={pretrained!r} would be ignored: {model_name!r} brings its own weights. "
                "Leave encoder.pretrained empty"
            )
        return
    known = open_clip.list_models()
    if model_name.replace("/", "-") not in known:
        by_lower_case = {name.lower(): name for name in known}
        close = difflib.get_close_matches(model_name.lower(), by_lower_case, n=3)
        meant = f" Did you mean {', '.join(by_lower_case[name] for name in close)}?" if close else ""
        raise ValueError(
            f"image encoder {model_name!r} is neither an open_clip model nor an existing folder.{meant} "
            "A model of the Hugging Face hub is written hf-hub:ORG/MODEL"
        )
    if not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)[:6]) or "none"
        raise ValueError(
            f"encoder.pretrained is empty: {model_name!r} would be an untrained encoder. Set it to a weights file "
            f"or one of open_clip's tags: {tags}"
        )


def _load(model_name: str, pretrained: str) -> tuple[nn.Module, Compose]:
    try:
        return open_clip.create_model_from_pretrained(model_name, pretrained=pretrained or None)
    except Exception as error:  # open_clip, the hub's client and torch raise many kinds
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        call = f"open_clip.create_model_from_pretrained({model_name!r}, pretrained={pretrained or None!r})"
        raise ValueError(
            f"image encoder {model_name!r} (pretrained {pretrained!r}) could not be loaded: {first_line}\n"
            f'On a machine with network run:  python -c "import open_clip; {call}"\n'
            "and copy the Hugging Face cache here, or set encoder.pretrained to a local weights file, or encoder.name "
            "to a folder with open_clip_config.json and weights."
        ) from error


def _maps_from_the_end(cells: Sequence[int]) -> int:
    """Which map, counted from the end (1 is the last), gives the patch tokens; ``cells`` of each map in order."""
    for from_the_end, count in enumerate(reversed(cells), start=1):
        if count >= MIN_PATCHES:
            return from_the_end
    return 1


def _described(step: object) -> str:
    """A step of the transform; one that prints its address, which differs from run to run, by its name."""
    text = str(step)
    return text if " at 0x" not in text else getattr(step, "__name__", type(step).__name__)


def _weights_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
