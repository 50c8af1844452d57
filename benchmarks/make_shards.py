"""Writing shards: MB/s of photos, beside `tar cf` on the same files and webdataset's ShardWriter.

In: how many photos, and their size. Out: on the screen and as JSON (``--out``) medians over rounds in which all take
turns, their ratios, and what the machine was doing. The photos are made here, lie in the page cache, and each is read
from a file of its own by everybody.

`tar cf` writes the photos alone, no records and no checksums; "tar, synced" also waits for the disk, as ours does.
ShardWriter gets the same photos and the same records; it neither checks nor hashes. Ours checks each photo, hashes it
(sha256) and its tar (sha256), takes crc32 of each member, writes the index, and syncs. Worker processes are started
within the time of each run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from diffcap_dist.data.order import SampleOrder
from diffcap_dist.data.shard_format import ShardIndex, ShardInfo, atomic_write
from shards.output import Folder
from shards.writer import RawSample, ShardSettings, Source, write_dataset

SAMPLES_PER_SHARD = 500
RESIZED = ShardSettings(samples_per_shard=SAMPLES_PER_SHARD, resize=256, quality=90)
AS_IS = ShardSettings(samples_per_shard=SAMPLES_PER_SHARD)
CAPTIONS = [
    f"a caption of ordinary length, the {word} of the five" for word in ("first", "second", "third", "4th", "5th")
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--dir", type=Path, help="a folder on the disk to be measured (default: the system's for scratch)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as scratch:
        result = measure(Path(scratch), arguments.photos, tuple(arguments.size), arguments.rounds)
    print(as_text(result))
    if arguments.out:
        atomic_write(arguments.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


def measure(scratch: Path, num_photos: int, size: tuple[int, int], rounds: int) -> dict:
    photos = make_photos(scratch / "photos", num_photos, size)
    megabytes = sum(path.stat().st_size for path in photos) / 1e6
    ways: dict[str, Callable[[Path], object]] = {
        "tar cf": lambda out: run_tar(photos, out),
        "tar cf, synced": lambda out: run_tar(photos, out, synced=True),
        "ShardWriter": lambda out: run_shard_writer(photos, out),
        "ours, 1 worker": lambda out: run_ours(photos, out, AS_IS, 1),
        "ours, 2 workers": lambda out: run_ours(photos, out, AS_IS, 2),
        "ours, resized, 1 worker": lambda out: run_ours(photos, out, RESIZED, 1),
        "ours, resized, 2 workers": lambda out: run_ours(photos, out, RESIZED, 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    load_before = os.getloadavg()[0]
    for _ in range(rounds):
        for name, run in ways.items():
            out = scratch / "out"
            start = time.perf_counter()
            run(out)
            seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(out)
    speed = {name: megabytes / statistics.median(times) for name, times in seconds.items()}
    return {
        "photos": num_photos,
        "megabytes": megabytes,
        "rounds": rounds,
        "mb_per_second": speed,
        "range": {name: [megabytes / max(times), megabytes / min(times)] for name, times in seconds.items()},
        "ratios": {
            "ours / tar cf": speed["ours, 1 worker"] / speed["tar cf"],
            "ours / tar cf, synced": speed["ours, 1 worker"] / speed["tar cf, synced"],
            "ours / ShardWriter": speed["ours, 1 worker"] / speed["ShardWriter"],
            "ours, 2 workers / 1 worker": speed["ours, 2 workers"] / speed["ours, 1 worker"],
            "resized, 2 workers / 1 worker": speed["ours, resized, 2 workers"] / speed["ours, resized, 1 worker"],
        },
        "seconds_to_open": {shards: seconds_to_open(scratch, shards) for shards in (1_000, 100_000)},
        "load_average": [load_before, os.getloadavg()[0]],
        "machine": {
            "cpus": len(os.sched_getaffinity(0)),
            "processor": platform.machine(),
            "python": sys.version.split()[0],
        },
        "versions": {name: version(name) for name in ("webdataset", "pillow", "numpy")},
    }


def seconds_to_open(scratch: Path, num_shards: int) -> float:
    """From nothing to an order of samples that can be asked: the index of so many shards of 10,000 samples."""
    infos = [ShardInfo(f"train-{number:06d}", "train", 10_000, 1, "0" * 64) for number in range(num_shards)]
    ShardIndex(infos, {}, {}).save(scratch)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        counts = [info.samples for info in ShardIndex.load(scratch).split("train")]
        SampleOrder(counts, seed=0).sample_at(9 * sum(counts) // 10)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def make_photos(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Files of a photo's size and grain; a comment makes each its own."""
    folder.mkdir()
    chance = np.random.RandomState(0)
    width, height = size
    pictures = []
    for _ in range(min(20, count)):
        coarse = Image.fromarray(chance.randint(0, 256, (12, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grain = chance.normal(0, 12, (height, width, 1))
        pictures.append(Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)))
    paths = []
    for number in range(count):
        buffer = io.BytesIO()
        pictures[number % len(pictures)].save(buffer, "JPEG", quality=90, comment=str(number).encode())
        paths.append(folder / f"{number:08d}.jpg")
        paths[-1].write_bytes(buffer.getvalue())
    return paths


def run_tar(photos: list[Path], out: Path, synced: bool = False) -> None:
    out.mkdir()
    names = "".join(f"{path.name}\n" for path in photos)
    command = ["tar", "cf", str(out / "photos.tar"), "-C", str(photos[0].parent), "-T", "-"]
    subprocess.run(command, input=names, text=True, check=True)
    if synced:
        subprocess.run(["sync", str(out / "photos.tar")], check=True)


def run_shard_writer(photos: list[Path], out: Path) -> None:
    import webdataset  # and torch: not in our worker processes, which import this file again

    out.mkdir()
    with webdataset.ShardWriter(str(out / "%06d.tar"), maxcount=SAMPLES_PER_SHARD, verbose=0) as writer:
        for path in photos:
            record = {"photo_id": path.stem, "captions": CAPTIONS, "split": "train", "source": "benchmark"}
            record |= {"width": 500, "height": 375, "sha256": "0" * 64}
            writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "json": record})


def run_ours(photos: list[Path], out: Path, settings: ShardSettings, workers: int) -> None:
    samples = [RawSample(path.stem, CAPTIONS, "train", "benchmark", path.read_bytes) for path in photos]
    written = write_dataset(Source(samples, [], {}, []), Folder(out), settings, workers=workers)
    assert written.index is not None and written.index.num_samples("train") == len(photos), "a photo was lost"


def as_text(result: dict) -> str:
    what = f"{result['photos']} photos, {result['megabytes']:.0f} MB"
    lines = [f"{what}; MB of photos a second, medians of {result['rounds']} rounds"]
    for name, speed in result["mb_per_second"].items():
        low, high = result["range"][name]
        lines.append(f"  {name:26} {speed:8.0f}   ({low:.0f} to {high:.0f})")
    lines += [f"  {name:32} {ratio:.2f}" for name, ratio in result["ratios"].items()]
    lines += [f"  opening {shards:,} shards: {seconds:.3f} s" for shards, seconds in result["seconds_to_open"].items()]
    before, after = result["load_average"]
    lines.append(f"load average {before:.1f} before, {after:.1f} after; {result['machine']['cpus']} CPUs")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
