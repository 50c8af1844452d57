"""The same samples in the format of each reader that `benchmarks/stream.py` compares.

In: pictures made here, or a folder of photos. Out: a dataset of ours, whose tars are those that webdataset and the
tarfile loop read too (plain USTAR, the fastest kind for them: webdataset's own writer makes PAX tars, which it reads
at half the speed), and its samples once more as MDS and as LitData chunks of as many samples.

As a program, ``python -m benchmarks.stream_formats mosaicml|litdata TARS OUT`` in that library's environment, so only
``write_ours`` imports this project.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

QUALITY = 85  # of the JPEGs: 20 KB at 224x224
NUM_PICTURES = 100  # different ones, where none are given
CAPTIONS = [
    f"a caption of ordinary length, the {word} of the five" for word in ("first", "second", "third", "4th", "5th")
]


def make_photos(folder: Path, size: tuple[int, int], photos: Path | None) -> list[Path]:
    """JPEGs of this size: those of the folder ``photos``, or smooth pictures with a photo's grain."""
    folder.mkdir()
    paths = []
    for number, picture in enumerate(_given(photos, size) if photos else _invented(size)):
        paths.append(folder / f"{number:06d}.jpg")
        paths[-1].write_bytes(picture)
    return paths


def _given(photos: Path, size: tuple[int, int]) -> Iterator[bytes]:
    paths = sorted(path for path in photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise ValueError(f"{photos} holds no .jpg or .jpeg file")
    for path in paths:
        with Image.open(path) as image:
            yield path.read_bytes() if image.size == size else _jpeg(ImageOps.fit(image.convert("RGB"), size))


def _invented(size: tuple[int, int]) -> Iterator[bytes]:
    chance = np.random.RandomState(0)
    width, height = size
    for _ in range(NUM_PICTURES):
        coarse = Image.fromarray(chance.randint(0, 256, (12, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grain = chance.normal(0, 12, (height, width, 1))
        yield _jpeg(Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)))


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write_ours(photos: list[Path], count: int, samples_per_shard: int, out: Path) -> None:
    """``count`` samples that take turns with the photos."""
    from shards.output import Folder
    from shards.writer import RawSample, ShardSettings, Source, write_dataset

    samples = [
        RawSample(f"{number:08d}", CAPTIONS, "train", "benchmark", photos[number % len(photos)].read_bytes)
        for number in range(count)
    ]
    written = write_dataset(Source(samples, [], {}, []), Folder(out), ShardSettings(samples_per_shard))
    assert written.index is not None and written.index.num_samples("train") == count, "a photo was lost"


def tar_samples(tar: str | Path) -> Iterator[dict[str, str | bytes]]:
    """key, jpg and json of each sample, its record still as bytes: a plain loop over the members of a tar."""
    sample: dict[str, str | bytes] = {}
    with tarfile.open(tar) as members:
        for member in members:
            key, suffix = member.name.split(".")
            if sample and key != sample["key"]:
                yield sample
                sample = {}
            sample["key"] = key
            sample[suffix] = members.extractfile(member).read()  # type: ignore[union-attr]
    if sample:
        yield sample


def write_mosaicml(tars: list[Path], out: Path) -> None:
    from streaming import MDSWriter

    columns = {"key": "str", "jpg": "bytes", "json": "json"}
    shard_bytes = max(tar.stat().st_size for tar in tars)
    with MDSWriter(out=str(out), columns=columns, size_limit=shard_bytes, progress_bar=False) as writer:
        for tar in tars:
            for sample in tar_samples(tar):
                writer.write({**sample, "json": json.loads(sample["json"])})


def write_litdata(tars: list[Path], out: Path) -> None:
    import litdata

    # Not the function of __main__: litdata's worker processes must find it.
    from benchmarks.stream_formats import tar_samples

    samples_per_shard = sum(1 for _ in tar_samples(tars[0]))
    litdata.optimize(tar_samples, [str(tar) for tar in tars], str(out), chunk_size=samples_per_shard, num_workers=1)


if __name__ == "__main__":
    write = {"mosaicml": write_mosaicml, "litdata": write_litdata}[sys.argv[1]]
    write(sorted(Path(sys.argv[2]).glob("*.tar")), Path(sys.argv[3]))
