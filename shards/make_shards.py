"""`make-shards`: raw photos and captions -> a dataset of shards, features beside it, and a check of both.

In: the command line. Out: a dataset folder, and on the screen what became of every input. Exit status 2 and
one line on stderr for what the user can mend, 1 when `verify` finds damage. The work is done in writer.py,
sources.py, scenes.py and features.py; they are imported when a command runs, so that --help answers at once.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.features import Registered
    from shards.writer import RawSample, Rejected

SAMPLES_PER_SHARD = 1000


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"make-shards {arguments.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make-shards", description="Make and check datasets of shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_scenes(commands)
    _add_flickr8k(commands)
    _add_features(commands)
    verify = commands.add_parser("verify", help="read every byte of a dataset and list all damages")
    verify.add_argument("directory", type=Path, metavar="DIR")
    verify.set_defaults(run=run_verify)
    return parser


def _add_scenes(commands: Any) -> None:
    scenes = commands.add_parser("scenes", help="render small pictures with captions and ground truth")
    scenes.add_argument("--out", type=Path, required=True, metavar="DIR")
    for split, default in (("train", 4000), ("val", 400), ("test", 400)):
        scenes.add_argument(f"--{split}", type=int, default=default, metavar="N", help=f"default {default}")
    scenes.add_argument("--max-objects", type=int, default=2, metavar="N", help="objects a picture (default 2)")
    scenes.add_argument("--image-size", type=int, default=64, metavar="PIXELS", help="default 64")
    scenes.add_argument("--seed", type=int, default=0)
    scenes.add_argument("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, metavar="N")
    scenes.set_defaults(run=run_scenes)


def _add_flickr8k(commands: Any) -> None:
    flickr8k = commands.add_parser("flickr8k", help="Flickr8k: a folder of photos and captions.txt")
    flickr8k.add_argument("--images", type=Path, metavar="DIR", help="without it: captions only, needs --npz")
    flickr8k.add_argument("--captions", type=Path, required=True, metavar="FILE", help="CSV: image,caption")
    flickr8k.add_argument(
        "--split",
        required=True,
        metavar="FILE|karpathy|random:SEED",
        help="lines `name.jpg split`, or Karpathy's json (karpathy: found beside the captions), or 80/10/10",
    )
    flickr8k.add_argument("--out", type=Path, required=True, metavar="DIR")
    flickr8k.add_argument("--npz", type=Path, metavar="FILE", help="features to import: names + array")
    flickr8k.add_argument("--allow-missing", action="store_true", help="more than 1%% without photo or caption")
    flickr8k.add_argument("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, metavar="N")
    flickr8k.set_defaults(run=run_flickr8k)


def _add_features(commands: Any) -> None:
    features = commands.add_parser("features", help="compute or import features of a dataset")
    features.add_argument("directory", type=Path, metavar="DIR")
    source = features.add_mutually_exclusive_group(required=True)
    source.add_argument("--encoder", metavar="NAME", help="an open_clip model, hub id or local folder")
    source.add_argument("--npz", type=Path, metavar="FILE", help="names + array; needs --name")
    features.add_argument("--pretrained", default="", metavar="TAG|PATH", help="the encoder's weights")
    features.add_argument("--patches", action="store_true", help="patch features too")
    features.add_argument("--name", help="what imported features are called")
    features.set_defaults(run=run_features)


# ---- commands ----


def run_scenes(arguments: argparse.Namespace) -> int:
    from diffcap_dist.data.shard_format import file_sha256
    from shards import scenes
    from shards.writer import RawSample

    asked = {
        "num_train": arguments.train,
        "num_val": arguments.val,
        "num_test": arguments.test,
        "seed": arguments.seed,
        "max_objects": arguments.max_objects,
        "image_size": arguments.image_size,
    }
    rendered = scenes.generate(**asked, workers=len(os.sched_getaffinity(0)))
    samples = (
        RawSample(photo_id, record["captions"], record["split"], "scenes", jpeg, record.get("scene"))
        for photo_id, jpeg, record in rendered
    )
    # The renderer's code is the source of its pictures: another one is another dataset.
    provenance = {"command": "scenes", **asked, "renderer": file_sha256(Path(scenes.__file__))}
    _write(samples, arguments, provenance, [])
    return 0


def run_flickr8k(arguments: argparse.Namespace) -> int:
    from shards import features, sources

    source = sources.flickr8k(
        arguments.images, arguments.captions, arguments.split, arguments.allow_missing, arguments.npz
    )
    for note in source.notes:
        print(f"note: {note}")
    _write(source.samples, arguments, source.provenance, source.rejected)
    if arguments.npz is not None:
        name = features.name_from_file(arguments.npz)
        _report_features(features.import_npz(arguments.out, arguments.npz, name))
    return 0


def run_features(arguments: argparse.Namespace) -> int:
    from shards import features

    if arguments.encoder is not None:
        if arguments.name is not None:
            raise ValueError("--name goes with --npz; computed features are called after their encoder")
        made = features.compute(arguments.directory, arguments.encoder, arguments.pretrained, arguments.patches)
    else:
        if arguments.patches or arguments.pretrained:
            raise ValueError("--patches and --pretrained go with --encoder, not with --npz")
        name = arguments.name or features.name_from_file(arguments.npz)
        made = features.import_npz(arguments.directory, arguments.npz, name)
    _report_features(made)
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    from diffcap_dist.data.shard_format import ShardIndex, verify

    damages = verify(arguments.directory)
    for damage in damages:
        print(damage, file=sys.stderr)
    index = ShardIndex.load(arguments.directory)
    what = f"{len(index.shards)} shards, {sum(shard.samples for shard in index.shards)} samples"
    print(f"{arguments.directory}: {what}: {f'damages: {len(damages)}' if damages else 'all as written'}")
    return 1 if damages else 0


# ---- reports ----


def _write(
    samples: "Iterable[RawSample]",
    arguments: argparse.Namespace,
    provenance: dict[str, Any],
    rejected: "list[Rejected]",
) -> None:
    from shards.writer import REJECTED_FILE, write_dataset

    start = time.perf_counter()
    written = write_dataset(samples, arguments.out, arguments.samples_per_shard, provenance, rejected)
    seconds = time.perf_counter() - start
    index, counts = written.index, written.index.provenance["counts"]
    if written.already_complete:
        print(f"{arguments.out} is complete, nothing to do: {written.shards_kept} shards are skipped")
    elif written.shards_kept:
        print(f"continued: {written.shards_kept} of {len(index.shards)} shards were complete and are kept")
    for what in ("photos", "captions"):
        kept, left = counts[what], counts[f"rejected_{what}"]
        print(f"{what}: {kept + left} = {kept} in shards + {left} rejected")
    for reason, count in counts["rejected"].items():
        print(f"  {reason}: {count['photos']} photos, {count['captions']} captions ({REJECTED_FILE})")
    splits = ", ".join(f"{split} {index.num_samples(split)}" for split in index.splits())
    total = sum(shard.bytes for shard in index.shards)
    print(f"splits: {splits}")
    print(f"{len(index.shards)} shards, {total:,} bytes in {arguments.out} ({seconds:.1f} s)")


def _report_features(made: "Registered") -> None:
    info, measured = made.info, made.alignment
    shape = f"{info.pooled_dim}" if info.patches is None else f"{info.pooled_dim}, patches {info.patches}"
    if made.already_complete:
        print(f"features {info.name} are complete, nothing to do: {len(info.files)} shards are skipped")
        return
    if made.shards_kept:
        print(f"continued: {made.shards_kept} of {len(info.files)} shards were complete and are kept")
    print(f"features {info.name}: {len(info.files)} shards, width {shape}")
    if measured is None:
        print("alignment with the captions: not checked, the dataset is too small to tell")
    else:
        print(
            f"alignment with the captions: matched {measured.matched:.4f}, shuffled {measured.shuffled:.4f} "
            f"(z = {measured.z:.1f} over {measured.samples} photos)"
        )


if __name__ == "__main__":
    sys.exit(main())
