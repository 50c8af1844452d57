"""Synthetic scenes: small pictures of one to three shapes on a textured ground, captioned, with ground truth.

In: numbers of pictures per split and a seed. Out: samples, train then val then test, each drawn when its photo is
asked for (in a worker process), byte for byte the same. The splits share no scene description, so a held-out
picture is a new combination. It writes no shards, and judging captions is `scene_facts`' work.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import combinations
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from diffcap_dist.evaluation.scene_facts import (
    BACKGROUNDS,
    COLORS,
    INVERSE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
)
from shards.writer import RawSample

SPLITS = ("train", "val", "test")
CAPTIONS_PER_SCENE = 5
MAX_WORDS = 18
ONE_OBJECT_SHARE = 0.25

# Shares of the picture's edge. Two large objects side by side, with the gap, must still fit.
_RADII = {"small": (0.105, 0.125), "large": (0.19, 0.215)}
_GAP = 0.04
_MARGIN = 0.015
# A relation is unambiguous when its axis' offset is at least this many times the other axis' offset.
_DOMINANCE = 2.0
_SIDES = (("x", -1), ("x", 1), ("y", -1), ("y", 1))

_RGB = {
    "red": (222, 28, 36),
    "orange": (250, 134, 10),
    "yellow": (250, 226, 40),
    "green": (40, 205, 70),
    "blue": (30, 70, 235),
    "purple": (140, 40, 200),
    "pink": (252, 140, 196),
    "white": (246, 246, 246),
}
_OUTLINE_RGB = (18, 18, 22)
_SUPERSAMPLING = 4
_JPEG_QUALITY = 92

# A split must keep enough descriptions of its own to draw from, however few pictures it has.
_MIN_SPLIT_SHARE = 0.05
_MAX_TRIES = 20_000

_PLACES = {name: (f"on {name}", f"on the {name}") for name in BACKGROUNDS} | {"sky": ("in the sky",)}
# {a}, {b}, {c}: noun phrases; {ab}, {ac}: how a stands to b and to c; {place}.
_TEMPLATES = {
    1: (
        "{a}",
        "{a} {place}",
        "there is {a} {place}",
        "{place} there is {a}",
        "a picture of {a}",
        "{a} is {place}",
        "a picture of {a} {place}",
        "{place} we see {a}",
    ),
    2: (
        "{a} {ab} {b}",
        "{a} {ab} {b} {place}",
        "{a} is {ab} {b}",
        "{a} is {ab} {b} {place}",
        "there is {a} {ab} {b}",
        "{a} and {b} {place}",
        "{place} {a} is {ab} {b}",
        "{ab} {b} is {a}",
        "{ab} {b} there is {a} {place}",
        "a picture of {a} {ab} {b}",
    ),
    3: (
        "{a} {ab} {b} and {ac} {c}",
        "{a} {ab} {b} and {ac} {c} {place}",
        "{a} is {ab} {b} and {ac} {c}",
        "there is {a} {ab} {b} and {c}",
        "{a} {ab} {b} and {c} {place}",
        "{place} {a} is {ab} {b} and {ac} {c}",
        "{ab} {b} is {a} and {c}",
        "a picture of {a} {ab} {b} and {c}",
    ),
}


def generate(
    num_train: int,
    num_val: int,
    num_test: int,
    seed: int,
    max_objects: int = 2,
    image_size: int = 64,
) -> Iterator[RawSample]:
    """Samples, split by split."""
    counts = dict(zip(SPLITS, (num_train, num_val, num_test)))
    if min(counts.values()) < 0 or image_size < 16:
        raise ValueError(f"scenes: expected counts >= 0 and image_size >= 16, got {counts}, image_size={image_size}")
    for split, index, scene in _choose_scenes(counts, seed, max_objects):
        captions = captions_of(scene, Random(f"captions/{seed}/{split}/{index}"))
        picture = partial(jpeg, scene, image_size)
        yield RawSample(f"scene-{split}-{index:06d}", captions, split, "scenes", picture, dict(scene))


def make_scene(rng: Random, max_objects: int = 2) -> Scene:
    """A random scene: a quarter hold one object, the rest 2 to `max_objects` in equal shares."""
    if not 1 <= max_objects <= 3:
        raise ValueError(f"max_objects is {max_objects}: expected 1, 2 or 3")
    alone = max_objects == 1 or rng.random() < ONE_OBJECT_SHARE
    num_objects = 1 if alone else rng.randint(2, max_objects)
    background, objects = rng.choice(BACKGROUNDS), _draw_objects(rng, num_objects)
    while not _place_objects(rng, objects):  # with any sizes a good part of the tries fit
        pass
    return {"background": background, "objects": objects, "relations": _relations(objects)}


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Draw a scene. Texture, brightness and shades vary by the scene itself: same scene, same picture."""
    rng = Random(json.dumps(scene, sort_keys=True))
    picture = _ground(scene["background"], size, rng)
    for thing in scene["objects"]:
        shade = rng.uniform(0.9, 1.04)
        rgb = tuple(min(255, round(level * shade + rng.uniform(-8, 8))) for level in _RGB[thing["color"]])
        _paint(picture, thing, rgb, size)
    return picture


