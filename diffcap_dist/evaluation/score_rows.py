"""The rows of a score table: everything that can be said of a split's captions, in one dict a row.

In: the records of a split's photos and, for CLIPScore, what a CLIP makes of photos and references. Out: the row of any
captions of these photos, and of people. All sums go over photos in the order of the records: sorted by key, a row is
the same floats whoever captioned what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffcap_dist.data.shard_format import references_of
from diffcap_dist.evaluation import protocol
from diffcap_dist.evaluation.clip_score import ClipFeatures, clip_scores, human_clip_scores, prompted
from diffcap_dist.evaluation.scene_facts import scene_scores
from diffcap_dist.evaluation.scores import score_captions
from diffcap_dist.evaluation.text_statistics import human_text_statistics, text_statistics

TEXTS_AT_ONCE = 64

EncodeTexts = Callable[[Sequence[str]], np.ndarray]
"""Texts -> features_BF of the CLIP that the ClipFeatures are of."""


class ScoreRows:
    """``of(captions)`` and ``human()``; with ``encode_texts`` and ``clip_features`` (by key) CLIPScores too."""

    def __init__(
        self,
        records: Mapping[str, dict[str, Any]],
        encode_texts: EncodeTexts | None = None,
        clip_features: Mapping[str, ClipFeatures] | None = None,
    ) -> None:
        self.records = records
        self.references: dict[str, list[str]] = {key: references_of(record) for key, record in records.items()}
        self.has_scenes = all("scene" in record for record in records.values())
        self.encode_texts = encode_texts
        self.clip_features = [clip_features[key] for key in records] if clip_features is not None else []

    def of(self, captions: Mapping[str, str]) -> dict[str, float]:
        """The row of one caption per photo."""
        row = score_captions(captions, self.references)
        if self.has_scenes:
            row |= scene_scores(captions, {key: record["scene"] for key, record in self.records.items()})
        texts = [captions[key] for key in self.records]
        row |= text_statistics(texts)
        if self.encode_texts is not None:
            row |= clip_scores(self._encoded(texts), self.clip_features)
        return row

    def human(self) -> dict[str, float]:
        """The row of the references, each in turn against the others (`protocol.human_scores`)."""
        row = protocol.human_scores(self.references)
        if self.has_scenes:
            turns = {
                f"{key}#{i}": (text, key) for key, texts in self.references.items() for i, text in enumerate(texts)
            }
            scenes = {turn: self.records[key]["scene"] for turn, (_, key) in turns.items()}
            row |= scene_scores({turn: text for turn, (text, _) in turns.items()}, scenes)
        row |= human_text_statistics(self.references)
        if self.encode_texts is not None:
            row |= human_clip_scores(self.clip_features)
        return row

    def _encoded(self, texts: Sequence[str]) -> np.ndarray:
        """captions_NF. Each text once, in batches that depend on nothing but the texts: these are exact floats."""
        assert self.encode_texts is not None
        distinct = list(dict.fromkeys(texts))
        starts = range(0, len(distinct), TEXTS_AT_ONCE)
        features_DF = np.concatenate([self.encode_texts(prompted(distinct[s : s + TEXTS_AT_ONCE])) for s in starts])
        row_of = {text: row for row, text in enumerate(distinct)}
        return features_DF[[row_of[text] for text in texts]]
