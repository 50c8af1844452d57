"""`diffcap report RUN`: what a run trained, scored and wrote, as one page, `RUN/report.html`; of a sweep, its table.

In: a run directory (config.yaml, metrics.jsonl, scores.json, predictions/) and the shards its pictures lie in. Out: one
self-contained HTML file: no script, no link to anything outside. What the run does not have is said on the page. It
computes no score of its own but the facts of shown captions; the page's words and looks are in report.html.j2.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jinja2
from PIL import Image

from diffcap_dist.config import Config
from diffcap_dist.data.photo import upright_rgb
from diffcap_dist.data.shard_format import atomic_write, references_of
from diffcap_dist.data.shard_store import ShardStore
from diffcap_dist.evaluation.scene_facts import Scene, judge
from diffcap_dist.run_dir import RunDir
from diffcap_dist.sweep_dir import SweepDir
from diffcap_dist.sweep_report import write_sweep_report

NUM_EMERGENCES = 6
NUM_GALLERY = 24
PICTURE_EDGE = 400  # pixels; larger photos are embedded smaller, they are shown at 160 CSS pixels

# key, name, what it is, how it is written
SCORES = (
    ("bleu_1", "BLEU-1", "words that a reference has too", "{:.3f}"),
    ("bleu_2", "BLEU-2", "and pairs of words", "{:.3f}"),
    ("bleu_3", "BLEU-3", "and runs of three", "{:.3f}"),
    ("bleu_4", "BLEU-4", "and runs of four: wording and order", "{:.3f}"),
    ("cider_d", "CIDEr-D", "telling words weigh more (papers print it × 100)", "{:.2f}"),
    ("rouge_l", "ROUGE-L", "longest common word sequence", "{:.3f}"),
    ("scene_accuracy", "Scene accuracy", "of the facts stated, the share true of the picture", "{:.1%}"),
    ("scene_all_true", "All facts true", "captions that state nothing false", "{:.1%}"),
    ("objects_mentioned", "Objects mentioned", "of the picture's objects, the share named", "{:.1%}"),
)
TEXT_SCORES = (
    ("clip_score", "CLIPScore", "2.5 × cosine of caption and picture, by the CLIP of this run", "{:.3f}"),
    ("ref_clip_score", "RefCLIPScore", "and of the nearest reference, harmonic mean", "{:.3f}"),
    ("distinct_1", "Distinct words", "different words, of all words in all captions", "{:.2%}"),
    ("distinct_2", "Distinct pairs", "different pairs of words, of all pairs", "{:.2%}"),
    ("unique_captions", "Unique captions", "different captions, of all captions", "{:.1%}"),
    ("mean_length", "Length", "words in a caption, mean", "{:.1f}"),
    ("repeated_words", "Repeated words", "captions with a word twice in a row", "{:.1%}"),
)
FORMATS = {key: how for key, _, _, how in SCORES}

T = TypeVar("T")
Points = list[tuple[float, float | None]]  # (step, value); None: not finite


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="diffcap report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or a sweep's (launch/sweep.py)")
    folder = parser.parse_args(argv).run
    if SweepDir(folder).description.is_file():
        page, table = write_sweep_report(SweepDir(folder))
        print(table)
        print(page)
    else:
        print(write_report(RunDir(folder)))
    return 0


def write_report(run: RunDir) -> Path:
    """Write the page of ``run``; returns its path. Raises ValueError when ``run`` is no run directory."""
    atomic_write(run.report, render(read_run(run)).encode())
    return run.report


# ---- what the run has ----


@dataclass(frozen=True)
class Sample:
    """What the shards know of a photo."""

    picture: str | None  # a data: URI; None: the shards have captions only
    captions: list[str]
    scene: Scene | None


@dataclass(frozen=True)
class RunData:
    """All that the page is made of; ``missing`` says, by section, what the run lacks."""

    folder: Path
    config: Config
    config_text: str
    start: dict[str, str]  # what the last start of training derived and printed
    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    scores: dict[str, Any]
    predictions: dict[str, dict[str, Any]]  # by key, in the file's order
    emergences: list[dict[str, Any]]
    samples: dict[str, Sample]  # of the photos that are shown
    missing: dict[str, str]


def read_run(run: RunDir) -> RunData:
    config, missing = run.load_config(), {}
    records = list(run.read_metrics())
    if not records:
        missing["metrics"] = "No metrics.jsonl in this run: it has not been trained yet."
    scores = json.loads(run.scores.read_text(encoding="utf-8")) if run.scores.is_file() else {}
    if not scores.keys() - {"seed_protocol"}:
        scores = {}
        missing["scores"] = "No scores.json in this run: it has not been evaluated yet."
    split = scores.get("split", "test")
    predictions, emergences = _read_captions(run, split, missing)
    shown = {*spread(list(predictions), NUM_GALLERY), *(entry["key"] for entry in emergences)}
    samples: dict[str, Sample] = {}
    try:
        samples = read_samples(_store(config), split, shown) if shown else {}
    except ValueError as error:
        missing["pictures"] = f"The pictures could not be read: {error}."
    return RunData(
        folder=run.root,
        config=config,
        config_text=run.config.read_text(encoding="utf-8"),
        start=_start_facts(records),
        training=last_of_each_step(records, "training"),
        validation=last_of_each_step(records, "validation"),
        scores=scores,
        predictions=predictions,
        emergences=emergences,
        samples=samples,
        missing=missing,
    )


def _store(config: Config) -> ShardStore:
    data = config.data
    return ShardStore(data.shards, Path(data.cache) if data.cache else None, int(data.cache_gb * 1e9) or None)


def last_of_each_step(records: Iterable[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Records of one kind by step; a resumed run logs a step twice, and the last line counts."""
    by_step = {record["step"]: dict(record) for record in records if record.get("kind") == kind}
    return [by_step[step] for step in sorted(by_step)]


