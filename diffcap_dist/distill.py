"""`diffcap distill RUN --out FILE.jsonl [key=value ...]`: a run's captions of its training photos, to train another on.

In: a run directory with an exported captioner, the teacher, and its shards. Out: JSON lines {"key": ..., "captions":
[...]}, the ``data.captions`` of a student's config. One caption a photo, always the same: a teacher's likeliest are
easier to learn than what people happened to write (sequence-level distillation: Kim & Rush 2016, arXiv:1606.07947),
most of all for a model that writes all words at once (Gu et al. 2018, arXiv:1711.02281). On any number of ranks.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from diffcap_dist.data.shard_format import atomic_write
from diffcap_dist.evaluation.trained_run import caption_share, load_run, open_split
from diffcap_dist.run_dir import RunDir
from diffcap_dist.training import distributed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="diffcap distill", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory: the teacher")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. sampler.num_beams=3")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--batch-size", type=int, default=64, help="photos at a time on one rank")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; LOCAL_RANK says it
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    ranks = distributed.init_ranks()
    try:
        captioner, encoder = load_run(RunDir(args.run), args.settings, ranks)
        reader = open_split(captioner, captioner.config.data.train_split, encoder)
        captions, _ = caption_share(captioner, reader, encoder, args.batch_size, ranks)
        gathered = distributed.gather_to_first(captions, ranks)
    finally:
        distributed.finish()
    if gathered is not None:
        everything = sorted(item for part in gathered for item in part.items())
        lines = [json.dumps({"key": key, "captions": [caption]}) + "\n" for key, caption in everything]
        atomic_write(args.out, "".join(lines).encode())
        print(f"captions of {len(lines)} photos in {args.out}: train with data.captions={args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