def jpeg(scene: Scene, size: int) -> bytes:
    """Its picture as a file."""
    buffer = io.BytesIO()
    # Full-resolution colour: at 64 pixels JPEG's usual halved chroma blurs a small object's colour away.
    render(scene, size).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def captions_of(scene: Scene, rng: Random) -> list[str]:
    """Five captions of different templates, all true; nothing in the phrasing depends on the picture."""
    templates = _TEMPLATES[len(scene["objects"])]
    captions: list[str] = []
    for template in rng.sample(templates, CAPTIONS_PER_SCENE):
        caption = _phrase(template, scene, rng)
        while len(caption.split()) > MAX_WORDS or caption in captions:
            caption = _phrase(template, scene, rng)
        captions.append(caption)
    return captions


def description(scene: Scene) -> str:
    """All that could be said of the scene, in one canonical form: what no two splits may share."""
    names = [" ".join((thing["size"], thing["color"], thing["shape"])) for thing in scene["objects"]]
    order = sorted(range(len(names)), key=lambda number: names[number])
    rank = {number: place for place, number in enumerate(order)}
    relations = []
    for subject, relation, target in scene["relations"]:
        a, b = rank[subject], rank[target]
        relations.append((a, relation, b) if a < b else (b, INVERSE[relation], a))
    return json.dumps([sorted(names), sorted(relations), scene["background"]])


def _choose_scenes(counts: dict[str, int], seed: int, max_objects: int) -> Iterator[tuple[str, int, Scene]]:
    """Each split draws only descriptions that hash to it; those of several objects are used once."""
    edges = _split_edges(counts)
    used: set[str] = set()
    for split, count in counts.items():
        for index in range(count):
            rng = Random(f"scene/{seed}/{split}/{index}")
            for _ in range(_MAX_TRIES):
                scene = make_scene(rng, max_objects)
                told = description(scene)
                low, high = edges[split]
                if low <= _share_of(told, seed) < high and told not in used:
                    break
            else:
                raise ValueError(
                    f"scenes: no new description found for {split} picture {index} in {_MAX_TRIES} tries; "
                    f"there are about 90,000 two-object descriptions: ask for fewer pictures or max_objects=3"
                )
            if len(scene["objects"]) > 1:
                used.add(told)
            yield split, index, scene


def _split_edges(counts: dict[str, int]) -> dict[str, tuple[float, float]]:
    """The part of [0, 1) whose descriptions belong to each split, in proportion to its pictures."""
    total = sum(counts.values())
    weights = {split: max(count / total, _MIN_SPLIT_SHARE) if count else 0.0 for split, count in counts.items()}
    edges, low = {}, 0.0
    for split, weight in weights.items():
        high = low + weight / sum(weights.values())
        edges[split] = (low, high)
        low = high
    return edges


