"""Sweeps: the paper's tables as files, what a sweep plans and keeps, and the table that a report makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffcap_dist import report
from diffcap_dist.config import ConfigError, load_config
from diffcap_dist.run_dir import RunDir
from diffcap_dist.sweep_dir import Overlay, Row, SweepDir, cell_config, error_file, load_overlay, load_table
from diffcap_dist.sweep_report import Cell, Line, interval, judge, read_cell, spread
from launch import sweep
from tests.test_report import Tags

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "configs" / "paper"
TABLES = ["table1", "table2", "table3", "table4", "figure4", "section54"]

# Tables 1 to 4 and section 5.4 as printed: row by row, BLEU-4 and the losses, in the table's own order.
PRINTED = {
    "table1": [(0.1549, 4.89, 12.87), (0.1539, 4.92, 13.49), (0.1558, 4.89, 13.06)],
    "table2": [
        (0.1549, 4.89, 12.87),
        (0.1699, 4.73, 11.11),
        (0.1643, 4.82, 11.30),
        (0.1876, 4.82, 11.28),
        (0.1848, 4.79, 11.28),
    ],
    "table3": [(0.1599,), (0.1614,), (0.2193,), (0.1549,), (0.2470,), (0.1550,)],
    "table4": [(0.1033,), (0.1948,), (0.1549,), (0.2337,)],
    "section54": [(0.1549, 17.8), (0.1474, 22.6)],
}
COLUMNS = {"table1": ("bleu_4", "restore", "weighted_rounding"), "section54": ("bleu_4", "loss")}
COLUMNS["table2"] = COLUMNS["table1"]


# ---- the paper's tables ----


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("overlay", [None, PAPER / "scenes.yaml"])
def test_every_row_of_every_table_is_a_valid_config(name: str, overlay: Path | None) -> None:
    path = PAPER / f"{name}.yaml"
    table = load_table(path)
    over = load_overlay(overlay) if overlay else Overlay()
    configs = [cell_config(path, table, row, 1, RunDir("r"), over) for row in table.rows]
    assert all((config.seed, config.run_dir) == (1, "r") for config in configs)
    told_apart = {json.dumps([row.base, row.settings]) for row in table.rows}
    assert len(told_apart) == len(table.rows)


@pytest.mark.parametrize("name", PRINTED)
def test_every_printed_number_is_there_once(name: str) -> None:
    columns = COLUMNS.get(name, ("bleu_4",))
    rows = [row.published for row in load_table(PAPER / f"{name}.yaml").rows]
    found = [tuple(row[column] for column in columns) for row in rows if "bleu_4" in row]
    assert found == PRINTED[name]


def test_the_baseline_is_the_papers() -> None:
    config = load_config(PAPER / "baseline.yaml")
    assert (config.data.max_length, config.diffusion.num_timesteps, config.diffusion.timesteps_per_caption) == (
        16,
        1000,
        100,
    )
    assert (config.optimizer.learning_rate, config.diffusion.rounding_weight) == (5e-5, 0.3)
    assert config.training.num_steps == 15 * config.optimizer.hold_steps == 15 * 6000 * 5 // 8
    final = load_config(PAPER / "final.yaml")
    assert (final.optimizer.schedule, final.optimizer.learning_rate, final.training.early_stop_ratio) == (
        "linear",
        1e-4,
        1.0,
    )
    assert final.training.num_steps == 10 * final.optimizer.hold_steps


# ---- tables and overlays ----


@pytest.fixture
def table(tiny_config: Path) -> Path:
    """A table of three rows over the tiny config, the second of which can't run."""
    path = tiny_config.parent / "table.yaml"
    path.write_text(
        """
title: "Table T <b>"
base: tiny.yaml
seeds: [0, 1]
rows:
  - {name: λ 1.0, published: {bleu_4: 0.15, restore: 4.89}, logged: {bleu_4: 0.16}, note: "hm <i>"}
  - {name: broken, settings: {data: {features: nothing}}, published: {bleu_4: 0.14}}
  - {name: more, base: more.yaml, settings: {optimizer: {learning_rate: 1e-3}}}
conclusions:
  - {says: "1.0 is better", better: λ 1.0, than: broken}
"""
    )
    (path.parent / "more.yaml").write_text("base: tiny.yaml\ntraining: {global_batch_size: 8, num_steps: 30}\n")
    return path


def planned(path: Path, *words: str) -> tuple[SweepDir, list[sweep.Cell]]:
    args = sweep._parser().parse_intermixed_args([str(path), "--out", str(path.parent / "out"), *words])
    folder, cells, _ = sweep.plan(args)
    return folder, cells


