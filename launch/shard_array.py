"""`make-shards` as a job array: every task has shards of its own, the last one to finish writes the index.

    python launch/shard_array.py --tasks 16 --slurm partition=cpu --time 120 -- cc3m --urls train.tsv --out DIR ...
    python launch/shard_array.py --tasks 8 --slurm gpus-per-node=1 -- features DIR --encoder ViT-B-32 ...

In: a make-shards command that writes a dataset, or computes features of one, behind ``--``. Out: what one process
writes, byte for byte.
On SLURM where there is one, else as processes of this machine. Run the same line again after a failure: finished shards
are kept. It waits for the tasks and shows the errors of those that failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import submitit

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] != str(ROOT):  # as a script: this checkout, whatever else is installed
    sys.path.insert(0, str(ROOT))

from launch.arguments import add_array_arguments, at_least, slurm_array  # noqa: E402
from launch.scheduler import choose_cluster  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if choose_cluster(arguments.cluster) == "slurm":
        executor = slurm_array(arguments, "make-shards", arguments.logs, arguments.tasks)
    else:
        executor = submitit.AutoExecutor(folder=arguments.logs, cluster="local")
        executor.update_parameters(timeout_min=arguments.time)
    parts = range(arguments.tasks)
    with executor.batch():
        jobs = [executor.submit(run_part, arguments.words, part, arguments.tasks) for part in parts]
    print(
        f"{arguments.tasks} tasks, job {jobs[0].job_id.split('_')[0]} on {executor.cluster}; logs in {arguments.logs}"
    )
    failed = [part for part, job in zip(parts, jobs) if not _succeeded(part, job)]
    if failed:
        print(f"tasks that failed: {', '.join(map(str, failed))}. Run the same line again: what is finished is kept")
        return 1
    return 0


def run_part(words: list[str], part: int, num_parts: int) -> None:
    """One task of the array."""
    from shards import make_shards

    status = make_shards.main([*words, "--part", f"{part}/{num_parts}"])
    if status != 0:
        raise SystemExit(f"make-shards ended with status {status}")


def _succeeded(part: int, job: submitit.Job[None]) -> bool:
    try:
        job.result()
        said = [line for line in (job.stdout() or "").splitlines() if not line.startswith("submitit ")]
        print(f"task {part}: {said[-1] if said else 'done'}", flush=True)
        return True
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
        lines = (job.stderr() or "it left no words: was it killed?").rstrip().splitlines()
        print(f"task {part} ({job.paths.stderr}):\n  " + "\n  ".join(lines[-5:]), file=sys.stderr)
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=at_least(1), required=True, metavar="N")
    add_array_arguments(parser, "task", 240)
    parser.add_argument("--logs", type=Path, default=Path("logs/make-shards"), metavar="DIR")
    parser.add_argument("words", nargs="+", metavar="-- COMMAND ...", help="of make-shards")
    return parser


if __name__ == "__main__":
    sys.exit(main())
