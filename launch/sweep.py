"""A whole table of runs: every (row, seed) trains and evaluates in a run directory of its own.

    python launch/sweep.py configs/paper/table3.yaml --out runs/table3
    python launch/sweep.py configs/paper/table3.yaml --out runs/small3 --over configs/paper/scenes.yaml --max-parallel 2

In: a table (configs/paper/), perhaps an overlay for another size, ``key=value`` words for all cells. Out: runs in
DIR/ROW/seed-N, and DIR/sweep.json for ``diffcap report DIR``. One job array on SLURM, else processes of this machine.
The same line again runs what is unfinished; a cell that fails stops no other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import submitit

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] != str(ROOT):  # as a script: this checkout, whatever else is installed
    sys.path.insert(0, str(ROOT))

from diffcap_dist.config import Config, ConfigError, differences  # noqa: E402
from diffcap_dist.run_dir import RunDir  # noqa: E402
from diffcap_dist.sweep_dir import (  # noqa: E402
    Overlay,
    Row,
    SweepDir,
    cell_config,
    error_file,
    load_overlay,
    load_table,
)
from launch.arguments import add_array_arguments, at_least, slurm_array  # noqa: E402
from launch.scheduler import choose_cluster  # noqa: E402

POLL_SECONDS = 1.0
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    row: Row
    seed: int
    config: Config
    run: RunDir

    @property
    def name(self) -> str:
        return f"{self.row.slug}/seed-{self.seed}"

    def is_done(self) -> bool:
        """Whether it was evaluated, by all protocols that it needs and with these settings."""
        scores = json.loads(self.run.scores.read_text()) if self.run.scores.is_file() else {}
        if "bleu_4" not in scores or (self.row.is_published and "seed_protocol" not in scores):
            return False
        return not differences(self.run.load_config(), self.config, frozenset({"run_dir", "data.num_workers"}))

    def prepare(self) -> None:
        """Write its config; what an earlier, other or failed run of it left is taken away. Raises ConfigError."""
        self.run.begin(self.config)
        self.run.scores.unlink(missing_ok=True)
        error_file(self.run).unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    try:
        sweep, cells, overlay = plan(args)
        todo = [cell for cell in cells if not cell.is_done()]
        for cell in todo:
            cell.prepare()
    except (ConfigError, OSError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    print(f"{len(cells)} cells in {sweep.root}, {len(cells) - len(todo)} done before", flush=True)
    jobs = _start_jobs(args, sweep, todo, overlay) if todo else Jobs([])
    follow(cells, jobs)
    failed = [cell for cell in cells if jobs.state(cell)[0] != DONE]
    print(f"next: diffcap report {sweep.root}" if not failed else f"{len(failed)} not done; {jobs.advice}")
    return 1 if failed else 0


def plan(args: argparse.Namespace) -> tuple[SweepDir, list[Cell], Overlay]:
    """Every cell of the table with its checked config; ``sweep.json`` is written. Raises ConfigError."""
    table = load_table(args.table)
    table = dataclasses.replace(table, seeds=args.seeds or table.seeds)
    overlay = load_overlay(args.over) if args.over else Overlay()
    sweep = SweepDir(args.out)
    cells = []
    for row in table.rows:
        for seed in table.seeds:
            run = sweep.cell(row, seed)
            cells.append(Cell(row, seed, cell_config(args.table, table, row, seed, run, overlay, args.settings), run))
    sweep.describe(table, args.table, args.over, args.settings)
    return sweep, cells, overlay


def run_cell(
    run: str, num_steps: int, evaluate_words: list[str], published: bool, cores: list[int] | None, threads: int
) -> None:
    """One cell, in a process of its own. torch is not yet imported here: it takes its threads from this."""
    if cores:
        os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from diffcap_dist import evaluate, train
    from diffcap_dist.training.checkpoint import complete_checkpoints

    folder = RunDir(run)
    try:
        train.main([str(folder.config)])
        state = json.loads((complete_checkpoints(folder.checkpoints)[-1] / "state.json").read_text())
        if state["step"] < num_steps and not state["early_stopped"]:
            raise InterruptedError(f"stopped at step {state['step']}, saved; the same sweep goes on from there")
        evaluate.main([run, *evaluate_words])
        if published:
            evaluate.main([run, "--protocol", "seed"])
    except BaseException:
        error_file(folder).write_text(traceback.format_exc(), encoding="utf-8")
        raise


def last_step(run: RunDir) -> int:
    """The last optimizer step that a run logged."""
    return max((record["step"] for record in run.read_metrics() if record.get("kind") == "training"), default=0)


# ---- where cells run ----


class Jobs:
    """Cells to run; this one has none."""

    advice = "the same line runs them again"

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.waiting = list(cells)
        self.started: dict[str, submitit.Job[None]] = {}

    def advance(self) -> bool:
        """Start what can be started; whether anything is still to be waited for."""
        return False

    def stop(self) -> None:
        """After Ctrl-C."""

    def state(self, cell: Cell) -> tuple[str, str]:
        """(kind, what is to be said of it)."""
        job = self.started.get(cell.name)
        if any(cell is one for one in self.waiting) or (job and not job.done() and job.state == "PENDING"):
            return WAITING, ""
        if job is not None and not job.done():
            step, steps = last_step(cell.run), cell.config.training.num_steps
            return RUNNING, f"step {step}/{steps}" if step < steps else "evaluating"
        if cell.is_done():
            return DONE, f"BLEU-4 {json.loads(cell.run.scores.read_text())['bleu_4']:.4f}"
        return FAILED, _why(cell, job)


class LocalJobs(Jobs):
    """Processes of this machine, at most ``most`` at once, each with its share of the cores and a GPU where there is
    one."""

    def __init__(
        self, cells: Sequence[Cell], executor: submitit.LocalExecutor, evaluate_words: list[str], most: int
    ) -> None:
        super().__init__(cells)
        self.executor, self.evaluate_words = executor, evaluate_words
        cores = sorted(os.sched_getaffinity(0))
        self.threads = max(1, len(cores) // most)
        self.cores = [cores[slot * self.threads : (slot + 1) * self.threads] for slot in range(most)]
        self.gpus = _gpus()
        self.slots: list[submitit.Job[None] | None] = [None] * most

    def advance(self) -> bool:
        for slot, job in enumerate(self.slots):
            if job is not None and job.done():
                self.slots[slot] = None
            if self.slots[slot] is None and self.waiting:
                self._start(self.waiting.pop(0), slot)
        return any(self.slots)

    def _start(self, cell: Cell, slot: int) -> None:
        if self.gpus:  # submitit hides the others
            self.executor.update_parameters(gpus_per_node=1, visible_gpus=[self.gpus[slot % len(self.gpus)]])
        with _ctrl_c_ignored():  # by submitit's process between this one and the cell: the cell itself saves and ends
            job = self.executor.submit(
                run_cell,
                str(cell.run.root),
                cell.config.training.num_steps,
                self.evaluate_words,
                cell.row.is_published,
                self.cores[slot],
                self.threads,
            )
        self.slots[slot] = self.started[cell.name] = job

    def stop(self) -> None:
        """Cells save at their next step and end."""
        self.waiting.clear()
        running = [job for job in self.slots if job is not None and not job.done()]
        print(f"stopping {len(running)} cells; they save first", flush=True)
        for job in running:
            os.kill(int(job.job_id), signal.SIGTERM)
        while not all(job.done() for job in running):
            time.sleep(POLL_SECONDS)


class SlurmJobs(Jobs):
    """One job array, handed in at once."""

    def __init__(
        self, cells: Sequence[Cell], executor: submitit.AutoExecutor, evaluate_words: list[str], threads: int
    ) -> None:
        super().__init__([])
        with executor.batch():
            jobs = [
                executor.submit(
                    run_cell,
                    str(cell.run.root),
                    cell.config.training.num_steps,
                    evaluate_words,
                    cell.row.is_published,
                    None,
                    threads,
                )
                for cell in cells
            ]
        self.started = {cell.name: job for cell, job in zip(cells, jobs)}
        self.array = jobs[0].job_id.split("_")[0]
        print(f"job array {self.array}", flush=True)

    def advance(self) -> bool:
        return not all(job.done() for job in self.started.values())

    def stop(self) -> None:
        self.advice = f"the array goes on: scancel {self.array} ends it. The same line again only when it has ended"
        print(self.advice, flush=True)


def _start_jobs(args: argparse.Namespace, sweep: SweepDir, todo: Sequence[Cell], overlay: Overlay) -> Jobs:
    if choose_cluster(args.cluster) != "slurm":
        local = submitit.LocalExecutor(folder=sweep.logs)
        local.update_parameters(timeout_min=args.time)
        return LocalJobs(todo, local, overlay.evaluate, args.max_parallel or 1)
    executor = slurm_array(args, "sweep", sweep.logs, args.max_parallel or len(todo))
    return SlurmJobs(todo, executor, overlay.evaluate, args.cpus_per_task)


def _gpus() -> list[int]:
    """Numbers of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [int(one) for one in visible.split(",") if one.strip().isdecimal()]
    import torch

    return list(range(torch.cuda.device_count()))


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _why(cell: Cell, job: submitit.Job[None] | None) -> str:
    """The last line of the traceback, or of what a cell that was killed said last."""
    error = error_file(cell.run)
    said = error.read_text(encoding="utf-8") if error.is_file() else (job.stderr() or "") if job else "not started"
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no word from it: was it killed?"]
    return lines[-1] + (f" ({job.paths.stderr})" if job else "")