def _share_of(told: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}/{told}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _draw_objects(rng: Random, num_objects: int) -> list[dict[str, Any]]:
    """Objects without places; no two share both shape and colour, so that captions can tell them apart."""
    kinds = rng.sample([(shape, color) for shape in SHAPES for color in COLORS], num_objects)
    objects = []
    for shape, color in kinds:
        size = rng.choice(list(SIZES))
        radius = round(rng.uniform(*_RADII[size]), 4)
        objects.append({"shape": shape, "color": color, "size": size, "x": 0.0, "y": 0.0, "radius": radius})
    return objects


def _place_objects(rng: Random, objects: list[dict[str, Any]]) -> bool:
    """Put the first anywhere and each other one off it along one axis; False where they don't fit.

    So the first object has a clear relation to each other one: captions state those.
    """
    first, *others = objects
    sides = [rng.choice(_SIDES) for _ in others]
    for axis in "xy":
        low, high = first["radius"] + _MARGIN, 1 - first["radius"] - _MARGIN
        for other, (other_axis, sign) in zip(others, sides):
            needed = _nearest(first, other) + other["radius"] + _MARGIN
            if other_axis == axis and sign < 0:
                low = max(low, needed)
            elif other_axis == axis:
                high = min(high, 1 - needed)
        if low > high:
            return False
        first[axis] = round(rng.uniform(low, high), 4)
    for other, (axis, sign) in zip(others, sides):
        _place_beside(rng, first, other, axis, sign)
    return all(
        math.hypot(a["x"] - b["x"], a["y"] - b["y"]) >= _nearest(a, b) - 1e-3 for a, b in combinations(objects, 2)
    )


def _nearest(a: dict[str, Any], b: dict[str, Any]) -> float:
    return float(a["radius"] + b["radius"] + _GAP)


def _place_beside(rng: Random, first: dict[str, Any], other: dict[str, Any], axis: str, sign: int) -> None:
    """Put the other at a random offset along the axis, and less far aside, inside the picture."""
    aside = "y" if axis == "x" else "x"
    low, high = other["radius"] + _MARGIN, 1 - other["radius"] - _MARGIN
    room = high - first[axis] if sign > 0 else first[axis] - low
    offset = rng.uniform(_nearest(first, other), room)
    most_aside = offset / (_DOMINANCE + 0.05)
    other[axis] = round(first[axis] + sign * offset, 4)
    other[aside] = round(rng.uniform(max(low, first[aside] - most_aside), min(high, first[aside] + most_aside)), 4)


def _relations(objects: list[dict[str, Any]]) -> list[list[Any]]:
    """Each pair whose offset lies clearly along one axis, as [subject, relation, later object]."""
    relations: list[list[Any]] = []
    for (i, a), (j, b) in combinations(enumerate(objects), 2):
        dx, dy = a["x"] - b["x"], a["y"] - b["y"]
        if abs(dx) >= _DOMINANCE * abs(dy):
            relations.append([i, "left of" if dx < 0 else "right of", j])
        elif abs(dy) >= _DOMINANCE * abs(dx):
            relations.append([i, "above" if dy < 0 else "below", j])
    return relations


def _phrase(template: str, scene: Scene, rng: Random) -> str:
    """Fill a template: object order, synonyms, and whether sizes are said, are all drawn."""
    order = list(range(len(scene["objects"])))
    if len(order) == 2:
        rng.shuffle(order)
    elif len(order) == 3 and rng.random() < 0.5:
        order[1:] = order[:0:-1]  # the first object is the one with a stated relation to each other
    say_size = rng.random() < 0.6
    words = {name: _noun_phrase(scene["objects"][n], say_size, rng) for name, n in zip("abc", order)}
    for name, n in zip("bc", order[1:]):
        words["a" + name] = rng.choice(RELATIONS[_relation_between(scene, order[0], n)])
    return template.format(place=rng.choice(_PLACES[scene["background"]]), **words)


