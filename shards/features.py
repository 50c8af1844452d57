"""Features beside the shards: what they are called, whether they fit the captions, how they are entered.

In: a finished dataset and, for each shard, arrays (fp16, row i = sample i). Out: `SHARD.NAME.npy` and perhaps patch
features `SHARD.NAME.patches.npy`, then their entry in index.json, which comes last and only if the features fit the
captions (`alignment`). Registered features are never overwritten. Where the arrays come from: feature_encoding.py,
feature_import.py. N samples, V words.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffcap_dist.data.shard_format import FeatureInfo, ShardIndex, atomic_write, open_shard, references_of
from shards.output import UNFINISHED, file_lock

ShardFiles = dict[str, dict[str, str]]  # "pooled" | "patches" -> {"file", "sha256"}, as in FeatureInfo.files

# Measured on the weak real features of 7,091 photos: at 200 samples matched features reach z > 9, features
# shifted by one row stay below 3; at 50 samples the two overlap.
MIN_ALIGNMENT_SAMPLES = 200
MAX_ALIGNMENT_SAMPLES = 20_000  # bounds memory at about 100 MB and the time at about a second
MIN_ALIGNMENT_Z = 4.0
# Sorted by id, neighbours are often of one series: shifted by one row, 7,091 photos reach z = 5.9 with a margin of
# 0.010. Features that match have 0.12 or more from 200 samples on.
MIN_ALIGNMENT_MARGIN = 0.02
NUM_WORDS = 500
RIDGE = 10.0  # in units of the features' mean variance


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Mean cosine between the words predicted from a photo's features and the words of its own captions, of
    other photos' captions, and how many standard errors lie between."""

    matched: float
    shuffled: float
    z: float
    samples: int

    @property
    def fits(self) -> bool:
        return self.z >= MIN_ALIGNMENT_Z and self.matched - self.shuffled >= MIN_ALIGNMENT_MARGIN


@dataclasses.dataclass(frozen=True)
class Registered:
    info: FeatureInfo
    alignment: Alignment | None  # None: too few samples to tell, or already registered
    already_complete: bool = False
    shards_kept: int = 0  # found complete from an interrupted run
    shards_owed: int = 0  # by other parts of an array, the last of which registers the features
    notes: tuple[str, ...] = ()


# ---- do features and captions belong together? ----


def alignment(features_NF: np.ndarray, captions: list[list[str]]) -> Alignment:
    """Ridge regression from features to the captions' words, fitted on one half and measured on the other."""
    if len(features_NF) != len(captions):
        raise ValueError(f"{len(features_NF)} rows of features for the captions of {len(captions)} photos")
    order = np.random.RandomState(0).permutation(len(captions))
    words_NV = _bag_of_words([captions[row] for row in order])
    features_NF = features_NF[order].astype(np.float32)
    half = len(order) // 2
    mean_F, mean_V = features_NF[:half].mean(0), words_NV[:half].mean(0)
    fit_NF, fit_NV = features_NF[:half] - mean_F, words_NV[:half] - mean_V
    gram_FF = fit_NF.T @ fit_NF
    gram_FF[np.diag_indices_from(gram_FF)] += RIDGE * gram_FF.trace() / len(gram_FF) + 1e-8
    weights_FV = np.linalg.solve(gram_FF, fit_NF.T @ fit_NV)
    predicted_NV = _unit_rows((features_NF[half:] - mean_F) @ weights_FV)
    words_NV = _unit_rows(words_NV[half:] - mean_V)
    matched_N = (predicted_NV * words_NV).sum(1)
    others_N = (predicted_NV @ words_NV.sum(0) - matched_N) / (len(words_NV) - 1)  # the mean over all shuffles
    difference_N = matched_N - others_N
    standard_error = difference_N.std(ddof=1) / np.sqrt(len(difference_N)) + 1e-12
    z = float(difference_N.mean() / standard_error)
    return Alignment(float(matched_N.mean()), float(others_N.mean()), z, len(order))


def _bag_of_words(captions: list[list[str]]) -> np.ndarray:
    """words_NV: 1 where a photo's captions hold a frequent word; words of every photo are left out."""
    words_N = [set(re.findall(r"\w+", " ".join(texts).lower())) for texts in captions]
    counts = Counter(word for words in words_N for word in words)
    ranked = sorted((word for word in counts if counts[word] < len(captions)), key=lambda word: (-counts[word], word))
    column = {word: number for number, word in enumerate(ranked[:NUM_WORDS])}
    words_NV = np.zeros((len(captions), len(column)), np.float32)
    for row, words in enumerate(words_N):
        words_NV[row, [column[word] for word in words if word in column]] = 1
    return words_NV


def _unit_rows(array: np.ndarray) -> np.ndarray:
    return array / (np.linalg.norm(array, axis=1, keepdims=True) + 1e-12)


