"""The stream: position -> sample -> batch, from shards wherever they lie.

In: datasets (folders or URLs), a split, an order, a tokenizer and how a photo is to be read (its features, or its
pixels through the encoder's transform). Out: endless training batches from any position on, or an exact partition for
evaluation. State is one integer, ``samples_seen``; ranks and workers change neither the order nor the content.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import math
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffcap_dist.config import DataConfig
from diffcap_dist.data.augmentation import augmented, crop_at
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.order import MixedOrder, Place, SampleOrder, draw, evaluation_positions, rank_positions
from diffcap_dist.data.pixels import Crop
from diffcap_dist.data.shard_format import FeatureInfo, Shard, ShardDamage
from diffcap_dist.data.shard_store import ShardStore
from diffcap_dist.training.preemption import reset_in_worker

Transform = Callable[..., Tensor]  # a photo's bytes, and the crop of it where there is one -> its pixels

SAMPLES_AHEAD = 4096  # of a rank: how far ahead remote shards are fetched
# Of a reader, below the usual limit of 1,024 files. C spans in windows of w samples are in C (w / m + 2) shards of m
# samples at once: 400 at the defaults with shards of 1,000. Opening one costs as much as reading ten samples.
MAX_OPEN_SHARDS = 768


class Damage(NamedTuple):
    """What could not be read in training, where another sample stood in for it."""

    position: int
    key: str  # SHARD/KEY, or SHARD where no one sample is to blame
    samples: int  # that it costs: 1, or all of the shard
    found: str


class Batch(NamedTuple):
    """N photos. Either ``images_NCHW`` or ``pooled_NF`` (with ``patches_NPF`` or None) is there."""

    positions: list[int]
    keys: list[str]
    captions: list[list[str]]  # C of each photo
    references: list[list[str]]  # all captions of each photo in this split, whatever is trained on
    ids_NCL: Tensor
    images_NCHW: Tensor | None
    pooled_NF: Tensor | None
    patches_NPF: Tensor | None
    damages: list[Damage]


class Photo(NamedTuple):
    """One sample as read: its record, and its pixels or features."""

    key: str
    record: dict[str, Any]
    image_CHW: Tensor | None
    pooled_F: Tensor | None
    patches_PF: Tensor | None


class Sample(NamedTuple):
    """A photo on its way into a batch."""

    position: int
    photo: Photo
    captions: list[str]  # C
    damages: list[Damage]


class StalledWorker(RuntimeError):
    """A loader worker gave no batch in time; where it stood is on stderr."""


class ShardReader:
    """Random access to the photos of a split, of one dataset or of several behind each other. Shards are opened when
    first touched (and so once per worker)."""

    def __init__(
        self,
        where: str | Path | Sequence[str | Path],
        split: str,
        features: str = "",
        patches: bool = False,
        transform: Transform | None = None,
        cache: str = "",
        cache_gb: float = 0.0,
    ) -> None:
        places = [where] if isinstance(where, (str, Path)) else list(where)
        limits = (Path(cache) if cache else None, int(cache_gb * 1e9) or None)
        self.stores = [ShardStore(place, *limits) for place in places]
        self.datasets = [store.index.split(split) for store in self.stores]
        self.shards = [shard for shards in self.datasets for shard in shards]
        self.counts = [shard.samples for shard in self.shards]
        self.bytes = sum(shard.bytes for shard in self.shards)
        self.patches, self.transform = patches, transform
        self.dataset_of = [number for number, shards in enumerate(self.datasets) for _ in shards]
        infos = [store.index.feature(features) if features else None for store in self.stores]
        self.feature_info: FeatureInfo | None = infos[0]
        self._check_features(places, features, infos)
        # Patch tokens that nobody looks at are not fetched.
        self._feature_infos = [
            info and (info if patches else dataclasses.replace(info, patches=None)) for info in infos
        ]
        self._open: dict[int, tuple[Shard, np.ndarray | None, np.ndarray | None]] = {}  # least lately used first

    def record(self, shard: int, sample: int) -> tuple[str, dict[str, Any]]:
        """Key and JSON record, checked against their checksum."""
        opened, _, _ = self._shard(shard)
        return opened.key(sample), opened.record(sample)

    def photo(self, shard: int, sample: int, crop: Crop | None = None) -> Photo:
        """The whole sample. ShardDamage names shard, offset and key; a copy in the cache is fetched anew first."""
        try:
            return self._photo(shard, sample, crop)
        except ShardDamage:
            number = self.dataset_of[shard]
            if not self.stores[number].forget(self.shards[shard], self._feature_infos[number]):
                raise
            if shard in self._open:
                self._open.pop(shard)[0].close()
            return self._photo(shard, sample, crop)

    def _photo(self, shard: int, sample: int, crop: Crop | None) -> Photo:
        opened, pooled_NF, patches_NPF = self._shard(shard)
        key, record = opened.key(sample), opened.record(sample)
        if pooled_NF is None:
            return Photo(key, record, self._image(opened, sample, crop), None, None)
        patches_PF = None
        if patches_NPF is not None:
            patches_PF = torch.from_numpy(patches_NPF[sample].astype(np.float32))
        return Photo(key, record, None, torch.from_numpy(pooled_NF[sample].astype(np.float32)), patches_PF)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Let remote shards come, the first ones first, while others are read."""
        for number, store in enumerate(self.stores):
            own = [self.shards[shard] for shard in shards if self.dataset_of[shard] == number]
            if own and store.is_remote:
                store.prefetch(own, self._feature_infos[number])

    @property
    def is_remote(self) -> bool:
        return any(store.is_remote for store in self.stores)

    def _check_features(self, places: Sequence[str | Path], features: str, infos: Sequence[FeatureInfo | None]) -> None:
        if self.feature_info is None:
            if self.transform is None:
                raise ValueError("neither features nor an image transform: nothing to see of the photos")
            return
        for place, info in zip(places, infos):
            assert info is not None
            if self.patches and info.patches is None:
                raise ValueError(
                    f"features {features!r} of {place} have no patch tokens: write them with "
                    f"make-shards features {place} --patches, or set encoder.patches=false"
                )
            first = self.feature_info
            if (info.pooled_dim, info.weights_sha256) != (first.pooled_dim, first.weights_sha256):
                raise ValueError(
                    f"features {features!r} of {place} are of another encoder than those of {places[0]} "
                    f"(width {info.pooled_dim} and {first.pooled_dim}): write them with one encoder"
                )

    def _shard(self, shard: int) -> tuple[Shard, np.ndarray | None, np.ndarray | None]:
        """The open shard and, of its features, what the run uses."""
        if shard in self._open:
            self._open[shard] = found = self._open.pop(shard)
            return found
        if len(self._open) >= MAX_OPEN_SHARDS:
            self._open.pop(next(iter(self._open)))[0].close()
        number = self.dataset_of[shard]
        info = self._feature_infos[number]
        opened = self.stores[number].open(self.shards[shard], info)
        pooled_NF, patches_NPF = (None, None) if info is None else opened.features(info)
        self._open[shard] = opened, pooled_NF, patches_NPF
        return self._open[shard]

    def _image(self, opened: Shard, sample: int, crop: Crop | None) -> Tensor:
        assert self.transform is not None
        data = opened.image_bytes(sample)
        if data is None:
            raise ValueError(
                f"{opened.path}: {opened.key(sample)} has no image (shards of captions only): "
                "set data.features to features beside the shards"
            )
        try:
            return self.transform(data, crop) if crop else self.transform(data)
        except Exception as error:  # decoders raise OSError, RuntimeError, SyntaxError, struct.error, zlib.error, ...
            raise ShardDamage(opened.path, opened.key(sample), f"its photo can't be decoded ({error})") from error


