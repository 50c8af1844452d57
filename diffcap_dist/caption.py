"""`diffcap caption --run RUN photo.jpg FOLDER ...`: captions for picture files, by a trained captioner.

In: a run directory (or its ``export/`` folder alone) and picture files or folders of them. Out: one line per picture on
standard output, or JSON. Needs no DeepSpeed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="diffcap caption", description=__doc__)
    parser.add_argument("pictures", nargs="+", type=Path, help="picture files, or folders of them")
    parser.add_argument("--run", type=Path, required=True, help="a run directory, or an export folder")
    parser.add_argument("--steps", type=int, help="denoising steps (sampler.num_inference_steps)")
    parser.add_argument(
        "--candidates", type=int, help="captions drawn per picture; the one nearest to the others is kept"
    )
    parser.add_argument("--json", action="store_true", help='print [{"picture": ..., "caption": ...}, ...]')
    args = parser.parse_args(argv)
    files = picture_files(args.pictures)
    chosen = {"num_inference_steps": args.steps, "candidates": args.candidates}
    settings = [f"sampler.{name}={value}" for name, value in chosen.items() if value is not None]
    captions = caption_files(args.run, files, settings)
    if args.json:
        print(json.dumps([{"picture": str(f), "caption": c} for f, c in zip(files, captions)], indent=2))
    else:
        print("\n".join(f"{file}\t{caption}" for file, caption in zip(files, captions)))
    return 0


def picture_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and the pictures inside the folders named. ValueError for what is not there."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
            if not inside:
                raise ValueError(f"no pictures ({', '.join(sorted(PICTURES))}) in the folder {path}")
            files.extend(inside)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"no such picture or folder: {path}")
    return files


def caption_files(run: Path, files: Sequence[Path], settings: Sequence[str] = (), batch_size: int = 32) -> list[str]:
    """Captions of picture files. Raises ValueError naming a file that can't be decoded."""
    import torch

    from diffcap_dist.evaluation.captioner import encode_images, load_captioner
    from diffcap_dist.model.denoiser import ImageFeatures
    from diffcap_dist.run_dir import RunDir

    folder = RunDir(run).export if RunDir(run).export.is_dir() else run
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    captioner = load_captioner(folder, settings, device)
    captions: list[str] = []
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        features: ImageFeatures = encode_images(folder, captioner.config, [_open(file) for file in batch])
        captions += captioner.caption(features.to(device, torch.float32), [file.name for file in batch])
    return captions


def _open(file: Path):  # type: ignore[no-untyped-def]  # PIL is imported late: --help answers at once
    from diffcap_dist.data.photo import decode_photo

    try:
        return decode_photo(file.read_bytes())
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise ValueError(f"{file} can't be decoded as a picture: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
