"""Train on a cluster with one command: it goes on through preemption and time limits, and is scored at its end.

    python launch/submit.py --nodes 2 --gpus-per-node 8 --time 24:00:00 configs/flickr8k.yaml training.zero_stage=2
    python launch/submit.py --site example --dry-run configs/flickr8k.yaml       # scripts and numbers; no SLURM needed
    python launch/submit.py --preflight --nodes 2 configs/flickr8k.yaml          # a minute on all nodes
    python launch/submit.py status|logs|cancel|resubmit RUN                      # logs RUN --follow, --rank 3, --job

In: a config and ``key=value`` words as for `diffcap train`. Out: a snapshot of code and config in the run directory, a
training job, and an evaluation that starts when it has ended well. On SLURM the scripts are ours (sbatch.py), so that
all ranks save together and a requeue is asked for outside of them; on this machine the ranks are submitit's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] != str(ROOT):  # as a script: this checkout, whatever else is installed
    sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from diffcap_dist.config import Config, ConfigError, differences, load_config  # noqa: E402
from diffcap_dist.data.shard_store import ShardStore  # noqa: E402
from diffcap_dist.run_dir import FREE_TO_CHANGE, RunDir  # noqa: E402
from launch import scheduler, snapshot  # noqa: E402
from launch.arguments import add_slurm_option, at_least  # noqa: E402
from launch.following import follow, read_log  # noqa: E402
from launch.job import SELF, free_port, is_finished, saved_step  # noqa: E402
from launch.local_rank import LocalRank  # noqa: E402
from launch.records import read_records  # noqa: E402
from launch.sbatch import Job, Resources, limit_seconds, script, warning_seconds  # noqa: E402
from launch.scheduler import EVALUATE_STEPS, SubmissionError, Submitted  # noqa: E402

SITES = ROOT / "configs" / "launch"
MONTH_MINUTES = 30 * 24 * 60
PREFLIGHT_TIME = "5"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    verb = VERBS.get(words[0]) if words else None
    try:
        if verb:
            return verb(words[1:])
        return submit(_parser().parse_intermixed_args(words))
    except (ValueError, OSError) as error:  # what the user can mend
        print(f"submit: {error}", file=sys.stderr)
        return 2


# ---- submitting ----


def submit(args: argparse.Namespace) -> int:
    every = [] if args.evaluate_every is None else [f"training.evaluate_every={args.evaluate_every}"]
    config = load_config(args.config, [*args.settings, *every])
    run = RunDir(Path(config.run_dir).absolute())
    config = dataclasses.replace(config, run_dir=str(run.root))
    resources = resources_of(args, run)
    limit_seconds(resources.time)
    numbers = derived_numbers(config, resources)
    if args.dry_run:
        print(dry_run(args, config, run, resources, numbers))
        return 0
    for job in _blocking_jobs(run):
        if scheduler.is_live(now := scheduler.state(job, run)):
            raise SubmissionError(
                f"{run.root} has a job already: {job.kind} {job.job}, {now}. "
                f"Look at it: {SELF} logs {run.root} --follow; end it: {SELF} cancel {run.root}"
            )
    if not args.preflight:  # which may try out several configs
        run.begin(config)
    run.logs.mkdir(parents=True, exist_ok=True)
    taken = snapshot.take(ROOT, config, run.snapshots)
    print(f"run        {run.root}\nsnapshot   {taken}: {(taken / 'git.txt').read_text().strip()}")
    print("\n".join(f"{name:<10} {value}" for name, value in numbers.items()), flush=True)
    cluster = scheduler.choose_cluster(args.cluster)
    if args.preflight:
        return run_preflight(run, taken, resources, cluster)
    if cluster != "slurm":
        return submit_local(args, run, taken, resources, cluster)
    for name, text in scripts(run, taken, resources, config.training.evaluate_every).items():
        (taken / f"{name}.sbatch").write_text(text, encoding="utf-8")
    return hand_in(run, taken, resources.ranks, args.evaluate_after, args.follow)


def hand_in(run: RunDir, taken: Path, ranks: int, evaluate: bool, follow_it: bool) -> int:
    """The scripts of a snapshot, to SLURM."""
    train = scheduler.sbatch(run, "train", taken / "train.sbatch", ranks)
    jobs = [train]
    if evaluate:
        script_file = taken / "evaluate.sbatch"
        jobs.append(scheduler.sbatch(run, "evaluate", script_file, ranks, *scheduler.after_options(train.job)))
    say_where(run, jobs)
    return follow(run, train) if follow_it else 0


def submit_local(args: argparse.Namespace, run: RunDir, taken: Path, resources: Resources, cluster: str) -> int:
    seconds = limit_seconds(resources.time)
    ranks = 1 if cluster == "debug" else resources.ranks
    gpus = resources.gpus_per_node * resources.nodes
    job = Submitted("train", cluster, "", ranks, gpus, args.evaluate_after)
    return start_local(run, taken, job, MONTH_MINUTES if seconds is None else seconds / 60, args.follow)


def start_local(run: RunDir, taken: Path, like: Submitted, minutes: float, follow_it: bool) -> int:
    """All ranks on this machine; the evaluation follows in the same job."""
    words: list[str] | None = [] if like.evaluates else None
    call = LocalRank(str(run.root), str(taken / "config.yaml"), (free_port(), free_port(), free_port()), words)
    job = scheduler.start_local(run, like, minutes, taken / "code", call)
    say_where(run, [job])
    return follow(run, job) if follow_it and job.cluster == "local" else 0


def run_preflight(run: RunDir, taken: Path, resources: Resources, cluster: str) -> int:
    """Wait for the preflight and show what it found."""
    if cluster != "slurm":
        raise SubmissionError("--preflight examines the nodes of a SLURM cluster; there is none here")
    resources = dataclasses.replace(resources, time=PREFLIGHT_TIME)
    file = taken / "preflight.sbatch"
    file.write_text(script(preflight_job(run, taken, resources), resources), encoding="utf-8")
    job = scheduler.sbatch(run, "preflight", file, resources.ranks)
    print(f"preflight  job {job.job}, waiting for {resources.nodes} nodes; Ctrl-C leaves it", flush=True)
    ended = scheduler.wait(job, run)
    print(read_log(job.log(run)) or read_log(job.job_log(run)) or f"it left no words: {ended}")
    well = "preflight: all well" in read_log(job.log(run))
    if not well:
        print(read_log(job.job_log(run)), file=sys.stderr)
    return 0 if well else 1


def say_where(run: RunDir, jobs: Sequence[Submitted]) -> None:
    """All that is needed to find the run again."""
    train = jobs[0]
    described = f"{train.job} (training, {train.ranks} ranks)"
    described += f", {jobs[1].job} (evaluation, when that has ended well)" if len(jobs) > 1 else ""
    where = shlex.quote(str(run.root))
    print(f"job        {described} on {train.cluster}")
    print(f"log        {train.log(run)} (rank 0)")
    if train.cluster == "slurm":
        print(f"           {train.job_log(run)} (starts, requeues, who failed first)")
        print("resume     by itself, after preemption and time limits; after a failure or a cancel:")
        print(f"           {SELF} resubmit {where}")
    else:
        print(f"resume     the same command again, or {SELF} resubmit {where}")
    print(f"look       {SELF} logs {where} --follow; {SELF} status {where}", flush=True)


def scripts(run: RunDir, taken: Path, resources: Resources, evaluate_every: int) -> dict[str, str]:
    """The batch scripts, by the name of their file."""
    train = _job(run, taken, "train", "diffcap_dist.train", [str(taken / "config.yaml")])
    jobs = [dataclasses.replace(train, warn=True, beside=[])]
    jobs.append(_job(run, taken, "evaluate", "diffcap_dist.evaluate", [str(run.root)]))
    if evaluate_every:
        jobs.append(_job(run, taken, EVALUATE_STEPS, "diffcap_dist.evaluate", [str(run.root), "--steps"]))
        jobs[0] = dataclasses.replace(jobs[0], beside=["--evaluation", str(taken / f"{EVALUATE_STEPS}.sbatch")])
    return {job.kind: script(job, resources) for job in jobs}


def preflight_job(run: RunDir, taken: Path, resources: Resources) -> Job:
    words = [str(taken / "config.yaml"), "--gpus-per-node", str(resources.gpus_per_node)]
    return _job(run, taken, "preflight", "launch.preflight", words)


def _job(run: RunDir, taken: Path, kind: str, module: str, words: list[str]) -> Job:
    return Job(kind, module, words, run.root, taken / "code", run.logs, sys.executable, Path.cwd())


def _blocking_jobs(run: RunDir) -> list[Submitted]:
    """Beside which another start must not be: not jobs that score steps, which a training never writes again."""
    return [job for job in scheduler.submitted_jobs(run) if job.kind != EVALUATE_STEPS]


# ---- what was asked for ----


def resources_of(args: argparse.Namespace, run: RunDir) -> Resources:
    """Defaults < the site's file < flags."""
    resources = load_site(args.site) if args.site else Resources()
    names = {field.name for field in dataclasses.fields(Resources)} - {"slurm", "setup"}
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    changed = dataclasses.replace(resources, **given, slurm={**resources.slurm, **dict(args.slurm)})
    return dataclasses.replace(changed, name=changed.name or f"diffcap-{run.root.name}")


