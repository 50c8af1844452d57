"""`diffcap distill RUN --out FILE.jsonl [key=value ...]`: a run's captions of its training photos, to train another on.

In: a run directory with an exported captioner, the teacher, and its shards (with ``data.train``, of all datasets of the
mix). Out: JSON lines {"key": ..., "captions": [...]}, the ``data.captions`` of a student's config. One caption a photo,
always the same: a teacher's likeliest are easier to learn than what people happened to write (sequence-level
distillation: Kim & Rush 2016, arXiv:1606.07947), most of all for a model that writes all words at once (Gu et al. 2018,
arXiv:1711.02281). On any number of ranks.

With ``--best-of N``, N more captions of each photo are drawn at ``--temperature``, and of all N + 1 the one with the
highest CIDEr-D against the photo's own captions is kept: the student learns what is rewarded (Dong et al. 2023,
arXiv:2304.06767).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from diffcap_dist.data.shard_format import atomic_write
from diffcap_dist.data.stream import ShardReader
from diffcap_dist.evaluation.captioner import Captioner
from diffcap_dist.evaluation.scores import count_caption, count_references, counted_cider_d, tokenize
from diffcap_dist.evaluation.trained_run import caption_share, load_run, open_training
from diffcap_dist.run_dir import RunDir
from diffcap_dist.training import distributed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="diffcap distill", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory: the teacher")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. sampler.num_beams=3")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--best-of", type=int, default=0, metavar="N", help="draw N more, keep the best by CIDEr-D")
    parser.add_argument("--temperature", type=float, default=0.5, help="at which they are drawn (default 0.5)")
    parser.add_argument("--batch-size", type=int, default=64, help="photos at a time on one rank")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; LOCAL_RANK says it
    args = parser.parse_intermixed_args(argv)
    if args.best_of and args.temperature <= 0:
        raise ValueError(f"--temperature {args.temperature}: captions are drawn at one above 0")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    ranks = distributed.init_ranks()
    try:
        captioner, encoder = load_run(RunDir(args.run), args.settings, ranks)
        reader = open_training(captioner, encoder)
        require_keys_of_their_own(reader)
        written, records = caption_share(captioner, reader, encoder, args.batch_size, ranks)
        drafts = {key: [caption] for key, caption in written.items()}
        for number in range(args.best_of):
            drawing = _drawing(captioner, args.temperature, captioner.config.sampler.seed + 1 + number)
            drawn, _ = caption_share(drawing, reader, encoder, args.batch_size, ranks)
            for key, caption in drawn.items():
                drafts[key].append(caption)
        references = {key: record["captions"] for key, record in records.items()} if args.best_of else {}
        gathered = distributed.gather_to_first((drafts, references), ranks)
    finally:
        distributed.finish()
    if gathered is not None:
        everything = {key: texts for part, _ in gathered for key, texts in part.items()}
        if args.best_of:
            everything = best(everything, {key: texts for _, part in gathered for key, texts in part.items()})
        lines = [json.dumps({"key": key, "captions": everything[key][:1]}) + "\n" for key in sorted(everything)]
        atomic_write(args.out, "".join(lines).encode())
        print(f"captions of {len(lines)} photos in {args.out}: train with data.captions={args.out}")
    return 0


def require_keys_of_their_own(reader: ShardReader) -> None:
    """Captions go by key: in a mix it may not stand for a photo of one dataset and for another's."""
    dataset_of_key: dict[str, int] = {}
    for shard, count in enumerate(reader.counts if len(reader.stores) > 1 else []):
        dataset = reader.dataset_of[shard]
        for sample in range(count):
            key, _ = reader.record(shard, sample)
            other = dataset_of_key.setdefault(key, dataset)
            if other != dataset:
                both = f"{reader.stores[other].where} and {reader.stores[dataset].where}"
                raise ValueError(
                    f"data.train: {both} both have a photo {key}, and captions go by key. Make one of them anew with "
                    "other photo ids (make-shards between: another --seed)"
                )


def best(drafts: dict[str, list[str]], references: dict[str, list[str]]) -> dict[str, list[str]]:
    """Of each photo's drafts the one with the highest CIDEr-D, the first among equals. Says what that gained."""
    keys = sorted(drafts)
    counted = [count_references([tokenize(text) for text in references[key]]) for key in keys]
    scores = [
        counted_cider_d([count_caption(tokenize(drafts[key][number])) for key in keys], counted)
        for number in range(len(drafts[keys[0]]))
    ]
    chosen = [max(range(len(scores)), key=lambda number, i=i: scores[number][i]) for i in range(len(keys))]  # type: ignore[misc]
    means = sum(scores[0]) / len(keys), sum(scores[number][i] for i, number in enumerate(chosen)) / len(keys)
    stayed = sum(number == 0 for number in chosen) / len(keys)
    print(f"CIDEr-D on these photos: {means[0]:.3f}, kept {means[1]:.3f}; of {stayed:.0%} the likeliest was the best")
    return {key: [drafts[key][number]] for key, number in zip(keys, chosen)}


def _drawing(captioner: Captioner, temperature: float, seed: int) -> Captioner:
    sampler = dataclasses.replace(
        captioner.config.sampler, temperature=temperature, num_beams=1, candidates=1, seed=seed
    )
    return Captioner(captioner.network, dataclasses.replace(captioner.config, sampler=sampler), captioner.tokenizer)


if __name__ == "__main__":
    sys.exit(main())
