"""`diffcap evaluate RUN [key=value ...]`: caption a split of the run's shards and score it, on any number of ranks.

In: a run directory with an exported captioner, and its shards. Out: ``predictions/SPLIT.jsonl``,
``predictions/emergence.json`` and ``scores.json`` with the floor and human rows. The photos are partitioned exactly, so
the scores are the same for any number of ranks: `deepspeed --module diffcap_dist.evaluate RUN` shares the work.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffcap_dist.data.shard_format import atomic_write
from diffcap_dist.data.stream import Photo, ShardReader, all_records, evaluation_photos
from diffcap_dist.evaluation import protocol
from diffcap_dist.evaluation.captioner import Captioner, Draft, about_export, load_captioner
from diffcap_dist.evaluation.scene_facts import scene_scores
from diffcap_dist.evaluation.scores import score_captions
from diffcap_dist.evaluation.validation import photo_features
from diffcap_dist.model.image_encoder import ImageEncoder
from diffcap_dist.run_dir import RunDir
from diffcap_dist.training import distributed
from diffcap_dist.training.distributed import Ranks

log = logging.getLogger("diffcap")

EMERGENCE_PHOTOS = 6
CONSENSUS_NEIGHBOURS = 30


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="diffcap evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. sampler.num_inference_steps=5")
    parser.add_argument("--split", default="test", help="which split of the shards (default: test)")
    parser.add_argument("--batch-size", type=int, default=64, help="photos at a time on one rank")
    parser.add_argument("--retrieval", action="store_true", help="also score retrieval from the training features")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; LOCAL_RANK says it
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    ranks = distributed.init_ranks()
    try:
        scores = evaluate(RunDir(args.run), args.split, args.settings, args.batch_size, args.retrieval, ranks)
    finally:
        distributed.finish()
    if scores is not None:
        print(score_table(scores))
        print(f"scores in {RunDir(args.run).scores}")
    return 0


def evaluate(
    run_dir: RunDir, split: str, settings: Sequence[str], batch_size: int, retrieval: bool, ranks: Ranks
) -> dict[str, Any] | None:
    """Caption and score; the scores on rank 0, None elsewhere. All ranks enter."""
    run_dir.load_config()
    captioner = load_captioner(run_dir.export, settings, ranks.device)
    config = captioner.config
    encoder = None
    if not config.data.features:
        encoder = ImageEncoder(config.encoder.name, config.encoder.pretrained).to(ranks.device)
    reader = _reader(captioner, split, encoder)
    started = time.perf_counter()
    captions, records = _caption_share(captioner, reader, encoder, batch_size, ranks)
    seconds = time.perf_counter() - started
    gathered = distributed.gather_to_first((captions, records, seconds), ranks)
    if gathered is None:
        return None
    # Sorted: sums of floats, and so the scores, must not depend on which rank captioned what.
    captions = dict(sorted(item for part, _, _ in gathered for item in part.items()))
    records = {key: next(part[key] for _, part, _ in gathered if key in part) for key in captions}
    slowest = max(seconds for _, _, seconds in gathered)
    scores = {
        "split": split,
        "photos": len(captions),
        **_caption_scores(captions, records),
        "num_inference_steps": config.sampler.num_inference_steps,
        "guidance_scale": config.sampler.guidance_scale,
        "candidates": config.sampler.candidates,
        "step": about_export(run_dir.export)["step"],
        "world_size": ranks.world_size,
        "seconds": slowest,
        "captions_per_second": len(captions) / slowest,
        "hardware": _hardware(ranks),
        **_reference_rows(records, _validation_records(captioner, encoder)),
    }
    gap = scores["human"]["bleu_4"] - scores["floor"]["bleu_4"]
    scores["gap_closed"] = (scores["bleu_4"] - scores["floor"]["bleu_4"]) / gap
    if retrieval:
        scores["retrieval"] = _retrieval_rows(captioner, reader, records)
    _write(run_dir, split, captions, records, _emergence(captioner, reader, encoder, ranks), scores)
    return scores


def score_table(scores: Mapping[str, Any]) -> str:
    """The scores beside the floor and human rows (and retrieval), as text."""
    names = [n for n in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider_d", "rouge_l") if n in scores]
    names += [n for n in ("scene_accuracy", "scene_all_true", "objects_mentioned") if n in scores]
    rows = {"model": scores, "floor": scores["floor"], "human": scores["human"], **scores.get("retrieval", {})}
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"  {name:>{max(7, len(name))}}" for name in names)]
    for title, row in rows.items():
        cells = [f"{row[n]:.4f}" if n in row else "-" for n in names]
        lines.append(f"{title:<{width}}" + "".join(f"  {c:>{max(7, len(n))}}" for c, n in zip(cells, names)))
    steps = scores["num_inference_steps"]
    lines.append(f"gap between floor and human closed, BLEU-4: {scores['gap_closed']:.2f}, in {steps} denoising steps")
    return "\n".join(lines)


def _reader(captioner: Captioner, split: str, encoder: ImageEncoder | None) -> ShardReader:
    config = captioner.config
    data = config.data
    transform = encoder.pixel_transform(exact=data.decode == "exact") if encoder is not None else None
    return ShardReader(data.shards, split, data.features, config.encoder.patches, transform, data.cache, data.cache_gb)


def _batches(photos: Iterator[Photo], size: int) -> Iterator[list[Photo]]:
    while batch := list(islice(photos, size)):
        yield batch


def _caption_share(
    captioner: Captioner, reader: ShardReader, encoder: ImageEncoder | None, batch_size: int, ranks: Ranks
) -> tuple[dict[str, str], dict[str, dict]]:
    """This rank's captions and records by key."""
    captions: dict[str, str] = {}
    records: dict[str, dict] = {}
    photos = evaluation_photos(reader, ranks.rank, ranks.world_size)
    share = len(range(ranks.rank, sum(reader.counts), ranks.world_size))
    with tqdm(total=share, disable=not ranks.is_first, unit="photo", desc="captioning", dynamic_ncols=True) as bar:
        for batch in _batches(photos, batch_size):
            keys = [photo.key for photo in batch]
            features = photo_features(batch, encoder, ranks.device, torch.float32)
            captions.update(zip(keys, captioner.caption(features, keys)))
            records.update((photo.key, photo.record) for photo in batch)
            bar.update(len(batch))
    return captions, records