def load_site(name: str) -> Resources:
    """``configs/launch/NAME.yaml``, or a file elsewhere. Raises ConfigError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else SITES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SITES.glob("*.yaml")))
        raise ConfigError(f"--site {name}: no {path}; known: {known}")
    content = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader) or {}  # all text: 4:00:00 is no number
    kinds = Resources.__annotations__
    for key in content:
        if key not in kinds:
            raise ConfigError(f"{path}: unknown {key!r}; known: {', '.join(kinds)}")
        if kinds[key] == "int" and not content[key].isdecimal():
            raise ConfigError(f"{path}: {key}: {content[key]!r} is not a number")
    values: dict[str, Any] = {key: int(value) if kinds[key] == "int" else value for key, value in content.items()}
    return Resources(**values)


def derived_numbers(config: Config, resources: Resources) -> dict[str, str]:
    """What follows from config and resources. Raises ValueError where they don't fit."""
    from diffcap_dist.training.engine import split_batch  # torch: not for status and cancel

    split = split_batch(config.training, resources.ranks)
    steps = config.training.num_steps
    numbers = {
        "ranks": f"{resources.ranks} = {resources.nodes} nodes x {resources.tasks_per_node}, "
        f"ZeRO stage {config.training.zero_stage}",
        "batch": f"{split.total} photos = {split.micro} (micro batch) x {split.accumulation} (accumulated) x "
        f"{split.world_size} ranks",
    }
    try:
        indexes = [ShardStore(one.shards).index for one in config.data.train] or [ShardStore(config.data.shards).index]
        photos = sum(index.num_samples(config.data.train_split) for index in indexes)
        numbers["data"] = f"{photos:,} photos in {sum(len(i.split(config.data.train_split)) for i in indexes)} shards"
        numbers["steps"] = f"{steps:,}; {photos / split.total:.1f} an epoch, {steps * split.total / photos:.1f} epochs"
    except (OSError, ValueError, ZeroDivisionError) as error:
        numbers["steps"] = f"{steps:,}; how many an epoch is not known here: {str(error).splitlines()[0]}"
    every = f"every {config.training.save_every} steps, and when the job is warned"
    numbers["saves"] = every + f", {resources.warning or warning_seconds(resources.time)} s before its time limit"
    if config.training.evaluate_every:
        numbers["scores"] = f"every {config.training.evaluate_every} steps, on the way (on this machine: at the end)"
    return numbers


