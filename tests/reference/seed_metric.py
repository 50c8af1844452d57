"""The published code's private score (item 4) and its split by caption row (item 2). Not comparable with any other.

BLEU-4 without smoothing, of each batch of 8 rows, averaged: a batch without one matching 4-gram counts 0. Counts and
brevity as in torchmetrics' ``bleu_score`` (which the tests compare with): clipped by the largest count in any
reference, the reference nearest in length, the first of equals. The audit does not name the library; of those in use
they differ only in that tie.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

BATCH_SIZE = 8
JOINED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def hypothesis_words(tokens: Sequence[str]) -> list[str]:
    """The word pieces of a generated row, [CLS], [SEP] and [PAD] kept, decoded: pieces and punctuation joined.

    ["[CLS]", "a", "par", "##ty", ".", "[SEP]", "[PAD]"] -> ["[CLS]", "a", "party.", "[SEP]", "[PAD]"].
    Assumption: punctuation is joined by the rules of transformers' ``clean_up_tokenization``.
    """
    text = " ".join(tokens).replace(" ##", "")
    for spaced in JOINED:
        text = text.replace(spaced, spaced.strip())
    return text.split()


def reference_words(caption: str) -> list[str]:
    """ "[CLS] caption . [SEP]", the caption as published (punctuation spaced), not cut to 16 pieces.

    Assumptions: lower case (else a human caption scores 0.11 here, not the audit's 0.165), one full stop at the end.
    """
    return ["[CLS]", *caption.lower().rstrip(" .").split(), ".", "[SEP]"]


def ngram_counts(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu_counts(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    """Matches of 1..4-grams, possible matches of 1..4-grams, length, nearest reference's length: 10 numbers to sum."""
    matches, possible = [], []
    for n in range(1, 5):
        allowed: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            allowed |= ngram_counts(reference, n)
        counts = ngram_counts(hypothesis, n)
        matches.append((counts & allowed).total())
        possible.append(counts.total())
    nearest = min((len(reference) for reference in references), key=lambda length: abs(length - len(hypothesis)))
    return [*matches, *possible, len(hypothesis), nearest]


def bleu_of_counts(counts: Sequence[Sequence[int]]) -> float:
    """BLEU-4 of the rows together: the corpus score, 0 without one match of each order."""
    *ngrams, length, reference_length = (sum(column) for column in zip(*counts))
    matches, possible = ngrams[:4], ngrams[4:]
    if min(matches) == 0:
        return 0.0
    mean_log = sum(math.log(match / of) for match, of in zip(matches, possible)) / 4
    return math.exp(mean_log + min(0.0, 1 - reference_length / length))


def seed_bleu(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """The mean over batches of 8 rows of the batch's BLEU-4 (item 4), in the rows' order.

    The last, smaller batch is left out: item 2's 252 batches are 5% of 40,455 rows only so (2,023 = 252 * 8 + 7).
    """
    counts = [bleu_counts(words, of_row) for words, of_row in zip(hypotheses, references)]
    starts = range(0, len(counts) - BATCH_SIZE + 1, BATCH_SIZE)
    if not starts:
        raise ValueError(f"{len(counts)} rows: the seed's score needs a batch of {BATCH_SIZE}")
    return sum(bleu_of_counts(counts[start : start + BATCH_SIZE]) for start in starts) / len(starts)


def caption_row_split(
    num_rows: int, train_share: float = 0.8, generator: torch.Generator | None = None
) -> tuple[list[int], list[int]]:
    """Item 2: rows (captions, not photos) drawn at random into train and validation; no seed in the code."""
    order = torch.randperm(num_rows, generator=generator).tolist()
    num_train = int(num_rows * train_share)
    return order[:num_train], order[num_train:]
