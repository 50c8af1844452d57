"""Points between photos: features on the way from a training photo to one like it, for a teacher to caption.

In: a dataset with pooled features beside it. Out: a `Source` of captions only, and the features of its samples. Each
point is nearer to one photo, whose captions it has until a teacher gives it others (`diffcap distill`). Mixup (Zhang et
al. 2018, arXiv:1710.09412) of neighbours: a student sees more of what its teacher knows than the photos at hand show.
It writes nothing.

N photos, P points, F features.
"""

import hashlib
from pathlib import Path

import numpy as np

from diffcap_dist.data.shard_format import FeatureInfo, ShardIndex, open_shard
from shards.writer import RawSample, Source

NEIGHBOURS = 30  # as many as `diffcap evaluate --retrieval` takes for a consensus
SHARE = (0.5, 0.7)  # of the nearer photo
PHOTOS_AT_ONCE = 1024


def between(directory: Path, feature_name: str, count: int, seed: int) -> tuple[Source, FeatureInfo, np.ndarray]:
    """The points as samples of the split train, what their features are, and the features (P, F) themselves.

    Raises ValueError where the dataset has no such features, or no two training photos.
    """
    index = ShardIndex.load(directory)
    info = index.feature(feature_name)
    pooled, captions, read = [], [], hashlib.sha256()
    for shard_info in index.split("train"):
        shard = open_shard(directory, shard_info)
        pooled.append(np.array(shard.features(info)[0], np.float32))
        captions += [shard.record(sample)["captions"] for sample in range(len(shard))]
        shard.close()
        read.update(f"{shard_info.sha256} {info.files[shard_info.name]['pooled']['sha256']}\n".encode())
    if len(captions) < 2:
        raise ValueError(f"{directory} has {len(captions)} training photos: there is nothing between them")
    features_NF = np.concatenate(pooled)
    rng = np.random.default_rng(seed)
    photo_P = rng.integers(len(captions), size=count)
    other_P = _neighbours(features_NF, photo_P, rng.integers(min(NEIGHBOURS, len(captions) - 1), size=count))
    share_P1 = rng.uniform(*SHARE, size=(count, 1)).astype(np.float32)
    points_PF = share_P1 * features_NF[photo_P] + (1 - share_P1) * features_NF[other_P]
    samples = [
        RawSample(f"between-{seed}-{number:08d}", captions[photo], "train", "between", None)
        for number, photo in enumerate(photo_P)
    ]
    what = {"features": feature_name, "count": count, "seed": seed, "of": read.hexdigest()}
    return Source(samples, [], {"command": "between", **what}, []), info, points_PF


def _neighbours(features_NF: np.ndarray, photo_P: np.ndarray, rank_P: np.ndarray) -> np.ndarray:
    """Of each photo the neighbour of that rank by cosine, 0 the nearest; itself left out."""
    unit_NF = features_NF / np.maximum(np.linalg.norm(features_NF, axis=1, keepdims=True), 1e-12)
    photos, at_P = np.unique(photo_P, return_inverse=True)
    ranked = []
    for start in range(0, len(photos), PHOTOS_AT_ONCE):
        chunk = photos[start : start + PHOTOS_AT_ONCE]
        cosine_CN = unit_NF[chunk] @ unit_NF.T
        cosine_CN[np.arange(len(chunk)), chunk] = -np.inf
        ranked.append(np.argsort(-cosine_CN, axis=1, kind="stable")[:, :NEIGHBOURS])
    return np.concatenate(ranked)[at_P, rank_P]
