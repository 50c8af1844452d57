"""Features beside the shards: computed by the frozen image encoder, or imported from a names + array file.

In: a finished dataset. Out: for each shard `SHARD.NAME.npy` (fp16, row i = sample i) and, when asked, patch
features `SHARD.NAME.patches.npy`, then their entry in index.json, which comes last and only if the features
fit the captions (`alignment`). N samples, B of them at a time, F feature width, P patches, V words.
"""

import dataclasses
import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffcap_dist.data.shard_format import (
    FeatureInfo,
    Shard,
    ShardIndex,
    ShardInfo,
    atomic_write,
    file_sha256,
    open_shard,
)
from shards.sources import npz_names, photo_id_of

if TYPE_CHECKING:
    from diffcap_dist.model.image_encoder import ImageEncoder

Files = dict[str, dict[str, dict[str, str]]]  # as in FeatureInfo.files

# Measured on the weak real features of 7,091 photos: at 200 samples matched features reach z > 9, features
# shifted by one row stay below 3; at 50 samples the two overlap.
MIN_ALIGNMENT_SAMPLES = 200
MAX_ALIGNMENT_SAMPLES = 20_000  # bounds memory at about 100 MB and the time at about a second
MIN_ALIGNMENT_Z = 4.0
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


@dataclasses.dataclass(frozen=True)
class Registered:
    info: FeatureInfo
    alignment: Alignment | None  # None: too few samples to tell, or already registered
    already_complete: bool = False
    shards_kept: int = 0  # found complete from an interrupted run


# ---- do features and captions belong together? ----


def alignment(features_NF: np.ndarray, captions: list[list[str]]) -> Alignment:
    """Ridge regression from features to the captions' words, fitted on one half and measured on the other."""
    if len(features_NF) != len(captions):
        raise ValueError(f"{len(features_NF)} rows of features for the captions of {len(captions)} photos")
    order = np.random.RandomState(0).permutation(len(captions))[:MAX_ALIGNMENT_SAMPLES]
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


# ---- import ----


def import_npz(directory: Path, npz: Path, feature_name: str) -> Registered:
    """Features from a file with `names` (photo ids or file names) and one 2-d float array."""
    _check_name(feature_name)
    index = ShardIndex.load(directory)
    row_of, array_NF, array_name = _read_npz(npz)
    info = FeatureInfo(
        name=feature_name,
        source=npz.name,
        weights_sha256=None,
        pooled_dim=array_NF.shape[1],
        patches=None,
        preprocessing=f"imported: array {array_name} of a file with sha256 {file_sha256(npz)}",
        files={},
    )
    if _is_registered(index, info):
        return Registered(index.features[feature_name], None, already_complete=True)
    rows = {shard.name: _rows(directory, shard, row_of) for shard in index.shards}
    missing = [photo_id for found in rows.values() for photo_id, row in found if row is None]
    if missing:
        raise ValueError(
            f"{npz} lacks features of {len(missing)} of the dataset's photos, e.g. {', '.join(missing[:5])}. "
            "Features must be complete: make the dataset from the photos that have them"
        )
    files: Files = {}
    for shard in index.shards:
        pooled_NF = array_NF[[row for _, row in rows[shard.name] if row is not None]]
        files[shard.name] = {"pooled": _write_array(directory, f"{shard.name}.{feature_name}.npy", pooled_NF)}
    info = dataclasses.replace(info, files=files)
    return Registered(info, _register(directory, info))


def _read_npz(npz: Path) -> tuple[dict[str, int], np.ndarray, str]:
    """(row of each photo id, features_NF, the array's name)."""
    names = npz_names(npz)
    with np.load(npz, allow_pickle=False) as arrays:
        shapes = {name: (arrays[name].ndim, arrays[name].dtype.kind) for name in arrays.files if name != "names"}
        candidates = [name for name, shape in shapes.items() if shape == (2, "f")]
        if len(candidates) != 1:
            found = ", ".join(candidates) or "none"
            raise ValueError(f"{npz} must hold one 2-d float array beside `names`; found: {found}")
        array_NF = arrays[candidates[0]]
    if len(array_NF) != len(names):
        raise ValueError(f"{npz}: {len(names)} names, but {candidates[0]} has {len(array_NF)} rows")
    row_of = {photo_id_of(name): row for row, name in enumerate(names)}
    if len(row_of) != len(names):
        twice, _ = Counter(map(photo_id_of, names)).most_common(1)[0]
        raise ValueError(f"{npz}: photo {twice} is named more than once")
    return row_of, array_NF, candidates[0]


def _rows(directory: Path, info: ShardInfo, row_of: dict[str, int]) -> list[tuple[str, int | None]]:
    """Each sample's (photo id, row in the array)."""
    photo_ids = [record["photo_id"] for record in _records(directory, info)]
    return [(photo_id, row_of.get(photo_id)) for photo_id in photo_ids]


# ---- compute ----


def compute(directory: Path, encoder_name: str, pretrained: str, patches: bool, batch_size: int = 64) -> Registered:
    """Features of all photos by the encoder; a shard whose files are complete is not encoded again."""
    from diffcap_dist.model.image_encoder import ImageEncoder  # torch and open_clip: seconds

    index = ShardIndex.load(directory)
    encoder = ImageEncoder(encoder_name, pretrained)
    _check_name(encoder.name)
    info = FeatureInfo(
        name=encoder.name,
        source=encoder.source,
        weights_sha256=encoder.weights_sha256,
        pooled_dim=encoder.pooled_dim,
        patches=encoder.patches_shape if patches else None,
        preprocessing=encoder.preprocessing,
        files={},
    )
    if _is_registered(index, info):
        return Registered(index.features[info.name], None, already_complete=True)
    progress = directory / f"{info.name}.unfinished.json"
    files = _finished_files(directory, progress, info)
    kept = len(files)
    for shard in index.shards:
        if shard.name not in files:
            files[shard.name] = _encode_shard(directory, shard, encoder, info, batch_size)
            content = {"info": _identity(info), "files": files}
            atomic_write(progress, json.dumps(content, indent=1).encode())
    info = dataclasses.replace(info, files=files)
    measured = _register(directory, info)
    progress.unlink()
    return Registered(info, measured, shards_kept=kept)


