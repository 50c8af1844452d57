"""`diffcap evaluate RUN [key=value ...]`: caption a split of the run's shards and score it, on any number of ranks.

In: a run directory with an exported captioner, and its shards. Out: ``predictions/SPLIT.jsonl``,
``predictions/emergence.json`` and ``scores.json`` with the floor and human rows, and CLIPScores where the run's CLIP
can be had. The photos are partitioned exactly, so the scores are the same for any number of ranks:
`deepspeed --module diffcap_dist.evaluate RUN` shares the work. ``--protocol seed`` adds the published code's private
score to ``scores.json`` and changes nothing else there. ``--steps`` scores what ``training.evaluate_every`` left in
``evaluations/``, each step in a folder of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffcap_dist.data.shard_format import atomic_write, references_of
from diffcap_dist.data.stream import ShardReader, all_records, evaluation_photos
from diffcap_dist.evaluation import protocol, seed_protocol
from diffcap_dist.evaluation.captioner import Captioner, Draft, about_export
from diffcap_dist.evaluation.clip_score import PROMPT, ClipFeatures, prompted
from diffcap_dist.evaluation.score_rows import ScoreRows
from diffcap_dist.evaluation.trained_run import (
    caption_share,
    code_commit,
    default_split,
    hardware,
    load_run,
    open_split,
)
from diffcap_dist.evaluation.validation import photo_features
from diffcap_dist.model.image_encoder import ImageEncoder
from diffcap_dist.run_dir import RunDir
from diffcap_dist.training import distributed
from diffcap_dist.training.distributed import Ranks

log = logging.getLogger("diffcap")

EMERGENCE_PHOTOS = 6
CONSENSUS_NEIGHBOURS = 30
CLIP_PHOTOS_AT_ONCE = 32

SCORES = (
    *("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider_d", "rouge_l"),
    *("scene_accuracy", "scene_all_true", "objects_mentioned"),
)
TEXT_SCORES = (
    *("clip_score", "ref_clip_score"),
    *("distinct_1", "distinct_2", "unique_captions", "mean_length", "repeated_words"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="diffcap evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. sampler.num_inference_steps=5")
    parser.add_argument("--split", help="which split of the shards (default: test, or val where there is no test)")
    parser.add_argument(
        "--protocol", choices=("ours", "seed"), default="ours", help="seed: the published code's score (default: ours)"
    )
    parser.add_argument(
        "--steps",
        action="store_true",
        help="score the captioners in RUN/evaluations, oldest first; their weights go then",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="photos at a time on one rank")
    parser.add_argument("--retrieval", action="store_true", help="also score retrieval from the training features")
    parser.add_argument(
        "--no-clip-score", action="store_true", help="do without CLIPScore, which takes a while on CPUs"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; LOCAL_RANK says it
    args = parser.parse_intermixed_args(argv)
    if args.protocol == "seed" and args.retrieval:
        parser.error("--retrieval belongs to our protocol: leave out --protocol seed")
    if args.protocol == "seed" and args.steps:
        parser.error("--steps belongs to our protocol: leave out --protocol seed")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    ranks = distributed.init_ranks()
    try:
        if args.protocol == "seed":
            return _print_seed(RunDir(args.run), evaluate_as_seed(args, ranks))
        if args.steps:
            return evaluate_steps(args, ranks)
        scores = _evaluate(RunDir(args.run), args, ranks)
    finally:
        distributed.finish()
    if scores is not None:
        print(score_table(scores))
        print(f"scores in {RunDir(args.run).scores}")
    return 0


def _evaluate(run_dir: RunDir, args: argparse.Namespace, ranks: Ranks) -> dict[str, Any] | None:
    clip_score = not args.no_clip_score
    return evaluate(run_dir, args.split, args.settings, args.batch_size, args.retrieval, clip_score, ranks)


def evaluate_steps(args: argparse.Namespace, ranks: Ranks) -> int:
    """What waits in RUN/evaluations, also what comes to wait meanwhile, until nothing does. All ranks enter."""
    run_dir = RunDir(args.run)
    run_dir.load_config()
    while step := distributed.from_first(_oldest_waiting(run_dir) if ranks.is_first else None):
        here = RunDir(step)
        scores = _evaluate(here, args, ranks)
        if scores is not None:  # on rank 0, when all ranks have read the weights
            shutil.rmtree(here.export)
            print(f"step {scores['step']}: BLEU-4 {scores['bleu_4']:.4f} ({here.scores})", flush=True)
    return 0


def _oldest_waiting(run_dir: RunDir) -> str | None:
    return next((str(step.root) for step in run_dir.waiting_evaluations()), None)


def evaluate_as_seed(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any] | None:
    """The entry ``seed_protocol`` of scores.json on rank 0, None elsewhere. All ranks enter."""
    run_dir = RunDir(args.run)
    # One draw a row, as in the published code; the sampler is otherwise the run's.
    captioner, encoder = load_run(run_dir, [*args.settings, "sampler.candidates=1"], ranks)
    tokenizer, length, sampler = captioner.tokenizer, captioner.config.data.max_length, captioner.config.sampler
    split = args.split or default_split(captioner)
    reader = open_split(captioner, split, encoder)
    rows = seed_protocol.caption_rows(reader)
    features_of = partial(photo_features, encoder=encoder, device=ranks.device, dtype=torch.float32)
    bleu_4 = seed_protocol.model_bleu(captioner, reader, features_of, rows, args.batch_size, ranks)
    if bleu_4 is None:
        return None
    validation = _validation_records(captioner, encoder)
    floor_caption = _floor_caption(validation)
    entry = {
        "bleu_4": bleu_4,
        "rows": len(rows),
        "floor": seed_protocol.floor_bleu(floor_caption, rows, tokenizer, length),
        "human": seed_protocol.human_bleu(rows, tokenizer, length),
        "floor_caption": floor_caption,
        "split": split,
        "split_by": seed_protocol.split_by(rows),
        "sampler": sampler.name if captioner.config.kind == "continuous" else captioner.config.kind,
        "num_inference_steps": sampler.num_inference_steps,
        "step": about_export(run_dir.export)["step"],
        "world_size": ranks.world_size,
    }
    scores = json.loads(run_dir.scores.read_text(encoding="utf-8")) if run_dir.scores.is_file() else {}
    atomic_write(run_dir.scores, json.dumps({**scores, "seed_protocol": entry}, indent=2).encode())
    return entry


def _print_seed(run_dir: RunDir, entry: Mapping[str, Any] | None) -> int:
    if entry is not None:
        print(seed_protocol.as_text(entry))
        print(f"in {run_dir.scores}, as seed_protocol")
    return 0


def evaluate(
    run_dir: RunDir,
    split: str | None,
    settings: Sequence[str],
    batch_size: int,
    retrieval: bool,
    clip_score: bool,
    ranks: Ranks,
) -> dict[str, Any] | None:
    """Caption and score; the scores on rank 0, None elsewhere. All ranks enter."""
    captioner, encoder = load_run(run_dir, settings, ranks)
    config = captioner.config
    split = split or default_split(captioner)
    reader = open_split(captioner, split, encoder)
    started = time.perf_counter()
    captions, records = caption_share(captioner, reader, encoder, batch_size, ranks)
    seconds = time.perf_counter() - started
    clip = _find_clip(captioner, reader, encoder, ranks) if clip_score else None
    clip_features = _clip_share(clip, reader, encoder, ranks) if clip else None
    gathered = distributed.gather_to_first((captions, records, seconds, clip_features), ranks)
    if gathered is None:
        return None
    # Sorted: sums of floats, and so the scores, must not depend on which rank captioned what.
    captions = dict(sorted(item for part, _, _, _ in gathered for item in part.items()))
    records = {key: next(part[key] for _, part, _, _ in gathered if key in part) for key in captions}
    slowest = max(seconds for _, _, seconds, _ in gathered)
    rows = _score_rows(records, clip, [part for _, _, _, part in gathered])
    scores = {
        "split": split,
        "photos": len(captions),
        **rows.of(captions),
        "num_inference_steps": config.sampler.num_inference_steps,
        "guidance_scale": config.sampler.guidance_scale,
        "candidates": config.sampler.candidates,
        "step": about_export(run_dir.export)["step"],
        "world_size": ranks.world_size,
        "seconds": slowest,
        "captions_per_second": len(captions) / slowest,
        "hardware": hardware(ranks),
        "commit": code_commit(),
        "floor": _floor_row(rows, _validation_records(captioner, encoder)),
        "human": rows.human(),
    }
    gap = scores["human"]["bleu_4"] - scores["floor"]["bleu_4"]
    scores["gap_closed"] = (scores["bleu_4"] - scores["floor"]["bleu_4"]) / gap
    if retrieval:
        scores["retrieval"] = _retrieval_rows(captioner, reader, rows)
    scores |= _seed_entry(run_dir, scores["step"])
    _write(run_dir, split, captions, records, _emergence(captioner, reader, encoder, ranks), scores)
    return scores


def score_table(scores: Mapping[str, Any]) -> str:
    """The scores beside the floor and human rows (and retrieval), as text; what the captions are like below them."""
    rows = {"model": scores, "floor": scores["floor"], "human": scores["human"], **scores.get("retrieval", {})}
    steps = scores["num_inference_steps"]
    gap = f"gap between floor and human closed, BLEU-4: {scores['gap_closed']:.2f}, in {steps} denoising steps"
    return "\n".join([*_table(rows, SCORES), "", *_table(rows, TEXT_SCORES), "", gap])


def _table(rows: Mapping[str, Mapping[str, Any]], known: Sequence[str]) -> list[str]:
    """Lines; scores that no row has are left out."""
    names = [name for name in known if any(name in row for row in rows.values())]
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"  {name:>{max(7, len(name))}}" for name in names)]
    for title, row in rows.items():
        cells = [f"{row[n]:.4f}" if n in row else "-" for n in names]
        lines.append(f"{title:<{width}}" + "".join(f"  {c:>{max(7, len(n))}}" for c, n in zip(cells, names)))
    return lines


def _seed_entry(run_dir: RunDir, step: int) -> dict[str, Any]:
    """What an earlier ``--protocol seed`` found of the same export."""
    scores = json.loads(run_dir.scores.read_text(encoding="utf-8")) if run_dir.scores.is_file() else {}
    entry = scores.get("seed_protocol", {})
    return {"seed_protocol": entry} if entry.get("step") == step else {}


def _find_clip(
    captioner: Captioner, reader: ShardReader, encoder: ImageEncoder | None, ranks: Ranks
) -> ImageEncoder | None:
    """The CLIP that the run sees photos with, for CLIPScore; None, and a line that says why, where it can't be had."""
    try:
        clip = encoder or _encoder_of_features(captioner, reader).to(ranks.device)
        clip.encode_text([PROMPT])
    except Exception as error:  # no text tower, no tokenizer, no weights: open_clip and the hub raise many kinds
        if ranks.is_first:
            log.info("no CLIPScore: %s", (str(error).strip().splitlines() or [type(error).__name__])[0])
        return None
    return clip