def dry_run(
    args: argparse.Namespace, config: Config, run: RunDir, resources: Resources, numbers: dict[str, str]
) -> str:
    """Everything that would be done, with the numbers of the next snapshot; nothing is written."""
    newest = snapshot.newest(run.snapshots)
    taken = run.snapshots / str(int(newest.name) + 1 if newest else 1)
    parts = scripts(run, taken, resources, config.training.evaluate_every)
    if args.preflight:
        short = dataclasses.replace(resources, time=PREFLIGHT_TIME)
        parts = {"preflight": script(preflight_job(run, taken, short), short)}
    elif not args.evaluate_after:
        del parts["evaluate"]
    lines = ["# ---- config ----", OmegaConf.to_yaml(OmegaConf.structured(config)).rstrip(), "", "# ---- numbers ----"]
    lines += [f"# {name:<10} {value}" for name, value in numbers.items()]
    if run.config.exists() and (changed := differences(load_config(run.config), config, FREE_TO_CHANGE)):
        lines.append(f"# REFUSED    {run.root} holds a run of another config: {'; '.join(changed)}")
    for name, text in parts.items():
        options = {
            "evaluate": scheduler.after_options("JOB_OF_train"),
            EVALUATE_STEPS: scheduler.low_priority_options(),
        }
        command = shlex.join(scheduler.sbatch_command(taken / f"{name}.sbatch", *options.get(name, [])))
        lines += ["", f"# ---- {name}: {command} ----", text.rstrip()]
    return "\n".join(lines)