def _encode_shard(
    directory: Path, shard_info: ShardInfo, encoder: "ImageEncoder", info: FeatureInfo, batch_size: int
) -> dict[str, dict[str, str]]:
    import torch
    from tqdm import tqdm

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.to(device)
    shard = open_shard(directory, shard_info)
    pooled_NF = np.empty((len(shard), info.pooled_dim), np.float16)
    patches_NPF = None if info.patches is None else np.empty((len(shard), *info.patches), np.float16)
    for start in tqdm(range(0, len(shard), batch_size), desc=shard_info.name, unit="batch", disable=None):
        rows = range(start, min(start + batch_size, len(shard)))
        images_BCHW = encoder.load_images([_image(shard, row) for row in rows])
        with torch.inference_mode():
            pooled_BF, patches_BPF = encoder(images_BCHW.to(device))
        pooled_NF[start : rows.stop] = pooled_BF.cpu().numpy()
        if patches_NPF is not None:
            patches_NPF[start : rows.stop] = patches_BPF.cpu().numpy()
    shard.close()
    files = {"pooled": _write_array(directory, f"{shard_info.name}.{info.name}.npy", pooled_NF)}
    if patches_NPF is not None:
        files["patches"] = _write_array(directory, f"{shard_info.name}.{info.name}.patches.npy", patches_NPF)
    return files


def _image(shard: Shard, sample: int) -> Any:
    from PIL import Image

    data = shard.image_bytes(sample)
    if data is None:
        raise ValueError(
            f"{shard.path}: sample {shard.key(sample)} has no photo to encode. "
            "A dataset of captions only takes its features from a file: --npz FILE --name NAME"
        )
    return Image.open(io.BytesIO(data)).convert("RGB")


def _finished_files(directory: Path, progress: Path, info: FeatureInfo) -> Files:
    """What an interrupted run of the same encoder has completed, each file checked against its sha256."""
    if not progress.is_file():
        return {}
    content = json.loads(progress.read_bytes())
    if content["info"] != _identity(info):
        return {}
    return {
        shard: files
        for shard, files in content["files"].items()
        if all(_is_intact(directory / file["file"], file["sha256"]) for file in files.values())
    }


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


# ---- both ----


def name_from_file(path: Path) -> str:
    """What imported features are called unless they are given a name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-_")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"features can't be named {name!r}: use letters, digits, - and _ (it goes in file names)")


def _identity(info: FeatureInfo) -> dict[str, Any]:
    """What must be equal for features to be the same, as JSON gives it back."""
    fields = dataclasses.asdict(dataclasses.replace(info, files={}))
    return {**fields, "patches": None if info.patches is None else list(info.patches)}


def _is_registered(index: ShardIndex, info: FeatureInfo) -> bool:
    """The same features are already there (with patches, if asked for). Others of that name are an error."""
    there = index.features.get(info.name)
    if there is None:
        return False
    now = _identity(info)
    different = {key: value for key, value in _identity(there).items() if value != now[key]}
    if different.keys() - {"patches"}:
        raise ValueError(
            f"features {info.name!r} are already there, and not the same: {different}, now "
            f"{ {key: now[key] for key in different} }. They are never overwritten: choose another name"
        )
    return info.patches is None or not different


def _write_array(directory: Path, name: str, array: np.ndarray) -> dict[str, str]:
    with np.errstate(over="ignore"):
        array = array.astype(np.float16)
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise ValueError(f"{name}: the features of sample {row} are not finite in fp16 (NaN, or beyond 65504)")
    buffer = io.BytesIO()
    np.save(buffer, array)
    atomic_write(directory / name, buffer.getbuffer())
    return {"file": name, "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest()}


def _records(directory: Path, info: ShardInfo) -> list[dict[str, Any]]:
    shard = open_shard(directory, info)
    records = [shard.record(sample) for sample in range(len(shard))]
    shard.close()
    return records


def _register(directory: Path, info: FeatureInfo) -> Alignment | None:
    """Enter the features in index.json, unless they don't fit the captions."""
    index = ShardIndex.load(directory)
    measured = _measure(directory, index, info)
    if measured is not None and measured.z < MIN_ALIGNMENT_Z:
        raise ValueError(
            f"features {info.name!r} don't fit the captions: words predicted from a photo's features agree "
            f"to {measured.matched:.4f} with its own captions, to {measured.shuffled:.4f} with other photos' "
            f"(z = {measured.z:.1f} over {measured.samples} photos, at least {MIN_ALIGNMENT_Z} expected). "
            "Rows are swapped or shifted, or the features say nothing of the photos. They were not registered"
        )
    index.features[info.name] = info
    index.save(directory)
    return measured


def _measure(directory: Path, index: ShardIndex, info: FeatureInfo) -> Alignment | None:
    if sum(shard.samples for shard in index.shards) < MIN_ALIGNMENT_SAMPLES:
        return None
    pooled, captions = [], []
    for shard_info in index.shards:
        shard = open_shard(directory, shard_info)
        pooled.append(shard.features(info)[0])
        captions += [shard.record(sample)["captions"] for sample in range(len(shard))]
        shard.close()
    return alignment(np.concatenate(pooled), captions)
