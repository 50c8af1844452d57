"""The frozen image encoder: images_BCHW -> pooled_BF and patches_BPF, by open_clip.

In: an open_clip model name with a pretrained tag or weights file, a hub id (``hf-hub:org/model``), or a local folder
with ``open_clip_config.json`` and weights. Out: features, and what identifies them (a slug for file names, a hash of
the weights, the preprocessing). Never trains, never writes; text is its business only through ``encode_text``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn


class ImageEncoder(nn.Module):
    """A frozen CLIP in evaluation mode. ``name``/``pretrained`` as the settings ``encoder.*`` give them."""

    def __init__(self, name: str, pretrained: str = "") -> None:
        super().__init__()
        model_name = f"local-dir:{name}" if Path(name).is_dir() else name
        self.source = f"{name}" + (f" / {pretrained}" if pretrained else "")
        self.clip, self.transform = _create(model_name, pretrained)
        self.clip.eval().requires_grad_(False)
        self.name = slug(name, pretrained)
        self.weights_sha256 = _weights_sha256(self.clip)
        self.preprocessing = " | ".join(str(step) for step in self.transform.transforms if not callable_only(step))
        self._model_name = model_name
        height, width = _image_size(self.clip)
        with torch.inference_mode():
            pooled_BF, patches_BPF = self(torch.zeros(1, 3, height, width))
        self.image_size = (height, width)
        self.pooled_dim = pooled_BF.shape[1]
        self.patches_shape = (patches_BPF.shape[1], patches_BPF.shape[2])

    def train(self, mode: bool = True) -> ImageEncoder:
        """Stays in evaluation mode whatever the module that holds it does: it is frozen."""
        return super().train(False)

    @torch.inference_mode()
    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """images_BCHW (preprocessed by ``transform``) -> L2-normalised pooled_BF and patches_BPF (P = H' x W')."""
        output = self.clip.visual.forward_intermediates(images_BCHW, indices=1)
        pooled_BF = nn.functional.normalize(output["image_features"].float(), dim=-1)
        return pooled_BF, output["image_intermediates"][-1].flatten(2).transpose(1, 2).float()

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised text features_BF of the same CLIP."""
        tokens_BL = open_clip.get_tokenizer(self._model_name)(list(texts))
        return self.clip.encode_text(tokens_BL, normalize=True).float()

    def load_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Preprocessed images_BCHW."""
        return torch.stack([self.transform(image.convert("RGB")) for image in images])


def slug(name: str, pretrained: str = "") -> str:
    """The encoder's name in feature file names: ``ViT-B-32_openai``; a folder or weights file by its last part."""
    parts = [Path(name).name if "/" in name else name]
    if pretrained:
        parts.append(Path(pretrained).stem if "/" in pretrained else pretrained)
    return re.sub(r"[^A-Za-z0-9_-]+", "-", "_".join(parts)).strip("-")


def _create(model_name: str, pretrained: str) -> tuple[nn.Module, object]:
    try:
        model, _, transform = open_clip.create_model_and_transforms(model_name, pretrained=pretrained or None)
    except Exception as error:
        raise ValueError(
            f"image encoder {model_name!r} (pretrained {pretrained!r}) could not be loaded: "
            f"{str(error).strip().splitlines()[0]}\n"
            'On a machine with network run:  python -c "import open_clip; '
            f'open_clip.create_model_and_transforms({model_name!r}, pretrained={pretrained!r})"\n'
            "and copy the Hugging Face cache here, or set encoder.pretrained to a local weights file, or encoder.name "
            "to a folder with open_clip_config.json and weights."
        ) from error
    if not pretrained and not model_name.startswith(("local-dir:", "hf-hub:")):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)[:6])
        raise ValueError(
            f"encoder.pretrained is empty: {model_name!r} would be an untrained encoder. Set it to a weights file "
            f"or one of open_clip's tags: {tags}"
        )
    return model, transform


def callable_only(step: object) -> bool:
    """Plain functions in a transform print their address, which differs from run to run."""
    return type(step).__name__ == "function"


def _image_size(clip: nn.Module) -> tuple[int, int]:
    size = clip.visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _weights_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
