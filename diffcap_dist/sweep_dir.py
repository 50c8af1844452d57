"""A table of runs: its rows as they are written down, the run of each (row, seed), and where these lie.

In: a TABLE.yaml (title, base, seeds, rows, changes, conclusions) and, for small machines, an overlay. Out: a checked
``Config`` for every cell, and the paths below the sweep's folder. It starts nothing and reads no score.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from diffcap_dist.config import Config, ConfigError, merge_settings, read_files, words_as_settings
from diffcap_dist.data.shard_format import atomic_write
from diffcap_dist.run_dir import RunDir

# What a table may print of a row: the score, the x_t term of the last training steps, lambda times the rounding term,
# and the sum of these two.
NUMBERS = ("bleu_4", "restore", "weighted_rounding", "loss")


@dataclass(frozen=True)
class Row:
    """One line of a table: what it changes, and what others have printed and logged for it."""

    name: str
    base: str = ""  # a config beside the table; empty: the table's
    settings: dict[str, Any] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)
    logged: dict[str, float] = field(
        default_factory=dict
    )  # where the published log has another number, or the only one
    note: str = ""

    @property
    def is_published(self) -> bool:
        """Whether others have numbers of it, so that theirs and ours are compared by their protocol too."""
        return bool(self.published or self.logged)

    @property
    def slug(self) -> str:
        """The row's folder."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower().replace("λ", "lambda")).strip("-.")


@dataclass(frozen=True)
class Change:
    """A step on the road from one recipe to another: ``diffcap ablate`` has what it is worth."""

    name: str
    settings: dict[str, Any]
    why: str = ""
    left_out: bool = True  # whether it is tried without it; false where the later ones can't do so, or undo it


@dataclass(frozen=True)
class Conclusion:
    """What was concluded from the table: row ``better`` is ahead of row ``than`` (lower, where ``by`` is a loss)."""

    says: str
    better: str
    than: str
    by: str = "bleu_4"


@dataclass(frozen=True)
class Table:
    """A whole TABLE.yaml."""

    title: str
    base: str
    rows: list[Row] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    changes: list[Change] = field(default_factory=list)
    conclusions: list[Conclusion] = field(default_factory=list)


@dataclass(frozen=True)
class Overlay:
    """Settings between base and row, so that a whole table runs at another size or on other data."""

    settings: dict[str, Any] = field(default_factory=dict)
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)  # more of them, for the rows of one base
    multiply: dict[str, float] = field(default_factory=dict)  # setting -> factor, after the row
    evaluate: list[str] = field(default_factory=list)  # words for `diffcap evaluate`


def load_table(path: Path) -> Table:
    """Raises ConfigError that says what is wrong, and where."""
    content = _read(path)
    rows = [_fill(Row, row, f"{path}, row {number}") for number, row in enumerate(content.pop("rows", []), start=1)]
    changes = [_fill(Change, one, f"{path}, changes") for one in content.pop("changes", [])]
    rows = [*ablation_rows(changes), *rows]
    concluded = [_fill(Conclusion, one, f"{path}, conclusions") for one in content.pop("conclusions", [])]
    table = _fill(Table, {**content, "rows": rows, "changes": changes, "conclusions": concluded}, str(path))
    slugs = [row.slug for row in rows]
    if not rows or len(set(slugs)) < len(slugs) or not all(slugs):
        raise ConfigError(f"{path}: expected rows whose names make different folders, found {slugs}")
    for row in rows:
        if unknown := sorted({*row.published, *row.logged} - set(NUMBERS)):
            raise ConfigError(f"{path}, row {row.name!r}: numbers {unknown}; known: {', '.join(NUMBERS)}")
    names = {row.name for row in rows}
    for one in concluded:
        if one.by not in NUMBERS or not {one.better, one.than} <= names:
            raise ConfigError(f"{path}: conclusion {one.says!r} is about {one.by}, {one.better!r} and {one.than!r}")
    return table


START = "the start"


def added_row(change: Change) -> str:
    """The name of the row with this change and those before it."""
    return f"+ {change.name}"


def left_out_row(changes: Sequence[Change], change: Change) -> str:
    """The name of the row with all changes but this one: of the last one it is the row before it."""
    if change is changes[-1]:
        return added_row(changes[-2]) if len(changes) > 1 else START
    return f"all but {change.name}"


