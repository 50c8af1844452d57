"""Words of the command line that the launchers share, and the job array of those that hand one in by submitit."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import submitit


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is no smaller."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number, {least} or more")
        return int(text)

    return count


def slurm_option(text: str) -> tuple[str, str]:
    """An argparse type: KEY=VALUE, or KEY alone for a bare flag of sbatch (an empty value)."""
    key, _, value = text.partition("=")
    if not key.strip("-"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY or KEY=VALUE, e.g. partition=gpu")
    return key.strip("-").replace("_", "-"), value


def add_slurm_option(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument(
        "--slurm", type=slurm_option, action="append", default=[], metavar="KEY[=VALUE]", help=f"{help}; repeatable"
    )


def add_array_arguments(parser: argparse.ArgumentParser, each: str, minutes: int) -> None:
    """Of a job array; ``each`` is what its tasks are called."""
    parser.add_argument("--cluster", choices=("auto", "slurm", "local"), default="auto")
    parser.add_argument(
        "--time", type=at_least(1), default=minutes, metavar="MINUTES", help=f"of each {each} (default {minutes})"
    )
    parser.add_argument("--cpus-per-task", type=at_least(1), default=8, metavar="N", help="on SLURM (default 8)")
    add_slurm_option(parser, "any option of sbatch: partition=cpu, gpus-per-node=1, exclusive")


def slurm_array(args: argparse.Namespace, name: str, folder: Path, at_once: int) -> submitit.AutoExecutor:
    """submitit's executor of an array of which ``at_once`` tasks may run; it hands in what ``add_array_arguments``
    read."""
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
    # submitit knows some options by name and refuses the others; these it writes as they are, above its own.
    options = {key.replace("-", "_"): value or True for key, value in args.slurm}
    executor.update_parameters(
        name=name,
        timeout_min=args.time,
        cpus_per_task=args.cpus_per_task,
        slurm_array_parallelism=at_once,
        slurm_additional_parameters=options,
    )
    return executor