def test_base_then_overlay_then_row_then_factors_then_words(table: Path) -> None:
    over = table.parent / "over.yaml"
    over.write_text(
        "training: {num_steps: 7}\nmodel: {dropout: 0.5}\noptimizer: {learning_rate: 3e-3}\n"
        "multiply: {optimizer.learning_rate: 10, training.log_every: 2.6}\n"
        "bases: {more.yaml: {model: {dropout: 0.25}}}\n"
    )
    _, cells = planned(table, "--over", str(over), "training.zero_stage=0", "--seeds", "5")
    first, _, more = [cell.config for cell in cells]
    assert [cell.name for cell in cells] == ["lambda-1.0/seed-5", "broken/seed-5", "more/seed-5"]
    assert first.optimizer.learning_rate == pytest.approx(3e-2) and more.optimizer.learning_rate == pytest.approx(1e-2)
    assert (first.model.dropout, more.model.dropout, first.training.log_every) == (0.5, 0.25, 3)
    assert (more.training.num_steps, more.training.global_batch_size) == (7, 8)
    assert (first.training.zero_stage, first.seed, more.run_dir) == (0, 5, str(table.parent / "out/more/seed-5"))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("title:", "titel:", "unknown titel"),
        ("note:", "notes:", "row 1: unknown notes"),
        ("name: more", "name: broken", "different folders"),
        ("restore:", "loss_of:", "numbers .'loss_of'."),
        ("than: broken", "than: whole", "1.0 is better"),
        ("base: more.yaml", "base: nothing.yaml", "no such config file"),
        ("learning_rate: 1e-3", "learning_rat: 1e-3", "did you mean 'optimizer.learning_rate'"),
    ],
)
def test_mistakes_in_a_table_are_named(table: Path, old: str, new: str, message: str) -> None:
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        planned(table)


def test_what_can_not_be_multiplied(table: Path) -> None:
    for name in ("model.body", "training.steps"):
        with pytest.raises(ConfigError, match="no number"):
            parsed = load_table(table)
            cell_config(table, parsed, parsed.rows[0], 0, RunDir("r"), Overlay(multiply={name: 2}))


# ---- resuming ----


def finish(cell: sweep.Cell, **scores: Any) -> None:
    cell.prepare()
    content = {"bleu_4": 0.2, "seed_protocol": {"bleu_4": 0.3}, "photos": 12, **scores}
    cell.run.scores.write_text(json.dumps(content))


def test_only_what_is_unfinished_is_run_again(table: Path) -> None:
    _, cells = planned(table)
    finish(cells[0])
    finish(cells[1])
    cells[1].run.scores.write_text(json.dumps({"bleu_4": 0.2}))  # killed before the second protocol
    assert [cell.is_done() for cell in planned(table)[1]] == [True, False, False, False, False, False]
    # More steps: the run goes on, and its old scores no longer count.
    longer = planned(table, "training.num_steps=25")[1][0]
    assert not longer.is_done()
    longer.prepare()
    assert not longer.run.scores.exists() and longer.run.load_config().training.num_steps == 25
    with pytest.raises(ConfigError, match=r"another config: model\.width"):
        planned(table, "model.width=64")[1][0].prepare()


def test_rows_that_nobody_published_need_no_second_protocol(table: Path) -> None:
    _, cells = planned(table, "--seeds", "0")
    for cell in cells:
        finish(cell)
        cell.run.scores.write_text(json.dumps({"bleu_4": 0.2}))
    assert [cell.is_done() for cell in cells] == [False, False, True]


def test_a_sweep_keeps_the_seeds_it_had(table: Path) -> None:
    planned(table, "--seeds", "3")
    folder, _ = planned(table, "--seeds", "1,2")
    assert folder.read()[0].seeds == [1, 2, 3]


def test_states_of_cells(table: Path) -> None:
    _, cells = planned(table)
    jobs = sweep.Jobs(cells[2:])
    finish(cells[0], bleu_4=0.25)
    error_file(cells[1].run).parent.mkdir(parents=True)
    error_file(cells[1].run).write_text("Traceback\n  File\nNonFiniteLoss: the loss is not finite\n")
    states = {cell.name: jobs.state(cell) for cell in cells}
    assert states["lambda-1.0/seed-0"] == ("done", "BLEU-4 0.2500")
    assert states["lambda-1.0/seed-1"] == ("failed", "NonFiniteLoss: the loss is not finite")
    assert states["more/seed-1"] == ("waiting", "")
    cells[2].run.root.mkdir(parents=True)
    cells[2].run.log({"kind": "training", "step": 7})
    assert sweep.last_step(cells[2].run) == 7
    assert "failed   NonFiniteLoss" in sweep.state_table(states)


