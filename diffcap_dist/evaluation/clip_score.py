"""CLIPScore and RefCLIPScore: whether a caption fits its photo, judged by a CLIP and not by the words it shares.

Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", arXiv:2104.08718, section 3.
In: features of photos and of `prompted` texts, all by one CLIP. Out: plain floats. Loads no CLIP, knows no ranks.
Scores by different CLIPs cannot be compared; a captioner trained on the CLIP that judges it has an advantage.

N photos, F feature width, R references of a photo.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

PROMPT = "A photo depicts "  # before captions and references alike
WEIGHT = 2.5  # stretches the cosines of ViT-B/32 to about 0..1


@dataclass(frozen=True)
class ClipFeatures:
    """What a CLIP makes of one photo and of its references; of any length, cosines are taken here."""

    photo_F: np.ndarray
    references_RF: np.ndarray


def prompted(texts: Iterable[str]) -> list[str]:
    return [PROMPT + text for text in texts]


def clip_score(photo_F: np.ndarray, caption_F: np.ndarray) -> float:
    """2.5 max(cos(photo, caption), 0)."""
    return WEIGHT * max(_cosine(photo_F, caption_F), 0.0)


def ref_clip_score(photo_F: np.ndarray, caption_F: np.ndarray, references_RF: np.ndarray) -> float:
    """The harmonic mean of CLIPScore and of the caption's cosine with its nearest reference, or 0 if that is less."""
    fits = clip_score(photo_F, caption_F)
    agrees = max(0.0, *(_cosine(reference_F, caption_F) for reference_F in references_RF))
    return 2 * fits * agrees / (fits + agrees) if fits + agrees else 0.0


def clip_scores(captions_NF: np.ndarray, photos: Sequence[ClipFeatures]) -> dict[str, float]:
    """Both scores of one caption a photo, each the mean over photos."""
    if len(captions_NF) != len(photos) or not photos:
        raise ValueError(f"{len(captions_NF)} captions for {len(photos)} photos; expected one for each of one or more")
    return _means([_both(one.photo_F, c_F, one.references_RF) for c_F, one in zip(captions_NF, photos)])


def human_clip_scores(photos: Sequence[ClipFeatures]) -> dict[str, float]:
    """Every reference in turn is the caption and the photo's others its references; the mean over all turns."""
    turns = [
        _both(one.photo_F, one.references_RF[turn], np.delete(one.references_RF, turn, axis=0))
        for one in photos
        if len(one.references_RF) > 1
        for turn in range(len(one.references_RF))
    ]
    if not turns:
        raise ValueError(f"none of {len(photos)} photos has two captions or more: no human row")
    return _means(turns)


def _both(photo_F: np.ndarray, caption_F: np.ndarray, references_RF: np.ndarray) -> tuple[float, float]:
    return clip_score(photo_F, caption_F), ref_clip_score(photo_F, caption_F, references_RF)


def _means(scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    clip, ref_clip = np.mean(scores, axis=0)
    return {"clip_score": float(clip), "ref_clip_score": float(ref_clip)}


def _cosine(one_F: np.ndarray, other_F: np.ndarray) -> float:
    one_F, other_F = one_F.astype(np.float64), other_F.astype(np.float64)
    return float(one_F @ other_F / max(float(np.linalg.norm(one_F) * np.linalg.norm(other_F)), 1e-12))
