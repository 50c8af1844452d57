"""What a captioner's scores are read against: the human, floor and retrieval rows of a score table.

In: references (photo key -> its captions), for retrieval also the training photos' features. Out: scores with
the keys of `score_captions`, or captions to be scored with it. Choices (the floor's caption) are made on
validation references by the caller; nothing here reads files or knows which split it was given.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from diffcap_dist.evaluation.scores import (
    CIDER_LENGTH_SIGMA,
    MAX_ORDER,
    CountedCaption,
    bleu,
    bleu_totals,
    closest_length,
    count_caption,
    count_references,
    score_captions,
    tokenize,
)

References = Mapping[str, Sequence[str]]
Similarity = Callable[[Sequence[CountedCaption]], np.ndarray]  # C captions, each to each: (C, C)

# ---- Human: one reference against the rest ----


def human_scores(references: References) -> dict[str, float]:
    """Every reference in turn is the hypothesis, the photo's others its references; all turns are one corpus.

    A photo with a single caption has no turn. Each hypothesis meets one reference fewer than a model's
    caption does, which costs people a little BLEU: the row is a lower bound.
    """
    turns = {
        f"{key}#{turn}": (caption, [*captions[:turn], *captions[turn + 1 :]])
        for key, captions in references.items()
        if len(captions) > 1
        for turn, caption in enumerate(captions)
    }
    if not turns:
        raise ValueError(
            f"none of {len(references)} photos has two captions or more; the human row needs one caption "
            "to score and another to score it against"
        )
    hypotheses = {turn: caption for turn, (caption, _) in turns.items()}
    return score_captions(hypotheses, {turn: others for turn, (_, others) in turns.items()})


# ---- Floor: the same caption for every photo ----


def floor_caption(references: References, candidates: Iterable[str]) -> str:
    """The candidate that, given to every photo, has the best corpus BLEU-4; of equals the first sorted.

    Exact over all candidates: a constant caption's clipped matches need only, for each n-gram, how many
    photos allow it once, twice, ..., so a candidate costs its own n-grams and not a pass over the photos.
    """
    distinct = sorted(set(candidates))
    if not references or not distinct:
        raise ValueError(
            f"{len(references)} photos and {len(distinct)} candidate captions; expected one of each or more"
        )
    counted = [count_references([tokenize(text) for text in texts]) for texts in references.values()]
    # (n-gram, k) -> photos with a reference that holds the n-gram at least k times
    allowing = Counter(
        (ngram, k)
        for photo in counted
        for highest in photo.most
        for ngram, most in highest.items()
        for k in range(1, most + 1)
    )
    lengths = [[len(caption.tokens) for caption in photo.captions] for photo in counted]
    closest_total: dict[int, int] = {}

    def constant_bleu_4(caption: CountedCaption) -> float:
        length = len(caption.tokens)
        if length not in closest_total:
            closest_total[length] = sum(closest_length(length, photo) for photo in lengths)
        matches = [
            sum(allowing[ngram, k] for ngram, count in counts.items() for k in range(1, count + 1))
            for counts in caption.ngrams
        ]
        totals = [len(lengths) * total for total in [*bleu_totals(length), length]]
        return bleu(np.array([*matches, *totals, closest_total[length]], dtype=np.int64))[-1]

    return max(distinct, key=lambda text: constant_bleu_4(count_caption(tokenize(text))))


def floor_scores(caption: str, references: References) -> dict[str, float]:
    """The scores of one caption given to every photo."""
    return score_captions(dict.fromkeys(references, caption), references)


# ---- Retrieval: captions of the nearest training photos ----

QUERIES_AT_ONCE = 256  # bounds the similarity matrix: 256 queries x 30,000 photos are 30 MB


def retrieval_captions(
    train_features_NF: np.ndarray,
    train_captions: Sequence[Sequence[str]],
    query_features_QF: np.ndarray,
    neighbours: int = 1,
) -> list[str]:
    """For each query, a caption of its nearest training photos by cosine (of equals, the earlier photo).

    One neighbour: its first caption. More: of all their captions the one most like the others
    (`consensus`), after Devlin et al., "Exploring nearest neighbor approaches for image captioning" (2015).
    """
    _check_retrieval(train_features_NF, train_captions, query_features_QF, neighbours)
    train_NF, query_QF = _unit_rows(train_features_NF), _unit_rows(query_features_QF)
    counted: dict[int, list[CountedCaption]] = {}
    chosen = []
    for start in range(0, len(query_QF), QUERIES_AT_ONCE):
        cosine_QN = query_QF[start : start + QUERIES_AT_ONCE] @ train_NF.T
        for photos in np.argsort(-cosine_QN, axis=1, kind="stable")[:, :neighbours].tolist():
            if neighbours == 1:
                chosen.append(train_captions[photos[0]][0])
                continue
            for photo in photos:
                if photo not in counted:
                    counted[photo] = [count_caption(tokenize(text)) for text in train_captions[photo]]
            pool = [text for photo in photos for text in train_captions[photo]]
            of_all = [caption for photo in photos for caption in counted[photo]]
            chosen.append(pool[consensus(of_all, bleu_similarity)])
    return chosen


def consensus(captions: Sequence[CountedCaption], similarity: Similarity) -> int:
    """The index of the caption with the highest mean similarity to the others; of equals the first."""
    similarity_CC = similarity(captions)
    np.fill_diagonal(similarity_CC, 0)
    return int(np.argmax(similarity_CC.sum(axis=1)))


def bleu_similarity(captions: Sequence[CountedCaption]) -> np.ndarray:
    """Sentence BLEU-4 of each against each other alone, (C, C), over distinct n-grams, each precision smoothed as
    (shared + 1) / (of c + 1), with the brevity penalty exp(1 - |r| / |c|) where c is shorter."""
    log_precision_CC = np.zeros((len(captions), len(captions)))
    for shared_CC in _shared_ngrams(captions):
        log_precision_CC += np.log((shared_CC + 1) / (np.diag(shared_CC)[:, None] + 1)) / MAX_ORDER
    length_C = _lengths(captions)
    return np.exp(log_precision_CC + np.minimum(0, 1 - length_C[None, :] / length_C[:, None]))


def f1_similarity(captions: Sequence[CountedCaption]) -> np.ndarray:
    """(C, C): F1 of the distinct n-grams of two captions, mean over n = 1..4, times CIDEr-D's penalty for unequal
    lengths (Vedantam et al. 2015, arXiv:1411.5726). It chooses better captions than BLEU does (docs/results.md)."""
    f1_CC = np.zeros((len(captions), len(captions)))
    for shared_CC in _shared_ngrams(captions):
        number_C = np.diag(shared_CC)
        f1_CC += 2 * shared_CC / np.maximum(1, number_C[:, None] + number_C) / MAX_ORDER
    length_C = _lengths(captions)
    return f1_CC * np.exp(-((length_C[:, None] - length_C) ** 2) / (2 * CIDER_LENGTH_SIGMA**2))


def _shared_ngrams(captions: Sequence[CountedCaption]) -> Iterator[np.ndarray]:
    """For n = 1..4, how many distinct n-grams two captions have in common, (C, C)."""
    for order in range(MAX_ORDER):
        tables = [caption.ngrams[order] for caption in captions]
        column = {ngram: index for index, ngram in enumerate(dict.fromkeys(g for t in tables for g in t))}
        holds_CG = np.zeros((len(captions), len(column)), dtype=np.float32)
        rows = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        holds_CG[rows, [column[ngram] for table in tables for ngram in table]] = 1
        yield holds_CG @ holds_CG.T


def _lengths(captions: Sequence[CountedCaption]) -> np.ndarray:
    return np.array([max(1, len(caption.tokens)) for caption in captions])


def _unit_rows(features_NF: np.ndarray) -> np.ndarray:
    features_NF = features_NF.astype(np.float32)
    return features_NF / np.maximum(np.linalg.norm(features_NF, axis=1, keepdims=True), 1e-12)


def _check_retrieval(
    train_NF: np.ndarray, captions: Sequence[Sequence[str]], query_QF: np.ndarray, neighbours: int
) -> None:
    if train_NF.ndim != 2 or query_QF.ndim != 2 or train_NF.shape[1] != query_QF.shape[1]:
        raise ValueError(
            f"features of shape {train_NF.shape} and queries of shape {query_QF.shape}; expected (N, F) and "
            "(Q, F) of one encoder"
        )
    if len(captions) != len(train_NF):
        raise ValueError(f"{len(captions)} caption lists for {len(train_NF)} feature rows; expected one for each")
    if not 1 <= neighbours <= len(train_NF):
        raise ValueError(f"neighbours = {neighbours}; expected 1 to {len(train_NF)}, the training photos there are")
    for row, texts in enumerate(captions):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"captions of training photo {row} are {texts!r}; expected a list of at least one")