def candidates(counts: Sequence[int], place: Place) -> Iterator[tuple[int, int]]:
    """(shard, sample): the place itself, then what may stand in for it, the next one first. A function of the place
    alone, so that ranks and workers change nothing."""
    for step in range(len(counts)):
        shard = (place.shard + step) % len(counts)
        first = place.sample if step == 0 else 0
        for number in range(counts[shard]):
            yield shard, (first + number) % counts[shard]


class _Positions(Dataset):
    """position -> sample: the map-style view that loader workers share."""

    def __init__(
        self, reader: ShardReader, order: MixedOrder, tokenizer: CaptionTokenizer, config: DataConfig, seed: int
    ) -> None:
        self.reader, self.order, self.tokenizer = reader, order, tokenizer
        self.config, self.seed = config, seed
        self.other_captions = read_captions(Path(config.captions)) if config.captions else None

    def __getitem__(self, position: int) -> Sample:
        place = self.order.sample_at(position)
        photo, damages = self._readable(position, place)
        captions = chosen_captions(self._captions_of(photo), self.config.captions_per_image, self.seed, place)
        if photo.image_CHW is not None:
            image_CHW, captions = augmented(photo.image_CHW, captions, position, self.config, self.seed)
            photo = photo._replace(image_CHW=image_CHW)
        return Sample(position, photo, captions, damages)

    def collate(self, samples: list[Sample]) -> Batch:
        """One batch from single samples. Captions become numbers here: one by one they take twice as long."""
        positions, photos, captions, damages = zip(*samples)
        texts = [caption for some in captions for caption in some]
        ids_BL, _ = self.tokenizer.encode(texts, self.config.max_length)
        return Batch(
            list(positions),
            [photo.key for photo in photos],
            list(captions),
            [photo.record["captions"] for photo in photos],
            torch.from_numpy(ids_BL).unflatten(0, (len(samples), -1)),
            _stack([photo.image_CHW for photo in photos]),
            _stack([photo.pooled_F for photo in photos]),
            _stack([photo.patches_PF for photo in photos]),
            [damage for some in damages for damage in some],
        )

    def _captions_of(self, photo: Photo) -> list[str]:
        if self.other_captions is None:
            return photo.record["captions"]
        if photo.key not in self.other_captions:
            raise ValueError(f"data.captions={self.config.captions} has no captions for {photo.key}: make it anew")
        return self.other_captions[photo.key]

    def _readable(self, position: int, place: Place) -> tuple[Photo, list[Damage]]:
        damages: list[Damage] = []
        unreadable: set[int] = set()
        crop = crop_at(position, self.config, self.seed)
        for shard, sample in candidates(self.reader.counts, place):
            if shard in unreadable:
                continue
            try:
                return self.reader.photo(shard, sample, crop), damages
            except ShardDamage as damage:
                if self.config.damage == "raise":
                    raise
                name = self.reader.shards[shard].name
                if damage.key is None:
                    unreadable.add(shard)
                    damages.append(Damage(position, name, self.reader.counts[shard], damage.found))
                else:
                    damages.append(Damage(position, f"{name}/{damage.key}", 1, damage.found))
        raise ValueError(f"no sample at all can be read; the first: {damages[0].key}: {damages[0].found}")


