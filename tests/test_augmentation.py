"""Augmentation: a function of (seed, position) alone; captions stay true of what is seen; off means untouched."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import os
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms.v2 import functional

from diffcap_dist.config import Config, ConfigError, DataConfig, load_config
from diffcap_dist.data.augmentation import RATIOS, augmented, crop_at, jittered, mirrored_caption, random_box
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.photo import decode_photo
from diffcap_dist.data.pixels import Box, Crop, PixelTransform
from diffcap_dist.data.stream import CaptionStream, ShardReader, all_records, evaluation_photos
from diffcap_dist.evaluation.scene_facts import Scene, judge
from shards import scenes
from tests.test_pixels import MEAN, ODD, PHOTOS, SIZE, WORST, transform

OFF = DataConfig(shards="", max_length=18, num_workers=0, canonical_spans=4, shuffle_window=8, captions_per_image=2)
ON = dataclasses.replace(OFF, flip_rate=0.5, crop_scale=0.3, color_jitter=0.4)

# ---- captions ----

SWAPPED = {
    "A man looks to the left .": "A man looks to the right .",
    "Dog on the far right of the picture": "Dog on the far left of the picture",
    "Left of a tree, a girl raises her right hand.": "Right of a tree, a girl raises her left hand.",
    "a cat licking its left front paw": "a cat licking its right front paw",
    "a man to the woman 's right , a bag in left hand": "a man to the woman 's left , a bag in right hand",
    "a cyclist makes a right turn": "a cyclist makes a left turn",
    "a tree at lower right , a bird at top left of frame": "a tree at lower left , a bird at top right of frame",
    "walking from left to right .": "walking from right to left .",
    "ON THE LEFT": "ON THE RIGHT",
    "the leftmost boy and a right-handed pitcher": "the rightmost boy and a left-handed pitcher",
    "Left-hand traffic goes leftward": "Right-hand traffic goes rightward",
    "Left-Hand side": "Right-Hand side",
    "a small red circle is right of a blue star": "a small red circle is left of a blue star",
}
SAME = [
    "A dog runs through bright grass .",
    "Food leftovers upright beside an animal rights sign , alright",
    "A number of people at a stop sign",
    "A man reads a book in a football jersey",
]
DOUBTFUL = [
    "A man has left the room .",
    "Ski equipment , left alone on a slope .",
    "Two boys play in the water left behind by the sprinklers .",
    "the little bit of water left by the sprinklers",
    "A woman looks at what is left of the cake .",
    "a slice left of a pizza",
    "A man surfs , the foam right behind him .",
    "A dog running right toward the camera",
    "a man stares right in the camera",
    "a park right outside of the city",
    "People protest for the right to vote .",
    "He is in the right place",
    "the ball is all right",
    "holding it right side up",
    "a car without right of way",
    "to the left , and then he left",
    "a right-angled corner to the left",
    "on the lEFT .",
    "on the right's side",
    "a lefty throws",
    'pink " Energizer " ears',
    "a dog wearing number 8",
    "dog # 2",
    "a shirt that reads Mambo",
    "a rock that says life",
    "running clockwise",
]


@pytest.mark.parametrize("caption", SWAPPED)
def test_sides_are_exchanged(caption: str) -> None:
    assert mirrored_caption(caption) == SWAPPED[caption]
    assert mirrored_caption(SWAPPED[caption]) == caption


@pytest.mark.parametrize("caption", SAME)
def test_other_words_stay(caption: str) -> None:
    assert mirrored_caption(caption) == caption


@pytest.mark.parametrize("caption", DOUBTFUL)
def test_doubtful_captions_have_no_mirror_image(caption: str) -> None:
    assert mirrored_caption(caption) is None


WORDS = sorted({word for caption in (*SWAPPED, *SAME, *DOUBTFUL) for word in caption.split()} | {"left", "right", "of"})


@given(st.one_of(st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join), st.text(max_size=20)))
@example("to the \N{LEFT RIGHT ARROW}")
@settings(max_examples=300, deadline=None)
def test_mirrored_twice_is_the_caption(caption: str) -> None:
    mirrored = mirrored_caption(caption)
    exchanged = re.sub("left|right", lambda found: "right" if found[0] == "left" else "left", caption)
    if mirrored is not None:
        assert mirrored_caption(mirrored) == caption
    elif not re.search("left(?:y|ies)|right(?:y|ies)", caption):
        assert mirrored_caption(exchanged) is None or exchanged == caption  # as doubtful as its mirror image


def mirrored_scene(scene: Scene) -> Scene:
    opposite = {"left of": "right of", "right of": "left of"}
    return {
        "background": scene["background"],
        "objects": [{**thing, "x": 1 - thing["x"]} for thing in scene["objects"]],
        "relations": [[a, opposite.get(relation, relation), b] for a, relation, b in scene["relations"]],
    }


def test_captions_of_a_mirrored_scene_are_true_of_it() -> None:
    swapped = 0
    for number in range(200):
        scene = scenes.make_scene(Random(number), 3)
        seen = mirrored_scene(scene)
        assert seen["relations"] == scenes._relations(seen["objects"])
        for caption in scenes.captions_of(scene, Random(number)):
            mirrored = mirrored_caption(caption)
            assert mirrored is not None and judge(mirrored, seen).all_true
            swapped += mirrored != caption
            assert mirrored == caption or not judge(caption, seen).all_true
    assert swapped > 100


@pytest.mark.skipif("DIFFCAP_DATA" not in os.environ, reason="needs the real captions: set DIFFCAP_DATA")
def test_real_captions_are_exchanged_or_prevent_the_mirror() -> None:
    """The figures of docs/data.md; all 150 were read, and none is exchanged wrongly."""
    with Path(os.environ["DIFFCAP_DATA"], "flickr8k", "captions.txt").open(encoding="utf-8", newline="") as file:
        captions = [row["caption"] for row in csv.DictReader(file)]
    mirrored = [mirrored_caption(caption) for caption in captions]
    sided = [bool(re.search(r"(?i)\b(?:left|right)\b", caption)) for caption in captions]
    exchanged = sum(text not in (None, caption) for text, caption in zip(mirrored, captions))
    prevented = [text is None for text in mirrored]
    assert (len(captions), sum(sided), exchanged) == (35455, 150, 123)
    assert (sum(prevented), sum(no and side for no, side in zip(prevented, sided))) == (280, 27)


# ---- crops ----


@given(st.integers(1, 700), st.integers(1, 700), st.floats(0.01, 1), st.integers(0, 10**9))
@settings(deadline=None)
def test_crops_lie_inside_and_keep_their_share(height: int, width: int, least: float, position: int) -> None:
    top, left, h, w = random_box(least, 0, position, height, width)
    assert 0 <= top <= height - h and 0 <= left <= width - w and h >= 1 and w >= 1
    ratio_low, ratio_high = (w - 0.5) / (h + 0.5), (w + 0.5) / (h - 0.5)
    fits = ratio_high >= RATIOS[0] and ratio_low <= RATIOS[1]
    assert fits or min(height, width) == 1
    most = (h + 0.5) * (w + 0.5)  # before rounding
    in_the_middle = (top, left) == ((height - h) // 2, (width - w) // 2)
    assert most >= least * height * width or in_the_middle


def test_crops_are_spread_as_torchvisions() -> None:
    """Its own get_params, 4,000 times each: share of the area, ratio and place have the same quartiles."""
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    photo_HW = torch.zeros(375, 500)
    theirs = [RandomResizedCrop.get_params(photo_HW[None], [0.3, 1.0], list(RATIOS)) for _ in range(4000)]
    ours = [random_box(0.3, 0, position, 375, 500) for position in range(4000)]
    for measure in (lambda box: box[2] * box[3], lambda box: box[3] / box[2], lambda box: box[0], lambda box: box[1]):
        quartiles = [np.quantile([measure(box) for box in boxes], [0.25, 0.5, 0.75]) for boxes in (theirs, ours)]
        spread = np.ptp([measure(box) for box in theirs])
        assert np.abs(quartiles[0] - quartiles[1]).max() < 0.04 * spread


def fixed(box: Box) -> Crop:
    return lambda height, width: box


@pytest.mark.parametrize("name", ["landscape", "portrait", "grey", "progressive"])
def test_a_crop_is_the_same_both_ways(name: str) -> None:
    crop = fixed((20, 31, 180, 211))
    fast, exact = transform()(PHOTOS[name], crop), transform(exact=True)(PHOTOS[name], crop)
    expected = functional.resized_crop(
        decode_photo(PHOTOS[name]), 20, 31, 180, 211, [SIZE, SIZE], InterpolationMode.BICUBIC
    )
    assert exact.equal(functional.pil_to_tensor(expected))
    difference = (fast.int() - exact.int()).abs().float()
    assert fast.shape == (3, SIZE, SIZE)
    assert difference.max() <= WORST + 1 and difference.mean() <= MEAN  # enlarged here, where others are reduced


@pytest.mark.parametrize("exact", [False, True])
def test_crops_have_the_encoders_size_and_resampling(exact: bool) -> None:
    pixels = PixelTransform([Resize(40, InterpolationMode.BILINEAR), CenterCrop((40, 30))], exact)
    seen = pixels(PHOTOS["landscape"], fixed((0, 0, 375, 500)))
    expected = functional.resize(decode_photo(PHOTOS["landscape"]), [40, 30], InterpolationMode.BILINEAR)
    assert (seen.int() - functional.pil_to_tensor(expected).int()).abs().max() <= WORST


def test_crops_see_photos_upright() -> None:
    seen: list[tuple[int, int]] = []
    transform()(ODD["on its side"], lambda height, width: seen.append((height, width)) or (0, 0, height, width))  # type: ignore[func-returns-value]
    assert seen == [(300, 400)]


# ---- mirror and colours ----


def test_a_flip_is_a_mirror_and_doubt_prevents_it() -> None:
    always = dataclasses.replace(OFF, flip_rate=1.0)
    pixels_CHW = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    once, captions = augmented(pixels_CHW, ["to the left .", "a dog"], 7, always, 0)
    assert once.equal(pixels_CHW.flip(-1)) and captions == ["to the right .", "a dog"]
    twice, captions = augmented(once, captions, 7, always, 0)
    assert twice.equal(pixels_CHW) and captions == ["to the left .", "a dog"]
    kept, captions = augmented(pixels_CHW, ["to the left .", "he has left"], 7, always, 0)
    assert kept.equal(pixels_CHW) and captions == ["to the left .", "he has left"]


def test_the_rate_of_flips_is_as_asked() -> None:
    config = dataclasses.replace(OFF, flip_rate=0.3)
    pixels_CHW = torch.arange(2, dtype=torch.uint8).view(1, 1, 2)
    flips = sum(int(augmented(pixels_CHW, ["a dog"], position, config, 0)[0][0, 0, 0]) for position in range(2000))
    assert abs(flips / 2000 - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 2000)


def test_brightness_stays_within_its_strength() -> None:
    """A grey plane has neither contrast nor saturation to change."""
    grey_CHW = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    levels = [int(jittered(grey_CHW, 0.3, 0, position)[0, 0, 0]) for position in range(300)]
    assert 70 <= min(levels) < 73 and 127 < max(levels) <= 130


def test_jitter_changes_colours_and_keeps_the_form() -> None:
    pixels_CHW = transform()(PHOTOS["landscape"])
    changed_CHW = jittered(pixels_CHW, 0.3, 0, 5)
    assert (changed_CHW.dtype, changed_CHW.shape) == (torch.uint8, pixels_CHW.shape)
    assert not changed_CHW.equal(pixels_CHW) and jittered(pixels_CHW, 1e-6, 0, 5).equal(pixels_CHW)
    assert changed_CHW.equal(jittered(pixels_CHW, 0.3, 0, 5)) and not changed_CHW.equal(jittered(pixels_CHW, 0.3, 1, 5))


# ---- in the stream ----


@pytest.fixture(scope="module")
def reader(scene_shards: Path) -> ShardReader:
    return ShardReader(scene_shards, "train", transform=transform())


@pytest.fixture(scope="module")
def tokenizer(reader: ShardReader) -> CaptionTokenizer:
    return CaptionTokenizer.from_captions(c for _, record in all_records(reader) for c in record["captions"])


def seen_at(
    reader: ShardReader, tokenizer: CaptionTokenizer, config: DataConfig, world: int = 1, start: int = 0, steps: int = 6
) -> dict[int, tuple[str, list, int]]:
    """position -> key, caption ids, hash of the pixels; of the ranks of a world together."""
    rows = {}
    for rank in range(world):
        stream = CaptionStream(reader, tokenizer, config, 5, 8, rank, world)
        stream.load_state_dict({"samples_seen": start})
        for batch in itertools.islice(iter(stream), steps):
            assert batch.images_NCHW is not None
            for position, key, ids, image in zip(batch.positions, batch.keys, batch.ids_NCL, batch.images_NCHW):
                rows[position] = (key, ids.tolist(), hash(image.numpy().tobytes()))
    return rows


@pytest.mark.parametrize("workers, world", [(0, 2), (1, 1)])
def test_every_choice_is_a_function_of_the_position(
    reader: ShardReader, tokenizer: CaptionTokenizer, workers: int, world: int
) -> None:
    whole = seen_at(reader, tokenizer, ON)
    assert seen_at(reader, tokenizer, dataclasses.replace(ON, num_workers=workers), world) == whole
    resumed = seen_at(reader, tokenizer, ON, start=32, steps=2)
    assert resumed == {position: whole[position] for position in range(32, 48)}


@pytest.mark.parametrize("threads", [2, 3])
def test_pixels_do_not_depend_on_the_threads(reader: ShardReader, tokenizer: CaptionTokenizer, threads: int) -> None:
    """A rank has the threads of its share of cores, a loader worker one."""
    whole, before = seen_at(reader, tokenizer, ON, steps=2), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert seen_at(reader, tokenizer, ON, steps=2) == whole
    finally:
        torch.set_num_threads(before)


def test_off_is_what_the_encoder_sees(reader: ShardReader, tokenizer: CaptionTokenizer) -> None:
    assert crop_at(3, OFF, 0) is None
    encoders = {}
    for shard, count in enumerate(reader.counts):
        for sample in range(count):
            photo = reader.photo(shard, sample)
            assert photo.image_CHW is not None
            encoders[photo.key] = hash(photo.image_CHW.numpy().tobytes())
    off, on = (seen_at(reader, tokenizer, config) for config in (OFF, ON))
    assert all(pixels == encoders[key] for key, _, pixels in off.values())
    assert not any(pixels == encoders[key] for key, _, pixels in on.values())
    assert sum(off[position][1] != on[position][1] for position in off) > 5  # captions of flipped photos


def test_evaluation_never_augments(scene_shards: Path, reader: ShardReader) -> None:
    photo = next(evaluation_photos(reader))
    assert photo.image_CHW is not None and photo.image_CHW.equal(reader.photo(0, 0).image_CHW)  # type: ignore[arg-type]


# ---- settings ----


@pytest.mark.parametrize("setting", ["flip_rate=0.5", "crop_scale=0.8", "color_jitter=0.1"])
def test_stored_features_can_not_be_augmented(tiny_config: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.features"):
        load_config(tiny_config, [f"data.{setting}"])
    assert isinstance(load_config(tiny_config, [f"data.{setting}", "data.features="]), Config)


@pytest.mark.parametrize("setting", ["flip_rate=1.1", "crop_scale=0", "crop_scale=1.5", "color_jitter=-0.1"])
def test_settings_have_bounds(tiny_config: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        load_config(tiny_config, [f"data.{setting}", "data.features="])