# ---- verbs ----


def status(words: Sequence[str]) -> int:
    run = _known(_verb("status").parse_args(words).run)
    steps = run.load_config().training.num_steps
    last = max((r["step"] for r in run.read_metrics() if r.get("kind") == "training"), default=0)
    print(f"{run.root}: step {last} of {steps}, saved at {saved_step(run)}" + (" (finished)" * is_finished(run)))
    for job in scheduler.current_jobs(run):
        now, records = scheduler.state(job, run), [r for r in read_records(run) if r.get("job") == job.job]
        starts = sum(r["event"] == "start" for r in records)
        told = f"; {starts} starts" if starts > 1 else ""
        if records[-1]["event"] == "end":
            told += f"; last: {records[-1]['how']}"
        elif records[-1]["event"] == "start" and not scheduler.is_live(now):
            told += (
                f"; ended without a word (its batch script was killed?): {SELF} resubmit {shlex.quote(str(run.root))}"
            )
        print(f"  {job.kind:<9} {job.cluster} {job.job}: {now}{told}")
    for file in sorted(run.evaluations.glob("step_*/scores.json")):
        scores = json.loads(file.read_text())
        print(f"  step {scores['step']:<4} BLEU-4 {scores['bleu_4']:.4f} on {scores['photos']} photos ({file})")
    if waiting := run.waiting_evaluations():
        print(f"  not yet   {', '.join(step.root.name for step in waiting)}: left for {EVALUATE_STEPS} to score")
    scores = json.loads(run.scores.read_text()) if run.scores.is_file() else {}
    if "bleu_4" in scores:
        print(f"  scores    BLEU-4 {scores['bleu_4']:.4f} on {scores['photos']} photos ({run.scores})")
    return 0


def logs(words: Sequence[str]) -> int:
    parser = _verb("logs")
    parser.add_argument("--follow", action="store_true", help="until the job has ended; requeues are waited out")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--job", action="store_true", help="what the job says instead of a rank: starts, requeues")
    parser.add_argument("--evaluation", action="store_true", help="of the evaluation instead of the training")
    args = parser.parse_args(words)
    run = _known(args.run)
    kind = "evaluate" if args.evaluation else "train"
    jobs = [job for job in scheduler.submitted_jobs(run) if job.kind == kind]
    if not jobs:
        raise SubmissionError(f"{run.root} has no {kind} job of its own (a local job evaluates by itself)")
    if args.follow:
        return follow(run, jobs[-1], args.rank)
    file = jobs[-1].job_log(run) if args.job else jobs[-1].log(run, args.rank)
    print(read_log(file) or f"nothing yet in {file}: {scheduler.state(jobs[-1], run)}")
    return 0