# ---- the table on the screen ----


def follow(cells: Sequence[Cell], jobs: Jobs) -> None:
    """Show the cells until all have ended: one table that is drawn again on a terminal, else a line for each change."""
    live = sys.stdout.isatty()
    shown: dict[str, str] = {}
    done: dict[str, tuple[str, str]] = {}  # not looked at again: a cell's config takes a while to read
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no cell is left alone
    try:
        going = True
        while going:
            going = jobs.advance()
            states = {cell.name: done.get(cell.name) or jobs.state(cell) for cell in cells}
            done |= {name: state for name, state in states.items() if state[0] == DONE}
            if live:
                print((f"\x1b[{len(cells)}A" if shown else "") + state_table(states, clear=True), flush=True)
            for name, (kind, text) in states.items():
                if not live and going and shown.get(name) != kind:
                    print(f"{name}: {kind} {text}".rstrip(), flush=True)
                shown[name] = kind
            time.sleep(POLL_SECONDS if going else 0)
    except KeyboardInterrupt:
        jobs.stop()
    if not live:
        print(state_table({cell.name: jobs.state(cell) for cell in cells}), flush=True)


def state_table(states: dict[str, tuple[str, str]], clear: bool = False) -> str:
    """A line a cell; ``clear`` is for drawing over an older one: no line may wrap, and its rest is wiped."""
    width = max(map(len, states))
    lines = [f"{name:<{width}}  {kind:<7}  {text}".rstrip() for name, (kind, text) in states.items()]
    columns = shutil.get_terminal_size().columns
    return "\n".join(line[: columns - 1] + "\x1b[K" if clear else line for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="TABLE.yaml", help="e.g. configs/paper/table3.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for every cell, above everything else")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--over", type=Path, metavar="OVERLAY.yaml", help="e.g. configs/paper/scenes.yaml")
    parser.add_argument("--seeds", type=_seeds, metavar="0,1", help="instead of the table's")
    parser.add_argument(
        "--max-parallel", type=at_least(1), metavar="N", help="cells at once (default: 1; on SLURM all)"
    )
    add_array_arguments(parser, "cell", 1440)
    return parser


def _seeds(text: str) -> list[int]:
    seeds = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in seeds) or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r}: expected different seeds, e.g. 0,1,2")
    return [int(part) for part in seeds]


if __name__ == "__main__":
    sys.exit(main())