def _relation_between(scene: Scene, subject: int, target: int) -> str:
    for a, relation, b in scene["relations"]:
        if (a, b) == (subject, target):
            return str(relation)
        if (b, a) == (subject, target):
            return INVERSE[relation]
    raise ValueError(f"scene has no clear relation between objects {subject} and {target}: {scene}")


def _noun_phrase(thing: dict[str, Any], say_size: bool, rng: Random) -> str:
    words = [rng.choice(SIZES[thing["size"]])] if say_size else []
    words += [thing["color"], thing["shape"]]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _paint(picture: Image.Image, thing: dict[str, Any], rgb: tuple[int, ...], size: int) -> None:
    """Draw one object with a dark rim, anti-aliased by drawing its masks larger and shrinking them."""
    reach = math.ceil(thing["radius"] * size) + 2
    left, top = round(thing["x"] * size) - reach, round(thing["y"] * size) - reach
    center = ((thing["x"] * size - left) * _SUPERSAMPLING, (thing["y"] * size - top) * _SUPERSAMPLING)
    radius = thing["radius"] * size * _SUPERSAMPLING
    rim = _SUPERSAMPLING * size / 64
    edge = 2 * reach
    mask = Image.new("L", (edge * _SUPERSAMPLING, edge * _SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    corners = _outline(thing["shape"], center, radius)
    draw.polygon(corners, fill=255)
    outer = mask.resize((edge, edge), Image.Resampling.BOX)
    draw.line([*corners, *corners[:2]], fill=0, width=round(2 * rim), joint="curve")
    inner = mask.resize((edge, edge), Image.Resampling.BOX)
    picture.paste(_OUTLINE_RGB, (left, top), outer)
    picture.paste(rgb, (left, top), inner)


def _outline(shape: str, center: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    return [(center[0] + radius * x, center[1] + radius * y) for x, y in _unit_outline(shape)]


@lru_cache
def _unit_outline(shape: str) -> list[tuple[float, float]]:
    """A shape's corners inside the unit circle, of about equal weight to the eye."""
    turns = [2 * math.pi * i / 48 for i in range(48)]
    if shape == "circle":
        return [(0.92 * math.cos(a), 0.92 * math.sin(a)) for a in turns]
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)]
    if shape == "star":
        points = [(1.0 if i % 2 == 0 else 0.44, math.pi * i / 5 - math.pi / 2) for i in range(10)]
        return [(r * math.cos(a), r * math.sin(a) + 0.05) for r, a in points]
    if shape == "cross":
        quarter = [(0.3, -0.95), (0.3, -0.3), (0.95, -0.3)]
        return [p for k in range(4) for p in ([_turn(q, k) for q in quarter])]
    if shape == "heart":
        return [
            (0.058 * 16 * math.sin(a) ** 3, -0.058 * _heart_height(a) - 0.1) for a in (t + math.pi / 48 for t in turns)
        ]
    raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")


def _turn(point: tuple[float, float], quarters: int) -> tuple[float, float]:
    x, y = point
    for _ in range(quarters):
        x, y = -y, x
    return x, y


def _heart_height(a: float) -> float:
    return 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)


def _ground(background: str, size: int, rng: Random) -> Image.Image:
    """A random piece of the background's texture, perhaps mirrored, a little brighter or darker."""
    texture = _texture(background, size)
    left, top = (rng.randrange(texture.shape[0] - size) for _ in range(2))
    piece = texture[top : top + size, left : left + size]
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    return Image.fromarray((piece * rng.uniform(0.85, 1.12)).clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=len(BACKGROUNDS))
def _texture(background: str, size: int) -> np.ndarray:
    """A sheet four pictures wide, drawn once per process from a fixed seed, HWC float32."""
    rng = np.random.default_rng(BACKGROUNDS.index(background))
    edge, grain = 4 * size, size / 64
    draw = {"grass": _grass, "sand": _sand, "water": _water, "bricks": _bricks, "sky": _sky}[background]
    return draw(rng, edge, grain)


