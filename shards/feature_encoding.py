"""Features computed by the frozen image encoder, in many processes, and in parts of a job array.

In: a finished dataset and the encoder's weights. Out: what features.py enters. A line is noted for each finished shard:
killed anywhere, the same command goes on from there. It never holds the features of more than one shard for each
worker. B samples at a time, N samples, F feature width, P patches.
"""

import dataclasses
import fcntl
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
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
from shards.features import Registered, ShardFiles, alone, check_name, identity, is_registered, register, write_arrays
from shards.output import UNFINISHED, file_lock
from shards.workers import end_with_parent

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from tqdm import tqdm

    from diffcap_dist.data.pixels import PixelTransform
    from diffcap_dist.model.image_encoder import ImageEncoder

BATCH_SIZE = 64  # fixed: the last bits of a convolution depend on it


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
    check_name(encoder.name)
    info = FeatureInfo(
        name=encoder.name,
        source=encoder.source,
        weights_sha256=encoder.weights_sha256,
        pooled_dim=encoder.pooled_dim,
        patches=encoder.patches_shape if patches else None,
        preprocessing=f"{encoder.preprocessing} | decoded by {encoder.pixel_transform().described}",
        files={},
    )
    with alone(directory, info.name, part):
        job = _Job(directory, encoder_name, pretrained, info, max(1, _num_cores() // workers))
        return _compute(job, encoder, workers, part)


def _compute(job: _Job, encoder: "ImageEncoder", workers: int, part: tuple[int, int]) -> Registered:
    index = ShardIndex.load(job.directory)
    number, num_parts = part
    ending = "" if num_parts == 1 else f"-{number}-of-{num_parts}"
    progress = job.directory / f"{job.info.name}.unfinished{ending}.jsonl"
    if is_registered(index, job.info):
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
    if is_registered(index, job.info):  # by a part that was waiting to merge before this one
        return Registered(index.features[job.info.name], None, already_complete=True)
    others = {entry["shard"]: entry for entry in _noted(job, index.shards) if entry["shard"] not in files}
    owed = sum(shard.name not in files and shard.name not in others for shard in index.shards)
    if not owed:  # only now each file is read: once, by the last part
        owed = sum(not _is_whole(job, entry) for entry in others.values())
    if owed:
        return Registered(job.info, None, shards_kept=kept, shards_owed=owed)
    files = files | {shard: entry["files"] for shard, entry in others.items()}
    info = dataclasses.replace(job.info, files={shard.name: files[shard.name] for shard in index.shards})
    measured = register(job.directory, info)
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
    return {**registered, **write_arrays(job.directory, shard_info.name, info.name, arrays)}


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
    return {"info": identity(info), "batch_size": BATCH_SIZE}


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
