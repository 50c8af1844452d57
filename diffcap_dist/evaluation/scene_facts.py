"""The facts of a synthetic scene, and a judge of the captions that state them.

In: a caption (a person's or a model's, also a broken one) and a scene, the `scene` member of a sample's JSON:
`{"background": "grass", "objects": [{"shape", "color", "size", "x", "y", "radius"}, ...],
"relations": [[0, "left of", 1], ...]}` (x, y, radius: shares of the picture's edge, y downwards; `relations`
lists each pair of objects whose offset is clearly along one axis, once). Out: what the caption states and how
much of it is true. It judges facts, not grammar: what makes a sentence clumsy but states nothing is ignored.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal, NamedTuple

Scene = dict[str, Any]

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = {"small": ("small", "tiny"), "large": ("large", "big")}
BACKGROUNDS = ("grass", "sand", "water", "bricks", "sky")
# Synonyms: the words a relation may be told with.
RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_SIZE_OF_WORD = {word: size for size, words in SIZES.items() for word in words}
_RELATION_OF_WORD = {words: name for name, synonyms in RELATIONS.items() for words in synonyms if " " not in words}

FactKind = Literal["object", "color", "size", "relation", "place", "malformed"]


@dataclass(frozen=True)
class Fact:
    """`subject` and `target` number the caption's noun phrases; of a malformed fact, its word's place."""

    kind: FactKind
    value: str
    subject: int = -1
    target: int = -1


@dataclass(frozen=True)
class Judgement:
    facts_stated: int
    facts_true: int
    objects_in_scene: int
    objects_mentioned: int

    @property
    def all_true(self) -> bool:
        return self.facts_stated >= 1 and self.facts_true == self.facts_stated


class _Item(NamedTuple):
    """A part of a sentence without its filler words; `number` counts noun phrases, else words."""

    kind: Literal["phrase", "relation", "place", "and"]
    value: str
    number: int


def stated_facts(caption: str) -> list[Fact]:
    """Every fact the caption states, once each (saying it twice states no more).

    Colours and sizes belong to the noun right after them, with only other colours and sizes between. An
    attribute with no noun, and a relation with a side missing, are malformed facts, which are never true.
    """
    items, facts = _read_words(re.findall(r"[a-z]+", caption.lower()))
    facts.extend(Fact("place", item.value) for item in items if item.kind == "place")
    facts.extend(_relation_facts(items))
    return list(dict.fromkeys(facts))


def judge(caption: str, scene: Scene) -> Judgement:
    """Match noun phrases to distinct objects so that most facts are true, and count with that matching."""
    facts = stated_facts(caption)
    num_phrases = 1 + max((fact.subject for fact in facts if fact.kind == "object"), default=-1)
    num_objects = len(scene["objects"])
    best = max(_count_true(facts, match, scene) for match in _matchings(num_phrases, num_objects))
    return Judgement(len(facts), best[0], num_objects, best[1])


def scene_scores(captions: Mapping[Any, str], scenes: Mapping[Any, Scene]) -> dict[str, float]:
    """Corpus scores of one caption per scene.

    scene_accuracy: true facts / stated facts. A caption that states nothing counts as one false fact, so that
    silence cannot win. scene_all_true: share of captions that state something and nothing false.
    objects_mentioned: share of the scenes' objects that a noun of the right shape was matched to.
    """
    _check_same_keys(captions, scenes)
    judgements = [judge(caption, scenes[key]) for key, caption in captions.items()]
    num_stated = sum(max(1, judgement.facts_stated) for judgement in judgements)
    num_objects = sum(judgement.objects_in_scene for judgement in judgements)
    return {
        "scene_accuracy": sum(judgement.facts_true for judgement in judgements) / num_stated,
        "scene_all_true": sum(judgement.all_true for judgement in judgements) / len(judgements),
        "objects_mentioned": sum(judgement.objects_mentioned for judgement in judgements) / num_objects,
    }


def _read_words(words: list[str]) -> tuple[list[_Item], list[Fact]]:
    """The sentence's items in order, and the facts of its noun phrases and dangling attributes."""
    items: list[_Item] = []
    facts: list[Fact] = []
    pending: list[tuple[int, FactKind, str]] = []  # attributes waiting for their noun
    num_phrases = 0
    for place, word in enumerate([*words, ""]):  # the closing "" flushes a trailing attribute
        attribute = _attribute(word)
        if attribute:
            pending.append((place, *attribute))
            continue
        if word in SHAPES:
            facts.append(Fact("object", word, num_phrases))
            facts.extend(Fact(kind, value, num_phrases) for _, kind, value in pending)
            items.append(_Item("phrase", word, num_phrases))
            num_phrases += 1
        else:
            facts.extend(Fact("malformed", value, at) for at, _, value in pending)
            items.extend(_other_item(words, place, word))
        pending = []
    return items, facts


