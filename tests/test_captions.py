"""The tokenizer: round trips, cuts, and clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffcap_dist.data.captions import CaptionTokenizer

WORDS = ["a", "dog", "runs", "over", "the", "grass", ",", "two"]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.from_captions([" ".join(WORDS), "a dog"])


@given(st.lists(st.sampled_from(WORDS), max_size=12))
def test_round_trip(words: list[str]) -> None:
    tokenizer = CaptionTokenizer.from_captions([" ".join(WORDS)])
    ids_BL, mask_BL = tokenizer.encode([" ".join(words)], max_length=13)
    assert tokenizer.decode(ids_BL) == [" ".join(words)]
    assert mask_BL.sum() == len(words) + 1
    assert ids_BL[0, len(words)] == tokenizer.sep_id
    assert (ids_BL[0, len(words) + 1 :] == tokenizer.pad_id).all()


def test_long_captions_are_cut_before_sep(tokenizer: CaptionTokenizer) -> None:
    ids_BL, _ = tokenizer.encode(["a dog runs over the grass"], max_length=4)
    assert tokenizer.decode(ids_BL) == ["a dog runs"]
    assert ids_BL[0, 3] == tokenizer.sep_id


def test_case_and_unknown_words(tokenizer: CaptionTokenizer) -> None:
    ids_BL, _ = tokenizer.encode(["A Zebra, runs"], max_length=8)
    assert ids_BL[0, 1] == tokenizer.unk_id
    assert tokenizer.decode(ids_BL) == ["a , runs"]


def test_rare_words_are_left_out() -> None:
    tokenizer = CaptionTokenizer.from_captions(["a dog", "a cat", "a dog"], min_count=2)
    assert tokenizer.vocab_size == 5 + 2
    with pytest.raises(ValueError, match="no word occurs 9 times"):
        CaptionTokenizer.from_captions(["a dog"], min_count=9)


def test_saved_and_loaded(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = CaptionTokenizer.load(str(tmp_path))
    texts = ["two dog over , the grass", ""]
    assert (again.encode(texts, 9)[0] == tokenizer.encode(texts, 9)[0]).all()
    assert again.vocab_size == tokenizer.vocab_size


def test_an_offline_hub_id_says_how_to_fetch_it() -> None:
    with pytest.raises(ValueError, match="hf download no-such-org/no-such-tokenizer"):
        CaptionTokenizer.load("no-such-org/no-such-tokenizer")
