"""From a photo's bytes to an encoder's pixels: how fast, and how far from the encoder's own preprocessing?

PIL with open_clip's steps is the peer, and the measure of accuracy; its draft mode lets libjpeg decode at 1/2, 1/4 or
1/8. All on one thread, interleaved rounds, medians; photos of a folder, resized to sizes that photos have.

    python benchmarks/decode.py --photos FOLDER
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor

from diffcap_dist.data.photo import decode_photo
from diffcap_dist.data.pixels import PixelTransform, parted

SIZES = ((224, 224), (500, 375), (640, 480), (1024, 768))
IMAGE_SIZE = 224

Decode = Callable[[bytes], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of JPEGs")
    parser.add_argument("--count", type=int, default=64, help="photos of each size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    files = sorted(path for path in args.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))[: args.count]
    if not files:
        parser.error(f"no .jpg in {args.photos}")
    torch.set_num_threads(1)
    print(f"{len(files)} photos, {args.rounds} rounds, load average {os.getloadavg()[0]:.1f}; microseconds a photo")
    results = {}
    for size in SIZES:
        photos = [resized(path.read_bytes(), size) for path in files]
        results[f"{size[0]}x{size[1]}"] = rows = measured(photos, ways(), args.rounds)
        print(f"\n{size[0]}x{size[1]}, {sum(map(len, photos)) / len(photos) / 1e3:.0f} kB")
        for name, row in rows.items():
            print(
                f"  {name:<38} {row['microseconds']:>7.0f}   {row['speed-up']:>5.2f}x PIL   "
                f"levels of 255 off: mean {row['mean']:.2f}, at most {row['largest']:.0f}"
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def ways() -> dict[str, Decode]:
    steps, _ = parted(image_transform(IMAGE_SIZE, is_train=False))
    exact, fast = PixelTransform(steps, exact=True), PixelTransform(steps)

    def draft(data: bytes) -> Tensor:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (IMAGE_SIZE, IMAGE_SIZE))
            return exact.of_picture(image)

    return {"PIL (data.decode=exact)": exact, "PIL, draft mode": draft, "torchvision (data.decode=fast)": fast}


def measured(photos: list[bytes], ways: dict[str, Decode], rounds: int) -> dict[str, dict[str, float]]:
    """Median time of a photo, and the distance from the first way's pixels."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, decode in ways.items():
            started = time.perf_counter()
            for data in photos:
                decode(data)
            seconds[name].append((time.perf_counter() - started) / len(photos))
    own = statistics.median(seconds[next(iter(ways))])
    exact = [next(iter(ways.values()))(data).int() for data in photos]
    rows = {}
    for name, decode in ways.items():
        off = torch.stack([(decode(data).int() - pixels).abs() for data, pixels in zip(photos, exact)]).float()
        middle = statistics.median(seconds[name])
        rows[name] = {
            "microseconds": middle * 1e6,
            "speed-up": own / middle,
            "mean": off.mean().item(),
            "largest": off.max().item(),
        }
    return rows


def resized(data: bytes, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    decode_photo(data).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