def read_samples(store: ShardStore, split: str, keys: set[str]) -> dict[str, Sample]:
    """Pictures, captions and scenes of ``keys``. Raises ValueError naming the keys that the split does not have."""
    found: dict[str, Sample] = {}
    for info in store.index.split(split):
        shard = store.open(info)
        for number in range(len(shard)):
            if (key := shard.key(number)) in keys:
                record, data = shard.record(number), shard.image_bytes(number)
                found[key] = Sample(picture_uri(data) if data else None, references_of(record), record.get("scene"))
        shard.close()
    if lost := sorted(keys - found.keys()):
        raise ValueError(
            f"{len(lost)} captioned photos, such as {lost[0]!r}, are not in split {split!r} of {store.where}"
        )
    return found


def picture_uri(data: bytes) -> str:
    """The picture as a data: URI, its own bytes when it is small enough."""
    picture: Image.Image = Image.open(io.BytesIO(data))
    mime = Image.MIME[str(picture.format)]
    if max(picture.size) > PICTURE_EDGE:
        picture = upright_rgb(picture)
        picture.thumbnail((PICTURE_EDGE, PICTURE_EDGE))
        small = io.BytesIO()
        picture.save(small, "JPEG", quality=88)
        data, mime = small.getvalue(), "image/jpeg"
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def spread(items: Sequence[T], count: int) -> list[T]:
    """``count`` items evenly spaced over all (all of them when there are fewer)."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def _read_captions(
    run: RunDir, split: str, missing: dict[str, str]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    predictions, emergences = run.predictions / f"{split}.jsonl", run.predictions / "emergence.json"
    for section, path in (("predictions", predictions), ("emergence", emergences)):
        if not path.is_file():
            missing[section] = f"No predictions/{path.name} in this run: evaluate it to fill this part."
    lines = [] if "predictions" in missing else predictions.read_text(encoding="utf-8").splitlines()
    drafts = [] if "emergence" in missing else json.loads(emergences.read_text(encoding="utf-8"))
    entries = [json.loads(line) for line in lines]
    return {entry["key"]: entry for entry in entries}, drafts[:NUM_EMERGENCES]


def _start_facts(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    starts = [record for record in records if record.get("kind") == "start"]
    return {name: fact for name, fact in starts[-1].items() if name not in ("kind", "step", "run")} if starts else {}


# ---- scores ----


@dataclass(frozen=True)
class Tile:
    """One headline number; ``marks`` and ``fill`` are per cent along its bar."""

    label: str
    value: str
    note: str
    fill: float | None = None
    marks: dict[str, float] = field(default_factory=dict)


def tiles(scores: Mapping[str, Any], training_seconds: float | None) -> list[Tile]:
    third = "scene_accuracy" if "scene_accuracy" in scores else "rouge_l"
    gap = scores.get("gap_closed")
    return [
        *(score_tile(key, scores) for key in ("bleu_4", "cider_d", third)),
        Tile(
            "Gap closed",
            written(gap, "{:.0%}"),
            "of the way in BLEU-4 from the floor to a person",
            None if gap is None else min(100.0, max(0.0, 100 * gap)),
        ),
        Tile("Denoising steps", written(scores.get("num_inference_steps")), _sampler_note(scores)),
        Tile("Captions per second", written(scores.get("captions_per_second"), "{:.1f}"), _ranks_note(scores)),
        Tile("Held-out pictures", written(scores.get("photos"), "{:,}"), f"the {scores.get('split', 'test')} split"),
        Tile("Time", duration(scores.get("seconds")), _time_note(scores, training_seconds)),
    ]


def score_tile(key: str, scores: Mapping[str, Any]) -> Tile:
    """A score with the floor and human ones as marks on its bar, which ends at the largest of them."""
    name = next(name for known, name, _, _ in SCORES if known == key)
    others = {row: scores.get(row, {}).get(key) for row in ("floor", "human")}
    note = " · ".join(f"{row} {written(value, FORMATS[key])}" for row, value in others.items())
    value = scores.get(key)
    numbers = {row: number for row, number in others.items() if number is not None}
    top = max([*numbers.values(), value or 0.0])
    if value is None or top <= 0:
        return Tile(name, written(value, FORMATS[key]), note)
    marks = {row: 100 * number / top for row, number in numbers.items()}
    return Tile(name, written(value, FORMATS[key]), note, 100 * value / top, marks)


def compared(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The columns of the score table; retrieval may have several, each with its own name."""
    return {
        "floor": scores.get("floor", {}),
        **scores.get("retrieval", {}),
        "model": scores,
        "human": scores.get("human", {}),
    }