def _attribute(word: str) -> tuple[FactKind, str] | None:
    if word in COLORS:
        return "color", word
    if word in _SIZE_OF_WORD:
        return "size", _SIZE_OF_WORD[word]
    return None


def _other_item(words: list[str], place: int, word: str) -> Iterator[_Item]:
    if word in BACKGROUNDS:
        yield _Item("place", word, place)
    elif word in _RELATION_OF_WORD:
        yield _Item("relation", _RELATION_OF_WORD[word], place)
    elif word in ("left", "right"):
        followed = words[place + 1 : place + 2] == ["of"]
        yield _Item("relation", f"{word} of" if followed else word, place)
    elif word == "and":
        yield _Item("and", word, place)


def _relation_facts(items: list[_Item]) -> Iterator[Fact]:
    """A relation's target is the noun phrase right after it; its subject is found by `_subject`."""
    last_subject: _Item | None = None
    for i, item in enumerate(items):
        if item.kind != "relation":
            continue
        subject = _subject(items, i, last_subject)
        target = _phrase_at(items, i + 1)
        if item.value in RELATIONS and subject and target:  # a bare "left" is no relation
            yield Fact("relation", item.value, subject.number, target.number)
            last_subject = subject
        else:
            yield Fact("malformed", item.value, item.number)


def _subject(items: list[_Item], i: int, last_subject: _Item | None) -> _Item | None:
    """Who stands in the relation at items[i].

    "A (on grass) above B": A. "A above B and left of C": A again. "(on grass) above B is A": the one after B.
    """
    before = [item for item in items[:i] if item.kind != "place"]
    if not before:
        return _phrase_at(items, i + 2)
    if before[-1].kind == "and":
        return last_subject or _phrase_at(before, len(before) - 2)
    return _phrase_at(before, len(before) - 1)


def _phrase_at(items: list[_Item], i: int) -> _Item | None:
    return items[i] if 0 <= i < len(items) and items[i].kind == "phrase" else None


def _matchings(num_phrases: int, num_objects: int) -> Iterator[dict[int, int]]:
    """All ways to give each object at most one noun phrase, as {phrase: object}."""
    # A number past the last phrase stands for no phrase.
    for phrases in permutations(range(max(num_phrases, num_objects)), num_objects):
        yield {phrase: number for number, phrase in enumerate(phrases) if phrase < num_phrases}


def _count_true(facts: list[Fact], match: dict[int, int], scene: Scene) -> tuple[int, int]:
    """(facts true, objects matched by a noun of their shape) under one matching."""
    true_facts = [fact for fact in facts if _is_true(fact, match, scene)]
    return len(true_facts), sum(fact.kind == "object" for fact in true_facts)


def _is_true(fact: Fact, match: dict[int, int], scene: Scene) -> bool:
    if fact.kind == "malformed":
        return False
    if fact.kind == "place":
        return bool(fact.value == scene["background"])
    subject, target = match.get(fact.subject), match.get(fact.target)
    if subject is None:
        return False
    if fact.kind == "relation":
        facing = [subject, fact.value, target]
        turned = [target, INVERSE[fact.value], subject]
        return any(list(relation) in (facing, turned) for relation in scene["relations"])
    member = "shape" if fact.kind == "object" else fact.kind
    return bool(scene["objects"][subject][member] == fact.value)


def _check_same_keys(captions: Mapping[Any, str], scenes: Mapping[Any, Scene]) -> None:
    if not captions:
        raise ValueError("scene scores of no captions: expected at least one caption with its scene")
    odd = sorted(map(str, captions.keys() ^ scenes.keys()))
    if odd:
        raise ValueError(
            f"captions and scenes must have the same keys, but {len(odd)} keys are in only one of them, "
            f"such as {odd[0]!r}: caption every scene that is scored"
        )
