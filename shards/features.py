"""Features beside the shards: computed by the frozen image encoder, or imported from what another tool computed.

In: a finished dataset. Out: for each shard `SHARD.NAME.npy` (fp16, row i = sample i) and perhaps patch features
`SHARD.NAME.patches.npy`, then their entry in index.json, which comes last and only if the features fit the
captions (`alignment`). It never holds the features of more than one shard for each worker, and never overwrites
registered ones. N samples, B of them at a time, F feature width, P patches, V words.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from diffcap_dist.data.shard_format import (
    FeatureInfo,
    Shard,
    ShardIndex,
    ShardInfo,
    atomic_write,
    file_sha256,
    open_shard,
    references_of,
)
from shards.output import UNFINISHED, file_lock
from shards.sources import npz_names, path_id_of, photo_id_of
from shards.workers import end_with_parent

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from tqdm import tqdm

    from diffcap_dist.data.pixels import PixelTransform
    from diffcap_dist.model.image_encoder import ImageEncoder

Header = tuple[tuple[int, ...], bool, np.dtype]  # of a .npy file: shape, is in Fortran order, type
ShardFiles = dict[str, dict[str, str]]  # "pooled" | "patches" -> {"file", "sha256"}, as in FeatureInfo.files

BATCH_SIZE = 64  # fixed: the last bits of a convolution depend on it

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


# ---- import ----


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The features of another tool by photo id."""

    where: Path
    preprocessing: str
    num_photos: int
    place: dict[str, int] | dict[str, str]  # of a photo id: the row in a file, or the name of a file in a folder
    read: Callable[[Any], np.ndarray]  # (F,) or (P, F)
    notes: tuple[str, ...] = ()


def import_npz(directory: Path, npz: Path, feature_name: str) -> Registered:
    """Features from a file with `names` (photo ids or file names) and one 2-d float array."""
    _check_name(feature_name)
    with _alone(directory, feature_name):
        return _import(directory, feature_name, _npz_rows(npz, directory))


def import_npy_dir(directory: Path, folder: Path, feature_name: str) -> Registered:
    """Features from a folder with one PHOTO.npy for each photo (its id or file name): (F,), or patches (P, F),
    whose mean becomes the pooled features."""
    _check_name(feature_name)
    with _alone(directory, feature_name):
        return _import(directory, feature_name, _npy_rows(folder))


def import_array(
    directory: Path, like: FeatureInfo, photo_ids: list[str], pooled_NF: np.ndarray, how: str
) -> Registered:
    """Features that were made of those that ``like`` describes: of the same name and the same encoder."""
    place = {photo_id: row for row, photo_id in enumerate(photo_ids)}
    rows = _Rows(Path(how), f"{like.preprocessing} | {how}", len(photo_ids), place, lambda row: pooled_NF[row])
    with _alone(directory, like.name):
        return _import(directory, like.name, rows, like.weights_sha256)


def _import(directory: Path, feature_name: str, rows: _Rows, weights_sha256: str | None = None) -> Registered:
    index = ShardIndex.load(directory)
    first_photo, num_photos = _require_complete(directory, index, rows)
    shape = _read_row(rows, first_photo, None).shape
    info = FeatureInfo(
        name=feature_name,
        source=rows.where.name,
        weights_sha256=weights_sha256,
        pooled_dim=shape[-1],
        patches=(shape[0], shape[1]) if len(shape) == 2 else None,
        preprocessing=rows.preprocessing,
        files={},
    )
    registered = _is_registered(index, info)
    files = {}
    for shard in index.shards:
        arrays = _import_shard(directory, shard, rows, shape)
        files[shard.name] = _write_arrays(directory, shard.name, feature_name, arrays, dry_run=registered)
    info = dataclasses.replace(info, files=files)
    if registered:
        _require_same_files(index.features[feature_name], info)
        return Registered(info, None, already_complete=True, notes=rows.notes)
    extra = rows.num_photos - num_photos
    notes = (f"{rows.where} has features of {extra} photos that are not in the dataset",) if extra > 0 else ()
    return Registered(info, _register(directory, info), notes=rows.notes + notes)