@pytest.mark.parametrize("words", [["--seeds", "0,0"], ["--seeds", "x"], ["--max-parallel", "0"], ["--slurm", "=x"]])
def test_wrong_words_are_refused(table: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.main([str(table), "--out", str(table.parent), *words])


# ---- the report ----


def cells_of(text: str, row: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_report_of_half_of_the_cells(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, cells = planned(table)
    references = {"floor": {"bleu_4": 0.05, "cider_d": 0.1}, "human": {"bleu_4": 0.5, "cider_d": 2.0}}
    for cell, bleu_4 in ((cells[0], 0.2), (cells[1], 0.3)):
        finish(cell, bleu_4=bleu_4, cider_d=1.0, **references)
        cell.run.log({"kind": "training", "step": 1, "loss": 9.0, "rounding": 2.0, "restore": 9.0})
        cell.run.log({"kind": "training", "step": 20, "loss": 3.0, "rounding": 2.0, "restore": 9.0})
    cells[2].prepare()
    error_file(cells[2].run).write_text("Traceback\nValueError: no <features>\n")
    assert report.main([str(folder.root)]) == 0
    printed = capsys.readouterr().out
    assert str(folder.report) in printed and folder.table.read_text() in printed
    assert cells_of(printed, "λ 1.0") == [
        "0.1500",
        "0.1600",
        "0.3000 ± 0.0000",
        "0.2500 ± 0.0707",
        "1.000 ± 0.000",
        "2",
    ]
    assert cells_of(printed, "broken") == ["0.1400", "", "", "", "", ""]
    assert cells_of(printed, "more") == [""] * 6
    assert cells_of(printed, "floor (12 photos)") == ["", "", "", "0.0500", "0.100", ""]
    assert cells_of(printed, "human (12 photos)")[3] == "0.5000"
    assert cells_of(printed, "1.0 is better") == ["+0.0100", "+0.0200", "", "not run"]
    assert "2 of 6 evaluated" in printed and "broken, seed 0, failed: ValueError: no <features>" in printed
    page = folder.report.read_text()
    assert Tags(page).open == []
    assert "<b>" not in page and "<i>" not in page and "no &lt;features&gt;" in page
    assert "0.2500 ± 0.0707" in page and "http" not in page


def test_a_report_before_anything_ran(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = planned(table)
    assert report.main([str(folder.root)]) == 0
    assert cells_of(capsys.readouterr().out, "λ 1.0") == ["0.1500", "0.1600", "", "", "", ""]


def test_losses_are_what_the_paper_prints(table: Path) -> None:
    words = ["diffusion.kind=continuous", "diffusion.restore_weight=1", "diffusion.first_step_weight=1"]
    _, cells = planned(table, *words)
    finish(cells[0])
    for step in range(1, 101):  # the last tenth counts; lambda times rounding is what the other terms leave of the loss
        value = 5.0 if step > 90 else 99.0
        terms = {"loss": 12.5, "restore": value, "first_step": 4.0, "rounding": 10.0, "length": 5.0}
        cells[0].run.log({"kind": "training", "step": step, **terms})
    cell = read_cell(cells[0].run)
    assert (cell.number("restore"), cell.number("weighted_rounding"), cell.number("loss")) == (5.0, 3.0, 8.0)


def line(name: str, published: float, values: list[float]) -> Line:
    row = Row(name, published={"bleu_4": published})
    return Line(row, {seed: Cell({"bleu_4": value}, {}, "") for seed, value in enumerate(values)})


def test_conclusions_hold_only_beyond_the_spread_of_seeds(table: Path) -> None:
    one = load_table(table).conclusions[0]

    def verdict(first: list[float], second: list[float]) -> str:
        return judge(one, [line("λ 1.0", 0.15, first), line("broken", 0.14, second)]).verdict

    assert verdict([0.30, 0.31, 0.32], [0.20, 0.21, 0.22]) == "holds"
    assert verdict([0.20, 0.21, 0.22], [0.30, 0.31, 0.32]) == "does not hold"
    assert verdict([0.20, 0.30, 0.25], [0.21, 0.28, 0.22]) == "open"
    assert verdict([0.30], [0.20]) == "open: too few seeds to tell"
    assert verdict([], [0.20]) == "not run"
    # scipy.stats.ttest_ind([1, 2, 3], [4, 6, 8]): standard error 1.29099, 4 degrees of freedom
    assert interval([1, 2, 3], [4, 6, 8]) == pytest.approx(2.78 * 1.29099, rel=1e-4)


def test_spread() -> None:
    assert [spread(values, 2) for values in ([], [0.5], [0.25, 0.75])] == ["", "0.50", "0.50 ± 0.35"]


# ---- for real ----


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_sweep_trains_evaluates_and_survives_a_failing_cell(table: Path) -> None:
    out = table.parent / "out"
    over = table.parent / "over.yaml"
    over.write_text("evaluate: [--no-clip-score]\n")
    words = [str(table), "--out", str(out), "--over", str(over), "--cluster", "local", "--max-parallel", "2"]
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), *words, "--seeds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1, done.stderr
    assert "lambda-1.0/seed-0: running" in done.stdout and "more/seed-0        done     BLEU-4" in done.stdout
    assert "broken/seed-0      failed   ValueError: features 'nothing' are not in the dataset" in done.stdout
    more, first = (json.loads((out / row / "seed-0" / "scores.json").read_text()) for row in ("more", "lambda-1.0"))
    assert more["photos"] == 12 and "seed_protocol" not in more  # nobody has numbers of it
    assert "bleu_4" in first["seed_protocol"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert again.returncode == 1 and "3 cells in" in again.stdout and "2 done before" in again.stdout
    assert report.main([str(out)]) == 0
    assert (out / "table.md").read_text().count("failed: ValueError") == 1
