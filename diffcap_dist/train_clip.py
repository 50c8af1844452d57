"""`diffcap train-clip SHARDS --out DIR`: a small CLIP of one's own, trained on the shards' train split.

In: a finished dataset with photos. Out: a folder to set as ``encoder.name``, and that open_clip loads as
``local-dir:DIR``. It stands in for ViT-B/32 where no weights can be fetched, and is no match for it on real photos.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffcap_dist.data.shard_format import ShardIndex

if TYPE_CHECKING:
    from diffcap_dist.training.contrastive import CaptionedPhotos

DEFAULT_STEPS = 500
RECORD_FILE = "training.json"  # what it was trained on, and how well it retrieves


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="diffcap train-clip", description=__doc__)
    parser.add_argument("shards", type=Path, help="a folder that make-shards wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help=f"optimizer steps (default: {DEFAULT_STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order (default: 0)")
    args = parser.parse_args(argv)
    wanted = _origin(args.shards, args.steps, args.seed)
    if args.out.exists():
        print(_finished(args.out, wanted))
        return 0
    print(_train(args.shards, args.out, wanted))
    return 0


def _origin(shards: Path, num_steps: int, seed: int) -> dict[str, Any]:
    """All that decides the weights."""
    train = ShardIndex.load(shards).split("train")
    return {"steps": num_steps, "seed": seed, "shards": {shard.name: shard.sha256 for shard in train}}


def _finished(out: Path, wanted: dict[str, Any]) -> str:
    """What an earlier run of the same command did; ValueError when ``out`` holds anything else."""
    record = out / RECORD_FILE
    if not record.is_file():
        raise ValueError(f"{out} exists and is no model of train-clip (no {RECORD_FILE}): give another --out")
    found = json.loads(record.read_text())
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        raise ValueError(
            f"{out} holds a model trained with other {', '.join(differing)}: delete it or give another --out"
        )
    return f"{out} is finished, nothing to do: {_result(found)}"


def _train(shards: Path, out: Path, wanted: dict[str, Any]) -> str:
    from tqdm import tqdm

    from diffcap_dist.training.contrastive import ContrastiveTraining, export_clip, retrieval_recall

    started = time.perf_counter()
    training = ContrastiveTraining(_read_photos(shards, "train"), wanted["steps"], wanted["seed"])
    print(training.described())
    with tqdm(training.steps(), total=training.num_steps, desc="clip", unit="step", disable=None) as progress:
        for losses in progress:
            progress.set_postfix({name: f"{value:.2f}" for name, value in losses.items()}, refresh=False)
    record = {**wanted, "val_photos": 0, "val_recall_at_1": None}
    if "val" in ShardIndex.load(shards).splits():
        val = _read_photos(shards, "val")
        record |= {"val_photos": len(val.captions), "val_recall_at_1": round(retrieval_recall(training, val), 4)}
    record["seconds"] = round(time.perf_counter() - started, 1)
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of an interrupted run
    export_clip(training, aside)
    (aside / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(out)
    return f"{out}: {_result(record)} in {record['seconds']:.0f} s"


def _read_photos(shards: Path, split: str) -> CaptionedPhotos:
    import torch

    from diffcap_dist.data.stream import ShardReader
    from diffcap_dist.training.contrastive import CaptionedPhotos, pixel_transform

    reader = ShardReader(shards, split, transform=pixel_transform())
    photos = [reader.photo(shard, sample) for shard, count in enumerate(reader.counts) for sample in range(count)]
    pixels = [photo.image_CHW for photo in photos if photo.image_CHW is not None]
    return CaptionedPhotos(torch.stack(pixels), [photo.record["captions"] for photo in photos])


def _result(record: dict[str, Any]) -> str:
    recall, photos = record["val_recall_at_1"], record["val_photos"]
    measured = "no val split to measure on" if recall is None else f"R@1 {recall:.3f} among {photos} val photos"
    return f"{record['steps']} steps, {measured}"


if __name__ == "__main__":
    sys.exit(main())
