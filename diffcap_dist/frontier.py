"""`diffcap frontier RUN ... [key=value ...] --out DIR`: quality against denoising steps, and captions per second.

In: run directories of one dataset, of any kind (continuous, masked, the autoregressive control). Out: in DIR,
frontier.json, frontier.md and frontier.svg. Each run's captioner is tried with each sampler of its kind and each number
of steps, one candidate a photo. All are timed in turn, round after round, in this one process on features that lie
ready: other programs beside it slow all alike. Quality is of the same captions. ``key=value`` words, such as
``sampler.precision=bf16`` and ``sampler.compile=true``, hold for all runs; the control writes word by word, uncompiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import torch
from tqdm import tqdm

from diffcap_dist.data.shard_format import atomic_write
from diffcap_dist.data.stream import evaluation_photos
from diffcap_dist.evaluation.captioner import Captioner
from diffcap_dist.evaluation.score_rows import ScoreRows
from diffcap_dist.evaluation.trained_run import code_commit, default_split, hardware, load_run, open_split
from diffcap_dist.evaluation.validation import photo_features
from diffcap_dist.model.denoiser import ImageFeatures
from diffcap_dist.run_dir import RunDir
from diffcap_dist.training import distributed

SAMPLERS: dict[str, dict[str, dict[str, Any]]] = {
    "continuous": {
        "DDIM": {"name": "ddim", "eta": 0.0},
        "DDPM": {"name": "ddim", "eta": 1.0},
        "DDIM, time difference 0.1": {"name": "ddim", "eta": 0.0, "time_difference": 0.1},
        "x0 feedback": {"name": "x0_feedback"},
    },
    "masked": {"unmasking": {"revise": False}, "unmasking, revised": {"revise": True}},
    "autoregressive": {"greedy": {"num_beams": 1}, "3 beams": {"num_beams": 3}},
}
# What is set for every point, over whatever a run's own config says.
FIXED = {"candidates": 1, "temperature": 0.0}
VARIED = {"num_inference_steps", *FIXED, *(s for kind in SAMPLERS.values() for some in kind.values() for s in some)}


@dataclass
class Point:
    """One captioner with one sampler: what it costs and what it is worth."""

    run: str
    kind: str
    sampler: str
    num_inference_steps: int | None  # None: a step a word
    captioner: Captioner
    seconds: list[float] = field(default_factory=list)  # for all photos, a round each
    scores: dict[str, float] = field(default_factory=dict)

    def record(self, photos: int) -> dict[str, Any]:
        """For frontier.json."""
        told = {name: getattr(self, name) for name in ("run", "kind", "sampler", "num_inference_steps", "seconds")}
        return {**told, "captions_per_second": photos / statistics.median(self.seconds), **self.scores}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="diffcap frontier", description=__doc__)
    parser.add_argument(
        "words", nargs="+", metavar="RUN ... key=value", help="run directories of one dataset; settings of all of them"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=_numbers, default=[1, 2, 3, 5, 10, 20], metavar="1,2,5", help="denoising steps")
    parser.add_argument("--photos", type=int, default=256, help="of the test split (default 256)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed; the median counts (default 3)")
    parser.add_argument("--batch-size", type=int, default=64, help="photos at a time (default 64)")
    args = parser.parse_intermixed_args(argv)  # words behind the options too
    args.runs = [Path(word) for word in args.words if "=" not in word]
    args.settings = [word for word in args.words if "=" in word]
    for word in args.settings:
        if word.split("=")[0].removeprefix("sampler.") in VARIED:
            parser.error(f"{word}: that is what a frontier tries, or keeps alike, itself")
    if not args.runs:
        parser.error("no run directory is among the words")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    ranks = distributed.init_ranks()
    try:
        points, photos = measure(args, ranks)
    finally:
        distributed.finish()
    result = {
        "command": "diffcap frontier " + " ".join(sys.argv[1:] if argv is None else argv),
        "photos": photos,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "hardware": hardware(ranks),
        "commit": code_commit(),
        "settings": args.settings,
        "precision": points[0].captioner.config.sampler.precision,
        "compiled": any(point.captioner.config.sampler.compile for point in points),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "points": [point.record(photos) for point in points],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out / "frontier.json", json.dumps(result, indent=2).encode())
    text = as_markdown(result)
    atomic_write(args.out / "frontier.md", text.encode())
    atomic_write(args.out / "frontier.svg", as_svg(result).encode())
    print(text)
    print(f"{args.out}/frontier.json, frontier.md, frontier.svg")
    return 0


def measure(args: argparse.Namespace, ranks: distributed.Ranks) -> tuple[list[Point], int]:
    """All points, timed and scored, and the number of photos. ValueError where the runs are not of one dataset."""
    points, datasets, batches, rows = [], set(), [], None
    for path in args.runs:
        settings = ["sampler.candidates=1", *args.settings]
        if RunDir(path).load_config().kind == "autoregressive":  # would refuse it
            settings = [word for word in settings if not word.startswith("sampler.compile=")]
        captioner, encoder = load_run(RunDir(path), settings, ranks)
        data = captioner.config.data
        datasets.add((data.shards, data.features, captioner.config.encoder.patches))
        if len(datasets) > 1:
            raise ValueError(f"the runs caption different photos, or see them differently: {sorted(datasets)}")
        if rows is None:
            reader = open_split(captioner, default_split(captioner), encoder)
            photos = list(islice(evaluation_photos(reader), args.photos))
            rows = ScoreRows({photo.key: photo.record for photo in photos})
            for start in range(0, len(photos), args.batch_size):
                batch = photos[start : start + args.batch_size]
                features = photo_features(batch, encoder, ranks.device, torch.float32)
                batches.append(([photo.key for photo in batch], features))
        points += points_of(path, captioner, args.steps)
    assert rows is not None
    total = sum(len(keys) for keys, _ in batches)
    for number in tqdm(range(args.rounds), unit="round", disable=None, dynamic_ncols=True):
        for point in points:
            captions, seconds = caption_all(point.captioner, batches, ranks.device)
            point.seconds.append(seconds)
            if number == 0:
                scores = rows.of(captions)
                point.scores = {n: scores[n] for n in ("bleu_4", "cider_d", "scene_accuracy") if n in scores}
    return points, total


def points_of(path: Path, captioner: Captioner, steps: Sequence[int]) -> list[Point]:
    """Every sampler of the captioner's kind, with every number of steps."""
    kind = captioner.config.kind
    found = []
    for name, settings in SAMPLERS[kind].items():
        for count in [None] if kind == "autoregressive" else steps:
            sampler = dataclasses.replace(
                captioner.config.sampler, num_inference_steps=count or 1, **{**FIXED, **settings}
            )
            config = dataclasses.replace(captioner.config, sampler=sampler)
            other = Captioner(captioner.network, config, captioner.tokenizer)
            found.append(Point(RunDir(path).root.name, kind, name, count, other))
    return found