def ablation_rows(changes: Sequence[Change]) -> list[Row]:
    """The base as it is, each change on top of those before it, and all changes but one."""
    if not changes:
        return []
    rows = [Row(START)]
    for number, change in enumerate(changes, start=1):
        rows.append(Row(added_row(change), settings=_merged(changes[:number]), note=change.why))
    for change in changes[:-1]:
        if not change.left_out:
            continue
        settings = _merged([one for one in changes if one is not change])
        rows.append(Row(left_out_row(changes, change), settings=settings))
    return rows


def _merged(changes: Sequence[Change]) -> dict[str, Any]:
    merged = OmegaConf.to_container(OmegaConf.merge({}, *(change.settings for change in changes)))
    assert isinstance(merged, dict)
    return {str(name): value for name, value in merged.items()}


def load_overlay(path: Path) -> Overlay:
    """Raises ConfigError."""
    content = _read(path)
    special: dict[str, Any] = {name: content.pop(name) for name in ("bases", "multiply", "evaluate") if name in content}
    return _fill(Overlay, {"settings": content, **special}, str(path))


def cell_config(
    table_path: Path, table: Table, row: Row, seed: int, run: RunDir, overlay: Overlay, words: Sequence[str] = ()
) -> Config:
    """Base < overlay < the overlay's part for that base < row, then the factors, then ``words``. Raises ConfigError."""
    base = table_path.parent / (row.base or table.base)
    layers = [*read_files(base), overlay.settings, overlay.bases.get(base.name, {}), row.settings, {"run_dir": "-"}]
    values = OmegaConf.create(dataclasses.asdict(merge_settings(layers, table_path)))
    scaled = []
    for name, factor in overlay.multiply.items():
        value = OmegaConf.select(values, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"multiply: {name} is {value!r}, which is no number")
        scaled.append(f"{name}={round(value * factor) if isinstance(value, int) else value * factor!r}")
    last = {"run_dir": str(run.root), "seed": seed}
    return merge_settings([*layers, words_as_settings(scaled), words_as_settings(words), last], table_path)


def error_file(run: RunDir) -> Path:
    """The traceback of a cell that failed."""
    return run.root / "error.txt"


class SweepDir:
    """Paths of a sweep; ``sweep.json`` says what its cells stand for."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.description = self.root / "sweep.json"
        self.logs = self.root / "logs"
        self.report = self.root / "report.html"
        self.table = self.root / "table.md"

    def cell(self, row: Row, seed: int) -> RunDir:
        return RunDir(self.root / row.slug / f"seed-{seed}")

    def cells(self, row: Row) -> dict[int, RunDir]:
        """The runs of a row that are there, by seed."""
        folders = {int(p.name[5:]): p for p in (self.root / row.slug).glob("seed-*") if p.name[5:].isdecimal()}
        return {seed: RunDir(folders[seed]) for seed in sorted(folders)}

    def describe(self, table: Table, table_path: Path, overlay: Path | None, words: Sequence[str]) -> None:
        """Write ``sweep.json``. Seeds that it has are kept: a sweep may be given more of them later."""
        self.root.mkdir(parents=True, exist_ok=True)
        before = self.read()[0].seeds if self.description.is_file() else []
        content = dataclasses.asdict(table) | {"seeds": sorted({*before, *table.seeds})}
        made = {"table": str(table_path), "overlay": str(overlay) if overlay else "", "words": list(words)}
        atomic_write(self.description, json.dumps({**made, **content}, indent=2, ensure_ascii=False).encode())

    def read(self) -> tuple[Table, dict[str, Any]]:
        """The table, and how it was run (table, overlay, words)."""
        content = json.loads(self.description.read_text(encoding="utf-8"))
        made = {name: content.pop(name) for name in ("table", "overlay", "words")}
        rows = [Row(**row) for row in content.pop("rows")]
        changes = [Change(**one) for one in content.pop("changes", [])]  # older sweeps have none
        concluded = [Conclusion(**one) for one in content.pop("conclusions")]
        return Table(**content, rows=rows, changes=changes, conclusions=concluded), made


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    content = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping, found a {type(content).__name__}")
    return {str(name): value for name, value in content.items()}


def _fill(kind: Any, content: Mapping[str, Any], where: str) -> Any:
    """``kind(**content)``; ConfigError names what is unknown or missing."""
    known = {one.name: one for one in dataclasses.fields(kind)}
    needed = {
        name
        for name, one in known.items()
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    }
    if unknown := sorted(set(content) - set(known)):
        raise ConfigError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    if missing := sorted(needed - set(content)):
        raise ConfigError(f"{where}: {', '.join(missing)} missing")
    return kind(**content)
