"""A trained run, opened for use: its captioner and encoder, its shards, and what all ranks caption of a split.

In: a run directory and the ranks. Out: captions and records by key, of this rank's exact part. Scores nothing.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffcap_dist.data.shard_store import ShardStore
from diffcap_dist.data.stream import Photo, ShardReader, evaluation_photos
from diffcap_dist.evaluation.captioner import Captioner, load_captioner
from diffcap_dist.evaluation.validation import photo_features
from diffcap_dist.model.image_encoder import ImageEncoder
from diffcap_dist.run_dir import RunDir
from diffcap_dist.training.distributed import Ranks


def load_run(run_dir: RunDir, settings: Sequence[str], ranks: Ranks) -> tuple[Captioner, ImageEncoder | None]:
    """The run's captioner, with ``settings`` of its sampler changed, and its encoder, where it reads no features."""
    run_dir.load_config()
    captioner = load_captioner(run_dir.export, settings, ranks.device)
    config = captioner.config
    if config.data.features:
        return captioner, None
    return captioner, ImageEncoder(config.encoder.name, config.encoder.pretrained).to(ranks.device)


def default_split(captioner: Captioner) -> str:
    """A dataset that is split by caption rows has no test split."""
    data = captioner.config.data
    return "test" if ShardStore(data.shards).index.num_samples("test") else data.val_split


def open_split(captioner: Captioner, split: str, encoder: ImageEncoder | None) -> ShardReader:
    """A split of the shards that the captioner was trained on, seen as it sees them."""
    return _reader(captioner, [captioner.config.data.shards], split, encoder)


def open_training(captioner: Captioner, encoder: ImageEncoder | None) -> ShardReader:
    """All that is trained on: of a mix, the datasets behind each other, each once."""
    data = captioner.config.data
    places = [one.shards for one in data.train] or [data.shards]
    return _reader(captioner, list(dict.fromkeys(places)), data.train_split, encoder)


def _reader(captioner: Captioner, places: list[str], split: str, encoder: ImageEncoder | None) -> ShardReader:
    config = captioner.config
    data = config.data
    transform = encoder.pixel_transform(exact=data.decode == "exact") if encoder is not None else None
    return ShardReader(places, split, data.features, config.encoder.patches, transform, data.cache, data.cache_gb)


def _batches(photos: Iterator[Photo], size: int) -> Iterator[list[Photo]]:
    while batch := list(islice(photos, size)):
        yield batch


def caption_share(
    captioner: Captioner, reader: ShardReader, encoder: ImageEncoder | None, batch_size: int, ranks: Ranks
) -> tuple[dict[str, str], dict[str, dict]]:
    """This rank's captions and records by key."""
    captions: dict[str, str] = {}
    records: dict[str, dict] = {}
    photos = evaluation_photos(reader, ranks.rank, ranks.world_size)
    share = len(range(ranks.rank, sum(reader.counts), ranks.world_size))
    with tqdm(total=share, disable=ranks.no_progress, unit="photo", desc="captioning", dynamic_ncols=True) as bar:
        for batch in _batches(photos, batch_size):
            keys = [photo.key for photo in batch]
            features = photo_features(batch, encoder, ranks.device, torch.float32)
            captions.update(zip(keys, captioner.caption(features, keys)))
            records.update((photo.key, photo.record) for photo in batch)
            bar.update(len(batch))
    return captions, records


def code_commit(file: Path = Path(__file__)) -> str | None:
    """The commit of the code that measures, which ``file`` is of, with a + where files of it are changed (not docs,
    where tables are written); None where it is no checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(file.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(file))  # else: installed into a folder of somebody's own checkout
        changed = git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)docs")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware(ranks: Ranks) -> dict[str, Any]:
    """What a measured figure was measured on."""
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None
    return {"gpu": gpu, "cpus": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