def score_rows(
    scores: Mapping[str, Any], known: Sequence[tuple[str, str, str, str]] = SCORES
) -> list[tuple[str, str, list[str]]]:
    """(score, what it is, its value in each column); scores that nobody has are left out."""
    columns = compared(scores).values()
    return [
        (name, meaning, [written(column.get(key), how) for column in columns])
        for key, name, meaning, how in known
        if any(key in column for column in columns)
    ]


def written(value: float | None, how: str = "{}") -> str:
    return "–" if value is None else how.format(value)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _sampler_note(scores: Mapping[str, Any]) -> str:
    return (
        f"guidance {written(scores.get('guidance_scale'))} · candidates per picture {written(scores.get('candidates'))}"
    )


def _ranks_note(scores: Mapping[str, Any]) -> str:
    ranks = scores.get("world_size")
    return "rank count not recorded" if ranks is None else f"on {ranks} rank{'s' if ranks != 1 else ''} together"


def _time_note(scores: Mapping[str, Any], training_seconds: float | None) -> str:
    """What ``seconds`` covers: an evaluation's own, photos / speed, or those of a whole demo, which are more."""
    captioning = scores.get("photos", 0) / scores["captions_per_second"] if "captions_per_second" in scores else None
    note = f"training {duration(training_seconds)}" if training_seconds is not None else "training not recorded"
    if captioning is None or "seconds" not in scores:
        return note
    whole = scores["seconds"] > 1.05 * captioning
    return f"{'for everything' if whole else 'for captioning'} · {note}"


# ---- curves: geometry here, SVG in the template ----

CHART_WIDTH, CHART_HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 44.0, 392.0, 12.0, 208.0  # of the plot, in the chart's own units
MOST_POINTS = 240


