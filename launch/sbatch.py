"""The batch scripts: a job's resources as sbatch takes them, and the few lines around srun.

In: ``Resources`` and paths. Out: text; nothing is run here. SLURM starts the same script again after a requeue, so it
holds nothing of one start: the port and the first node are found by the job itself.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

WARNING_SECONDS = 120  # before the time limit, SIGUSR2 asks the ranks to save; a checkpoint has to fit in


@dataclass
class Resources:
    """What a job asks for. Names are those of the flags and of configs/launch/*.yaml."""

    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int = 0  # 0: one a GPU, or one where there are none
    cpus_per_task: int = 0  # 0: the cluster's default
    mem: str = ""
    time: str = ""  # as sbatch takes it: minutes, H:MM:SS, D-HH, ...
    warning: int = 0  # seconds between SIGUSR2 and the time limit; 0: WARNING_SECONDS, less where the limit is short
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    reservation: str = ""
    comment: str = ""
    name: str = ""
    slurm: dict[str, str] = field(default_factory=dict)  # any other option of sbatch; an empty value is a bare flag
    setup: list[str] = field(default_factory=list)  # shell lines before srun, e.g. module load cuda

    @property
    def tasks_per_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class Job:
    """One job of a run: ``kind`` names its logs, ``module`` and ``words`` are what every rank runs."""

    kind: str
    module: str
    words: list[str]
    run: Path
    code: Path  # the snapshot's
    logs: Path
    python: str
    folder: Path  # relative paths in a config are relative to this
    warn: bool = False  # ask with SIGUSR2 before the time limit
    beside: list[str] | None = None  # words of launch.beside, in a step of its own; None: without it


def script(job: Job, resources: Resources) -> str:
    """The whole file that sbatch gets."""
    options = sbatch_options(job, resources)
    python, run = shlex.quote(job.python), shlex.quote(str(job.run))
    srun = ["srun", "--kill-on-bad-exit=1", "--unbuffered", "--open-mode=append"]
    if resources.cpus_per_task:  # srun no longer takes it over from sbatch since SLURM 22.05
        srun.append(f"--cpus-per-task={resources.cpus_per_task}")
    srun.append(f"--output={_pattern(job.logs / f'{job.kind}.%j.%t.log')}")
    warning = resources.warning or warning_seconds(resources.time)
    said = f'{shlex.quote(str(job.logs / job.kind))}."$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}".srun'
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}" + (f"={_quoted(value)}" if value else "") for key, value in options.items()),
        "",
        *resources.setup,
        "# The snapshot is what runs, wherever the checkout has gone since. Some shared disks show it late.",
        f"code={shlex.quote(str(job.code))}",
        'for second in {1..60}; do [ -d "$code" ] && break; sleep 1; done',
        'export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1',
        "trap : TERM USR2  # the ranks save at their next step; this shell sees them out",
        f"said={said}  # what srun says: who failed first",
        'export MASTER_ADDR="$SLURMD_NODENAME"',
        f'MASTER_PORT="$({python} -m launch.job before {job.kind} {run})" || exit 1',
        "export MASTER_PORT",
        *([] if job.beside is None else _step_beside(job)),
        f'{_words(srun)} {python} -m {job.module} {_words(job.words)} 2> "$said"',
        f'{python} -m launch.job after {job.kind} {run} --status $? --said "$said" --warning {warning}',
    ]
    return "\n".join(lines) + "\n"


def _step_beside(job: Job) -> list[str]:
    """One process on this node that shares the ranks' cores and has no GPU; the variables would ask for one again."""
    srun = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none"]
    srun += [f"--output={_pattern(job.logs / f'{job.kind}.%j.log')}", "--open-mode=append"]
    python = [job.python, "-m", "launch.beside", str(job.run), *(job.beside or ())]
    return [
        "# Hands in what is to be scored on the way, and asks for a requeue where this script is killed.",
        '(unset "${!SLURM_GPU@}" SLURM_MEM_PER_GPU SLURM_NTASKS_PER_GPU SLURM_TRES_PER_TASK',
        f' exec {_words(srun)} --nodelist="$SLURMD_NODENAME" {_words(python)} --script $$ < /dev/null) &',
    ]


def sbatch_options(job: Job, resources: Resources) -> dict[str, str]:
    """Long option -> value, in the order of the file; ``resources.slurm`` goes above everything."""
    r = resources
    options = {
        "job-name": r.name if job.kind == "train" else f"{r.name}-{job.kind}",
        "nodes": str(r.nodes),
        "ntasks-per-node": str(r.tasks_per_node),
        "gpus-per-node": str(r.gpus_per_node or ""),
        "cpus-per-task": str(r.cpus_per_task or ""),
        **{key: getattr(r, key) for key in ("mem", "time", "partition", "account", "qos", "constraint", "exclude")},
        **{key: getattr(r, key) for key in ("reservation", "comment")},
        "chdir": str(job.folder),
        "output": _pattern(job.logs / f"{job.kind}.%j.log"),
        "open-mode": "append",
        "signal": f"USR2@{r.warning or warning_seconds(r.time)}" if job.warn else "",
    }
    options = {key: value for key, value in options.items() if value}
    return options | {"requeue": ""} | {key.replace("_", "-"): value for key, value in r.slurm.items()}


def warning_seconds(time: str) -> int:
    """How long before its limit a job is warned: ``WARNING_SECONDS``, of a short job a quarter of its time."""
    limit = limit_seconds(time)
    return WARNING_SECONDS if limit is None else max(10, min(WARNING_SECONDS, limit // 4))


def limit_seconds(time: str) -> int | None:
    """Seconds of a time limit as sbatch takes it; None without one. Raises ValueError."""
    if time.upper() in ("", "UNLIMITED", "INFINITE"):
        return None
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise ValueError(f"--time {time}: expected minutes, MM:SS, H:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    numbers = [int(part) for part in parts]
    units = [3600, 60, 1] if dash or len(numbers) == 3 else [60, 1]
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units))


def _pattern(path: Path) -> str:
    """A path for --output: SLURM replaces %j in the file's name, and would in folders above it."""
    return str(path.parent).replace("%", "%%") + "/" + path.name


def _quoted(value: str) -> str:
    """As sbatch reads its own lines: double quotes, where it needs them."""
    return value if re.fullmatch(r"[\w@%+=:,./-]+", value) else '"' + value.replace('"', '\\"') + '"'


def _words(words: list[str]) -> str:
    return " ".join(map(shlex.quote, words))