def _clouds(rng: np.random.Generator, edge: int, cell: float) -> np.ndarray:
    """Smooth noise in [-1, 1] whose blobs are `cell` pixels wide, HW1."""
    cells = max(2, round(edge / cell))
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((edge, edge), Image.Resampling.BICUBIC))[..., None]


def _plain(rgb: tuple[int, int, int], edge: int) -> np.ndarray:
    return np.broadcast_to(np.array(rgb, np.float32), (edge, edge, 3))


def _grass(rng: np.random.Generator, edge: int, grain: float) -> np.ndarray:
    sheet = Image.new("RGB", (edge, edge), (48, 84, 30))
    draw = ImageDraw.Draw(sheet)
    for _ in range(5000):
        x, y = rng.uniform(0, edge, 2)
        lean, height = rng.uniform(-2, 2) * grain, rng.uniform(3, 8) * grain
        light = rng.uniform(0.6, 1.5)
        blade = (round(58 * light), round(98 * light), round(34 * light))
        draw.line([(x, y), (x + lean, y - height)], fill=blade, width=max(1, round(grain)))
    return np.asarray(sheet, np.float32) + 12 * _clouds(rng, edge, 20 * grain)


def _sand(rng: np.random.Generator, edge: int, grain: float) -> np.ndarray:
    drift = 1.2 * _clouds(rng, edge, 24 * grain)
    rows = np.arange(edge)[:, None, None] / (2.2 * grain)
    ripples = 9 * np.sin(rows + 3 * drift)
    speckle = 16 * _clouds(rng, edge, 1.5 * grain)
    return (_plain((205, 182, 138), edge) + ripples + speckle).astype(np.float32)


def _water(rng: np.random.Generator, edge: int, grain: float) -> np.ndarray:
    drift = _clouds(rng, edge, 14 * grain)
    rows = np.arange(edge)[:, None, None] / (1.6 * grain)
    waves = np.sin(rows + 5 * drift)
    crests = 60 * np.clip(waves * (0.6 + 0.8 * _clouds(rng, edge, 10 * grain)) - 0.55, 0, 1)
    return (_plain((62, 132, 150), edge) + 12 * waves + crests).astype(np.float32)


def _bricks(rng: np.random.Generator, edge: int, grain: float) -> np.ndarray:
    sheet = Image.new("RGB", (edge, edge), (176, 168, 158))
    draw = ImageDraw.Draw(sheet)
    width, height, mortar = round(16 * grain), round(8 * grain), max(1, round(grain))
    for row, top in enumerate(range(0, edge, height)):
        for left in range(-(row % 2) * width // 2, edge, width):
            light = rng.uniform(0.8, 1.15)
            clay = (round(126 * light), round(78 * light), round(62 * light))
            draw.rectangle((left, top, left + width - mortar - 1, top + height - mortar - 1), fill=clay)
    return (np.asarray(sheet, np.float32) + 10 * _clouds(rng, edge, 2 * grain)).astype(np.float32)


def _sky(rng: np.random.Generator, edge: int, grain: float) -> np.ndarray:
    haze = np.array((14, 12, 24), np.float32) * _clouds(rng, edge, 30 * grain)
    sheet = Image.new("L", (edge, edge))
    draw = ImageDraw.Draw(sheet)
    for _ in range(520):
        x, y = rng.uniform(0, edge, 2)
        half = rng.uniform(0.0, 0.6) * grain
        draw.ellipse((x - half, y - half, x + half, y + half), fill=int(rng.integers(90, 230)))
    return (_plain((30, 30, 58), edge) + haze + np.asarray(sheet, np.float32)[..., None]).astype(np.float32)