def _encoder_of_features(captioner: Captioner, reader: ShardReader) -> ImageEncoder:
    info, setting = reader.feature_info, captioner.config.encoder
    assert info is not None
    if info.weights_sha256 is None:
        raise ValueError(f"the features {info.name!r} were imported, so their encoder's text tower is not at hand")
    encoder = ImageEncoder(setting.name, setting.pretrained)
    if encoder.weights_sha256 != info.weights_sha256:
        raise ValueError(f"the features {info.name!r} are of another encoder than encoder.name={encoder.source}")
    return encoder


def _clip_share(
    clip: ImageEncoder, reader: ShardReader, encoder: ImageEncoder | None, ranks: Ranks
) -> dict[str, ClipFeatures]:
    """By key, of this rank's blocks of photos. The blocks are the same for any number of ranks: what stands beside a
    text in a batch may change the last bit of its features."""
    features: dict[str, ClipFeatures] = {}
    num_blocks = math.ceil(sum(reader.counts) / CLIP_PHOTOS_AT_ONCE)
    blocks = range(ranks.rank, num_blocks, ranks.world_size)
    for block in tqdm(blocks, disable=ranks.no_progress, unit="block", desc="CLIPScore", dynamic_ncols=True):
        photos = list(evaluation_photos(reader, block, num_blocks))
        photo_NF = photo_features(photos, encoder, ranks.device, torch.float32).pooled_NF.cpu().numpy()
        texts = [references_of(photo.record) for photo in photos]
        texts_MF = _encode_texts(clip, prompted(text for captions in texts for text in captions))
        references = np.split(texts_MF, np.cumsum([len(captions) for captions in texts])[:-1])
        features.update((p.key, ClipFeatures(p_F, r_RF)) for p, p_F, r_RF in zip(photos, photo_NF, references))
    return features