def _measure(directory: Path, index: ShardIndex, info: FeatureInfo) -> Alignment | None:
    """The alignment of samples spread evenly over all shards: of all of them, if they are few enough."""
    total = sum(shard.samples for shard in index.shards)
    if total < MIN_ALIGNMENT_SAMPLES:
        return None
    count = min(total, MAX_ALIGNMENT_SAMPLES)
    chosen = np.arange(count, dtype=np.int64) * total // count  # of the samples of all shards, one after another
    pooled_NF = np.empty((count, info.pooled_dim), np.float16)
    records: list[dict[str, Any]] = []
    first = 0
    for shard_info in index.shards:
        begin, end = np.searchsorted(chosen, (first, first + shard_info.samples))
        if begin < end:
            shard = open_shard(directory, shard_info)
            rows = chosen[begin:end] - first
            pooled_NF[begin:end] = shard.features(info)[0][rows]
            records += [shard.record(int(row)) for row in rows]
            shard.close()
        first += shard_info.samples
    # Of a photo that is in several splits, with part of its captions in each, one sample: the fit must not know it.
    once = {record["photo_id"] if "references" in record else row: row for row, record in enumerate(records)}
    if len(once) < min(count, MIN_ALIGNMENT_SAMPLES):
        return None
    return alignment(pooled_NF[list(once.values())], [references_of(records[row]) for row in once.values()])


# ---- entered ----


def check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"features can't be named {name!r}: use letters, digits, - and _ (it goes in file names)")


def identity(info: FeatureInfo) -> dict[str, Any]:
    """What must be equal for features to be the same, as JSON gives it back."""
    fields = dataclasses.asdict(dataclasses.replace(info, files={}))
    return {**fields, "patches": None if info.patches is None else list(info.patches)}


def is_registered(index: ShardIndex, info: FeatureInfo) -> bool:
    """The same features are already there (with patches, if asked for). Others of that name are an error."""
    there = index.features.get(info.name)
    if there is None:
        return False
    now = identity(info)
    different = {key: value for key, value in identity(there).items() if value != now[key]}
    imported_other_shape = info.weights_sha256 is None and different
    if different.keys() - {"patches"} or imported_other_shape:
        raise ValueError(
            f"features {info.name!r} are already there, and not the same: {different}, now "
            f"{ {key: now[key] for key in different} }. They are never overwritten: choose another name"
        )
    return info.patches is None or not different


def require_same_files(there: FeatureInfo, now: FeatureInfo) -> None:
    shard = next((shard for shard, files in now.files.items() if there.files.get(shard) != files), None)
    if shard is not None:
        raise ValueError(
            f"features {now.name!r} are already there, and not the same: those of shard {shard} differ. "
            "They are never overwritten: choose another name"
        )


def write_arrays(
    directory: Path, shard_name: str, feature_name: str, arrays: dict[str, np.ndarray], dry_run: bool = False
) -> ShardFiles:
    """Write each kind's fp16 array; a dry run only says what would be written."""
    files = {}
    for kind, array in arrays.items():
        name = f"{shard_name}.{feature_name}{'' if kind == 'pooled' else '.patches'}.npy"
        if not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            raise ValueError(f"{name}: the features of sample {row} are not finite in fp16 (NaN, or beyond 65504)")
        buffer = io.BytesIO()
        np.save(buffer, array)
        if not dry_run:
            atomic_write(directory / name, buffer.getbuffer())
        files[kind] = {"file": name, "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest()}
    return files


@contextlib.contextmanager
def alone(directory: Path, feature_name: str, part: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Two runs may write different features of one dataset, not the same ones; but the parts of an array may."""
    ShardIndex.load(directory)  # before anything is made in a folder that is no dataset
    lock = directory / UNFINISHED / f"lock-features-{feature_name}"
    number, num_parts = part
    kind, own = fcntl.LOCK_EX if num_parts == 1 else fcntl.LOCK_SH, lock.with_name(f"{lock.name}-{number}")
    with file_lock(lock, kind | fcntl.LOCK_NB), file_lock(own, fcntl.LOCK_EX | fcntl.LOCK_NB):
        yield


def register(directory: Path, info: FeatureInfo) -> Alignment | None:
    """Enter the features in index.json, unless they don't fit the captions."""
    measured = _measure(directory, ShardIndex.load(directory), info)
    if measured is not None and not measured.fits:
        raise ValueError(
            f"features {info.name!r} don't fit the captions: words predicted from a photo's features agree "
            f"to {measured.matched:.4f} with its own captions, to {measured.shuffled:.4f} with other photos' "
            f"(z = {measured.z:.1f} over {measured.samples} photos; expected at least {MIN_ALIGNMENT_Z}, and at least "
            f"{MIN_ALIGNMENT_MARGIN} between the two). "
            "Rows are swapped or shifted, or the features say nothing of the photos. They were not registered"
        )
    with file_lock(directory / UNFINISHED / "lock-features", fcntl.LOCK_EX):
        index = ShardIndex.load(directory)  # as it is now: others may have been entered meanwhile
        index.features[info.name] = info
        index.save(directory)
    return measured