def caption_all(
    captioner: Captioner, batches: Sequence[tuple[list[str], ImageFeatures]], device: torch.device
) -> tuple[dict[str, str], float]:
    """Captions by key, and the seconds that they took."""
    captions: dict[str, str] = {}
    started = time.perf_counter()
    for keys, features in batches:
        captions.update(zip(keys, captioner.caption(features, keys)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return captions, time.perf_counter() - started


def as_markdown(result: dict[str, Any]) -> str:
    """The table, and how much faster than the greedy control each kind is where it is at least as good."""
    scores = [n for n in ("bleu_4", "cider_d", "scene_accuracy") if n in result["points"][0]]
    greedy = next((p for p in result["points"] if p["sampler"] == "greedy"), None)
    head = ["run", "kind", "sampler", "steps", *scores, "captions/s"] + (["beside greedy"] if greedy else [])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for p in result["points"]:
        cells = [p["run"], p["kind"], p["sampler"], str(p["num_inference_steps"] or "a step a word")]
        cells += [f"{p[name]:.3f}" for name in scores] + [f"{p['captions_per_second']:.0f}"]
        cells += [f"{p['captions_per_second'] / greedy['captions_per_second']:.2f}"] if greedy else []
        lines.append("| " + " | ".join(cells) + " |")
    found = result["hardware"]
    device = found["gpu"] or f"{found['cpus']} {found['machine']} CPUs, {result['threads']} threads"
    told = (
        f"{result['photos']} photos, {result['batch_size']} at a time, one candidate, {result['precision']}"
        + (", denoisers compiled" if result["compiled"] else ""),
        f"medians of {result['rounds']} rounds",
        f"{device}, torch {found['torch']}, load average {result['load']:.1f}",
        f"commit {result['commit'] or 'unknown'}. `{result['command']}`",
    )
    lines += ["", "; ".join(told)]
    for kind in ("continuous", "masked"):
        ours = [p for p in result["points"] if p["kind"] == kind]
        if greedy is None or not ours:
            continue
        equal = [p for p in ours if p["bleu_4"] >= greedy["bleu_4"]]
        if equal:
            best = max(equal, key=lambda p: p["captions_per_second"])
            ratio = best["captions_per_second"] / greedy["captions_per_second"]
            said = f"{kind}: {ratio:.2f} times the captions/s of greedy at no lower BLEU-4 ({best['sampler']}, "
            said += f"{best['num_inference_steps']} steps)"
        else:
            best = max(ours, key=lambda p: p["bleu_4"])
            said = f"{kind}: below greedy's BLEU-4 everywhere; at best {best['bleu_4'] / greedy['bleu_4']:.2f} of it"
            said += f" ({best['sampler']}, {best['num_inference_steps']} steps)"
        lines += ["", said]
    return "\n".join(lines) + "\n"


PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, GAP = 400.0, 300.0, 60.0, 34.0, 70.0


def as_svg(result: dict[str, Any]) -> str:
    """BLEU-4 against steps and against captions/s; a line for each run and sampler."""
    points = result["points"]
    top = max(0.01, *(p["bleu_4"] for p in points)) * 1.05
    stepped = [p for p in points if p["num_inference_steps"]]
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for p in points:
        lines.setdefault((p["run"], p["sampler"]), []).append(p)
    panels = []
    for number, (title, name, some) in enumerate(
        [("denoising steps", "num_inference_steps", stepped), ("captions per second", "captions_per_second", points)]
    ):
        values = [p[name] for p in some] or [1]
        low, high = math.log(min(values)) - 0.1, math.log(max(values)) + 0.1
        left = LEFT + number * (PANEL_WIDTH + GAP)

        def place(p: dict[str, Any], name: str = name, low: float = low, high: float = high, left: float = left) -> Any:
            x = left + (math.log(p[name]) - low) / (high - low) * PANEL_WIDTH
            return round(x, 1), round(TOP + PANEL_HEIGHT * (1 - p["bleu_4"] / top), 1)

        ticks = sorted({*values}) if name == "num_inference_steps" else _round_values(min(values), max(values))
        drawn = []
        for index, part in enumerate(lines.values()):
            inside = sorted((p for p in part if p[name]), key=lambda p: p[name])
            drawn.append({"color": index, "at": [(*place(p), _hover(p)) for p in inside]})
        panels.append(
            {
                "title": title,
                "left": left,
                "ticks": [(place({name: tick, "bleu_4": 0})[0], f"{tick:g}") for tick in ticks],
                "lines": drawn,
            }
        )
    levels = [round(top * share, 2) for share in (0.25, 0.5, 0.75)]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("diffcap_dist").joinpath("frontier.svg.j2").read_text(encoding="utf-8"))
    return template.render(
        panels=panels,
        names=[f"{run}: {sampler}" for run, sampler in lines],
        levels=[(round(TOP + PANEL_HEIGHT * (1 - level / top), 1), f"{level:.2f}") for level in levels],
        size=(PANEL_WIDTH, PANEL_HEIGHT, TOP),
        width=LEFT + 2 * PANEL_WIDTH + GAP + 20,
        height=TOP + PANEL_HEIGHT + 60 + 18 * math.ceil(len(lines) / 3),
    )


def _hover(p: dict[str, Any]) -> str:
    steps = f"{p['num_inference_steps']} steps, " if p["num_inference_steps"] else ""
    return f"{p['run']}, {p['sampler']}: {steps}BLEU-4 {p['bleu_4']:.3f}, {p['captions_per_second']:.0f} captions/s"


def _round_values(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between the two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**power for power in powers for factor in (1, 2, 5) if low <= factor * 10.0**power <= high]


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of at least 1, e.g. 1,5,10")
    return sorted({int(part) for part in parts})


if __name__ == "__main__":
    sys.exit(main())
