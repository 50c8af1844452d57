"""`make-shards`: raw photos and captions -> a dataset of shards, features beside it, and a check of both.

In: the command line. Out: a dataset, and on the screen what became of every input. Exit status 2 and one line on
stderr for what the user can mend, 1 when `verify` finds damage. The work is done in the modules beside this one; they
are imported when a command runs, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.features import Registered
    from shards.sources import Given
    from shards.writer import Source, Written

SPLIT_GRAMMAR = "FILE|DIR|official|karpathy|random:SEED|rows:SEED|train|val|test"
MAX_REJECTED, MAX_REJECTED_URLS = 0.01, 0.5  # of what the web promised, much is gone
DATASETS = {
    "flickr8k": "Flickr8k: photos, and captions.txt or Flickr8k.token.txt",
    "flickr30k": "Flickr30k: photos, and results_20130124.token or results.csv",
    "karpathy": "COCO, Flickr30k or Flickr8k by Karpathy's dataset_*.json",
    "folder": "any folder of photos, and captions as CSV or JSON lines",
}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"make-shards {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"make-shards {arguments.command}: interrupted. Run the same command again to go on", file=sys.stderr)
        return 130


# ---- the command line ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make-shards", description="Make, check and show datasets of shards.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_scenes(commands)
    for name, what in DATASETS.items():
        _add_dataset(commands, name, what)
    _add_joined(commands)
    _add_urls(commands)
    _add_between(commands)
    _add_index(commands)
    _add_features(commands)
    _add_inspection(commands)
    return parser


def _writing(parser: argparse.ArgumentParser, max_rejected: float = MAX_REJECTED) -> None:
    """What all commands that write a dataset take."""
    parser.add_argument("--out", required=True, metavar="DIR|URL", help="a folder, or s3://, gs://, hf:// ...")
    parser.add_argument("--workers", type=int, default=_num_cores(), metavar="N", help="processes (default: all cores)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="shorter side, as JPEG (default: bytes untouched)")
    parser.add_argument("--quality", type=int, default=90, metavar="Q", help="of resized JPEGs (default 90)")
    parser.add_argument("--min-side", type=int, default=16, metavar="PIXELS", help="reject smaller photos (default 16)")
    parser.add_argument("--max-rejected", type=float, default=max_rejected, metavar="SHARE", help="default %(default)g")
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="of a job array, I from 0")


def _add_scenes(commands: Any) -> None:
    scenes = commands.add_parser("scenes", help="render small pictures with captions and ground truth")
    _writing(scenes)
    for split, default in (("train", 4000), ("val", 400), ("test", 400)):
        scenes.add_argument(f"--{split}", type=int, default=default, metavar="N", help=f"default {default}")
    scenes.add_argument("--max-objects", type=int, default=2, metavar="N", help="objects a picture (default 2)")
    scenes.add_argument("--image-size", type=int, default=64, metavar="PIXELS", help="default 64")
    scenes.add_argument("--seed", type=int, default=0)
    scenes.set_defaults(run=run_scenes)


def _add_dataset(commands: Any, name: str, what: str) -> None:
    dataset = commands.add_parser(name, help=what, description=what)
    _given(dataset)
    if name == "karpathy":
        dataset.add_argument("--restval", action="store_true", help="COCO's restval photos join train")
    else:
        dataset.set_defaults(restval=False)
    _shared_given(dataset)
    _writing(dataset)
    dataset.set_defaults(run=run_dataset)


def _add_joined(commands: Any) -> None:
    what = "both as one, by photo: no test or val photo of either in train"
    joined = commands.add_parser("flickr30k+8k", help=what, description=what)
    for prefix in ("flickr30k-", "flickr8k-"):
        _given(joined, prefix)
    _shared_given(joined)
    _writing(joined)
    joined.set_defaults(run=run_joined, restval=False)


def _given(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    parser.add_argument(f"--{prefix}images", type=Path, metavar="DIR", help="without it: captions only, needs --npz")
    parser.add_argument(f"--{prefix}captions", type=Path, required=True, metavar="FILE", help="CSV, token file or JSON")
    parser.add_argument(f"--{prefix}split", required=True, metavar=SPLIT_GRAMMAR)


def _shared_given(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--npz", type=Path, metavar="FILE", help="features to import: names + array")
    parser.add_argument("--allow-missing", action="store_true", help="more than 1%% without photo or caption")


def _add_urls(commands: Any) -> None:
    what = "CC3M, or any list of URLs and captions (TSV, parquet): downloads, then shards"
    urls = commands.add_parser("cc3m", aliases=["urls"], help=what, description=what)
    urls.add_argument("--urls", required=True, action="append", metavar="[SPLIT=]FILE", help="may come several times")
    urls.add_argument("--downloads", type=Path, required=True, metavar="DIR", help="where fetched photos are kept")
    urls.add_argument("--retry-failed", action="store_true", help="ask again for what failed in an earlier run")
    urls.add_argument("--connections", type=int, default=64, metavar="N", help="over all workers (default 64)")
    urls.add_argument("--per-host", type=int, default=4, metavar="N", help="of each worker, to one host (default 4)")
    urls.add_argument("--timeout", type=float, default=20.0, metavar="SECONDS", help="of one request (default 20)")
    _writing(urls, MAX_REJECTED_URLS)
    urls.set_defaults(run=run_urls)


def _add_between(commands: Any) -> None:
    what = "points between photos in the space of their features, for a teacher to caption"
    between = commands.add_parser("between", help=what, description=what)
    between.add_argument("directory", type=_local, metavar="DIR")
    between.add_argument("--features", required=True, metavar="NAME", help="pooled features beside DIR's photos")
    between.add_argument("--count", type=int, required=True, metavar="N", help="points")
    between.add_argument("--seed", type=int, default=0)
    _writing(between)
    between.set_defaults(run=run_between)


def _add_index(commands: Any) -> None:
    what = "make tars from elsewhere (img2dataset, WebDatasets) readable where they are"
    index = commands.add_parser("index", help=what, description=what)
    index.add_argument("places", nargs="+", metavar="DIR|URL", help="one folder of tars, or URLs of tars")
    index.add_argument("--out", type=Path, metavar="DIR", help="for URLs: where the index goes")
    index.add_argument("--split", metavar="NAME", help="default: by a word in the tar's name, else train")
    index.add_argument("--workers", type=int, default=_num_cores(), metavar="N")
    index.set_defaults(run=run_index)


def _add_features(commands: Any) -> None:
    features = commands.add_parser("features", help="compute or import features of a dataset")
    features.add_argument("directory", type=_local, metavar="DIR")
    source = features.add_mutually_exclusive_group(required=True)
    source.add_argument("--encoder", metavar="NAME", help="an open_clip model, hub id or local folder")
    source.add_argument("--npz", type=Path, metavar="FILE", help="import: names + array")
    source.add_argument("--npy-dir", type=Path, metavar="DIR", help="import: one PHOTO.npy for each photo")
    features.add_argument("--pretrained", default="", metavar="TAG|PATH", help="the encoder's weights")
    features.add_argument("--patches", action="store_true", help="patch features too")
    features.add_argument("--workers", type=int, metavar="N", help="default: one per GPU, else one per core")
    features.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="of a job array, I from 0")
    features.add_argument("--name", help="what imported features are called (default: the file's name)")
    features.set_defaults(run=run_features)


def _add_inspection(commands: Any) -> None:
    verify = commands.add_parser("verify", help="read every byte of a dataset and list all damages")
    verify.set_defaults(run=run_verify)
    info = commands.add_parser("info", help="splits, counts, sizes, caption lengths, duplicates")
    info.add_argument("--near-duplicates", action="store_true", help="photos with a near twin in train, too")
    info.add_argument("--tokenizer", default="words", metavar="NAME", help="for the share of captions that is cut")
    info.set_defaults(run=run_info)
    show = commands.add_parser("show", help="a page of photos with their captions")
    show.add_argument("-n", type=int, default=16, metavar="N", help="photos (default 16)")
    show.add_argument("--out", type=Path, required=True, metavar="FILE.html")
    show.add_argument("--split", metavar="NAME", help="default: all splits")
    show.set_defaults(run=run_show)
    for parser in (verify, info, show):
        parser.add_argument("directory", type=_local, metavar="DIR")
    for parser in (verify, info):
        parser.add_argument("--workers", type=int, default=_num_cores(), metavar="N", help="default: all cores")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _local(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not on this machine: copy the dataset here first")
    return Path(text)


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1, e.g. 0/8")
    return int(number), int(count)


# ---- commands that write a dataset ----


def run_scenes(arguments: argparse.Namespace) -> int:
    from diffcap_dist.data.shard_format import file_sha256
    from shards import scenes
    from shards.writer import Source

    asked = {
        "num_train": arguments.train,
        "num_val": arguments.val,
        "num_test": arguments.test,
        "seed": arguments.seed,
        "max_objects": arguments.max_objects,
        "image_size": arguments.image_size,
    }
    # The renderer's code is the source of its pictures: another one is another dataset.
    provenance = {"command": "scenes", **asked, "renderer": file_sha256(Path(scenes.__file__))}
    _write(Source(scenes.generate(**asked), [], provenance, []), arguments)
    return 0


def run_dataset(arguments: argparse.Namespace) -> int:
    from shards import sources

    read = {
        "flickr8k": sources.flickr8k,
        "flickr30k": sources.flickr30k,
        "karpathy": sources.karpathy,
        "folder": sources.folder,
    }
    _write_and_import(read[arguments.command](_given_of(arguments)), arguments)
    return 0


def run_joined(arguments: argparse.Namespace) -> int:
    from shards import sources

    source = sources.flickr30k_8k(_given_of(arguments, "flickr30k_"), _given_of(arguments, "flickr8k_"))
    _write_and_import(source, arguments)
    return 0


def run_urls(arguments: argparse.Namespace) -> int:
    from shards.download import Limits, url_list
    from shards.output import refuse_code_folder

    refuse_code_folder(arguments.downloads)
    files = []
    for text in arguments.urls:
        split, equals, path = text.partition("=")
        files.append((split, Path(path)) if equals and split.isidentifier() else ("train", Path(text)))
    connections = max(1, arguments.connections // max(1, arguments.workers))
    limits = Limits(connections=connections, per_host=arguments.per_host, timeout_seconds=arguments.timeout)
    _write(url_list(files, arguments.downloads, limits, arguments.retry_failed), arguments)
    return 0


def run_between(arguments: argparse.Namespace) -> int:
    from shards import feature_import
    from shards.between import between

    if "://" in arguments.out:
        raise ValueError("features are written into a local folder: make the dataset there, then copy it")
    source, info, points_PF = between(arguments.directory, arguments.features, arguments.count, arguments.seed)
    if _write(source, arguments).index is not None:
        photo_ids = [sample.photo_id for sample in source.samples]
        how = f"between photos of {arguments.directory.name}"
        _report_features(feature_import.import_array(Path(arguments.out), info, photo_ids, points_PF, how))
    return 0


def _given_of(arguments: argparse.Namespace, prefix: str = "") -> Given:
    from shards.sources import Given

    return Given(
        captions=getattr(arguments, f"{prefix}captions"),
        split=getattr(arguments, f"{prefix}split"),
        images=getattr(arguments, f"{prefix}images"),
        npz=arguments.npz,
        allow_missing=arguments.allow_missing,
        restval=arguments.restval,
    )


def _write_and_import(source: Source, arguments: argparse.Namespace) -> None:
    """The dataset and, where the user gave them, its features."""
    from shards import feature_import

    if arguments.npz is not None and "://" in arguments.out:
        raise ValueError("--npz imports features into a local folder: make the dataset there, then copy it")
    if _write(source, arguments).index is not None and arguments.npz is not None:
        name = feature_import.name_from_file(arguments.npz)
        _report_features(feature_import.import_npz(Path(arguments.out), arguments.npz, name))


def _write(source: Source, arguments: argparse.Namespace) -> Written:
    from shards.output import output_at
    from shards.writer import ShardSettings, write_dataset

    for note in source.notes:
        print(f"note: {note}")
    settings = ShardSettings(arguments.samples_per_shard, arguments.min_side, arguments.resize, arguments.quality)
    output, start = output_at(arguments.out), time.perf_counter()
    written = write_dataset(source, output, settings, arguments.max_rejected, arguments.workers, arguments.part)
    _report_written(written, arguments, time.perf_counter() - start)
    return written


# ---- commands on a dataset that is there ----


def run_index(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from shards.foreign import format_indexed, index_tars
    from shards.output import refuse_code_folder

    for folder in (
        [arguments.out] if arguments.out else [Path(place) for place in arguments.places if "://" not in place]
    ):
        refuse_code_folder(folder)
    with tqdm(desc="index", unit="B", unit_scale=True, disable=None) as progress:
        made = index_tars(arguments.places, arguments.out, arguments.split, arguments.workers, progress.update)
    print(format_indexed(made))
    return 0


def run_features(arguments: argparse.Namespace) -> int:
    from shards import feature_encoding, feature_import

    if arguments.encoder is not None:
        if arguments.name is not None:
            raise ValueError("--name goes with --npz and --npy-dir; computed features are called after their encoder")
        made = feature_encoding.compute(
            arguments.directory,
            arguments.encoder,
            arguments.pretrained,
            arguments.patches,
            arguments.workers,
            arguments.part,
        )
    else:
        if arguments.patches or arguments.pretrained or arguments.workers is not None or arguments.part != (0, 1):
            raise ValueError("--patches, --pretrained, --workers and --part go with --encoder")
        folder, npz = arguments.npy_dir, arguments.npz
        name = arguments.name or feature_import.name_from_file(npz or folder)
        if npz is not None:
            made = feature_import.import_npz(arguments.directory, npz, name)
        else:
            made = feature_import.import_npy_dir(arguments.directory, folder, name)
    _report_features(made)
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from diffcap_dist.data.shard_format import ShardIndex
    from shards.verification import unknown_files, verify

    index = ShardIndex.load(arguments.directory)
    total = sum(shard.bytes for shard in index.shards)
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, disable=None) as progress:
        damages = verify(arguments.directory, arguments.workers, progress.update)
    for damage in damages:
        print(damage, file=sys.stderr)
    if strangers := unknown_files(arguments.directory):
        print(f"note: {len(strangers)} files are not the dataset's: {', '.join(strangers[:5])}")
    what = f"{len(index.shards)} shards, {sum(shard.samples for shard in index.shards)} samples"
    print(f"{arguments.directory}: {what}: {f'damages: {len(damages)}' if damages else 'all as written'}")
    return 1 if damages else 0


def run_info(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from shards.inspection import dataset_info, format_info

    with tqdm(desc="info", unit="B", unit_scale=True, disable=None) as progress:
        info = dataset_info(
            arguments.directory, arguments.tokenizer, arguments.near_duplicates, arguments.workers, progress.update
        )
    print(format_info(info))
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    from shards.inspection import write_contact_sheet

    shown = write_contact_sheet(arguments.directory, arguments.out, arguments.n, arguments.split)
    print(f"{shown} photos: {arguments.out}")
    return 0


# ---- reports ----


def _report_written(written: Written, arguments: argparse.Namespace, seconds: float) -> None:
    from shards.writer import REJECTED_FILE

    index = written.index
    if index is None:
        number, count = arguments.part
        kept = f", {written.shards_kept} shards were complete and are kept" if written.shards_kept else ""
        print(f"part {number} of {count} is done{kept} ({seconds:.1f} s); the part that is last writes the index")
        return
    counts = index.provenance["counts"]
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


def _report_features(made: Registered) -> None:
    info, measured = made.info, made.alignment
    for note in made.notes:
        print(f"note: {note}")
    shape = f"{info.pooled_dim}" if info.patches is None else f"{info.pooled_dim}, patches {info.patches}"
    if made.already_complete:
        print(f"features {info.name} are complete, nothing to do: {len(info.files)} shards are skipped")
        return
    if made.shards_owed:
        print(
            f"features {info.name}: this part is done; others owe {made.shards_owed} shards, and the last registers all"
        )
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