@dataclass(frozen=True)
class Curve:
    name: str
    last: str
    path: str  # SVG path data
    dots: list[tuple[float, float, str]]  # x, y, what a pointer over it reads


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    curves: list[Curve] = field(default_factory=list)
    levels: list[tuple[str, str, float]] = field(default_factory=list)  # name, value, y
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)


def charts(data: RunData) -> list[Chart]:
    second = "scene_accuracy" if any("scene_accuracy" in line for line in data.validation) else "cider_d"
    terms = {name: points(data.training, name) for name in ("loss", "rounding", "restore", "first_step", "length")}
    if terms["rounding"] == terms["loss"]:
        del terms["rounding"]  # the loss has that term only
    rewards = points(data.training, "reward")
    if rewards:
        del terms["loss"]  # its gradient means something, its value nothing
    drawn = [
        chart(
            "Loss",
            "training loss, its terms, and the validation loss (at fixed timesteps and noise)",
            {**terms, "validation": points(data.validation, "val_loss")},
        ),
        score_chart("bleu_4", data),
        score_chart(second, data),
        chart("Learning rate", "per optimizer step", {"learning rate": points(data.training, "learning_rate")}),
        chart("Throughput", "samples per second", {"samples/s": points(data.training, "samples_per_second")}),
        chart("Gradient norm", "before clipping", {"norm": points(data.training, "grad_norm")}),
    ]
    if rewards:
        drawn.append(chart("Reward", "mean CIDEr-D of the captions drawn of a step's photos", {"reward": rewards}))
    if directions := points(data.validation, "resultant_length"):
        note = "length of the mean of the trained words' unit vectors: 1 where all have collapsed into one direction"
        drawn.append(chart("Words' directions", note, {"resultant length": directions}))
    return drawn


def score_chart(key: str, data: RunData) -> Chart:
    name = next(name for known, name, _, _ in SCORES if known == key)
    levels = {row: data.scores[row][key] for row in ("floor", "human") if key in data.scores.get(row, {})}
    note = "quick validation; dashed: floor and human on the scored split" if levels else "quick validation"
    return chart(f"{name} while training", note, {name: points(data.validation, key)}, levels)


def points(records: Iterable[Mapping[str, Any]], key: str) -> Points:
    return [(record["step"], record[key]) for record in records if key in record]


def chart(title: str, note: str, curves: Mapping[str, Points], levels: Mapping[str, float] | None = None) -> Chart:
    """Curves over steps, with horizontal ``levels``; both axes start at 0 and end at a round number."""
    curves = {name: thinned(points) for name, points in curves.items() if any(y is not None for _, y in points)}
    if not curves:
        return Chart(title, note)
    levels = levels or {}
    x_ticks = round_ticks(max(x for points in curves.values() for x, _ in points))
    y_ticks = round_ticks(
        max([y for points in curves.values() for _, y in points if y is not None] + [*levels.values()])
    )
    x_scale, y_scale = (RIGHT - LEFT) / x_ticks[-1], (BOTTOM - TOP) / y_ticks[-1]
    return Chart(
        title,
        note,
        [
            curve(name, [(x, y, LEFT + x * x_scale, BOTTOM - (y or 0) * y_scale) for x, y in points])
            for name, points in curves.items()
        ],
        [(name, compact(y), BOTTOM - y * y_scale) for name, y in levels.items()],
        [(LEFT + x * x_scale, compact(x)) for x in x_ticks],
        [(BOTTOM - y * y_scale, compact(y)) for y in y_ticks],
    )


