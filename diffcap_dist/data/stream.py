"""The stream: position -> sample -> batch, from shards on disk.

In: a shards folder, a split, an order, a tokenizer and how a photo is to be read (its features, or its pixels through
the encoder's transform). Out: endless training batches from any position on, or an exact partition for evaluation.
State is one integer, ``samples_seen``; ranks and workers change neither the order nor the content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffcap_dist.config import DataConfig
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.order import SampleOrder, draw, evaluation_positions, rank_positions
from diffcap_dist.data.photo import decode_photo
from diffcap_dist.data.shard_format import FeatureInfo, Shard, ShardIndex, open_shard
from diffcap_dist.training.preemption import reset_in_worker

Transform = Callable[[Image.Image], Tensor]

WORKER_TIMEOUT = 120  # seconds without a batch before a stalled loader is an error


class Batch(NamedTuple):
    """N photos. Either ``images_NCHW`` or ``pooled_NF`` (with ``patches_NPF`` or None) is there."""

    positions: list[int]
    keys: list[str]
    ids_NCL: Tensor
    images_NCHW: Tensor | None
    pooled_NF: Tensor | None
    patches_NPF: Tensor | None


class Photo(NamedTuple):
    """One sample as read: its record, and its pixels or features."""

    key: str
    record: dict[str, Any]
    image_CHW: Tensor | None
    pooled_F: Tensor | None
    patches_PF: Tensor | None


class ShardReader:
    """Random access to the photos of a split: shards open when first touched (and so once per worker)."""

    def __init__(
        self,
        directory: Path,
        split: str,
        features: str = "",
        patches: bool = False,
        transform: Transform | None = None,
    ) -> None:
        index = ShardIndex.load(directory)
        self.directory = directory
        self.shards = index.split(split)
        self.counts = [shard.samples for shard in self.shards]
        self.bytes = sum(shard.bytes for shard in self.shards)
        self.feature_info: FeatureInfo | None = index.feature(features) if features else None
        self.patches = patches
        self.transform = transform
        if self.feature_info is None and transform is None:
            raise ValueError("neither features nor an image transform: nothing to see of the photos")
        if self.feature_info is not None and patches and self.feature_info.patches is None:
            raise ValueError(
                f"features {features!r} of {directory} have no patch tokens: write them with "
                f"make-shards features {directory} --patches, or set encoder.patches=false"
            )
        self._open: dict[int, Shard] = {}
        self._features: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}

    def record(self, shard: int, sample: int) -> tuple[str, dict[str, Any]]:
        """Key and JSON record, checked against their checksum."""
        opened = self._shard(shard)
        return opened.key(sample), opened.record(sample)

    def photo(self, shard: int, sample: int) -> Photo:
        """The whole sample. Raises ShardDamage naming shard, offset and key."""
        key, record = self.record(shard, sample)
        if self.feature_info is None:
            return Photo(key, record, self._image(shard, sample), None, None)
        pooled_NF, patches_NPF = self._features[shard]
        patches_PF = None
        if self.patches and patches_NPF is not None:
            patches_PF = torch.from_numpy(patches_NPF[sample].astype(np.float32))
        return Photo(key, record, None, torch.from_numpy(pooled_NF[sample].astype(np.float32)), patches_PF)

    def _shard(self, shard: int) -> Shard:
        if shard not in self._open:
            self._open[shard] = open_shard(self.directory, self.shards[shard])
            if self.feature_info is not None:
                self._features[shard] = self._open[shard].features(self.feature_info)
        return self._open[shard]

    def _image(self, shard: int, sample: int) -> Tensor:
        assert self.transform is not None
        data = self._shard(shard).image_bytes(sample)
        if data is None:
            raise ValueError(
                f"{self.directory / self.shards[shard].name}.tar: {self._shard(shard).key(sample)} has no image "
                "(shards of captions only): set data.features to features beside the shards"
            )
        return self.transform(decode_photo(data))


class _Positions(Dataset):
    """position -> (position, photo, caption ids): the map-style view that loader workers share."""

    def __init__(
        self,
        reader: ShardReader,
        order: SampleOrder,
        tokenizer: CaptionTokenizer,
        config: DataConfig,
        seed: int,
    ) -> None:
        self.reader, self.order, self.tokenizer, self.config, self.seed = (
            reader,
            order,
            tokenizer,
            config,
            seed,
        )

    def __getitem__(self, position: int) -> tuple[int, Photo, Tensor]:
        place = self.order.sample_at(position)
        photo = self.reader.photo(place.shard, place.sample)
        captions = chosen_captions(photo.record["captions"], self.config.captions_per_image, self.seed, position)
        ids_CL, _ = self.tokenizer.encode(captions, self.config.max_length)
        return position, photo, torch.from_numpy(ids_CL)


class CaptionStream:
    """Endless batches of one rank. ``samples_seen`` counts over all ranks; set it (``load_state_dict``) to continue."""

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: CaptionTokenizer,
        config: DataConfig,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.order = SampleOrder(reader.counts, seed, config.canonical_spans, config.shuffle_window)
        self.dataset = _Positions(reader, self.order, tokenizer, config, seed)
        self.config, self.batch_size, self.rank, self.world_size = config, batch_size, rank, world_size
        self.samples_seen = 0

    def __iter__(self) -> Iterator[Batch]:
        """Batches of ``batch_size`` photos from ``samples_seen`` on. The reader of batches advances the counter:
        what a worker has fetched ahead is not yet seen."""
        workers = self.config.num_workers
        positions = rank_positions(self.samples_seen, self.rank, self.world_size, self.config.canonical_spans)
        return iter(
            DataLoader(
                self.dataset,
                batch_sampler=_batched(positions, self.batch_size),  # type: ignore[arg-type]
                num_workers=workers,
                collate_fn=collate,
                worker_init_fn=reset_in_worker,
                timeout=WORKER_TIMEOUT if workers else 0,
                pin_memory=torch.cuda.is_available(),
            )
        )

    def state_dict(self) -> dict[str, int]:
        return {"samples_seen": self.samples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.samples_seen = state["samples_seen"]


def evaluation_photos(
    reader: ShardReader, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Iterator[Photo]:
    """This rank's photos of the split, in shard order; over all ranks each photo exactly once."""
    ends = np.cumsum(reader.counts)
    total = int(ends[-1]) if limit is None else min(limit, int(ends[-1]))
    for position in evaluation_positions(total, rank, world_size):
        shard = int(np.searchsorted(ends, position, side="right"))
        yield reader.photo(shard, position - int(ends[shard] - reader.counts[shard]))


def all_records(reader: ShardReader) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and record of every sample, in shard order."""
    for shard, count in enumerate(reader.counts):
        for sample in range(count):
            yield reader.record(shard, sample)


def chosen_captions(captions: Sequence[str], count: int, seed: int, position: int) -> list[str]:
    """``count`` captions of a photo, all different while there are enough; a function of (seed, position)."""
    start = np.random.default_rng(draw(seed, "caption", position)).permutation(len(captions))
    return [captions[int(start[i % len(captions)])] for i in range(count)]


def collate(samples: list[tuple[int, Photo, Tensor]]) -> Batch:
    """One batch from single samples."""
    positions, photos, ids = zip(*samples)
    return Batch(
        list(positions),
        [photo.key for photo in photos],
        torch.stack(ids),
        _stack([photo.image_CHW for photo in photos]),
        _stack([photo.pooled_F for photo in photos]),
        _stack([photo.patches_PF for photo in photos]),
    )


def _stack(tensors: list[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.stack(tensors)  # type: ignore[arg-type]


def _batched(positions: Iterator[int], size: int) -> Iterator[list[int]]:
    while True:
        yield [next(positions) for _ in range(size)]
