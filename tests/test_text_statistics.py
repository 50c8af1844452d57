"""Variety, length and repeated words, counted by hand."""

from __future__ import annotations

import pytest

from diffcap_dist.evaluation.text_statistics import (
    distinct,
    human_text_statistics,
    repeats_a_word,
    text_statistics,
)

CAPTIONS = ["A dog runs.", "a dog, a dog", "a a cat", "A dog runs!"]
# tokens: a dog runs | a dog a dog | a a cat | a dog runs; 13 of them, 4 words; bigrams 2 + 3 + 2 + 2, 5 different


def test_counted_by_hand() -> None:
    assert text_statistics(CAPTIONS) == {
        "distinct_1": 4 / 13,
        "distinct_2": 5 / 9,
        "unique_captions": 3 / 4,  # the first and the last are the same words
        "mean_length": 13 / 4,
        "repeated_words": 1 / 4,
    }


def test_a_constant_caption_has_no_variety_and_all_different_words_have_all() -> None:
    constant = text_statistics(["two men sit"] * 50)
    assert (constant["distinct_1"], constant["distinct_2"]) == (3 / 150, 2 / 100)
    assert constant["unique_captions"] == 1 / 50
    varied = text_statistics(["two men sit", "a dog runs"])
    assert varied["distinct_1"] == varied["distinct_2"] == varied["unique_captions"] == 1


def test_captions_without_words_count_as_such() -> None:
    nothing = text_statistics(["", "."])
    assert set(nothing.values()) == {0.0, 1 / 2} and nothing["unique_captions"] == 1 / 2
    assert text_statistics(["a", ""])["mean_length"] == 1 / 2
    assert distinct([["a"]], 2) == 0.0  # no pair at all
    assert not repeats_a_word([]) and not repeats_a_word(["a", "b", "a"])


def test_people_are_compared_at_one_caption_a_photo() -> None:
    """Five references of a photo at once would look poorer in words than one caption of it."""
    references = {"p1": ["a dog", "a big dog runs", "x"], "p2": ["a cat", "a cat cat"]}
    firsts, seconds = text_statistics(["a dog", "a cat"]), text_statistics(["a big dog runs", "a cat cat"])
    people = human_text_statistics(references)  # the third caption of p1 has no counterpart
    assert people == {name: (firsts[name] + seconds[name]) / 2 for name in firsts}
    assert people["repeated_words"] == 1 / 4


def test_nothing_to_describe_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        text_statistics([])
    with pytest.raises(ValueError, match="some of 2 photos has no caption"):
        human_text_statistics({"p1": ["a dog"], "p2": []})
