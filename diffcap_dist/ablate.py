"""`diffcap ablate SWEEP`: what each change between two recipes is worth: added in turn, and alone left out.

In: the folder of a sweep whose table has ``changes`` (launch/sweep.py ran its cells). Out: in that folder, or in
``--out``, ablation.json, ablation.md and ablation.svg. A gain is a difference of means over seeds, with half its 95%
interval (Student's t, pooled); where that holds 0, the change is not shown to matter. What was not run is blank.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from diffcap_dist.config import ConfigError
from diffcap_dist.data.shard_format import atomic_write
from diffcap_dist.run_dir import RunDir
from diffcap_dist.sweep_dir import START, Row, SweepDir, added_row, left_out_row
from diffcap_dist.sweep_report import Line, Sweep, facts, interval, read_sweep, spread, text_table

FACTS = ("cells", "table", "photos", "measured on", "by commits")  # of those of a sweep
SCORES = {"bleu_4": "BLEU-4", "cider_d": "CIDEr-D", "scene_accuracy": "scene accuracy"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="diffcap ablate", description=__doc__)
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="the --out of launch/sweep.py")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the three files go (default: SWEEP)")
    args = parser.parse_args(argv)
    sweep = SweepDir(args.sweep)
    if not sweep.description.is_file():
        raise ConfigError(f"{args.sweep}: no sweep.json there; run launch/sweep.py TABLE.yaml --out {args.sweep} first")
    read = read_sweep(sweep)
    if not read.table.changes:
        raise ConfigError(f"{args.sweep}: its table has no `changes`: it is no ablation, see diffcap report")
    out = args.out or args.sweep
    out.mkdir(parents=True, exist_ok=True)
    result = measure(read)
    text = as_markdown(result)
    atomic_write(out / "ablation.json", json.dumps(result, indent=2, ensure_ascii=False).encode())
    atomic_write(out / "ablation.md", text.encode())
    atomic_write(out / "ablation.svg", as_svg(result).encode())
    print(text)
    print(f"{out}/ablation.json, ablation.md, ablation.svg")
    return 0


def measure(sweep: Sweep) -> dict[str, Any]:
    """Rows in the order of the table, each with its scores by seed, and what they gain."""
    lines = {line.row.name: line for line in sweep.lines}
    changes = sweep.table.changes
    whole = lines[added_row(changes[-1])]
    speeds = {name: _photos_per_second(sweep, line) for name, line in lines.items()}
    rows = []
    before = lines[START]
    for change in changes:
        after, without = lines[added_row(change)], lines.get(left_out_row(changes, change), Line(Row("not tried")))
        rows.append(
            {
                "change": change.name,
                "why": change.why,
                "added": _scores(after),
                "gain": {name: _difference(after, before, name) for name in SCORES},
                "left_out": _scores(without),
                "loss": {name: _difference(whole, without, name) for name in SCORES},
                "photos_per_second": speeds[after.row.name],
            }
        )
        before = after
    named = {START, *(added_row(c) for c in changes), *(left_out_row(changes, c) for c in changes)}
    others = [
        {"name": name, "scores": _scores(line), "photos_per_second": speeds[name]}
        for name, line in lines.items()
        if name not in named
    ]
    return {
        "title": sweep.table.title,
        "start": {"scores": _scores(lines[START]), "photos_per_second": speeds[START]},
        "changes": rows,
        "others": others,
        "facts": facts(sweep),
    }


def _scores(line: Line) -> dict[str, list[float]]:
    return {name: values for name in SCORES if (values := line.values(name))}


def _difference(first: Line, second: Line, name: str) -> tuple[float, float | None] | None:
    """Of the means, with half its 95% interval (None for single seeds); None where either was not run."""
    values = first.values(name), second.values(name)
    if not all(values):
        return None
    return statistics.fmean(values[0]) - statistics.fmean(values[1]), interval(*values)


def _photos_per_second(sweep: Sweep, line: Line) -> float | None:
    """The median over all logged steps of all seeds: what a step of this recipe costs."""
    found = [
        record["samples_per_second"]
        for run in SweepDir(sweep.folder).cells(line.row).values()
        for record in RunDir(run.root).read_metrics()
        if record.get("kind") == "training" and record["samples_per_second"]  # of a start's first steps there is none
    ]
    return statistics.median(found) if found else None


def as_markdown(result: dict[str, Any]) -> str:
    found = [row["scores"] for row in (result["start"], *result["others"])]
    found += [row[part] for row in result["changes"] for part in ("added", "left_out")]
    scores = [name for name in SCORES if any(name in one for one in found)]
    base = result["start"]["photos_per_second"]

    def cost(row: dict[str, Any]) -> str:
        found = row["photos_per_second"]
        return f"{base / found:.2f}" if base and found else ""

    def told(values: dict[str, list[float]]) -> list[str]:
        return [spread(values.get(name, []), 3) for name in scores]

    head = ["recipe", *(SCORES[n] for n in scores), "gain in BLEU-4", "lost without it", "a photo's cost"]
    rows = [[START, *told(result["start"]["scores"]), "", "", cost(result["start"])]]
    for row in result["changes"]:
        gained = [_signed(row["gain"]["bleu_4"]), _signed(row["loss"]["bleu_4"])]
        rows.append([f"+ {row['change']}", *told(row["added"]), *gained, cost(row)])
    rows += [[row["name"], *told(row["scores"]), "", "", cost(row)] for row in result["others"]]
    lines = [f"# {result['title']}", "", *text_table(head, rows)]
    lines += [f"- {row['change']}: {row['why']}" for row in result["changes"] if row["why"]]
    lines += [
        "- gain: beside the row above; lost: of the last recipe, without this change alone; ± half the 95% interval, "
        "of a single score the deviation over seeds",
        "- a photo's cost: time of a training step over its photos, beside the start's, measured as the cells ran",
        *(f"- {name}: {text}" for name, text in result["facts"].items() if name in FACTS),
    ]
    return "\n".join(lines) + "\n"


def _signed(difference: tuple[float, float | None] | None) -> str:
    if difference is None:
        return ""
    value, half = difference
    return f"{value:+.3f}" if half is None else f"{value:+.3f} ± {half:.3f}"


ROW, LEFT, PANEL, GAP, TOP = 26.0, 300.0, 320.0, 40.0, 56.0


def as_svg(result: dict[str, Any]) -> str:
    """BLEU-4 of every seed, twice: with the changes so far, and with all but this one."""
    groups: list[tuple[Any, ...]] = [(START, result["start"]["scores"], {})]
    groups += [(f"+ {row['change']}", row["added"], row["left_out"]) for row in result["changes"]]
    groups += [(row["name"], row["scores"], {}) for row in result["others"]]
    whole = result["changes"][-1]["added"].get("bleu_4", [])
    values = [v for _, *both in groups for scores in both for v in scores.get("bleu_4", [])]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.05 * (high - low or 1.0)
    low, high = max(0.0, low - margin), high + margin

    def place(panel: int, value: float) -> float:
        return round(LEFT + panel * (PANEL + GAP) + (value - low) / (high - low) * PANEL, 1)

    rows = []
    for number, (name, *both) in enumerate(groups):
        y = TOP + ROW * (number + 0.5)
        found = [scores.get("bleu_4", []) for scores in both]
        dots = [(place(panel, v), f"{name}: {v:.4f}") for panel, some in enumerate(found) for v in some]
        means = [(place(panel, statistics.fmean(some))) for panel, some in enumerate(found) if some]
        rows.append({"name": name, "y": y, "dots": dots, "means": means})
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / step <= 5)
    ticks = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("diffcap_dist").joinpath("ablation.svg.j2").read_text(encoding="utf-8"))
    return template.render(
        title=result["title"],
        rows=rows,
        panels=[
            {"title": title, "left": place(panel, low), "right": place(panel, high)}
            for panel, title in enumerate(["with the changes so far", "all changes but this one"])
        ],
        ticks=[(place(panel, tick), f"{tick:.2f}") for panel in (0, 1) for tick in ticks],
        whole=[place(1, statistics.fmean(whole))] if whole else [],
        top=TOP,
        bottom=TOP + ROW * len(rows),
        left=LEFT,
        width=LEFT + 2 * PANEL + GAP + 30,
        height=TOP + ROW * len(rows) + 44,
    )


if __name__ == "__main__":
    sys.exit(main())
