"""The scenes set: its captions are true, its judge sees what is false, its splits share nothing."""

import io
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from multiprocessing import get_context
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffcap_dist.evaluation.scene_facts import (
    BACKGROUNDS,
    COLORS,
    INVERSE,
    RELATIONS,
    SHAPES,
    SIZES,
    Fact,
    judge,
    scene_scores,
    stated_facts,
)
from shards.scenes import captions_of, description, generate, make_scene, render
from shards.writer import RawSample


def thing(shape: str, color: str, size: str) -> dict[str, Any]:
    return {"shape": shape, "color": color, "size": size, "x": 0.5, "y": 0.5, "radius": 0.1}


SCENE = {
    "background": "grass",
    "objects": [thing("circle", "red", "large"), thing("square", "blue", "small")],
    "relations": [[0, "left of", 1]],
}
THREE = {
    "background": "sky",
    "objects": [*SCENE["objects"], thing("star", "red", "small")],
    "relations": [[0, "left of", 1], [0, "above", 2]],
}


@pytest.fixture(scope="module")
def samples() -> list[RawSample]:
    return list(generate(500, 60, 60, seed=3, image_size=16))


@pytest.fixture(scope="module", params=[1, 2, 3])
def scenes(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    rng = Random(request.param)
    return [make_scene(rng, request.param) for _ in range(300)]


# ---- The judge ----


@pytest.mark.parametrize(
    "caption",
    [
        "a large red circle to the left of a small blue square on grass",
        "A big red circle is left of a tiny blue square.",
        "a blue square is right of a red circle",
        "right of a red circle there is a square on the grass",
        "on grass right of a red circle is a square",
        "a red circle on grass left of a square",
        "a square and a circle",
        "the grass",
    ],
)
def test_true_captions(caption: str) -> None:
    assert judge(caption, SCENE).all_true


@pytest.mark.parametrize(
    ("caption", "stated", "true"),
    [
        ("a blue circle left of a red square", 5, 3),  # colours swapped
        ("a red circle right of a blue square", 5, 4),  # relation turned
        ("a red circle above a blue square", 5, 4),
        ("a red circle on sand", 3, 2),
        ("a small red circle", 3, 2),
        ("a red triangle", 2, 1),
        ("a red circle and a red circle", 4, 2),  # one object cannot be both
        ("a red circle and a square and a star", 4, 3),
        ("a red blue circle", 3, 2),
        ("a red red red circle", 2, 2),  # said three times, stated once
        ("a circle a red", 2, 1),  # dangling attributes
        ("a circle on red grass", 3, 2),
        ("a red and circle", 2, 1),
        ("left of a square", 2, 1),  # relations missing a side
        ("a circle left of", 2, 1),
        ("a circle left of on grass", 3, 2),
        ("a circle left a square", 3, 2),
        ("a circle left of above a square", 4, 2),
        ("", 0, 0),
        ("there is a picture of a zebra", 0, 0),
    ],
)
def test_false_facts_are_counted(caption: str, stated: int, true: int) -> None:
    judgement = judge(caption, SCENE)
    assert (judgement.facts_stated, judgement.facts_true) == (stated, true)
    assert judgement.all_true == (stated == true > 0)


def test_stated_facts() -> None:
    assert set(stated_facts("in the sky a tiny red star is below a circle")) == {
        Fact("place", "sky"),
        Fact("object", "star", 0),
        Fact("size", "small", 0),
        Fact("color", "red", 0),
        Fact("object", "circle", 1),
        Fact("relation", "below", 0, 1),
    }


def test_second_relation_keeps_its_subject() -> None:
    assert judge("a red circle left of a square and above a red star in the sky", THREE).all_true
    assert not judge("a red circle left of a square above a red star", THREE).all_true  # square above star


def test_matching_is_joint() -> None:
    """The red star is found though the circle is red too, and a wrong shape is no mention."""
    assert judge("a small red star", THREE).all_true
    assert judge("a red heart above a red star", THREE).objects_mentioned == 1
    assert judge("a star and a square and a circle", THREE).objects_mentioned == 3


def test_scores_of_a_corpus() -> None:
    scenes = {"a": SCENE, "b": SCENE, "c": THREE}
    scores = scene_scores({"a": "a red circle", "b": "", "c": "a red square on grass"}, scenes)
    assert scores == {"scene_accuracy": 3 / 6, "scene_all_true": 1 / 3, "objects_mentioned": 2 / 7}


def test_scores_need_a_scene_for_each_caption() -> None:
    with pytest.raises(ValueError, match=r"same keys.*'b'"):
        scene_scores({"a": "a circle", "b": "a square"}, {"a": SCENE})
    with pytest.raises(ValueError, match="no captions"):
        scene_scores({}, {})


WORDS = [
    *COLORS,
    *SHAPES,
    *SIZES,
    *BACKGROUNDS,
    "left",
    "right",
    "of",
    "above",
    "under",
    "a",
    "is",
    "and",
    "on",
]


@given(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
def test_any_words_can_be_judged(caption: str) -> None:
    judgement = judge(caption, THREE)
    assert 0 <= judgement.facts_true <= judgement.facts_stated
    assert 0 <= judgement.objects_mentioned <= judgement.objects_in_scene


# ---- Scenes and their captions ----


def test_every_caption_is_true(scenes: list[dict[str, Any]]) -> None:
    for scene in scenes:
        captions = captions_of(scene, Random(1))
        assert len(set(captions)) == 5
        for caption in captions:
            judgement = judge(caption, scene)
            assert judgement.all_true, (caption, scene)
            assert judgement.objects_mentioned == len(scene["objects"]), (caption, scene)
            assert caption.islower() and caption[-1].isalpha() and len(caption.split()) <= 18


def test_wrong_facts_in_generated_captions_are_seen(scenes: list[dict[str, Any]]) -> None:
    """Another scene's caption is false wherever it states what differs; a turned relation always is."""
    for scene in scenes:
        color, shape = scene["objects"][0]["color"], scene["objects"][0]["shape"]
        for caption in captions_of(scene, Random(2)):
            assert not judge(caption.replace(f"{color} {shape}", f"{color} moon"), scene).all_true
            elsewhere = next(place for place in BACKGROUNDS if place != scene["background"])
            assert not judge(f"{caption} on {elsewhere}", scene).all_true
            relations = [fact for fact in stated_facts(caption) if fact.kind == "relation"]
            turned = {**scene, "relations": [[a, INVERSE[name], b] for a, name, b in scene["relations"]]}
            assert judge(caption, turned).all_true == (not relations)


def test_sizes_are_balanced(scenes: list[dict[str, Any]]) -> None:
    """Large objects fit less easily, yet finding room must not favour small ones."""
    sizes = [thing["size"] for scene in scenes for thing in scene["objects"]]
    assert 0.4 < sizes.count("large") / len(sizes) < 0.6


def test_ground_truth_is_unambiguous(scenes: list[dict[str, Any]]) -> None:
    axis_and_sign = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}
    for scene in scenes:
        objects = scene["objects"]
        for a, b in combinations(objects, 2):
            assert (a["x"] - b["x"]) ** 2 + (a["y"] - b["y"]) ** 2 > (a["radius"] + b["radius"]) ** 2
        assert all(o["radius"] <= o[axis] <= 1 - o["radius"] for o in objects for axis in "xy")
        assert all(o["radius"] < 0.15 if o["size"] == "small" else o["radius"] > 0.15 for o in objects)
        for subject, name, target in scene["relations"]:
            (axis, sign), other = axis_and_sign[name], "y" if axis_and_sign[name][0] == "x" else "x"
            offset = sign * (objects[subject][axis] - objects[target][axis])
            assert offset >= 2 * abs(objects[subject][other] - objects[target][other])
        pairs = {(subject, target) for subject, _, target in scene["relations"]}
        assert {(0, number) for number in range(1, len(objects))} <= pairs


def test_everything_listed_occurs(samples: list[RawSample]) -> None:
    scenes = [sample.scene for sample in samples]
    objects = [thing for scene in scenes for thing in scene["objects"]]
    assert {o["shape"] for o in objects} == set(SHAPES)
    assert {o["color"] for o in objects} == set(COLORS)
    assert {o["size"] for o in objects} == set(SIZES)
    assert {scene["background"] for scene in scenes} == set(BACKGROUNDS)
    assert {name for scene in scenes for _, name, _ in scene["relations"]} == set(RELATIONS)
    words = Counter(word for sample in samples for text in sample.captions for word in text.split())
    assert {word for words_of in SIZES.values() for word in words_of} <= set(words)
    assert len(words) < 80
    one_object_share = sum(len(scene["objects"]) == 1 for scene in scenes) / len(scenes)
    assert 0.19 < one_object_share < 0.31


def test_phrasing_does_not_depend_on_the_picture() -> None:
    """The same draws word two different pictures alike, up to the words for what is in them."""
    scene = {**SCENE, "relations": [[0, "above", 1]]}
    other = {
        "background": "bricks",
        "objects": [thing("heart", "pink", "small"), thing("star", "white", "small")],
        "relations": [[0, "below", 1]],
    }
    swaps = {"heart": "circle", "star": "square", "pink": "red", "white": "blue", "bricks": "grass"}
    swaps |= {"below": "ABOVE", "under": "OVER", "above": "below", "over": "under"}
    for seed in range(20):
        told, other_told = captions_of(scene, Random(seed)), captions_of(other, Random(seed))
        renamed = [" ".join(swaps.get(word, word) for word in text.split()).lower() for text in other_told]
        small_for_large = [text.replace("large", "small").replace("big", "tiny") for text in told]
        assert renamed == small_for_large


# ---- Generating the set ----


def test_splits_share_no_description(samples: list[RawSample]) -> None:
    told: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for sample in samples:
        told[sample.split].append(description(sample.scene))
    assert {split: len(texts) for split, texts in told.items()} == {"train": 500, "val": 60, "test": 60}
    for a, b in combinations(told.values(), 2):
        assert not set(a) & set(b)
    several = [text for texts in told.values() for text in texts if json.loads(text)[1]]
    assert len(several) == len(set(several)) > 300


def test_description_ignores_the_order_of_objects() -> None:
    turned = {**SCENE, "objects": SCENE["objects"][::-1], "relations": [[0, "right of", 1]]}
    assert description(turned) == description(SCENE)
    assert description({**turned, "relations": [[0, "left of", 1]]}) != description(SCENE)


def test_order_and_members(samples: list[RawSample]) -> None:
    assert [sample.split for sample in samples] == ["train"] * 500 + ["val"] * 60 + ["test"] * 60
    assert len({sample.photo_id for sample in samples}) == len(samples)
    for sample in samples:
        with Image.open(io.BytesIO(drawn(sample))) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (16, 16))