def _encode_texts(clip: ImageEncoder, texts: Sequence[str]) -> np.ndarray:
    return clip.encode_text(texts).cpu().numpy()


def _score_rows(
    records: Mapping[str, dict], clip: ImageEncoder | None, parts: Sequence[dict[str, ClipFeatures] | None]
) -> ScoreRows:
    if clip is None or any(part is None for part in parts):
        return ScoreRows(records)
    features = {key: value for part in parts if part is not None for key, value in part.items()}
    return ScoreRows(records, partial(_encode_texts, clip), features)


def _validation_records(captioner: Captioner, encoder: ImageEncoder | None) -> dict[str, dict]:
    return dict(all_records(open_split(captioner, captioner.config.data.val_split, encoder)))


def _floor_row(rows: ScoreRows, validation: Mapping[str, dict]) -> dict[str, Any]:
    """The row of the constant caption that is best on validation."""
    caption = _floor_caption(validation)
    return {"caption": caption, **rows.of(dict.fromkeys(rows.records, caption))}


def _floor_caption(validation: Mapping[str, dict]) -> str:
    references = {key: references_of(record) for key, record in validation.items()}
    return protocol.floor_caption(references, [text for texts in references.values() for text in texts])


def _retrieval_rows(captioner: Captioner, reader: ShardReader, rows: ScoreRows) -> dict[str, dict[str, float]]:
    """Captions of the nearest training photos by the same features: what a captioner has to beat."""
    if not captioner.config.data.features:
        raise ValueError("--retrieval needs stored features (data.features): the encoder runs online in this run")
    train = list(evaluation_photos(open_split(captioner, captioner.config.data.train_split, None)))
    queries = list(evaluation_photos(reader))
    train_NF, query_QF = (np.stack([p.pooled_F.numpy() for p in part]) for part in (train, queries))  # type: ignore
    train_captions = [photo.record["captions"] for photo in train]
    found_rows = {}
    for title, neighbours in {
        "nearest neighbour": 1,
        f"consensus of {CONSENSUS_NEIGHBOURS}": CONSENSUS_NEIGHBOURS,
    }.items():
        found = protocol.retrieval_captions(train_NF, train_captions, query_QF, min(neighbours, len(train)))
        found_rows[title] = rows.of({photo.key: text for photo, text in zip(queries, found)})
    return found_rows


def _emergence(captioner: Captioner, reader: ShardReader, encoder: ImageEncoder | None, ranks: Ranks) -> list[dict]:
    """The drafts of the first photos of the split, step by step."""
    photos = list(islice(evaluation_photos(reader), EMERGENCE_PHOTOS))
    drafts: list[list[Draft]] = []
    keys = [photo.key for photo in photos]
    captioner.caption(photo_features(photos, encoder, ranks.device, torch.float32), keys, drafts)
    return [{"key": key, "drafts": [asdict(draft) for draft in part]} for key, part in zip(keys, drafts)]


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
        json.dumps({"key": key, "caption": captions[key], "references": references_of(records[key])})
        for key in sorted(captions)
    ]
    atomic_write(run_dir.predictions / f"{split}.jsonl", ("\n".join(lines) + "\n").encode())
    atomic_write(run_dir.predictions / "emergence.json", json.dumps(emergence).encode())
    atomic_write(run_dir.scores, json.dumps(scores, indent=2).encode())


if __name__ == "__main__":
    sys.exit(main())
