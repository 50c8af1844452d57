"""The page of a sweep: its table as published, as logged, and as its cells came out; ``report.html`` and ``table.md``.

In: a sweep's folder (sweep.json, the cells' scores.json and metrics.jsonl). Out: both files. A number that was not run
is blank. It computes no score; of the cells it takes means, spreads and differences over seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from diffcap_dist.config import Config, differences
from diffcap_dist.data.shard_format import atomic_write
from diffcap_dist.run_dir import RunDir
from diffcap_dist.sweep_dir import Conclusion, Row, SweepDir, Table, error_file

LAST_SHARE = 0.1  # of the training steps: a row's losses are the mean over these
# Two-sided 95% points of Student's t, by degrees of freedom; the largest not above those at hand is taken.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 8: 2.31, 10: 2.23, 15: 2.13, 20: 2.09, 30: 2.04}
NOT_COMPARABLE = (
    "The seed's protocol is the mean of BLEU-4 over batches of eight caption rows, with [CLS], [SEP] and [PAD] kept as "
    "words: it depends on the batches and rewards equal padding, so it compares with no corpus BLEU-4 of anyone else."
)


@dataclass(frozen=True)
class Cell:
    """What a run has to show; empty where it has not got so far."""

    scores: dict[str, Any]
    losses: dict[str, float]
    error: str
    commits: frozenset[str] = frozenset()  # of the code that trained and scored it

    def number(self, name: str) -> float | None:
        """A score, ``seed_bleu_4``, or a loss."""
        if name == "seed_bleu_4":
            return self.scores.get("seed_protocol", {}).get("bleu_4")
        return self.scores.get(name, self.losses.get(name))


@dataclass(frozen=True)
class Line:
    """A row of the table with its cells, by seed."""

    row: Row
    cells: dict[int, Cell] = field(default_factory=dict)
    is_reference: bool = False  # floor or human: of the photos, not of a run

    def values(self, name: str) -> list[float]:
        numbers = [cell.number(name) for cell in self.cells.values()]
        return [number for number in numbers if number is not None]


@dataclass(frozen=True)
class Sweep:
    """All that the page is made of."""

    folder: Path
    table: Table
    made: dict[str, Any]
    lines: list[Line]
    shared: Config | None  # of the first cell
    differing: list[str]  # settings in which cells differ

    @property
    def planned(self) -> int:
        return len(self.lines) * len(self.table.seeds)

    @property
    def evaluated(self) -> int:
        return sum(bool(cell.scores) for line in self.lines for cell in line.cells.values())


def write_sweep_report(sweep: SweepDir) -> tuple[Path, str]:
    """Write both files; (the page's path, the table as text)."""
    read = read_sweep(sweep)
    text = markdown(read)
    atomic_write(sweep.table, text.encode())
    atomic_write(sweep.report, render(read).encode())
    return sweep.report, text


def read_sweep(sweep: SweepDir) -> Sweep:
    table, made = sweep.read()
    runs = {row.name: sweep.cells(row) for row in table.rows}
    lines = [Line(row, {seed: read_cell(run) for seed, run in runs[row.name].items()}) for row in table.rows]
    configs = [run.load_config() for found in runs.values() for run in found.values() if run.config.is_file()]
    differing = {change.split(":")[0] for config in configs for change in differences(configs[0], config)}
    return Sweep(
        sweep.root, table, made, lines, configs[0] if configs else None, sorted(differing - {"run_dir", "seed"})
    )


def read_cell(run: RunDir) -> Cell:
    scores = json.loads(run.scores.read_text(encoding="utf-8")) if run.scores.is_file() else {}
    losses = _losses(run) if scores else {}
    said = error_file(run).read_text(encoding="utf-8").strip() if error_file(run).is_file() else ""
    starts = [record for record in run.read_metrics() if record.get("kind") == "start"]
    commits = frozenset(made.get("commit") or "not recorded" for made in (*starts, *([scores] if scores else [])))
    return Cell(scores, losses, said.splitlines()[-1] if said else "", commits)


def _losses(run: RunDir) -> dict[str, float]:
    """Means over the last steps, in the paper's terms: the x_t term, lambda times the rounding term, and their sum.
    A run on a reward has no such terms."""
    by_step = {record["step"]: record for record in run.read_metrics() if record.get("kind") == "training"}
    last = [record for step, record in by_step.items() if step > (1 - LAST_SHARE) * max(by_step)]
    if not last or any(record.get("loss") is None or "reward" in record for record in last):
        return {}
    diffusion = run.load_config().diffusion
    mean = {
        name: statistics.fmean(record.get(name, 0.0) for record in last)
        for name in ("loss", "restore", "first_step", "length")
    }
    # lambda may have changed from step to step, so its product is what the other terms leave.
    restore = diffusion.restore_weight * mean["restore"]
    weighted = mean["loss"] - restore - diffusion.first_step_weight * mean["first_step"]
    weighted -= diffusion.length_weight * mean["length"]
    if not restore:
        return {"weighted_rounding": weighted}
    return {"restore": mean["restore"], "weighted_rounding": weighted, "loss": restore + weighted}


# ---- tables, as text cells ----


@dataclass(frozen=True)
class Column:
    """One column: its two header lines, and what it says of a row."""

    group: str
    title: str
    of: Callable[[Line], str]
    ours: bool = False


def score_columns(lines: Sequence[Line]) -> list[Column]:
    """BLEU-4 by everyone, then ours by other scores."""
    columns = [
        Column("BLEU-4", "ours", lambda line: spread(line.values("bleu_4"), 4), ours=True),
        Column("CIDEr-D", "ours", lambda line: spread(line.values("cider_d"), 3), ours=True),
    ]
    if any(line.values("scene_accuracy") for line in lines):
        columns.append(
            Column("scene accuracy", "ours", lambda line: spread(line.values("scene_accuracy"), 3), ours=True)
        )
    if any(line.row.is_published for line in lines):
        columns = [
            Column("BLEU-4", "published", lambda line: _number(line.row.published.get("bleu_4"), 4)),
            Column("BLEU-4", "its log", lambda line: _number(line.row.logged.get("bleu_4"), 4)),
            Column("BLEU-4", "ours, seed's protocol", lambda line: spread(line.values("seed_bleu_4"), 4), ours=True),
            *columns,
        ]
    return [*columns, Column("seeds", "run", _seeds_run, ours=True)]


def _seeds_run(line: Line) -> str:
    return "" if line.is_reference else str(len(line.values("bleu_4")) or "")


def loss_columns(lines: Sequence[Line]) -> list[Column]:
    """Three columns for each loss that anyone has."""
    columns = []
    for name, title in {"restore": "x_t term", "weighted_rounding": "λ L_R", "loss": "x_t term + λ L_R"}.items():
        if any(name in line.row.published or name in line.row.logged or line.values(name) for line in lines):
            columns += [
                Column(title, "published", lambda line, name=name: _number(line.row.published.get(name))),  # type: ignore
                Column(title, "its log", lambda line, name=name: _number(line.row.logged.get(name))),  # type: ignore
                Column(title, "ours", lambda line, name=name: spread(line.values(name), 2), ours=True),  # type: ignore
            ]
    return columns


def reference_lines(lines: Sequence[Line]) -> list[Line]:
    """The floor and human rows of the scored photos: one pair, or one for each number of photos."""
    found: dict[str, Line] = {}
    for cell in [cell for line in lines for cell in line.cells.values()]:
        for name in [name for name in ("floor", "human") if name in cell.scores]:
            as_seed = cell.scores.get("seed_protocol", {})
            entry = {"seed_protocol": {"bleu_4": as_seed[name]}} if name in as_seed else {}
            title = f"{name} ({cell.scores.get('photos', '?')} photos)"
            shown = Cell({**cell.scores[name], **entry}, {}, "")
            if title not in found or (entry and not found[title].values("seed_bleu_4")):
                found[title] = Line(Row(title), {0: shown}, is_reference=True)
    return sorted(found.values(), key=lambda line: line.row.name)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over seeds; one value stands alone, none is blank."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _number(value: float | None, digits: int | None = None) -> str:
    """As it was printed."""
    if value is None:
        return ""
    return f"{value:g}" if digits is None else f"{value:.{digits}f}"


# ---- conclusions ----


@dataclass(frozen=True)
class Verdict:
    """Whether a conclusion of the paper holds in our cells."""

    conclusion: Conclusion
    published: str
    logged: str
    ours: str
    verdict: str


def judge(conclusion: Conclusion, lines: Iterable[Line]) -> Verdict:
    """``holds`` or ``does not hold`` where 0 lies outside the 95% interval (Student's t, pooled) of the difference of
    the means, in the conclusion's sense; ``open`` where it lies inside or there are too few seeds."""
    by_name = {line.row.name: line for line in lines}
    pair, by = (by_name[conclusion.better], by_name[conclusion.than]), conclusion.by
    sign, digits = (1, 4) if by == "bleu_4" else (-1, 2)

    def gap(numbers: Sequence[float | None]) -> str:
        first, second = numbers
        return "" if first is None or second is None else f"{first - second:+.{digits}f}"

    published = [line.row.published.get(by) for line in pair]
    logged = [line.row.logged.get(by, line.row.published.get(by)) for line in pair]
    told = gap(published), gap(logged) if gap(logged) != gap(published) else ""
    values = [line.values(by) for line in pair]
    if not all(values):
        return Verdict(conclusion, *told, "", "not run")
    difference = statistics.fmean(values[0]) - statistics.fmean(values[1])
    half = interval(*values)
    if half is None:
        return Verdict(conclusion, *told, f"{difference:+.{digits}f}", "open: too few seeds to tell")
    verdict = "open" if abs(difference) <= half else "holds" if sign * difference > 0 else "does not hold"
    return Verdict(conclusion, *told, f"{difference:+.{digits}f} ± {half:.{digits}f}", verdict)


def interval(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Half the width of the 95% interval of the difference of two means with one variance; None below two values."""
    freedom = len(first) + len(second) - 2
    if min(len(first), len(second)) < 2:
        return None
    squares = sum((value - statistics.fmean(values)) ** 2 for values in (first, second) for value in values)
    deviation = math.sqrt(squares / freedom * (1 / len(first) + 1 / len(second)))
    return T_95[max(known for known in T_95 if known <= freedom)] * deviation


# ---- text and page ----


def facts(sweep: Sweep) -> dict[str, str]:
    """What was run, in the words a reader asks for."""
    if sweep.shared is None:
        return {"cells": "none has been started"}
    config, made = sweep.shared, sweep.made
    model, training, diffusion = config.model, config.training, config.diffusion
    cells = [cell for line in sweep.lines for cell in line.cells.values() if cell.scores]
    scored = [cell.scores for cell in cells]
    return {
        "cells": f"{sweep.evaluated} of {sweep.planned} evaluated; seeds {', '.join(map(str, sweep.table.seeds))}",
        "table": " ".join([made["table"], *(["over " + made["overlay"]] if made["overlay"] else []), *made["words"]]),
        "photos": f"{config.data.shards}, features {config.data.features or 'online'}",
        "measured on": "; ".join(sorted({_device(scores["hardware"]) for scores in scored if "hardware" in scores})),
        "by commits": ", ".join(sorted(frozenset().union(*(cell.commits for cell in cells)))),
        "denoiser": f"{model.num_layers} layers x {model.width}, {model.body} body, {model.embeddings} embeddings",
        "training": f"{training.num_steps:,} steps of {training.global_batch_size} photos, "
        f"{diffusion.timesteps_per_caption} timesteps a caption",
        "cells differ in": ", ".join(sweep.differing) or "nothing",
        "losses": f"means over the last {LAST_SHARE:.0%} of the steps, of the terms that the paper's tables print",
        "±": "standard deviation over seeds; of differences, half the 95% interval",
    }


def _device(hardware: dict[str, Any]) -> str:
    return (
        f"{hardware['gpu'] or str(hardware['cpus']) + ' ' + hardware['machine'] + ' CPUs'}, torch {hardware['torch']}"
    )


def remarks(sweep: Sweep) -> list[str]:
    """Notes of rows, and cells that failed."""
    notes = [f"{line.row.name}: {line.row.note}" for line in sweep.lines if line.row.note]
    failed = [
        f"{line.row.name}, seed {seed}, failed: {cell.error}"
        for line in sweep.lines
        for seed, cell in line.cells.items()
        if cell.error
    ]
    published = any(line.row.is_published for line in sweep.lines)
    return [*notes, *failed, *([NOT_COMPARABLE] if published else [])]


def tables(sweep: Sweep) -> dict[str, tuple[list[Column], list[Line]]]:
    """By title: columns and rows. Floor and human have no losses."""
    found = {"Scores": (score_columns(sweep.lines), [*sweep.lines, *reference_lines(sweep.lines)])}
    if columns := loss_columns(sweep.lines):
        found["Training losses"] = (columns, sweep.lines)
    return found


def markdown(sweep: Sweep) -> str:
    parts = [f"# {sweep.table.title}", ""]
    for title, (columns, lines) in tables(sweep).items():
        head = [
            "",
            *(
                c.group if c.title in ("ours", "run") and _alone(c, columns) else f"{c.group}, {c.title}"
                for c in columns
            ),
        ]
        parts += [
            f"## {title}",
            "",
            *text_table(head, [[line.row.name, *(c.of(line) for c in columns)] for line in lines]),
        ]
    if sweep.table.conclusions:
        head = ["conclusion of the paper", "difference, published", "its log", "ours", "here"]
        rows = [[v.conclusion.says, v.published, v.logged, v.ours, v.verdict] for v in verdicts(sweep)]
        parts += ["## Conclusions", "", *text_table(head, rows)]
    parts += [f"- {name}: {value}" for name, value in facts(sweep).items()]
    return "\n".join([*parts, *(f"- {remark}" for remark in remarks(sweep))]) + "\n"


def verdicts(sweep: Sweep) -> list[Verdict]:
    return [judge(conclusion, sweep.lines) for conclusion in sweep.table.conclusions]


def _alone(column: Column, columns: Sequence[Column]) -> bool:
    return sum(other.group == column.group for other in columns) == 1


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose columns also line up as plain text."""
    cells = [[text.replace("|", "\\|") for text in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(f"{text:<{w}}" for text, w in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:], ""]


PLOT_WIDTH, PLOT_LEFT, PLOT_ROW = 720.0, 230.0, 26.0


def dots(sweep: Sweep) -> dict[str, Any]:
    """A plot of every seed's BLEU-4, a line for each row, with the floor and human levels and what was published."""
    levels = {line.row.name: line.values("bleu_4")[0] for line in reference_lines(sweep.lines) if line.values("bleu_4")}
    published = [line.row.published.get("bleu_4") for line in sweep.lines]
    top = max(
        [0.01, *levels.values(), *(p for p in published if p), *(v for x in sweep.lines for v in x.values("bleu_4"))]
    )
    scale = (PLOT_WIDTH - PLOT_LEFT - 20) / top

    def place(value: float) -> float:
        return round(PLOT_LEFT + value * scale, 1)

    return {
        "width": PLOT_WIDTH,
        "height": PLOT_ROW * len(sweep.lines) + 40,
        "levels": [(name.split(" ")[0], place(value), f"{value:.3f}") for name, value in levels.items()],
        "rows": [
            {
                "name": line.row.name,
                "y": PLOT_ROW * number + 28,
                "ours": [(place(value), f"{value:.4f}") for value in line.values("bleu_4")],
                "published": [(place(p), f"{p:.4f}") for p in (line.row.published.get("bleu_4"),) if p is not None],
            }
            for number, line in enumerate(sweep.lines)
        ],
    }


def render(sweep: Sweep) -> str:
    """The whole page; every text in it is escaped."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(
        files("diffcap_dist").joinpath("sweep_report.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        name=sweep.folder.resolve().name,
        title=sweep.table.title,
        evaluated=sweep.evaluated,
        planned=sweep.planned,
        tables={
            title: (columns, [(line.row.name, [c.of(line) for c in columns]) for line in lines])
            for title, (columns, lines) in tables(sweep).items()
        },
        plot=dots(sweep),
        verdicts=verdicts(sweep),
        facts=facts(sweep),
        remarks=remarks(sweep),
    )