def _require_complete(directory: Path, index: ShardIndex, rows: _Rows) -> tuple[str, int]:
    """All of the dataset's photos have features. Returns the first photo's id and how many photos there are."""
    missing, first = 0, None
    known: set[str] = set()  # a photo may be in several splits
    examples: list[str] = []
    for shard in index.shards:
        photo_ids = _photo_ids(directory, shard)
        first = photo_ids[0] if first is None and photo_ids else first
        lacking = [photo_id for photo_id in photo_ids if photo_id not in rows.place]
        missing += len(lacking)
        known.update(photo_ids)
        examples += lacking[: 5 - len(examples)]
    if missing:
        if rows.where.is_dir():
            examples = [f"{photo_id}.npy" for photo_id in examples]
        raise ValueError(
            f"{rows.where} lacks features of {missing} of the dataset's photos, e.g. {', '.join(examples)}. "
            "Features must be complete: make the dataset from the photos that have them"
        )
    if first is None:
        raise ValueError(f"{directory} has no samples, so there is nothing that features belong to")
    return first, len(known)


def _import_shard(directory: Path, shard: ShardInfo, rows: _Rows, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    pooled_NF = np.empty((shard.samples, shape[-1]), np.float16)
    if len(shape) == 1:
        for sample, photo_id in enumerate(_photo_ids(directory, shard)):
            pooled_NF[sample] = _read_row(rows, photo_id, shape)
        return {"pooled": pooled_NF}
    patches_NPF = np.empty((shard.samples, *shape), np.float16)
    for sample, photo_id in enumerate(_photo_ids(directory, shard)):
        patches_PF = _read_row(rows, photo_id, shape)
        patches_NPF[sample] = patches_PF
        pooled_NF[sample] = patches_PF.mean(0, dtype=np.float64)
    return {"pooled": pooled_NF, "patches": patches_NPF}


def _photo_ids(directory: Path, info: ShardInfo) -> list[str]:
    shard = open_shard(directory, info)
    photo_ids = [shard.record(sample)["photo_id"] for sample in range(len(shard))]
    shard.close()
    return photo_ids


def _read_row(rows: _Rows, photo_id: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """The features of one photo, sure to be of that shape (None: any that will do) and finite in fp16."""
    place = rows.place[photo_id]
    array = rows.read(place)
    where = f"{rows.where if isinstance(place, int) else _npy_path(rows.where, place)}: photo {photo_id}"
    if shape is None and (array.ndim not in (1, 2) or array.size == 0):
        raise ValueError(f"{where} has features of shape {array.shape}, expected (F,), or patches (P, F)")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{where} has features of shape {array.shape}, the dataset's first photo of shape {shape}")
    if array.dtype.kind != "f":
        raise ValueError(f"{where} has features of type {array.dtype}, expected floats")
    with np.errstate(over="ignore"):
        if not np.isfinite(array.astype(np.float16)).all():
            raise ValueError(f"{where} has features that are not finite in fp16 (NaN, or beyond 65504)")
    return array


def _by_photo_id(where: Path, names: list[str]) -> dict[str, int]:
    """Number of the name by photo id: the path without ending, and the file name alone if only one has it."""
    number_of = {path_id_of(name): number for number, name in enumerate(names)}
    if len(number_of) != len(names):
        twice, _ = Counter(map(path_id_of, names)).most_common(1)[0]
        raise ValueError(f"{where}: photo {twice} is named more than once")
    same_name = Counter(map(photo_id_of, names))
    alone = {photo_id_of(name): number for number, name in enumerate(names) if same_name[photo_id_of(name)] == 1}
    return {**alone, **number_of}


def _npz_rows(npz: Path, scratch: Path) -> _Rows:
    names = npz_names(npz)
    headers = _npz_headers(npz)
    candidates = [name for name, (shape, _, dtype) in headers.items() if (len(shape), dtype.kind) == (2, "f")]
    if len(candidates) != 1:
        found = ", ".join(candidates) or "none"
        raise ValueError(f"{npz} must hold one 2-d float array beside `names`; found: {found}")
    num_rows = headers[candidates[0]][0][0]
    if num_rows != len(names):
        raise ValueError(f"{npz}: {len(names)} names, but {candidates[0]} has {num_rows} rows")
    array_NF = _mapped_array(npz, candidates[0], scratch)
    preprocessing = f"imported: array {candidates[0]} of a file with sha256 {file_sha256(npz)}"
    return _Rows(npz, preprocessing, len(names), _by_photo_id(npz, names), lambda row: array_NF[row])


def _npz_headers(npz: Path) -> dict[str, Header]:
    with zipfile.ZipFile(npz) as archive:
        headers = {}
        for member in archive.namelist():
            with archive.open(member) as packed:
                headers[member.removesuffix(".npy")] = _read_npy_header(packed)
    return headers


def _read_npy_header(file: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _mapped_array(npz: Path, name: str, scratch: Path) -> np.ndarray:
    """One array of the file, unpacked on disk: it may be larger than memory."""
    with tempfile.TemporaryFile(dir=scratch) as unpacked:  # it has no name: gone however this process ends
        try:
            with zipfile.ZipFile(npz) as archive, archive.open(f"{name}.npy") as packed:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{npz}: its array {name} is damaged ({error}). Copy or make the file again") from error
        unpacked.seek(0)
        shape, is_fortran, dtype = _read_npy_header(unpacked)
        return np.memmap(unpacked, dtype, "r", unpacked.tell(), shape, "F" if is_fortran else "C")


def _npy_rows(folder: Path) -> _Rows:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of .npy files")
    files = [(Path(place) / name).relative_to(folder) for place, _, names in os.walk(folder) for name in names]
    names = sorted(str(file.with_suffix("")) for file in files if _is_npy(file))
    others = sorted(str(file) for file in files if not _is_npy(file))
    if not names:
        raise ValueError(f"{folder} has no .npy files. It holds: {', '.join(others[:3]) or 'nothing'}")
    notes = (f"{len(others)} entries of {folder} are no .npy files: {', '.join(others[:5])}",) if others else ()
    place = {photo_id: names[number] for photo_id, number in _by_photo_id(folder, names).items()}
    read = lambda name: _read_npy(_npy_path(folder, name))  # noqa: E731
    return _Rows(folder, "imported: a folder of one .npy file for each photo", len(names), place, read, notes)


def _is_npy(file: Path) -> bool:
    return file.suffix == ".npy" and not file.name.startswith(".")  # macOS leaves ._1.npy beside 1.npy in archives


def _npy_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} can't be read as a .npy file ({error}). Copy or make it again") from error


# ---- compute ----


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a worker must know to encode shards."""

    directory: Path
    encoder_name: str
    pretrained: str
    info: FeatureInfo  # its files: pooled features that are registered and stay, when patches join them
    decoders: int  # threads


def compute(
    directory: Path,
    encoder_name: str,
    pretrained: str,
    patches: bool,
    workers: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> Registered:
    """Features of all photos by the encoder, in `workers` processes (None: one for each GPU, or else for each
    CPU core), or of the shards of one part (i, n); whoever finishes the last shard registers them. A shard whose files
    are complete is not encoded again. Needs ImageEncoder's weights."""
    import torch  # and open_clip: seconds

    from diffcap_dist.model.image_encoder import ImageEncoder

    workers = _check_workers(workers, torch.cuda.device_count())
    ShardIndex.load(directory)  # before seconds go into the encoder
    encoder = ImageEncoder(encoder_name, pretrained)
    _check_name(encoder.name)
    info = FeatureInfo(
        name=encoder.name,
        source=encoder.source,
        weights_sha256=encoder.weights_sha256,
        pooled_dim=encoder.pooled_dim,
        patches=encoder.patches_shape if patches else None,
        preprocessing=f"{encoder.preprocessing} | decoded by {encoder.pixel_transform().described}",
        files={},
    )
    with _alone(directory, info.name, part):
        job = _Job(directory, encoder_name, pretrained, info, max(1, _num_cores() // workers))
        return _compute(job, encoder, workers, part)


def _compute(job: _Job, encoder: "ImageEncoder", workers: int, part: tuple[int, int]) -> Registered:
    index = ShardIndex.load(job.directory)
    number, num_parts = part
    ending = "" if num_parts == 1 else f"-{number}-of-{num_parts}"
    progress = job.directory / f"{job.info.name}.unfinished{ending}.jsonl"
    if _is_registered(index, job.info):
        _forget_progress(job)  # killed between the last two steps
        return Registered(index.features[job.info.name], None, already_complete=True)
    there = index.features.get(job.info.name)
    if there is not None:
        job = dataclasses.replace(job, info=dataclasses.replace(job.info, files=there.files))
    files, kept = _encode_all(job, encoder, index.shards[number::num_parts], workers, progress)
    with file_lock(job.directory / UNFINISHED / f"lock-features-{job.info.name}-merge", fcntl.LOCK_EX):
        return _merge(job, files, kept)


def _merge(job: _Job, files: dict[str, ShardFiles], kept: int) -> Registered:
    """Register the features if this part's files and those that others have noted are all."""
    index = ShardIndex.load(job.directory)
    if _is_registered(index, job.info):  # by a part that was waiting to merge before this one
        return Registered(index.features[job.info.name], None, already_complete=True)
    others = {entry["shard"]: entry for entry in _noted(job, index.shards) if entry["shard"] not in files}
    owed = sum(shard.name not in files and shard.name not in others for shard in index.shards)
    if not owed:  # only now each file is read: once, by the last part
        owed = sum(not _is_whole(job, entry) for entry in others.values())
    if owed:
        return Registered(job.info, None, shards_kept=kept, shards_owed=owed)
    files = files | {shard: entry["files"] for shard, entry in others.items()}
    info = dataclasses.replace(job.info, files={shard.name: files[shard.name] for shard in index.shards})
    measured = _register(job.directory, info)
    _forget_progress(job)
    return Registered(info, measured, shards_kept=kept)


def _check_workers(workers: int | None, num_gpus: int) -> int:
    if workers is None:
        return num_gpus or _num_cores()
    if workers < 1:
        raise ValueError(f"--workers is {workers}, it must be at least 1")
    return workers


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _encode_all(
    job: _Job, encoder: "ImageEncoder", shards: list[ShardInfo], workers: int, progress: Path
) -> tuple[dict[str, ShardFiles], int]:
    """The files of every shard, and how many shards were found complete."""
    from tqdm import tqdm

    files = _finished_files(job, progress, shards)
    kept = len(files)
    to_do = [shard for shard in shards if shard.name not in files]
    workers = min(workers, len(to_do))
    with tqdm(
        total=sum(shard.samples for shard in shards),
        initial=sum(shard.samples for shard in shards if shard.name in files),
        desc=job.info.name,
        unit=" photos",
        disable=None,
    ) as bar:
        if workers > 1:
            encoded = _encode_in_pool(job, to_do, workers, bar)
        else:
            encoded = _encode_here(job, encoder, to_do, bar)
        for shard, shard_files in encoded:
            files[shard.name] = shard_files
            _note_finished(progress, shard, shard_files)
    return files, kept


def _encode_here(
    job: _Job, encoder: "ImageEncoder", shards: list[ShardInfo], bar: "tqdm[Any]"
) -> Iterator[tuple[ShardInfo, ShardFiles]]:
    import torch

    num_threads = torch.get_num_threads()
    try:
        encode = _encode_function(job, encoder, 0, bar.update)
        for shard in shards:
            yield shard, encode(shard)
    finally:
        torch.set_num_threads(num_threads)


def _encode_in_pool(
    job: _Job, shards: list[ShardInfo], workers: int, bar: "tqdm[Any]"
) -> Iterator[tuple[ShardInfo, ShardFiles]]:
    """Shards as they are finished. No more are handed out than there are workers, so that an error waits for
    no others than those under way."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    counts = context.RawArray("q", workers)  # photos encoded by each: one writer to a place, so no lock
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job, numbers, counts))
    waiting, running = iter(shards), dict[Future[ShardFiles], ShardInfo]()
    before = bar.n
    try:
        while True:
            for shard in islice(waiting, workers - len(running)):
                running[pool.submit(_encode_in_worker, shard)] = shard
            if not running:
                return
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(before + sum(counts) - bar.n)
            for future in sorted(done, key=lambda future: future.exception() is not None):
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process died (killed, perhaps for want of memory). Finished shards are kept: run the same "
            "command again, with fewer --workers if memory is short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# ---- in a worker ----

_worker: tuple[_Job, int, Any] | None = None


def _start_worker(job: _Job, numbers: Any, counts: Any) -> None:
    global _worker
    end_with_parent()
    _worker = (job, numbers.get(), counts)


def _encode_in_worker(shard: ShardInfo) -> ShardFiles:
    return _encode_function_of_worker()(shard)


@functools.cache
def _encode_function_of_worker() -> Callable[[ShardInfo], ShardFiles]:
    """Built with the first shard and not at the start, where an error would only be a broken pool."""
    from diffcap_dist.model.image_encoder import ImageEncoder

    assert _worker is not None
    job, number, counts = _worker

    def count(photos: int) -> None:
        counts[number] += photos

    return _encode_function(job, ImageEncoder(job.encoder_name, job.pretrained), number, count)


def _encode_function(
    job: _Job, encoder: "ImageEncoder", number: int, count: Callable[[int], object]
) -> Callable[[ShardInfo], ShardFiles]:
    import torch

    # The last bits of a convolution depend on the number of threads (RN50: one or several), so it is always one;
    # a CPU's cores are used by as many workers.
    torch.set_num_threads(1)
    num_gpus = torch.cuda.device_count()
    device = torch.device("cuda", number % num_gpus) if num_gpus else torch.device("cpu")
    encoder.to(device)
    return functools.partial(_encode_shard, job, encoder, device, count)


def _encode_shard(
    job: _Job, encoder: "ImageEncoder", device: "torch.device", count: Callable[[int], object], shard_info: ShardInfo
) -> ShardFiles:
    import torch

    info = job.info
    shard = open_shard(job.directory, shard_info)
    pooled_NF = np.empty((len(shard), info.pooled_dim), np.float16)
    patches_NPF = None if info.patches is None else np.empty((len(shard), *info.patches), np.float16)
    start = 0
    for pixels_BCHW in _batches(shard, encoder.pixel_transform(), job.decoders):
        with torch.inference_mode():
            pooled_BF, patches_BPF = encoder(pixels_BCHW.to(device))
        rows = slice(start, start + len(pixels_BCHW))
        with np.errstate(over="ignore"):  # checked before it is written
            pooled_NF[rows] = pooled_BF.cpu().numpy()
            if patches_NPF is not None:
                patches_NPF[rows] = patches_BPF.cpu().numpy()
        start = rows.stop
        count(len(pixels_BCHW))
    shard.close()
    registered = info.files.get(shard_info.name, {})
    arrays = {"pooled": pooled_NF} if patches_NPF is None else {"pooled": pooled_NF, "patches": patches_NPF}
    arrays = {kind: array for kind, array in arrays.items() if kind not in registered}
    return {**registered, **_write_arrays(job.directory, shard_info.name, info.name, arrays)}


def _batches(shard: Shard, pixels: "PixelTransform", decoders: int) -> Iterator["Tensor"]:
    """pixels_BCHW of the shard in order; the next ones are decoded while the caller encodes these."""
    import torch

    with ThreadPoolExecutor(decoders) as pool:

        def begin(start: int) -> list[Future["Tensor"]]:
            rows = range(start, min(start + BATCH_SIZE, len(shard)))
            return [pool.submit(_pixels_CHW, shard, row, pixels) for row in rows]

        coming = begin(0)
        for start in range(0, len(shard), BATCH_SIZE):
            images, coming = coming, begin(start + BATCH_SIZE)
            yield torch.stack([image.result() for image in images])


def _pixels_CHW(shard: Shard, row: int, pixels: "PixelTransform") -> "Tensor":
    data = shard.image_bytes(row)
    where = f"{shard.path}: sample {shard.key(row)}"
    if data is None:
        raise ValueError(
            f"{where} has no photo to encode. A dataset of captions only takes its features from files: "
            "--npz FILE or --npy-dir DIR"
        )
    try:
        return pixels(data)
    except Exception as error:  # decoders raise OSError, RuntimeError, SyntaxError, struct.error, zlib.error, ...
        raise ValueError(f"{where}: its photo can't be decoded ({error}). Make the dataset without it") from error


# ---- progress: a line for each finished shard ----


def _finished_files(job: _Job, progress: Path, shards: list[ShardInfo]) -> dict[str, ShardFiles]:
    """What interrupted runs of the same encoder have completed of these shards, in whatever parts, each file checked
    against its sha256. Writes the list anew, so that a line that was cut off does no harm to the next."""
    finished = {entry["shard"]: entry for entry in _noted(job, shards) if _is_whole(job, entry)}
    lines = [json.dumps(entry) + "\n" for entry in [_progress_head(job.info), *finished.values()]]
    atomic_write(progress, "".join(lines).encode())
    return {shard: entry["files"] for shard, entry in finished.items()}


def _noted(job: _Job, shards: list[ShardInfo]) -> Iterator[dict[str, Any]]:
    """The entries of these shards, as they are now, in the lists of all parts; their files are not read."""
    tar_of = {shard.name: shard.sha256 for shard in shards}
    for progress in _progress_files(job):
        entries = _json_lines(progress)
        if entries and entries[0] == _progress_head(job.info):
            yield from (entry for entry in entries[1:] if tar_of.get(entry["shard"]) == entry["tar_sha256"])


def _is_whole(job: _Job, entry: dict[str, Any]) -> bool:
    return all(_is_intact(job.directory / file["file"], file["sha256"]) for file in entry["files"].values())


def _progress_files(job: _Job) -> list[Path]:
    return sorted(job.directory.glob(f"{job.info.name}.unfinished*.jsonl"))


def _forget_progress(job: _Job) -> None:
    for progress in _progress_files(job):
        progress.unlink(missing_ok=True)


def _progress_head(info: FeatureInfo) -> dict[str, Any]:
    return {"info": _identity(info), "batch_size": BATCH_SIZE}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may end in half a line."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_bytes().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _note_finished(progress: Path, shard: ShardInfo, files: ShardFiles) -> None:
    entry = {"shard": shard.name, "tar_sha256": shard.sha256, "files": files}
    with progress.open("a") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


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
    imported_other_shape = info.weights_sha256 is None and different
    if different.keys() - {"patches"} or imported_other_shape:
        raise ValueError(
            f"features {info.name!r} are already there, and not the same: {different}, now "
            f"{ {key: now[key] for key in different} }. They are never overwritten: choose another name"
        )
    return info.patches is None or not different


def _require_same_files(there: FeatureInfo, now: FeatureInfo) -> None:
    shard = next((shard for shard, files in now.files.items() if there.files.get(shard) != files), None)
    if shard is not None:
        raise ValueError(
            f"features {now.name!r} are already there, and not the same: those of shard {shard} differ. "
            "They are never overwritten: choose another name"
        )


def _write_arrays(
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
def _alone(directory: Path, feature_name: str, part: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Two runs may write different features of one dataset, not the same ones; but the parts of an array may."""
    ShardIndex.load(directory)  # before anything is made in a folder that is no dataset
    lock = directory / UNFINISHED / f"lock-features-{feature_name}"
    number, num_parts = part
    kind, own = fcntl.LOCK_EX if num_parts == 1 else fcntl.LOCK_SH, lock.with_name(f"{lock.name}-{number}")
    with file_lock(lock, kind | fcntl.LOCK_NB), file_lock(own, fcntl.LOCK_EX | fcntl.LOCK_NB):
        yield


def _register(directory: Path, info: FeatureInfo) -> Alignment | None:
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