def cancel(words: Sequence[str]) -> int:
    run = _known(_verb("cancel").parse_args(words).run)
    live = [j for j in scheduler.current_jobs(run) if scheduler.is_live(scheduler.state(j, run))]
    for job in reversed(live):  # the evaluation first: it waits for the training
        scheduler.cancel(job)
        print(f"cancelled {job.kind} {job.job}")
    print(f"continue with: {SELF} resubmit {shlex.quote(str(run.root))}" if live else "nothing to cancel")
    return 0


def resubmit(words: Sequence[str]) -> int:
    """The newest snapshot again: the code as it was."""
    parser = _verb("resubmit")
    parser.add_argument("--follow", action="store_true")
    args = parser.parse_args(words)
    run = _known(args.run)
    jobs = _blocking_jobs(run)
    for job in jobs:
        if scheduler.is_live(now := scheduler.state(job, run)):
            raise SubmissionError(f"{job.kind} {job.job} is still there: {now}")
    trained = [job for job in jobs if job.kind == "train"]
    taken = snapshot.newest(run.snapshots)
    if not trained or taken is None:
        raise SubmissionError(f"{run.root} was never submitted; {SELF} CONFIG does")
    last = trained[-1]
    if last.cluster == "slurm":
        evaluate = any(job.kind == "evaluate" for job in jobs)
        return hand_in(run, Path(last.script).parent, last.ranks, evaluate, args.follow)
    return start_local(run, taken, last, MONTH_MINUTES, args.follow)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "status": status,
    "logs": logs,
    "cancel": cancel,
    "resubmit": resubmit,
}


# ---- words ----


def _known(where: Path) -> RunDir:
    run = RunDir(where.absolute())
    run.load_config()
    return run


def _verb(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"submit.py {name}")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML of settings, e.g. configs/flickr8k.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. training.num_steps=100")
    parser.add_argument("--site", metavar="NAME", help="defaults from configs/launch/NAME.yaml, or a file")
    parser.add_argument("--cluster", choices=("auto", "slurm", "local", "debug"), default="auto")
    parser.add_argument("--nodes", type=at_least(1), metavar="N", help="default 1")
    counts = {"gpus-per-node": "default 0", "cpus-per-task": "of each rank", "ranks-per-node": "default: one a GPU"}
    counts["warning"] = "seconds before the time limit in which a checkpoint has to fit (default 120)"
    for name, text in counts.items():
        parser.add_argument(f"--{name}", type=at_least(0), metavar="N", help=text)
    parser.add_argument("--mem", metavar="SIZE", help="of a node, e.g. 64G")
    parser.add_argument("--time", metavar="LIMIT", help="minutes, H:MM:SS, D-HH; the run goes on in the next start")
    for name in ("partition", "account", "qos", "constraint", "exclude", "reservation", "comment"):
        parser.add_argument(f"--{name}", metavar="TEXT")
    parser.add_argument("--name", metavar="TEXT", help="of the job (default: diffcap-RUN)")
    add_slurm_option(parser, "any other option of sbatch: exclusive, gres=gpu:a100:8")
    parser.add_argument(
        "--evaluate-after",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="score the run on the same kind of nodes when it has ended well (default)",
    )
    parser.add_argument(
        "--evaluate-every",
        type=at_least(1),
        metavar="N",
        help="also score every N steps, by jobs of low priority: training.evaluate_every=N",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the scripts and every number; hand nothing in")
    parser.add_argument("--preflight", action="store_true", help="only examine the nodes, in a minute")
    parser.add_argument("--follow", action="store_true", help="show rank 0's log until the end; Ctrl-C leaves the job")
    return parser


if __name__ == "__main__":
    sys.exit(main())