def curve(name: str, placed: Sequence[tuple[float, float | None, float, float]]) -> Curve:
    """A path through (step, value, x, y), broken where there is no value; few points are dotted as well."""
    path, pen_down = "", False
    for _, value, x, y in placed:
        if value is not None:
            path += f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}"
        pen_down = value is not None
    known = [(step, value, x, y) for step, value, x, y in placed if value is not None]
    dots = [(x, y, f"step {step:.0f}: {compact(value)}") for step, value, x, y in known]
    return Curve(name, compact(known[-1][1]), path, dots if len(dots) <= 40 else [])


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most ``most`` points, each the mean of its neighbours, so that a long run is still a small page."""
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if size > 1 else []
    return [_mean_point(group) for group in groups] or points


def round_ticks(top: float) -> list[float]:
    """0 and 3 to 5 more round numbers, the last at or above ``top``."""
    if top <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(top / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * 5 >= top * (1 - 1e-9))
    return [i * step for i in range(math.ceil(top / step * (1 - 1e-9)) + 1)]


def compact(value: float) -> str:
    """A number in few characters: 0.41, 1.5k, 5e-5."""
    if value and abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _mean_point(group: Points) -> tuple[float, float | None]:
    values = [y for _, y in group if y is not None]
    return sum(x for x, _ in group) / len(group), sum(values) / len(values) if values else None


# ---- captions ----


@dataclass(frozen=True)
class Word:
    text: str
    changed: bool
    opacity: float


@dataclass(frozen=True)
class Row:
    """One draft of a caption: how much noise is left, and its words."""

    step: int
    t: float
    words: list[Word]


@dataclass(frozen=True)
class Card:
    """A photo with its caption, what is true of it, and what people wrote; ``rows``: how the caption came to be."""

    key: str
    caption: str
    references: list[str]
    picture: str | None
    facts: tuple[int, int] | None  # (true, stated); None: no ground truth
    rows: list[Row] = field(default_factory=list)


def gallery_cards(data: RunData) -> list[Card]:
    return [_card(data, key, data.predictions[key]["caption"]) for key in spread(list(data.predictions), NUM_GALLERY)]


def emergence_cards(data: RunData) -> list[Card]:
    """The caption is the one that was kept: with several candidates, perhaps not the one that the drafts end in."""
    cards = []
    for entry in data.emergences:
        kept = data.predictions.get(entry["key"], entry["drafts"][-1])["caption"]
        cards.append(_card(data, entry["key"], kept, draft_rows(entry)))
    return cards


def draft_rows(entry: Mapping[str, Any]) -> list[Row]:
    """The drafts of one photo; a word is ``changed`` when the draft before did not have it there."""
    rows, before = [], None
    for draft in entry["drafts"]:
        words = draft["caption"].split()
        confidence = draft.get("confidence", [1.0] * len(words))
        if len(confidence) != len(words):
            raise ValueError(
                f"predictions/emergence.json, key {entry['key']!r}, step {draft['step']}: {len(words)} words but "
                f"{len(confidence)} confidences; expected one per word. Evaluate the run again"
            )
        changed = changed_words(before, words) if before is not None else set()
        rows.append(
            Row(
                draft["step"],
                draft["t"],
                [Word(word, i in changed, opacity(confidence[i])) for i, word in enumerate(words)],
            )
        )
        before = words
    return rows


def changed_words(before: Sequence[str], after: Sequence[str]) -> set[int]:
    """Places in ``after`` of words that a shortest edit from ``before`` puts there."""
    edits = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return {place for kind, _, _, start, end in edits if kind != "equal" for place in range(start, end)}


def opacity(confidence: float) -> float:
    """A doubtful word is faint, but can still be read."""
    return round(0.42 + 0.58 * min(1.0, max(0.0, confidence)), 2)


def _card(data: RunData, key: str, caption: str, rows: Sequence[Row] = ()) -> Card:
    sample = data.samples.get(key)
    judgement = judge(caption, sample.scene) if sample and sample.scene else None
    return Card(
        key,
        caption,
        data.predictions.get(key, {}).get("references", sample.captions if sample else []),
        sample.picture if sample else None,
        (judgement.facts_true, judgement.facts_stated) if judgement else None,
        list(rows),
    )


# ---- what kind of model this is ----


class Story(NamedTuple):
    """How captions come about, in words: title, what the model does in so many steps, and what its drafts show."""

    title: str
    what: str
    drafts_title: str
    drafts: str


STORIES = {
    "masked": Story(
        "Captions that fill in from blanks",
        "A captioner that writes by masked diffusion: every word of a caption starts hidden, and {steps} steps write "
        "them, the surest first, while the model looks at the picture.",
        "How a caption fills in",
        "The model's whole caption at each step. The number is t, the share of the words that were still hidden when "
        "the step began: at t = 1 the model sees only the picture.",
    ),
    "continuous": Story(
        "Captions that emerge from noise",
        "A captioner that writes by diffusion: every word of a caption starts as pure noise, and all words are cleaned "
        "up together, in {steps} steps, while the model looks at the picture.",
        "How a caption emerges from noise",
        "The model's estimate of the whole caption at each denoising step. The number is t, the time of the step: at "
        "t = 1 the model sees only noise and the picture, near t = 0 a sentence.",
    ),
    "autoregressive": Story(
        "Captions written left to right",
        "The control: the same network without diffusion, which writes a word a step behind those before it, while it "
        "looks at the picture.",
        "How a caption is written",
        "The caption so far, a word a step. The number is t, the share of the positions that were still free.",
    ),
}


# ---- setup ----


def settings(config: Config, scores: Mapping[str, Any]) -> dict[str, str]:
    """The settings a reader asks for first; all others stand in the config below them."""
    data, model, diffusion, training = config.data, config.model, config.diffusion, config.training
    optimizer, encoder = config.optimizer, config.encoder
    return {
        "Shards": data.shards + (f", features {data.features}" if data.features else ", encoder online"),
        "Encoder (frozen)": encoder.name + (f", {encoder.pretrained}" if encoder.pretrained else ""),
        "Denoiser": f"{model.num_layers} layers × {model.width}, {model.num_heads} heads, {model.body} body",
        "Words": f"{data.tokenizer} tokenizer, {data.max_length} tokens, {model.embedding_dim}-d embeddings",
        "Noise": {
            "masked": "a share t of the words is hidden, t evenly over [0, 1]",
            "continuous": f"{diffusion.schedule} schedule, {diffusion.num_timesteps} timesteps, "
            f"scale {diffusion.noise_scale:g}",
            "autoregressive": "none: left to right",
        }[config.kind],
        "Loss weights": f"rounding {diffusion.rounding_weight:g}, restore {diffusion.restore_weight:g}",
        "Optimizer": f"AdamW, {optimizer.learning_rate:g}, {optimizer.schedule}, warm-up {optimizer.warmup_steps}",
        "Training": f"{training.num_steps:,} steps of {training.global_batch_size} photos, EMA {training.ema_decay:g}",
        "DeepSpeed": f"ZeRO stage {training.zero_stage}, {training.precision} precision",
        "Scored": f"step {written(scores.get('step'))} on {written(scores.get('world_size'))} rank(s)",
        "Seed": str(config.seed),
    }


def commands(folder: Path) -> str:
    return "\n".join(
        [
            "# train again, or on from where it stopped",
            f"diffcap train {folder}/config.yaml",
            "# the same on all ranks of a machine",
            f"deepspeed --module diffcap_dist.train {folder}/config.yaml",
            "# scores, then this page",
            f"diffcap evaluate {folder} && diffcap report {folder}",
            "# a caption for your own picture",
            f"diffcap caption --run {folder} photo.jpg",
        ]
    )


# ---- the page ----


def render(data: RunData) -> str:
    """The whole page; every text in it is escaped."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files("diffcap_dist").joinpath("report.html.j2").read_text(encoding="utf-8"))
    story = STORIES[data.config.kind]
    steps = data.scores.get("num_inference_steps", data.config.sampler.num_inference_steps)
    return template.render(
        name=data.folder.resolve().name,
        story=story,
        what=story.what.format(steps=steps),
        steps=steps if data.config.kind != "autoregressive" else None,
        scores=data.scores,
        missing=data.missing,
        tiles=tiles(data.scores, data.training[-1].get("seconds") if data.training else None),
        compared=list(compared(data.scores)),
        score_rows=score_rows(data.scores),
        text_rows=score_rows(data.scores, TEXT_SCORES),
        charts=charts(data),
        plot={"width": CHART_WIDTH, "height": CHART_HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        emergences=emergence_cards(data),
        gallery=gallery_cards(data),
        start=data.start,
        settings=settings(data.config, data.scores),
        config_text=data.config_text,
        commands=commands(data.folder),
    )


if __name__ == "__main__":
    sys.exit(main())