class CaptionStream:
    """Endless batches of one rank: its share of each global batch, in parts of ``micro_batch_size`` (all of it by
    default). ``samples_seen`` counts over all ranks; set it (``load_state_dict``) to continue."""

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: CaptionTokenizer,
        config: DataConfig,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
    ) -> None:
        orders = [
            SampleOrder([shard.samples for shard in shards], seed, config.canonical_spans, config.shuffle_window)
            for shards in reader.datasets
        ]
        self.order = MixedOrder(orders, [one.repeat for one in config.train] or [1.0] * len(orders))
        self.dataset = _Positions(reader, self.order, tokenizer, config, seed)
        self.config, self.rank, self.world_size = config, rank, world_size
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size or global_batch_size // world_size
        self.samples_seen = 0

    def __iter__(self) -> Iterator[Batch]:
        """Batches from ``samples_seen`` on. The reader of batches advances the counter: what a worker has fetched ahead
        is not yet seen."""
        workers, reader = self.config.num_workers, self.dataset.reader
        positions = rank_positions(self.order, self.samples_seen, self.rank, self.world_size, self.global_batch_size)
        # A remote shard may take as long as its store allows; it gives up by itself.
        timeout = max(store.deadline_seconds for store in reader.stores) + 10 if reader.is_remote else 0.0
        batches = _batched(positions, self.micro_batch_size)
        loader = DataLoader(
            self.dataset,
            batch_sampler=self._announced(batches) if reader.is_remote else batches,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=self.dataset.collate,
            worker_init_fn=_begin_worker,
            timeout=max(timeout, self.config.worker_timeout) if workers else 0,
            pin_memory=torch.cuda.is_available(),
        )
        return _watched(iter(loader)) if workers else iter(loader)

    def _announced(self, batches: Iterator[list[int]]) -> Iterator[list[int]]:
        """The same batches; the shards of those to come are fetched to this node meanwhile, in the order of need."""
        coming = deque(islice(batches, max(1, SAMPLES_AHEAD // self.micro_batch_size)))
        uses: Counter[int] = Counter()  # of the shards in `coming`, in the order in which they are met first
        for batch in coming:
            uses.update(self._shards_of(batch))
        self.dataset.reader.prefetch(list(uses))
        while True:
            batch = coming.popleft()
            coming.append(next(batches))
            uses.subtract(self._shards_of(batch))
            known = len(uses)
            uses.update(self._shards_of(coming[-1]))
            if len(uses) > known:
                uses = Counter({shard: count for shard, count in uses.items() if count > 0})
                self.dataset.reader.prefetch(list(uses))
            yield batch

    def _shards_of(self, positions: list[int]) -> list[int]:
        return [self.order.sample_at(position).shard for position in positions]

    def state_dict(self) -> dict[str, int]:
        return {"samples_seen": self.samples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.samples_seen = state["samples_seen"]


def _begin_worker(worker_id: int) -> None:
    reset_in_worker(worker_id)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)  # stderr


def _watched(batches: Any) -> Iterator[Batch]:
    """The loader's batches; of a worker that stalls, the place where it stands is shown before the error."""
    while True:
        try:
            yield next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            for worker in batches._workers:
                if worker.is_alive():
                    os.kill(worker.pid, signal.SIGUSR1)
            raise StalledWorker(
                f"a loader worker gave no batch in time ({error}); where each of them stands is above. Is the file "
                "system or the network stuck? A slow one may need a larger data.worker_timeout"
            ) from error


def evaluation_photos(
    reader: ShardReader, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Iterator[Photo]:
    """This rank's photos of the split, in shard order; over all ranks each photo exactly once."""
    ends = np.cumsum(reader.counts)
    total = int(ends[-1]) if limit is None else min(limit, int(ends[-1]))
    for position in evaluation_positions(total, rank, world_size):
        shard = int(np.searchsorted(ends, position, side="right"))
        yield reader.photo(shard, position - int(ends[shard] - reader.counts[shard]))


def all_records(
    reader: ShardReader, damages: list[ShardDamage] | None = None, every: int = 1
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and record of every sample (of one shard in ``every``), in shard order. Damage is raised, or noted in
    ``damages`` where that is given."""
    for shard in range(0, len(reader.counts), every):
        for sample in range(reader.counts[shard]):
            try:
                yield reader.record(shard, sample)
            except ShardDamage as damage:
                if damages is None:
                    raise
                damages.append(damage)


def read_captions(path: Path) -> dict[str, list[str]]:
    """Captions by key, of JSON lines {"key": ..., "captions": [...]}. ValueError names a line that is none."""
    if not path.is_file():
        raise ValueError(f"data.captions: no such file: {path}")
    found: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            key, captions = entry["key"], entry["captions"]
            wrong = not captions or not all(isinstance(caption, str) for caption in captions)
        except (ValueError, KeyError, TypeError):
            wrong = True
        if wrong:
            raise ValueError(f'{path}, line {number}: expected {{"key": ..., "captions": [...]}}, got {line[:80]!r}')
        found[key] = captions
    return found


def chosen_captions(captions: Sequence[str], count: int, seed: int, place: Place) -> list[str]:
    """``count`` captions of a photo at one visit, all different while there are enough.

    Visits go round the captions, from a start and in strides that are the photo's own: n visits that take one of n
    captions see each once, so that n epochs of photos are one epoch of captions.
    """
    n = len(captions)
    drawn, first = divmod(draw(seed, "caption", place.shard, place.sample), n)
    stride = _strides_around(n)[drawn % len(_strides_around(n))]
    return [captions[(first + stride * (place.epoch * count + i)) % n] for i in range(count)]


@lru_cache
def _strides_around(n: int) -> list[int]:
    """Strides that come by each of n places."""
    return [stride for stride in range(1, n + 1) if math.gcd(stride, n) == 1]


def _stack(tensors: list[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.stack(tensors)  # type: ignore[arg-type]


def _batched(positions: Iterator[int], size: int) -> Iterator[list[int]]:
    while True:
        yield [next(positions) for _ in range(size)]
