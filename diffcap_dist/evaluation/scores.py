"""Corpus scores of captions without Java: BLEU-1..4, CIDEr-D and ROUGE-L.

In: captions as text (`score_captions`) or as tokens (everything else). Out: plain floats, equal to
pycocoevalcap's scorers on the same tokens. BLEU goes through int64 counts that add up over samples and
ranks, so a divided evaluation gives exactly the number of an undivided one; CIDEr-D cannot be divided
(its idf needs every reference at once). Not here: METEOR, SPICE, CLIPScore, files, ranks.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np

MAX_ORDER = 4
BLEU_COUNTS = 2 * MAX_ORDER + 2
Tokens = Sequence[str]
# n-gram -> count; an n-gram is its tokens joined by spaces (a string keeps its hash, a tuple does not)
Ngrams = dict[str, int]

# ---- Tokens: Stanford's PTBTokenizer 3.4.1, then COCO's list of dropped punctuation ----

# COCO's list names brackets in capitals, but its tokens are lower case: "-lrb-" stays, as do "!!" and "/".
COCO_PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
REWRITTEN = str.maketrans(
    {
        **dict.fromkeys("’´‛", "'"),
        "‘": "`",
        **dict.fromkeys("“”«»", '"'),
        **dict.fromkeys("–—―‒", "--"),
        "…": " ... ",
        "\N{SOFT HYPHEN}": "",
        "½": " 1/2 ",
        "¼": " 1/4 ",
        "¾": " 3/4 ",
        "⅓": " 1/3 ",
        "⅔": " 2/3 ",
        "€": "$",
        "£": "#",
    }
)
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
ENTITY = re.compile("|".join(ENTITIES))
NUMBERED = re.compile(r"(?i)\b(nos?|art|figs?|op|pp|prop)\.\s+(?=\d)")  # "No. 5" keeps its full stop, as "No.5" does
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", '"': "''"}
ASSIMILATED = "can(?=not)|gon(?=na)|got(?=ta)|wan(?=na)|gim(?=me)|lem(?=me)"
ABBREVIATIONS = (
    "adj adm al ala alex apr ariz assn atty aug ave bancorp bhd blvd brig bros calif capt cf cmdr co "
    "col colo comdr conn corp cos cpl ct dak dec dept det dr drs esq est etc feb fla fri ft ga gen "
    "gov hon inc ind intl jan jr jul jun kan kans ky lieut lt ltd maj mar md messrs mich minn mo mon "
    "mont mr mrs ms mt neb nev nov oct okla penn pfc ph plc pres prof profs pvt rd rep reps rev rt "
    "sen sens sep sept seq sgt spc sq sr st ste supt sys tel tenn thu thurs tue tues univ va vs vt "
    "wed wis wm wyo [a-z]"
).replace(" ", "|")
TOKEN = re.compile(
    rf"""
      https?://\S+[\w/] | www\.\S+\w
    | [<>]?[:;=][-o*']?[()DPdpO\\{{@|\[\]](?![a-zA-Z])
    | (?i:(?:{ASSIMILATED})(?=(?:not|na|ta|me)(?![\w'-])))
    | (?i:'t(?=is\b|was\b) | '(?:n'|em\b|til\b|cause\b|n\b) | (?:somethin|dunkin|ol)' | y'(?=[a-z]))
    | (?i:[a-z]+(?:-[a-z]+)*(?=n['`]t(?![a-z])) | n['`]t(?![a-z]) | '(?:s|m|d|ll|re|ve)(?![a-z]))
    | (?<!\w)'\d\ds?(?!\w)
    | (?i:[dlos]'(?!s\b)[a-z]+ | c'mon\b | ma'am\b)
    | (?i:(?:[a-z]\.)+[a-z](?![a-z])\.?(?:-[a-z]+)* | ph\.d\.? | (?:{ABBREVIATIONS})\.(?!\w))
    | (?i:(?:no|nos|art|figs?|op|pp|prop)\.(?=\d))
    | (?i:[a-z0-9]+[.,][a-z0-9.,]*(?:-[a-z0-9]+)+) | [^\W_]+(?:-[^\W_]+)*\.(?=[,;])
    | [A-Z]+&[A-Z]+(?![a-z])
    | [\w.+-]*\w@\w+(?:[.-]\w+)* | [@\#][^\W\d]\w*
    | [^\W\d_]+(?:[.!?][^\W\d_]+)+
    | [+-]?\d*(?:[.,:]\d+)+ | [+-]\d+(?![\w-])
    | [^\W_]+(?:[-/_][^\W_]+)*
    | \.{{3,}} | --+ | [!?]{{2,}} | \*+ | _+ | '' | `` | \S
    """,
    re.VERBOSE,
)


@lru_cache(maxsize=1 << 16)
def _word_tokens(word: str) -> tuple[str, ...]:
    found = TOKEN.findall(word)
    found = ["..." if t.startswith("...") else "--" if t.startswith("--") else BRACKETS.get(t, t) for t in found]
    found = ["".join(BRACKETS.get(c, c) for c in t) if t[0] in "<>:;=" else t for t in found]  # emoticons
    return tuple(t for t in map(str.lower, found) if t not in COCO_PUNCTUATION)


def tokenize(text: str) -> list[str]:
    """The tokens of COCO's caption evaluation.

    Limits, against the Java original: markup ("<b>") and "C++" fall apart, an initial keeps its full stop before a
    sentence ("J. A dog runs"), and nothing but English is provided for.
    """
    if "&" in text:
        text = ENTITY.sub(lambda found: ENTITIES[found[0]], text)
    text = NUMBERED.sub(r"\1.", text.translate(REWRITTEN))
    return [token for word in text.split() for token in _word_tokens(word)]


# ---- Counted once, scored often ----


@dataclass(frozen=True)
class CountedCaption:
    tokens: Tokens
    ngrams: tuple[Ngrams, ...]
    """One table for each order 1..4."""


@dataclass(frozen=True)
class CountedReferences:
    captions: Sequence[CountedCaption]
    most: tuple[Ngrams, ...]
    """For each order, an n-gram's highest count in any one reference: what BLEU clips at."""


def _count(ngrams: Tokens) -> Ngrams:
    once = dict.fromkeys(ngrams, 1)  # nearly every caption repeats no bigram; Counter costs five times this
    return once if len(once) == len(ngrams) else Counter(ngrams)


def count_caption(tokens: Tokens) -> CountedCaption:
    shifted = [tokens[start:] for start in range(MAX_ORDER)]
    joined = [list(map(" ".join, zip(*shifted[:order]))) for order in range(2, MAX_ORDER + 1)]
    return CountedCaption(tokens, (_count(tokens), *map(_count, joined)))


def _check_not_empty(references_tokens: Sequence[Tokens]) -> None:
    if not references_tokens:
        raise ValueError("a caption came without references; expected at least one to score it against")


def count_references(references_tokens: Sequence[Tokens]) -> CountedReferences:
    _check_not_empty(references_tokens)
    captions = [count_caption(tokens) for tokens in references_tokens]
    most: tuple[Ngrams, ...] = tuple({} for _ in range(MAX_ORDER))
    for caption in captions:
        for highest, counts in zip(most, caption.ngrams):
            highest.update([item for item in counts.items() if item[1] > highest.get(item[0], 0)])
    return CountedReferences(captions, most)


# ---- BLEU (Papineni et al., 2002) ----


def closest_length(length: int, reference_lengths: Iterable[int]) -> int:
    """The reference length nearest to `length`, the shorter of two equally near."""
    return min(reference_lengths, key=lambda reference: (abs(reference - length), reference))


def bleu_totals(length: int) -> list[int]:
    """How many n-grams of order 1..4 a caption of `length` tokens has."""
    return [max(0, length - order) for order in range(MAX_ORDER)]


def counted_bleu(hypothesis: CountedCaption, references: CountedReferences) -> np.ndarray:
    """`bleu_counts` of what is already counted."""
    matches = [
        sum(min(counts[ngram], most[ngram]) for ngram in counts.keys() & most.keys())
        for counts, most in zip(hypothesis.ngrams, references.most)
    ]
    length = len(hypothesis.tokens)
    closest = closest_length(length, (len(caption.tokens) for caption in references.captions))
    return np.array([*matches, *bleu_totals(length), length, closest], dtype=np.int64)


def bleu_counts(hypothesis_tokens: Tokens, references_tokens: Sequence[Tokens]) -> np.ndarray:
    """int64 [matches 1..4, totals 1..4, hypothesis length, closest reference length]; sums over samples."""
    return counted_bleu(count_caption(hypothesis_tokens), count_references(references_tokens))


def bleu(counts: np.ndarray) -> tuple[float, float, float, float]:
    """BLEU-1..4 of summed counts, with pycocoevalcap's way round divisions by zero."""
    if counts.shape != (BLEU_COUNTS,):
        raise ValueError(f"BLEU counts have shape {counts.shape}; expected ({BLEU_COUNTS},): sum over samples first")
    tiny, small = 1e-15, 1e-9
    values = [int(count) for count in counts]
    ratio = (values[-2] + tiny) / (values[-1] + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    precision, scores = 1.0, []
    for order in range(MAX_ORDER):
        precision *= (values[order] + tiny) / (values[MAX_ORDER + order] + small)
        scores.append(brevity * precision ** (1 / (order + 1)))
    return scores[0], scores[1], scores[2], scores[3]


# ---- CIDEr-D (Vedantam et al., 2015) ----

CIDER_LENGTH_SIGMA = 6.0


class _SquaredIdf(dict[str, float]):
    """n-gram -> idf squared. One that no reference has is as rare as one that a single sample has."""

    def __init__(self, references: Iterable[CountedReferences]) -> None:
        documents: Counter[str] = Counter()
        samples = 0
        for sample in references:
            samples += 1
            documents.update(chain.from_iterable(sample.most))
        log_samples = math.log(max(1, samples))
        by_count = {count: (log_samples - math.log(count)) ** 2 for count in set(documents.values())}
        super().__init__(zip(documents, map(by_count.__getitem__, documents.values())))
        self.of_unseen = log_samples**2

    def __missing__(self, ngram: str) -> float:
        return self.of_unseen


class CiderD:
    """CIDEr-D with the idf of some samples' references."""

    def __init__(self, references: Iterable[CountedReferences]) -> None:
        self._idf_squared = _SquaredIdf(references)

    def __call__(self, hypotheses: Sequence[CountedCaption], references: CountedReferences) -> list[float]:
        """The score of each hypothesis of one sample. What the references have is laid out once for all hypotheses."""
        captions, idf_squared = references.captions, self._idf_squared
        having: list[dict[str, list[tuple[int, int]]]] = [{} for _ in range(MAX_ORDER)]  # n-gram -> (which, how often)
        norms: list[list[float]] = [[] for _ in range(MAX_ORDER)]
        for which, caption in enumerate(captions):
            for of_order, norms_of_order, counts in zip(having, norms, caption.ngrams):
                squares = 0.0
                for ngram, count in counts.items():
                    of_order.setdefault(ngram, []).append((which, count))
                    squares += count * count * idf_squared[ngram]
                norms_of_order.append(math.sqrt(squares))
        scores = []
        for hypothesis in hypotheses:
            cosines = [0.0] * len(captions)
            for of_order, norms_of_order, counts in zip(having, norms, hypothesis.ngrams):
                dots, squares = [0.0] * len(captions), 0.0
                for ngram, count in counts.items():
                    weight = idf_squared[ngram]
                    squares += count * count * weight
                    for which, in_reference in of_order.get(ngram, ()):  # min() would be a call each
                        dots[which] += (count if count < in_reference else in_reference) * in_reference * weight
                norm = math.sqrt(squares)
                for which, dot in enumerate(dots):
                    if dot:
                        cosines[which] += dot / (norm * norms_of_order[which])
            # the reference implementation measures length in bigrams, which matters only for empty captions
            length = max(len(hypothesis.tokens), 1)
            deltas = [length - max(len(caption.tokens), 1) for caption in captions]
            total = sum(c * math.exp(-(d**2) / (2 * CIDER_LENGTH_SIGMA**2)) for c, d in zip(cosines, deltas))
            scores.append(10.0 * total / MAX_ORDER / len(captions))
        return scores


def counted_cider_d(hypotheses: Sequence[CountedCaption], references: Sequence[CountedReferences]) -> list[float]:
    """`cider_d` of what is already counted."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} samples; expected one for each")
    score = CiderD(references)
    return [score([hypothesis], sample)[0] for hypothesis, sample in zip(hypotheses, references)]


def cider_d(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """One score per sample; their mean is the corpus score. The idf comes from these references alone."""
    counted = [count_references(sample) for sample in references]
    return counted_cider_d([count_caption(tokens) for tokens in hypotheses], counted)


# ---- ROUGE-L (Lin, 2004) ----

ROUGE_BETA = 1.2


def longest_common_subsequences(hypothesis: Tokens, references: Sequence[Tokens]) -> list[int]:
    """Their lengths; a row of the usual table is one integer whose zero bits are matches (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for place, token in enumerate(hypothesis):
        places[token] = places.get(token, 0) | 1 << place
    full = (1 << len(hypothesis)) - 1
    lengths = []
    for reference in references:
        row = full
        for token in reference:
            if token in places:
                matched = row & places[token]
                row = (row + matched | row - matched) & full
        lengths.append(len(hypothesis) - row.bit_count())
    return lengths


def rouge_l(hypothesis_tokens: Tokens, references_tokens: Sequence[Tokens]) -> float:
    """F of the best precision and the best recall (maybe of two references, as in pycocoevalcap)."""
    _check_not_empty(references_tokens)
    # there, an empty caption counts as one empty token
    hypothesis, references = hypothesis_tokens or [""], [tokens or [""] for tokens in references_tokens]
    common = longest_common_subsequences(hypothesis, references)
    precision = max(common) / len(hypothesis)
    recall = max(length / len(reference) for length, reference in zip(common, references))
    if precision == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


# ---- All of them ----


def _check_same_samples(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not references:
        raise ValueError("no captions to score: the references are empty; expected at least one sample")
    unscored, unknown = references.keys() - hypotheses.keys(), hypotheses.keys() - references.keys()
    faults = {"references without a hypothesis": unscored, "hypotheses without references": unknown}
    for fault, keys in faults.items():
        if keys:
            raise ValueError(f"{len(keys)} {fault}, e.g. {sorted(keys)[:3]}; expected the same keys in both")
    for key, captions in references.items():
        if isinstance(captions, str) or not captions:
            raise ValueError(f"references of {key!r} are {captions!r}; expected a list of at least one caption")


def score_captions(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Corpus scores of one caption per key: 0..1, but for CIDEr-D, whose 1.2 is printed as 120 in papers."""
    _check_same_samples(hypotheses, references)
    counted = [count_references([tokenize(text) for text in texts]) for texts in references.values()]
    captions = [count_caption(tokenize(hypotheses[key])) for key in references]
    counts = sum((counted_bleu(h, r) for h, r in zip(captions, counted)), np.zeros(BLEU_COUNTS, dtype=np.int64))
    rouge = [rouge_l(h.tokens, [r.tokens for r in refs.captions]) for h, refs in zip(captions, counted)]
    scores = {f"bleu_{order}": score for order, score in enumerate(bleu(counts), start=1)}
    scores["cider_d"] = float(np.mean(counted_cider_d(captions, counted)))
    scores["rouge_l"] = float(np.mean(rouge))
    return scores
