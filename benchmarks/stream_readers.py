"""One reader of the benchmark in a process of its own: what it gives, and how soon, as one line of JSON.

In: the name of a reader, a folder in its format (`stream_formats.py`), whether photos are decoded, how many workers.
Out: seconds from opening the folder to the first batch, samples/s with that and behind a warm-up, what came. Imports
come before the clock starts. Runs in the environment of the reader's library, so only the functions of ours import this
project.

All give batches of (keys, photos, records). Undecoded, a photo is its file's bytes and a record parsed JSON. Decoded, a
photo is a float tensor 3 x 224 x 224: for the peers by the transform that open_clip gives everybody, for us by
`data/pixels.py`, whose uint8 becomes floats here as the encoder makes it on its device. Ours also tokenizes one caption
of each photo then, since its stream does so.
Ours checks every byte against its crc32; no peer does by default. All shuffle, each with its own ordinary settings.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from benchmarks.stream_formats import CAPTIONS, tar_samples

IMAGE_SIZE = 224
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHUFFLE_BUFFER = 1000  # samples, of webdataset and the tarfile loop
WARM_UP = 8  # batches, before steady samples/s are counted: they fill the workers' queues
SEED = 0

Sample = tuple[str, Any, Any]  # key, photo, record
Batch = tuple[list[str], Any, Any]

open_clip_transform = Compose(
    [
        Resize(IMAGE_SIZE, interpolation=InterpolationMode.BICUBIC),
        CenterCrop(IMAGE_SIZE),
        lambda image: image.convert("RGB"),
        ToTensor(),
        Normalize(CLIP_MEAN, CLIP_STD),
    ]
)


@dataclass(frozen=True)
class Setup:
    """What is asked of a reader. ``skip``: samples of the epoch that a resumed run has seen."""

    folder: Path
    decode: bool = False
    workers: int = 0
    batch_size: int = 64
    skip: int = 0
    state: Path | None = None  # of the loader after ``skip`` samples, where it has one


def as_sample(key: str, jpg: bytes, record: Any, decode: bool) -> Sample:
    """A peer's sample. LitData gives views of its mapped file, which don't pickle: bytes here, as the others give."""
    parsed = record if isinstance(record, dict) else json.loads(bytes(record))
    return key, open_clip_transform(Image.open(io.BytesIO(jpg))) if decode else bytes(jpg), parsed


def collate(samples: list[Sample]) -> Batch:
    keys, photos, records = zip(*samples)
    return list(keys), torch.stack(photos) if isinstance(photos[0], Tensor) else list(photos), list(records)


def collate_dicts(samples: list[dict[str, Any]], decode: bool) -> Batch:
    return collate([as_sample(sample["key"], sample["jpg"], sample["json"], decode) for sample in samples])


# ---- the readers: each opens the folder and gives the batches of an epoch, ours without end ----


def open_ours(setup: Setup, exact: bool = False) -> Iterable[Batch]:
    return our_decoded(setup, exact) if setup.decode else our_undecoded(setup)


def our_undecoded(setup: Setup) -> Iterator[Batch]:
    """Bytes and records through the reader of the stream, in its order."""
    from diffcap_dist.data.order import SampleOrder
    from diffcap_dist.data.stream import ShardReader

    reader = ShardReader(setup.folder, "train", transform=lambda data: data)
    order = SampleOrder(reader.counts, SEED)
    for start in itertools.count(setup.skip, setup.batch_size):
        places = [order.sample_at(position) for position in range(start, start + setup.batch_size)]
        photos = [reader.photo(place.shard, place.sample) for place in places]
        yield [photo.key for photo in photos], [photo.image_CHW for photo in photos], [photo.record for photo in photos]


def our_decoded(setup: Setup, exact: bool) -> Iterator[Batch]:
    """The stream that `diffcap train` reads, its pixels made floats as the encoder makes them."""
    from diffcap_dist.config import DataConfig
    from diffcap_dist.data.captions import CaptionTokenizer
    from diffcap_dist.data.pixels import PixelTransform
    from diffcap_dist.data.stream import CaptionStream, ShardReader

    transform = PixelTransform([Resize(IMAGE_SIZE, InterpolationMode.BICUBIC), CenterCrop(IMAGE_SIZE)], exact)
    reader = ShardReader(setup.folder, "train", transform=transform)
    tokenizer = CaptionTokenizer.from_captions(CAPTIONS)
    stream = CaptionStream(reader, tokenizer, DataConfig(num_workers=setup.workers), SEED, setup.batch_size)
    stream.load_state_dict({"samples_seen": setup.skip})
    mean_C11, std_C11 = torch.tensor(CLIP_MEAN).view(-1, 1, 1), torch.tensor(CLIP_STD).view(-1, 1, 1)
    for batch in stream:
        yield batch.keys, batch.images_NCHW.float().div_(255).sub_(mean_C11).div_(std_C11), batch.ids_NCL


def open_webdataset(setup: Setup) -> Iterable[Batch]:
    import webdataset

    def read(sample: dict[str, Any]) -> Sample:
        return as_sample(sample["__key__"], sample["jpg"], sample["json"], setup.decode)

    tars = [str(tar) for tar in sorted(setup.folder.glob("*.tar"))]
    shuffled = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=SEED).shuffle(SHUFFLE_BUFFER, seed=SEED)
    batches = shuffled.map(read).batched(setup.batch_size, collation_fn=collate)
    if setup.workers:
        batches = webdataset.WebLoader(batches, batch_size=None, num_workers=setup.workers)
    return _discarded(batches, setup)


class TarLoop(IterableDataset):
    """What one writes without a library: shuffled shards, dealt to workers, and a buffer to shuffle samples in."""

    def __init__(self, folder: Path, decode: bool) -> None:
        self.tars, self.decode = sorted(folder.glob("*.tar")), decode

    def __iter__(self) -> Iterator[Sample]:
        worker, chance = get_worker_info(), random.Random(SEED)
        tars = chance.sample(self.tars, len(self.tars))
        if worker:
            tars = tars[worker.id :: worker.num_workers]
        buffer: list[dict[str, Any]] = []
        for sample in itertools.chain.from_iterable(map(tar_samples, tars)):
            if len(buffer) < SHUFFLE_BUFFER:
                buffer.append(sample)
                continue
            number = chance.randrange(SHUFFLE_BUFFER)
            chosen, buffer[number] = buffer[number], sample
            yield as_sample(chosen["key"], chosen["jpg"], chosen["json"], self.decode)
        chance.shuffle(buffer)
        for sample in buffer:
            yield as_sample(sample["key"], sample["jpg"], sample["json"], self.decode)


def open_tarfile(setup: Setup) -> Iterable[Batch]:
    samples = TarLoop(setup.folder, setup.decode)
    loader = DataLoader(samples, setup.batch_size, num_workers=setup.workers, collate_fn=collate)
    return _discarded(loader, setup)


def _discarded(batches: Iterable[Batch], setup: Setup) -> Iterable[Batch]:
    """The only way to resume a reader without a state."""
    return itertools.islice(batches, setup.skip // setup.batch_size, None)


def open_mosaicml(setup: Setup) -> Any:
    import streaming

    samples = streaming.StreamingDataset(
        local=str(setup.folder), shuffle=True, shuffle_seed=SEED, batch_size=setup.batch_size
    )
    return _resumed(streaming.StreamingDataLoader, samples, setup)


def open_litdata(setup: Setup) -> Any:
    import litdata

    samples = litdata.StreamingDataset(str(setup.folder), shuffle=True, seed=SEED)
    return _resumed(litdata.StreamingDataLoader, samples, setup)


def _resumed(loader_type: Any, samples: Any, setup: Setup) -> Any:
    read = partial(collate_dicts, decode=setup.decode)
    loader = loader_type(samples, batch_size=setup.batch_size, num_workers=setup.workers, collate_fn=read)
    if setup.state:
        loader.load_state_dict(torch.load(setup.state, weights_only=False))
    return loader


READERS: dict[str, Callable[[Setup], Any]] = {
    "ours": open_ours,
    "ours_exact": partial(open_ours, exact=True),
    "webdataset": open_webdataset,
    "tarfile": open_tarfile,
    "mosaicml": open_mosaicml,
    "litdata": open_litdata,
}
IMPORTS = {
    "ours": "diffcap_dist.data.stream",
    "ours_exact": "diffcap_dist.data.stream",
    "webdataset": "webdataset",
    "tarfile": "tarfile",
    "mosaicml": "streaming",
    "litdata": "litdata",
}


# ---- measuring ----


def measure(reader: str, setup: Setup, num_samples: int) -> dict[str, Any]:
    """Read ``num_samples``. ``steady`` is None where they end within the warm-up."""
    importlib.import_module(IMPORTS[reader])
    keys: list[str] = []
    photo_bytes, warm, warm_samples = 0, 0.0, 0
    started = time.perf_counter()
    batches = iter(READERS[reader](setup))
    for number in itertools.count():
        batch = next(batches, None)
        if batch is None:
            break
        now = time.perf_counter()
        if number == 0:
            first, first_keys = now, batch[0]
        if number + 1 == WARM_UP:
            warm, warm_samples = now, len(keys) + len(batch[0])
        keys += batch[0]
        photo_bytes += 0 if setup.decode else sum(len(photo) for photo in batch[1])
        if len(keys) >= num_samples:
            break
    ended = time.perf_counter()
    return {
        "first_batch_seconds": first - started,
        "samples_per_second": len(keys) / (ended - started),  # opening and first batch included
        "steady_samples_per_second": (len(keys) - warm_samples) / (ended - warm)
        if len(keys) > warm_samples > 0
        else None,
        "different_samples": len(set(keys)),
        "photo_bytes": photo_bytes,
        "first_batch": _digest(first_keys),
    }


def save_state(reader: str, setup: Setup, out: Path) -> dict[str, Any]:
    """Read ``skip`` samples of the epoch, save the state where the loader has one, and say which batch comes next."""
    importlib.import_module(IMPORTS[reader])
    loader = READERS[reader](Setup(setup.folder, batch_size=setup.batch_size))
    batches = iter(loader)
    for _ in range(setup.skip // setup.batch_size):
        next(batches)
    if hasattr(loader, "state_dict"):
        torch.save(loader.state_dict(), out)
    return {"next_batch": _digest(next(batches)[0])}


def _digest(keys: list[str]) -> str:
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=sys.maxsize, help="how many to read")
    parser.add_argument("--skip", type=int, default=0, help="resume behind so many samples of the epoch")
    parser.add_argument("--state", type=Path, help="of a loader that has one, to resume from")
    parser.add_argument("--save-state", type=Path, metavar="FILE", help="read --skip samples and write the state")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in a loader's worker
    setup = Setup(args.folder, args.decode, args.workers, args.batch_size, args.skip, args.state)
    if args.save_state:
        result = save_state(args.reader, setup, args.save_state)
    else:
        result = measure(args.reader, setup, args.samples)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