@pytest.mark.parametrize("max_objects", [1, 3])
def test_other_numbers_of_objects(max_objects: int) -> None:
    found = [len(sample.scene["objects"]) for sample in generate(60, 10, 10, 1, max_objects, image_size=16)]
    assert set(found) == set(range(1, max_objects + 1))


def test_same_seed_same_bytes_in_another_process() -> None:
    first, again, other = (list(generate(90, 10, 10, seed=seed, image_size=32)) for seed in (7, 7, 8))
    assert [(one.captions, one.scene) for one in first] == [(one.captions, one.scene) for one in again]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert list(pool.map(drawn, again)) == [drawn(one) for one in first]
    assert all(drawn(a) != drawn(b) for a, b in zip(first, other))


def drawn(sample: RawSample) -> bytes:
    assert sample.image is not None
    return sample.image()


def test_a_scene_from_json_gives_the_same_picture() -> None:
    scene = make_scene(Random(5))
    assert render(json.loads(json.dumps(scene))).tobytes() == render(scene).tobytes()
    assert render({**scene, "background": "sand" if scene["background"] != "sand" else "sky"}) != render(scene)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_colors_stand_out(background: str) -> None:
    """A small circle's colour is far from its ground and from every other colour on that ground."""

    def look(objects: list[dict[str, Any]]) -> np.ndarray:
        picture = render({"background": background, "objects": objects, "relations": []})
        return np.asarray(picture, np.int64)

    ground = look([]).mean(axis=(0, 1))
    looks = {color: look([thing("circle", color, "small")])[32, 32] for color in COLORS}
    for color in COLORS:
        assert np.abs(looks[color] - ground).sum() > 100, color
    for a, b in combinations(COLORS, 2):
        assert np.abs(looks[a] - looks[b]).sum() > 60, (a, b)


def test_backgrounds_are_textured() -> None:
    for background in BACKGROUNDS:
        picture = render({"background": background, "objects": [], "relations": []})
        low, high = picture.convert("L").getextrema()
        assert high - low > 20, background


@pytest.mark.parametrize("bad", [{"num_val": -1}, {"image_size": 8}, {"max_objects": 4}, {"max_objects": 0}])
def test_bad_settings_are_errors(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"expected .*(>=|or 3)"):
        list(generate(**{"num_train": 2, "num_val": 1, "num_test": 1, "seed": 0, **bad}))
