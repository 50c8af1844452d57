"""What a visit in training changes about its photo and captions: a crop, a mirror, colours. All is off by default.

In: settings, a seed and a position; nothing else decides, so ranks, workers and resume change nothing. A mirrored photo
has left and right changed in its captions; where a caption is not surely as true of the mirror image, its photo is not
mirrored. English only. Reading and resizing the photo are the business of ``pixels``.

C = 3 channels, H, W pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from diffcap_dist.config import DataConfig
from diffcap_dist.data.order import draw_uniform
from diffcap_dist.data.pixels import Box, Crop

RATIOS = (3 / 4, 4 / 3)  # of a crop, width to height
TRIES = 10


def crop_at(position: int, config: DataConfig, seed: int) -> Crop | None:
    """The crop of a visit; None where crops are off."""
    return partial(random_box, config.crop_scale, seed, position) if config.crop_scale < 1 else None


def augmented(
    pixels_CHW: Tensor, captions: list[str], position: int, config: DataConfig, seed: int
) -> tuple[Tensor, list[str]]:
    """uint8 pixels and captions of a visit, mirrored and with other colours as its position has it."""
    if draw_uniform(seed, "flip", position) < config.flip_rate:
        mirrored = mirrored_captions(captions)
        if mirrored is not None:
            pixels_CHW, captions = functional.horizontal_flip(pixels_CHW), mirrored
    if config.color_jitter:
        pixels_CHW = jittered(pixels_CHW, config.color_jitter, seed, position)
    return pixels_CHW, captions


def random_box(least_share: float, seed: int, position: int, height: int, width: int) -> Box:
    """``RandomResizedCrop.get_params`` of torchvision, from our draws: a share of the area in [least_share, 1], a
    logarithm of the ratio, a place; after ten that don't fit, the largest box in the middle of a ratio allowed."""
    low, high = map(math.log, RATIOS)
    for attempt in range(TRIES):
        by_area, by_ratio, down, right = (draw_uniform(seed, "crop", position, attempt, i) for i in range(4))
        area = height * width * (least_share + (1 - least_share) * by_area)
        ratio = math.exp(low + (high - low) * by_ratio)
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    h = min(height, round(width / RATIOS[0]))
    w = min(width, round(height * RATIOS[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def jittered(pixels_CHW: Tensor, strength: float, seed: int, position: int) -> Tensor:
    """Brightness, contrast and saturation, each times a factor drawn from [1 - strength, 1 + strength]."""
    # In bytes each change would round down; in fp32 the mean that contrast is about depends on the number of threads.
    colors_CHW = pixels_CHW.double() / 255
    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for number, change in enumerate(changes):
        factor = 1 + strength * (2 * draw_uniform(seed, "color", position, number) - 1)
        colors_CHW = change(colors_CHW, factor)
    return (255 * colors_CHW).round().to(torch.uint8)


# ---- captions of the mirror image ----

_SWAP = {"left": "right", "Left": "Right", "LEFT": "RIGHT", "right": "left", "Right": "Left", "RIGHT": "LEFT"}
# Whole words, and the compounds that are always about sides. "right-angled" and "lEFT" make a caption doubtful.
_SIDES = re.compile(rf"(?<![\w'-])({'|'.join(_SWAP)})(-?(?i:most|hand|handed|hander|handers|ward|wards))?(?![\w'-])")
_TOKENS = re.compile(r"\w+(?:['-]\w+)*|[^\w\s]")


def _words(text: str) -> str:
    return f"(?:{'|'.join(text.split())})"


# In the patterns S is "left" or "right": they can't tell one from the other, so that what is sure of a caption is sure
# of its mirror image. A caption is sure if each of its S is in a use that is listed here.
_PART = _words(
    "hand hands arm arms leg legs foot feet knee knees shoulder shoulders eye eyes ear ears wrist wrists ankle elbow "
    "finger fingers thumb fist palm paw paws hip thigh cheek forearm sleeve pocket side sides corner edge lane turn"
)
_WHOSE = r"(?:the(?: far)?|his|her|their|its|my|your|our|(?:the |a )?\w+(?:'s| ' s))"
_END = r"(?= [^\w\s]| (?:of|and|or|is|are|while|as|with)\b|$)"
_NEXT = _words(  # no noun: "the right place"
    "a an and are as at behind beside by for from has holding holds in inside into is looking looks near of on or "
    "outside side sitting standing that to toward towards under watches wearing wears where which while who with"
)
_AFTER_WHOSE = rf"(?= [^\w\s]| {_NEXT}\b|$)"
_SURE = re.compile(
    rf"\b(?:to|on|at|in|from|into|toward|towards|off) {_WHOSE} S{_AFTER_WHOSE}"
    rf"|\b(?:to|on|at|from|toward|towards) S{_END}"
    rf"|(?<!\S)S (?:(?:front|rear|hind|back|upper|lower|index|middle|pointer|ring) )?{_PART}\b"
    rf"|\b(?:top|bottom|upper|lower|far) S{_END}"
    rf"|\b{_words('look turn face lean point glance gaze stare swerve veer')}(?:s|ing)? S{_END}"
    rf"|\b{_words('facing gazing glancing staring')} S{_END}"
    rf"|(?<!\S)S of\b|(?<!\S)S to S{_END}"
)
# What looks like one of them, but is the past of "leave", or "right" as correct.
_DOUBTFUL = re.compile(
    r"\b(?:has|have|had|having|been|just|all) S\b"
    r"|\b(?:what|what's|that|that's|all|any|some|much|more|little|few|bit|lot|nothing|piece|pieces|slice|slices)"
    r"(?: (?:is|are|was|were))? S of\b"
    r"|(?<!\S)S (?:of way|side (?:up|out|by)|hand (?:man|in hand))\b"
)
# What a mirror image does not show: writing that the caption quotes, numbers that are seen, turns of a clock.
_NOT_MIRRORED = re.compile(
    r'["“”#]|(?<!\ba )\bnumbers?\b|\b(?:numbered|letters?|lettering|words?|written|logos?|inscribed|inscription|says?|'
    r"saying|spell|spells|spelling|marked|label+ed|initials|(?:that|which|signs?|shirts?|t-shirts?) read(?:s|ing)?|"
    r"(?:counter-?|anti-?)?clockwise|left(?:y|ies)|right(?:y|ies))\b",
    re.IGNORECASE,
)


def mirrored_captions(captions: Sequence[str]) -> list[str] | None:
    """Captions of the mirrored photo. None where one of them is doubtful."""
    mirrored = []
    for caption in captions:
        text = mirrored_caption(caption)
        if text is None:
            return None
        mirrored.append(text)
    return mirrored


def mirrored_caption(caption: str) -> str | None:
    """The caption of the mirrored photo: left and right exchanged where they are sides. None where it is doubtful."""
    if _NOT_MIRRORED.search(caption):
        return None
    if re.search(r"left|right", caption, re.IGNORECASE) and not _is_sure(caption):
        return None
    return _SIDES.sub(lambda found: _SWAP[found[1]] + (found[2] or ""), caption)


def _is_sure(caption: str) -> bool:
    """Each whole word left or right of the caption is about a side."""
    marked = _SIDES.sub(lambda found: "" if found[2] else "\u21c4", caption)
    line = " ".join(_TOKENS.findall(marked.lower())).replace("\u21c4", "S")  # the only capital
    return not _DOUBTFUL.search(line) and not re.search(r"\bS\b|\b(?:left|right)\b", _SURE.sub(" ", line))
