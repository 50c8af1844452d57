"""A teacher's captions: of several drafts the one is kept that a photo's own captions reward most."""

from __future__ import annotations

import pytest

from diffcap_dist.distill import best
from diffcap_dist.evaluation.scores import cider_d, tokenize

REFERENCES = {
    "b": ["a red circle above a star", "a circle on the grass"],
    "a": ["two dogs run on the beach", "dogs play in the sand"],
}
DRAFTS = {
    "b": ["a dog", "a red circle above a star", "a red circle above a star"],
    "a": ["two dogs run on the sand", "a dog", "a cat sleeps"],
}


def test_the_best_draft_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    kept = best(DRAFTS, REFERENCES)
    assert kept == {"a": ["two dogs run on the sand"], "b": ["a red circle above a star"]}
    said = capsys.readouterr().out
    scores = [
        cider_d([tokenize(texts[key]) for key in "ab"], [[tokenize(r) for r in REFERENCES[key]] for key in "ab"])
        for texts in ({k: v[0] for k, v in DRAFTS.items()}, {k: v[0] for k, v in kept.items()})
    ]
    assert f"{sum(scores[0]) / 2:.3f}, kept {sum(scores[1]) / 2:.3f}" in said and "of 50% the likeliest" in said


def test_equal_drafts_are_the_likeliest() -> None:
    assert best({"a": ["a b c d", "a b c d"]}, {"a": ["x y z"]}) == {"a": ["a b c d"]}
