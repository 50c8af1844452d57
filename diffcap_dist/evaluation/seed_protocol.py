"""The private score of CLIP-Diffusion-LM's published code: BLEU-4 of batches of 8 caption rows, special tokens kept.

In: a captioner, the reader of a split, the ranks. Out: that score beside its floor and human rows, the same floats for
any number of ranks. Only for reading beside that paper's figures; ``scores`` and ``protocol`` are for everything else.

As the published code does it, by the audit of it:
    rows       a caption is generated for each caption row of the split, five for a photo of five; rows in random order
    repeats    `torch.unique_consecutive` over a batch's columns: one goes where all 8 rows repeat the one before
    words      hypotheses keep [CLS], [SEP] and [PAD] as words, with punctuation joined to the word before it;
               references are "[CLS] caption . [SEP]" in lower case with punctuation as published, and are not cut
    score      BLEU-4 of each batch of 8 rows against all captions of their photos, unsmoothed, averaged over batches;
               a last, smaller batch is left out
A run whose rows do not begin with [CLS] (data.begin_token=false) gets it put before them, or it would be missing from
the score alone. Padding counts, so the score depends on data.max_length: people get 0.167 on Flickr8k at the paper's
16, 0.127 at 24. B rows, L positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffcap_dist.data.captions import CLS, SEP, CaptionTokenizer
from diffcap_dist.data.shard_format import references_of
from diffcap_dist.data.stream import Photo, ShardReader
from diffcap_dist.evaluation.captioner import Captioner
from diffcap_dist.evaluation.scores import MAX_ORDER, bleu_counts
from diffcap_dist.model.denoiser import ImageFeatures
from diffcap_dist.training import distributed
from diffcap_dist.training.distributed import Ranks

BATCH_ROWS = 8
ROW_ORDER_SEED = 0  # the published code has none; any order will do that keeps the rows of a photo apart
# What transformers' `clean_up_tokenization` joins, in its order.
JOINED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")

Words = Sequence[str]


# ---- The metric ----


def drop_repeated_columns(ids_BL: Tensor) -> Tensor:
    """ "Removal of repeated words" as coded: what it mostly removes is padding that all rows of the batch have."""
    return torch.unique_consecutive(ids_BL, dim=-1)


def hypothesis_words(tokens: Words) -> list[str]:
    """[CLS] a par ##ty . [SEP] [PAD] -> [CLS] a party. [SEP] [PAD]."""
    text = " ".join(tokens).replace(" ##", "")
    for spaced in JOINED:
        text = text.replace(spaced, spaced.strip())
    return text.split()


def reference_words(caption: str) -> list[str]:
    """A party ! . -> [CLS] a party ! . [SEP]."""
    return [CLS, *caption.lower().rstrip(" .").split(), ".", SEP]


