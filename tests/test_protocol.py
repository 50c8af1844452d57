"""The human, floor and retrieval rows against slow, obvious computations of the same things."""

import random
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffcap_dist.evaluation.protocol import (
    Similarity,
    bleu_similarity,
    consensus,
    f1_similarity,
    floor_caption,
    floor_scores,
    human_scores,
    retrieval_captions,
)
from diffcap_dist.evaluation.scores import bleu, bleu_counts, count_caption, score_captions, tokenize

PHOTOS = {
    "p1": ["a red dog runs on the grass", "a dog runs on grass", "the dog is red"],
    "p2": ["a man sits on the grass", "one man is sitting"],
    "p3": ["a dog and a cat on a red mat"],
}
words = st.sampled_from(["a", "dog", "the", "man", "runs", "on", "red"])
texts = st.lists(words, min_size=1, max_size=9).map(" ".join)
photos = st.dictionaries(st.sampled_from("pqrstu"), st.lists(texts, min_size=1, max_size=4), min_size=1)


def many_captions(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"w{int(200 * draw.random() ** 3)}" for _ in range(draw.randint(6, 15))) for _ in range(count)]


def test_human_row_is_every_reference_against_the_rest_in_one_corpus() -> None:
    tokens = {key: [tokenize(text) for text in captions] for key, captions in PHOTOS.items()}
    counts = [
        bleu_counts(tokens["p1"][0], tokens["p1"][1:]),
        bleu_counts(tokens["p1"][1], [tokens["p1"][0], tokens["p1"][2]]),
        bleu_counts(tokens["p1"][2], tokens["p1"][:2]),
        bleu_counts(tokens["p2"][0], tokens["p2"][1:]),
        bleu_counts(tokens["p2"][1], tokens["p2"][:1]),
    ]
    scores = human_scores(PHOTOS)
    assert [scores[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(list(bleu(np.sum(counts, axis=0))))
    assert scores.keys() == score_captions({"p": "a"}, {"p": ["a"]}).keys()


def test_human_row_of_people_who_agree_is_perfect() -> None:
    agreed = {key: [captions[0]] * 3 for key, captions in PHOTOS.items()}
    scores = human_scores(agreed)
    assert scores["bleu_4"] == pytest.approx(1) and scores["rouge_l"] == pytest.approx(1)


def test_human_row_needs_two_captions_of_a_photo() -> None:
    with pytest.raises(ValueError, match="none of 1 photos has two captions"):
        human_scores({"p3": PHOTOS["p3"]})


@given(photos, st.lists(texts, min_size=1, max_size=12))
def test_floor_is_the_candidate_that_scores_best_on_every_photo(
    references: dict[str, list[str]], candidates: list[str]
) -> None:
    best = max(floor_scores(text, references)["bleu_4"] for text in candidates)
    chosen = floor_caption(references, candidates)
    assert floor_scores(chosen, references)["bleu_4"] == pytest.approx(best)
    assert floor_caption(references, candidates[::-1] * 2) == chosen


def test_floor_of_a_known_corpus() -> None:
    assert floor_caption(PHOTOS, ["a cat", "a dog runs on the grass", "the dog is red"]) == "a dog runs on the grass"
    scores = floor_scores("a dog runs on the grass", PHOTOS)
    assert scores == score_captions(dict.fromkeys(PHOTOS, "a dog runs on the grass"), PHOTOS)


def test_floor_counts_repeated_words_as_often_as_a_photo_has_them() -> None:
    assert floor_caption({"p": ["a b a b a b"]}, ["a b a b a b", "a b a b a"]) == "a b a b a b"
    assert floor_caption({"p": ["x b c d e"]}, ["x x b c d e", "b c d e"]) == "b c d e"


def test_floor_of_300_photos_and_1500_candidates_is_quick() -> None:
    captions = many_captions(1500, seed=0)
    references = {str(photo): captions[5 * photo : 5 * photo + 5] for photo in range(300)}
    started = time.process_time()
    assert floor_caption(references, captions) in captions
    assert time.process_time() - started < 3


def test_floor_refuses_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError, match="3 photos and 0 candidate captions"):
        floor_caption(PHOTOS, [])
    with pytest.raises(ValueError, match="0 photos"):
        floor_caption({}, ["a dog"])


TRAIN_FEATURES = np.array([[1, 0, 0], [0, 2, 0], [0, 1, 1], [0, 0, 3]], dtype=np.float16)
TRAIN_CAPTIONS = [
    ["a red dog", "dog"],
    ["two men on a boat", "men sail a boat on the sea"],
    ["two men sit on a boat at sea", "sailors"],
    ["the sea", "blue water with waves"],
]


def test_one_neighbour_gives_its_first_caption_whatever_the_lengths_of_the_vectors() -> None:
    queries = np.array([[9, 1, 0], [0, 0.1, 0.01], [0, 5, 6], [0, 0, 0.1]], dtype=np.float32)
    found = retrieval_captions(TRAIN_FEATURES, TRAIN_CAPTIONS, queries)
    assert found == ["a red dog", "two men on a boat", "two men sit on a boat at sea", "the sea"]


def test_more_neighbours_give_the_caption_they_agree_on() -> None:
    query = np.array([[0, 1, 0.9]], dtype=np.float32)
    assert retrieval_captions(TRAIN_FEATURES, TRAIN_CAPTIONS, query, neighbours=3) == ["two men on a boat"]


def test_retrieval_in_blocks_is_retrieval() -> None:
    draw = np.random.default_rng(0)
    train, queries = draw.normal(size=(40, 8)), draw.normal(size=(600, 8))
    captions = [[text] for text in many_captions(40, seed=1)]
    whole = retrieval_captions(train, captions, queries, neighbours=5)
    one_by_one = [retrieval_captions(train, captions, query[None], neighbours=5)[0] for query in queries[250:260]]
    assert whole[250:260] == one_by_one


def ngram_sets(c: list[str], r: list[str]) -> list[tuple[set, set]]:
    return [tuple({tuple(t[i : i + n]) for i in range(len(t) - n + 1)} for t in (c, r)) for n in range(1, 5)]  # type: ignore[misc]


def plain_bleu(c: list[str], r: list[str]) -> float:
    precisions = [(len(in_c & in_r) + 1) / (len(in_c) + 1) for in_c, in_r in ngram_sets(c, r)]
    return min(1.0, np.exp(1 - len(r) / len(c))) * float(np.prod(precisions)) ** 0.25


def plain_f1(c: list[str], r: list[str]) -> float:
    f1 = [2 * len(in_c & in_r) / max(1, len(in_c) + len(in_r)) for in_c, in_r in ngram_sets(c, r)]
    return sum(f1) / 4 * np.exp(-((len(c) - len(r)) ** 2) / 72)


@pytest.mark.parametrize("similarity, plain", [(bleu_similarity, plain_bleu), (f1_similarity, plain_f1)])
@pytest.mark.parametrize("seed", range(5))
def test_consensus_is_the_highest_mean_similarity(seed: int, similarity: Similarity, plain) -> None:  # type: ignore[no-untyped-def]
    tokens = [text.split() for text in many_captions(30, seed)]
    counted = [count_caption(words) for words in tokens]
    np.testing.assert_allclose(similarity(counted), [[plain(c, r) for r in tokens] for c in tokens], atol=1e-6)
    totals = [sum(plain(c, r) for j, r in enumerate(tokens) if j != i) for i, c in enumerate(tokens)]
    assert consensus(counted, similarity) == int(np.argmax(np.round(totals, 9)))


@pytest.mark.parametrize("similarity", [bleu_similarity, f1_similarity])
def test_consensus_of_one_and_of_empty_captions(similarity: Similarity) -> None:
    assert consensus([count_caption(["a"])], similarity) == 0
    assert consensus([count_caption([]), count_caption([])], similarity) == 0


@pytest.mark.parametrize(
    ("train", "captions", "query", "neighbours", "message"),
    [
        (TRAIN_FEATURES, TRAIN_CAPTIONS, np.ones((2, 5)), 1, r"\(4, 3\) and queries of shape \(2, 5\)"),
        (TRAIN_FEATURES, TRAIN_CAPTIONS[:3], np.ones((2, 3)), 1, "3 caption lists for 4 feature rows"),
        (TRAIN_FEATURES, TRAIN_CAPTIONS, np.ones((2, 3)), 30, "neighbours = 30; expected 1 to 4"),
        (TRAIN_FEATURES, [*TRAIN_CAPTIONS[:3], []], np.ones((2, 3)), 1, "captions of training photo 3"),
    ],
)
def test_mismatching_retrieval_input_is_refused(
    train: np.ndarray, captions: list[list[str]], query: np.ndarray, neighbours: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_captions(train, captions, query, neighbours)
