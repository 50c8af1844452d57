"""What the captions of a split are like, whatever they say: their variety, their length, words said twice in a row.

In: captions as text. Out: plain floats from counts, so the same for any order and number of ranks. Words are the tokens
of the other scores (`tokenize`: no punctuation). Variety falls as captions are added: compare rows of equally many.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from diffcap_dist.evaluation.scores import Tokens, tokenize


def distinct(captions: Sequence[Tokens], order: int) -> float:
    """Different n-grams of `order` / all n-grams in all captions (Li et al. 2016, arXiv:1510.03055, who divide by the
    number of words; here, as usual since, 1 means that no n-gram comes twice)."""
    ngrams = [ngram for tokens in captions for ngram in zip(*(tokens[start:] for start in range(order)))]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def repeats_a_word(tokens: Tokens) -> bool:
    """Whether some token equals the one before it ("a a dog"), the typical slip of a writer that fills all places at
    once (Xu 2022, arXiv:2210.04559, section 5)."""
    return any(first == second for first, second in pairwise(tokens))


def text_statistics(captions: Sequence[str]) -> dict[str, float]:
    """distinct_1, distinct_2; shares of captions that are unique (different captions / captions) and that repeat a
    word; mean_length in tokens."""
    if not captions:
        raise ValueError("no captions to describe; expected at least one")
    tokens = [tokenize(caption) for caption in captions]
    return {
        "distinct_1": distinct(tokens, 1),
        "distinct_2": distinct(tokens, 2),
        "unique_captions": len(set(map(tuple, tokens))) / len(tokens),
        "mean_length": sum(map(len, tokens)) / len(tokens),
        "repeated_words": sum(map(repeats_a_word, tokens)) / len(tokens),
    }


def human_text_statistics(references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Of people: the i-th references of all photos are the captions of one split; the mean over every i that all
    photos have. (Of all references at once the variety would be that of several times as many captions.)"""
    turns = min((len(texts) for texts in references.values()), default=0)
    rows = [text_statistics([texts[turn] for texts in references.values()]) for turn in range(turns)]
    if not rows:
        raise ValueError(f"some of {len(references)} photos has no caption; expected one of each or more")
    return {name: sum(row[name] for row in rows) / turns for name in rows[0]}