def batch_bleu(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Corpus BLEU-4 without smoothing: 0 where an order has no match. Of equally near lengths the first counts."""
    totals = np.zeros(2 * MAX_ORDER + 2, dtype=np.int64)
    for words, of_row in zip(hypotheses, references, strict=True):
        counts = bleu_counts(words, of_row)
        counts[-1] = min((len(reference) for reference in of_row), key=lambda length: abs(length - len(words)))
        totals += counts
    *ngrams, length, reference_length = totals.tolist()
    matches, possible = ngrams[:MAX_ORDER], ngrams[MAX_ORDER:]
    if min(matches) == 0:
        return 0.0
    mean_log = sum(math.log(match / of) for match, of in zip(matches, possible)) / MAX_ORDER
    return math.exp(mean_log + min(0.0, 1 - reference_length / length))


def row_words(ids_BL: Tensor, tokenizer: CaptionTokenizer, begin: bool) -> list[list[str]]:
    """The hypotheses of one batch of rows; ``begin``: the rows have [CLS] themselves."""
    before = [] if begin else [CLS]
    rows = drop_repeated_columns(ids_BL).tolist()
    return [hypothesis_words([*before, *tokenizer.tokenizer.convert_ids_to_tokens(row)]) for row in rows]


def caption_words(captions: Sequence[str], tokenizer: CaptionTokenizer, max_length: int) -> list[list[str]]:
    """Captions of people as one batch of hypotheses, through the same rows, cuts and padding as a model's."""
    ids_BL = torch.from_numpy(tokenizer.encode(captions, max_length)[0])
    begin = ids_BL[0, 0].item() == tokenizer.tokenizer.convert_tokens_to_ids(CLS)
    return row_words(ids_BL, tokenizer, begin)


# ---- Rows of a split ----


@dataclass(frozen=True)
class CaptionRow:
    """One caption of a photo of the split, and where the photo is."""

    shard: int
    sample: int
    noise_key: str
    caption: str
    references: Sequence[str]
    has_elsewhere: bool  # other captions of its photo may be in another split


def caption_rows(reader: ShardReader) -> list[CaptionRow]:
    """Whole batches of the split's rows, in an order that is the same everywhere. ValueError if there is none."""
    rows: list[CaptionRow] = []
    for shard, count in enumerate(reader.counts):
        for sample in range(count):
            key, record = reader.record(shard, sample)
            references = references_of(record)
            rows += [
                CaptionRow(shard, sample, f"{key}#{number}", caption, references, "references" in record)
                for number, caption in enumerate(record["captions"])
            ]
    order = np.random.RandomState(ROW_ORDER_SEED).permutation(len(rows)).tolist()
    return [rows[place] for place in _whole_batches(order)]


def split_by(rows: list[CaptionRow]) -> str:
    """What was drawn into splits: caption rows as in the published code, or photos."""
    return "caption rows" if any(row.has_elsewhere for row in rows) else "photos"


def _whole_batches(items: list) -> list:
    if len(items) < BATCH_ROWS:
        raise ValueError(f"the split has {len(items)} caption rows; the published code's score needs {BATCH_ROWS}")
    return items[: len(items) - len(items) % BATCH_ROWS]


def mean_bleu(hypotheses: Callable[[list[CaptionRow]], list[list[str]]], rows: list[CaptionRow]) -> float:
    """Of what ``hypotheses`` makes of each batch of rows."""
    starts = range(0, len(rows), BATCH_ROWS)
    batches = [rows[start : start + BATCH_ROWS] for start in starts]
    return math.fsum(batch_bleu(hypotheses(batch), _references(batch)) for batch in batches) / len(batches)


def human_bleu(rows: list[CaptionRow], tokenizer: CaptionTokenizer, max_length: int) -> float | None:
    """Each row's own caption against the others of its photo (one reference fewer than a model's); None: no others."""
    turns = []
    for row in rows:
        others = list(row.references)
        others.remove(row.caption)
        if others:
            turns.append(dataclasses.replace(row, references=others))
    if len(turns) < BATCH_ROWS:
        return None

    def own_words(batch: list[CaptionRow]) -> list[list[str]]:
        return caption_words([row.caption for row in batch], tokenizer, max_length)

    return mean_bleu(own_words, _whole_batches(turns))


def floor_bleu(caption: str, rows: list[CaptionRow], tokenizer: CaptionTokenizer, max_length: int) -> float:
    """The same caption for every row."""
    words = caption_words([caption] * BATCH_ROWS, tokenizer, max_length)
    return mean_bleu(lambda batch: words, rows)


def _references(batch: list[CaptionRow]) -> list[list[list[str]]]:
    return [[reference_words(text) for text in row.references] for row in batch]


# ---- A captioner's score, on all ranks ----


def model_bleu(
    captioner: Captioner,
    reader: ShardReader,
    features_of: Callable[[list[Photo]], ImageFeatures],
    rows: list[CaptionRow],
    rows_at_once: int,
    ranks: Ranks,
) -> float | None:
    """The score on rank 0, None elsewhere; all ranks enter. A rank takes whole batches, and always the same rows are
    captioned together: the floats do not depend on the number of ranks."""
    found: dict[int, float] = {}
    begin, candidates = captioner.config.data.begin_token, captioner.config.sampler.candidates
    block = max(1, rows_at_once // BATCH_ROWS) * BATCH_ROWS
    starts = range(ranks.rank * block, len(rows), ranks.world_size * block)
    for start in tqdm(starts, disable=ranks.no_progress, unit="block", desc="captioning", dynamic_ncols=True):
        part = rows[start : start + block]
        features = features_of([reader.photo(row.shard, row.sample) for row in part])
        ids_BL = captioner.caption_ids(features, [row.noise_key for row in part])[::candidates].cpu()
        for first in range(0, len(part), BATCH_ROWS):
            batch = slice(first, first + BATCH_ROWS)
            words = row_words(ids_BL[batch], captioner.tokenizer, begin)
            found[start + first] = batch_bleu(words, _references(part[batch]))
    gathered = distributed.gather_to_first(found, ranks)
    if gathered is None:
        return None
    scores = [score for part_found in gathered for score in part_found.values()]
    return math.fsum(scores) / len(scores)  # exact, so in any order


def as_text(entry: Mapping[str, Any]) -> str:
    """The three rows and why they are not to be compared."""
    human = "-" if entry["human"] is None else f"{entry['human']:.4f}"
    by_rows = entry["split_by"] == "caption rows"
    split = (
        f"captions were split, not photos, so most photos of {entry['split']} were trained on"
        if by_rows
        else "only the metric is the published code's: this dataset is split by photo, that code's was not"
    )
    return (
        f"published code's protocol, {entry['rows']} caption rows of {entry['split']}, BLEU-4 by batch:\n"
        f"model  {entry['bleu_4']:.4f}\nfloor  {entry['floor']:.4f}\nhuman  {human}\n"
        f"Not comparable with any other score: it is the mean over batches of {BATCH_ROWS} rows with [CLS], [SEP] and "
        f"[PAD] counted as words (a person's captions get no more than the human row), and {split}."
    )