def _caption_scores(captions: Mapping[str, str], records: Mapping[str, dict]) -> dict[str, float]:
    scores = score_captions(captions, {key: records[key]["captions"] for key in captions})
    if all("scene" in record for record in records.values()):
        scores |= scene_scores(captions, {key: records[key]["scene"] for key in captions})
    return scores


def _validation_records(captioner: Captioner, encoder: ImageEncoder | None) -> dict[str, dict]:
    return dict(all_records(_reader(captioner, captioner.config.data.val_split, encoder)))


def _reference_rows(records: Mapping[str, dict], validation: Mapping[str, dict]) -> dict[str, dict]:
    """``floor`` (the constant caption that is best on validation) and ``human`` (one reference against the rest)."""
    references = {key: record["captions"] for key, record in records.items()}
    val_references = {key: record["captions"] for key, record in validation.items()}
    caption = protocol.floor_caption(val_references, [c for captions in val_references.values() for c in captions])
    floor: dict[str, Any] = {"caption": caption, **_caption_scores(dict.fromkeys(references, caption), records)}
    human = protocol.human_scores(references)
    if all("scene" in record for record in records.values()):
        turns = {f"{key}#{i}": (text, key) for key, texts in references.items() for i, text in enumerate(texts)}
        scenes = {turn: records[key]["scene"] for turn, (_, key) in turns.items()}
        human |= scene_scores({turn: text for turn, (text, _) in turns.items()}, scenes)
    return {"floor": floor, "human": human}


def _retrieval_rows(captioner: Captioner, reader: ShardReader, records: Mapping[str, dict]) -> dict[str, dict]:
    """Captions of the nearest training photos by the same features: what a captioner has to beat."""
    if not captioner.config.data.features:
        raise ValueError("--retrieval needs stored features (data.features): the encoder runs online in this run")
    train = list(evaluation_photos(_reader(captioner, captioner.config.data.train_split, None)))
    queries = list(evaluation_photos(reader))
    train_NF, query_QF = (np.stack([p.pooled_F.numpy() for p in part]) for part in (train, queries))  # type: ignore
    train_captions = [photo.record["captions"] for photo in train]
    rows = {}
    for title, neighbours in {
        "nearest neighbour": 1,
        f"consensus of {CONSENSUS_NEIGHBOURS}": CONSENSUS_NEIGHBOURS,
    }.items():
        found = protocol.retrieval_captions(train_NF, train_captions, query_QF, min(neighbours, len(train)))
        rows[title] = _caption_scores({photo.key: text for photo, text in zip(queries, found)}, records)
    return rows


def _emergence(captioner: Captioner, reader: ShardReader, encoder: ImageEncoder | None, ranks: Ranks) -> list[dict]:
    """The drafts of the first photos of the split, step by step."""
    photos = list(islice(evaluation_photos(reader), EMERGENCE_PHOTOS))
    drafts: list[list[Draft]] = []
    keys = [photo.key for photo in photos]
    captioner.caption(photo_features(photos, encoder, ranks.device, torch.float32), keys, drafts)
    return [{"key": key, "drafts": [asdict(draft) for draft in part]} for key, part in zip(keys, drafts)]


def _hardware(ranks: Ranks) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None
    return {"gpu": gpu, "cpus": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}


def _write(
    run_dir: RunDir,
    split: str,
    captions: Mapping[str, str],
    records: Mapping[str, dict],
    emergence: list[dict],
    scores: Mapping[str, Any],
) -> None:
    run_dir.predictions.mkdir(exist_ok=True)
    lines = [
        json.dumps({"key": key, "caption": captions[key], "references": records[key]["captions"]})
        for key in sorted(captions)
    ]
    atomic_write(run_dir.predictions / f"{split}.jsonl", ("\n".join(lines) + "\n").encode())
    atomic_write(run_dir.predictions / "emergence.json", json.dumps(emergence).encode())
    atomic_write(run_dir.scores, json.dumps(scores, indent=2).encode())


if __name__ == "__main__":
    sys.exit(main())
