"""A photo's bytes -> the pixels that an encoder takes: uint8, at its size, not yet normalised.

Normalising is the encoder's first operation, on its device: a batch of bytes is a quarter of a batch of floats to
collate, to hand from worker to rank and to copy to a GPU. Two ways to the same pixels: ``exact`` is PIL's decoder and
resampling, which CLIP was trained with; else plain JPEGs go through torchvision's decoder and torch's vectorised
resampling, which differ from PIL by a rounding here and there (tests/test_pixels.py has the tolerance,
benchmarks/decode.py the speed).

C = 3 channels, H, W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize
from torchvision.transforms.v2 import functional

from diffcap_dist.data.photo import UPRIGHT, decode_photo, orientation, upright_rgb

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels
Crop = Callable[[int, int], Box]  # a picture's height and width -> the part of it that is seen
PictureStep = Callable[[Image.Image], Image.Image]
VECTORISED = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)  # what torch resamples in uint8


class PixelTransform:
    """bytes -> uint8 pixels_CHW. ``steps`` are the encoder's own: each takes and gives a PIL picture.

    Raises what the decoders raise on bad bytes (OSError, RuntimeError, ...).
    """

    def __init__(self, steps: Sequence[PictureStep], exact: bool = False) -> None:
        self.steps = list(steps)
        self._tensor_steps = None if exact else _tensor_steps(self.steps)
        self._size_HW = list(self._exact(Image.new("RGB", (32, 32))).shape[1:])
        resampling = [step.interpolation for step in steps if isinstance(step, Resize)]
        self._interpolation = resampling[0] if resampling else InterpolationMode.BICUBIC

    def __call__(self, data: bytes, crop: Crop | None = None) -> Tensor:
        """The part of the photo that ``crop`` chooses is stretched to the encoder's size; without it its steps alone
        decide what is seen."""
        if self._tensor_steps is None or not _is_plain_jpeg(data):
            picture = decode_photo(data)
            if crop:
                return _as_tensor(self._cropped(picture, crop(picture.height, picture.width)))
            return self._exact(picture)
        pixels_CHW = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        if crop:
            return self._cropped(pixels_CHW, crop(*pixels_CHW.shape[1:]))
        for step in self._tensor_steps:
            pixels_CHW = step(pixels_CHW)
        return pixels_CHW

    def of_picture(self, picture: Image.Image) -> Tensor:
        """The exact way, for a picture that is already decoded."""
        return self._exact(upright_rgb(picture))

    def _cropped(self, image: Any, box: Box) -> Any:
        """Of a picture or a tensor, at the encoder's size."""
        return functional.resized_crop(image, *box, self._size_HW, self._interpolation, antialias=True)

    def _exact(self, picture: Image.Image) -> Tensor:
        for step in self.steps:
            picture = step(picture)
        return _as_tensor(picture)

    @property
    def described(self) -> str:
        """The way plain JPEGs go."""
        return "PIL" if self._tensor_steps is None else "torchvision"


def parted(transform: Compose) -> tuple[list[PictureStep], Normalize]:
    """open_clip's preprocessing as its steps on pictures and, behind the turn into a tensor, the normalisation."""
    *steps, convert, to_tensor, normalise = transform.transforms
    names = [type(convert).__name__, type(to_tensor).__name__]
    if names != ["MaybeConvertMode", "MaybeToTensor"] or not isinstance(normalise, Normalize):
        raise ValueError(
            f"the encoder's preprocessing ends in {transform.transforms[-3:]}; expected open_clip's conversion to RGB, "
            "to a tensor, and its normalisation. Is open_clip newer than this program knows?"
        )
    return steps, normalise


def _tensor_steps(steps: Sequence[Any]) -> list[Callable[[Tensor], Tensor]] | None:
    """The same steps on uint8 tensors; None where one of them has no such twin."""
    twins: list[Callable[[Tensor], Tensor]] = []
    for step in steps:
        if type(step) is Resize and step.interpolation in VECTORISED and step.antialias and step.max_size is None:
            twins.append(_resize(step))
        elif type(step) is CenterCrop:
            twins.append(_crop(step))
        else:
            return None
    return twins


def _resize(step: Resize) -> Callable[[Tensor], Tensor]:
    size = [step.size] if isinstance(step.size, int) else list(step.size)
    # v2 keeps uint8, which torch resamples 8 times as fast as PIL; the older functional goes through floats.
    return lambda pixels_CHW: functional.resize(pixels_CHW, size, step.interpolation, antialias=True)


def _crop(step: CenterCrop) -> Callable[[Tensor], Tensor]:
    return lambda pixels_CHW: functional.center_crop(pixels_CHW, list(step.size))


def _as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _is_plain_jpeg(data: bytes) -> bool:
    """A JPEG of one or three components that stands upright: PIL reads the header only."""
    if not data.startswith(b"\xff\xd8"):
        return False
    with Image.open(io.BytesIO(data)) as image:
        return image.format == "JPEG" and image.mode in ("RGB", "L") and orientation(image) == UPRIGHT
