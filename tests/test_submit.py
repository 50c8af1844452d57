"""launch/submit.py: what it hands in, what its jobs decide, what a snapshot keeps; real ranks of this machine."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffcap_dist.config import load_config
from diffcap_dist.run_dir import RunDir
from diffcap_dist.training.distributed import slurm_rank_variables
from launch import following, job, preflight, snapshot, submit
from launch.arguments import slurm_option
from launch.job import culprit
from launch.records import add_record, read_records
from launch.sbatch import Resources, limit_seconds, warning_seconds
from launch.scheduler import NICE, Submitted, choose_cluster
from tests.conftest import TINY_SETTINGS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def spaced_config(scene_shards: Path, tmp_path: Path) -> Path:
    """The tiny run, in a folder with a space and a percent sign in its name."""
    folder = tmp_path / "a 5% folder"
    folder.mkdir()
    path = folder / "tiny.yaml"
    path.write_text(TINY_SETTINGS.format(run=f'"{folder / "run"}"', shards=scene_shards))
    return path


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH but for the system's own: for a SLURM of shell scripts."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "sh", "cat", "git", "env", "echo"):
        (folder / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("RANK", raising=False)
    return folder


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def slurm_of_scripts(programs: Path, log: Path) -> None:
    """Jobs 100, 101, ...: never run. No sacct."""
    program(programs, "srun", "")
    numbers = f'n=$(cat "{log}.n" 2>/dev/null || echo 100); echo $((n + 1)) > "{log}.n"; echo "$n"'
    program(programs, "sbatch", f'echo "sbatch $*" >> "{log}"; env >> "{log}.env"; {numbers}')
    program(programs, "squeue", 'echo "PENDING|Resources|0:00|"')
    program(programs, "scancel", f'echo "scancel $*" >> "{log}"')


# ---- which cluster ----


def test_auto_is_slurm_where_there_is_a_cluster(programs: Path) -> None:
    """Not where its programs only lie about; but a cluster that doesn't answer is one."""
    assert choose_cluster("auto") == "local"
    program(programs, "sbatch", "")
    program(programs, "scontrol", "echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1")
    assert choose_cluster("auto") == "local" and choose_cluster("slurm") == "slurm"
    program(programs, "scontrol", "echo 'Slurmctld(primary) at n0 is DOWN'; exit 1")
    assert choose_cluster("auto") == "slurm" and choose_cluster("local") == "local"


@pytest.mark.parametrize("text", ["mail-type=END", "--mail_type=END", "exclusive", "=x"])
def test_an_option_of_sbatch(text: str) -> None:
    if text == "=x":
        with pytest.raises(argparse.ArgumentTypeError, match="expected KEY or KEY=VALUE"):
            slurm_option(text)
    else:
        assert slurm_option(text) == (("exclusive", "") if text == "exclusive" else ("mail-type", "END"))


# ---- what it hands in ----


def test_dry_run_needs_no_slurm_and_writes_nothing(
    spaced_config: Path, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--dry-run --nodes 2 --gpus-per-node 4 --cpus-per-task 6 --time 1-12 --mem 9G --partition gpu --warning 300"
    words += " --evaluate-every 10 --slurm exclusive --slurm mail-type=END"
    assert (
        submit.main(
            [
                *words.split(),
                "--comment",
                'for "us"',
                str(spaced_config),
                "training.micro_batch_size=1",
                "training.zero_stage=2",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    run = spaced_config.parent / "run"
    assert not run.exists()
    for line in [
        "#SBATCH --job-name=diffcap-run",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --mem=9G",
        "#SBATCH --time=1-12",
        "#SBATCH --partition=gpu",
        '#SBATCH --comment="for \\"us\\""',
        "#SBATCH --exclusive",
        "#SBATCH --mail-type=END",
        "#SBATCH --signal=USR2@300",
        "#SBATCH --requeue",
        f'#SBATCH --output="{str(run).replace("%", "%%")}/logs/train.%j.log"',
        "# ranks      8 = 2 nodes x 4, ZeRO stage 2",
        "# batch      16 photos = 1 (micro batch) x 2 (accumulated) x 8 ranks",
        "# data       64 photos in 1 shards",
        "# steps      20; 4.0 an epoch, 5.0 epochs",
        "# scores     every 10 steps, on the way (on this machine: at the end)",
    ]:
        assert line in said.splitlines(), line
    assert "--dependency=afterok:JOB_OF_train --kill-on-invalid-dep=yes" in said
    assert f"--nice={NICE} --dependency=singleton '{run}/snapshots/1/evaluate-steps.sbatch'" in said
    assert said.count("-m launch.beside") == 1 and "-m diffcap_dist.evaluate" in said and "--steps" in said
    assert "-m diffcap_dist.train" in said and "--cpus-per-task=6" in said
    config = yaml.safe_load(said.split("# ---- numbers")[0])
    assert config["training"]["zero_stage"] == 2 and config["run_dir"] == str(run)
    for part in said.split("#!/bin/bash")[1:]:  # what bash thinks of it
        script = "#!/bin/bash" + part.split("\n# ----")[0]
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_two_jobs_are_handed_in(
    spaced_config: Path,
    programs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = tmp_path / "log"
    slurm_of_scripts(programs, log)
    for name, value in {"RANK": "3", "SLURM_PROCID": "3", "SLURM_JOB_ID": "9", "SLURM_CONF": "/etc/c"}.items():
        monkeypatch.setenv(name, value)
    assert submit.main([str(spaced_config)]) == 0
    run = RunDir(spaced_config.parent / "run")
    said = capsys.readouterr().out
    folder = run.snapshots / "1"
    assert log.read_text().splitlines() == [
        f"sbatch --parsable {folder}/train.sbatch",
        f"sbatch --parsable --dependency=afterok:100 --kill-on-invalid-dep=yes {folder}/evaluate.sbatch",
    ]
    handed_on = Path(f"{log}.env").read_text()
    assert "SLURM_CONF=/etc/c" in handed_on and "RANK=3" not in handed_on and "SLURM_JOB_ID" not in handed_on
    assert "100 (training, 1 ranks), 101 (evaluation" in said and f"{run.logs}/train.100.0.log" in said
    assert load_config(folder / "config.yaml").run_dir == str(run.root)
    # A second one beside it would write into the same run.
    assert submit.main([str(spaced_config)]) == 2
    assert "has a job already: train 100, PENDING (Resources)" in capsys.readouterr().err
    assert submit.main(["status", str(run.root)]) == 0
    assert "evaluate  slurm 101: PENDING (Resources)" in capsys.readouterr().out
    assert submit.main(["cancel", str(run.root)]) == 0
    assert log.read_text().splitlines()[-2:] == ["scancel 101", "scancel 100"]
    program(programs, "squeue", "echo 'error: Unable to contact slurm controller' >&2; exit 1")
    assert submit.main(["resubmit", str(run.root)]) == 2
    assert "train 100 is still there: UNKNOWN (error: Unable" in capsys.readouterr().err
    program(
        programs, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    )  # gone from the queue, and no sacct to ask
    add_record(run, {"event": "start", "kind": "train", "job": "100", "restarts": 0, "step": 0})
    assert submit.main(["status", str(run.root)]) == 0
    assert "train     slurm 100: not in the queue; ended without a word" in capsys.readouterr().out
    assert submit.main(["resubmit", str(run.root)]) == 0
    assert [r["job"] for r in read_records(run) if r["event"] == "submit"] == ["100", "101", "102", "103"]


def test_errors_are_shown_whole(spaced_config: Path, programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["--cluster", "slurm", str(spaced_config)]) == 2
    assert "no sbatch here" in capsys.readouterr().err
    program(programs, "sbatch", 'printf "sbatch: error: Batch job submission failed:\\nInvalid qos" >&2; exit 1')
    assert submit.main(["--cluster", "slurm", str(spaced_config)]) == 2
    assert "sbatch: error: Batch job submission failed:\nInvalid qos" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--time", "1x"], "--time 1x: expected minutes"),
        (["--nodes", "3"], "can't be shared equally by 3 ranks"),
        (["--site", "nowhere"], "known: cpu, example"),
        (["training.num_step=3"], "did you mean 'training.num_steps'"),
        (["--evaluate-every", "15"], "evaluate_every=15 is no multiple of training.save_every=10"),
    ],
)
def test_mistakes(spaced_config: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [word for word in words if "training" not in word]
    settings = [word for word in words if "training" in word]
    assert submit.main([*flags, "--dry-run", str(spaced_config), *settings]) == 2
    assert message in capsys.readouterr().err
    assert not (spaced_config.parent / "run").exists()


def test_a_site_below_the_flags(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "time: 4:00:00\nnodes: 4\npartition: gpu\nslurm: {exclusive: , gres: 'gpu:2'}\nsetup: [module load x]\n"
    )
    args = submit._parser().parse_args(["c.yaml", "--site", str(site), "--nodes", "2", "--slurm", "gres=gpu:4"])
    found = submit.resources_of(args, RunDir("runs/x"))
    expected = Resources(nodes=2, time="4:00:00", partition="gpu", name="diffcap-x", setup=["module load x"])
    expected.slurm = {"exclusive": "", "gres": "gpu:4"}
    assert found == expected
    site.write_text("node: 4\n")
    with pytest.raises(ValueError, match="unknown 'node'; known: nodes"):
        submit.load_site(str(site))


def test_every_site_of_ours_loads() -> None:
    for path in submit.SITES.glob("*.yaml"):
        limit_seconds(submit.load_site(path.stem).time)


def test_time_limits() -> None:
    seconds = {"90": 5400, "1:30": 90, "2:00:00": 7200, "1-12": 129600, "1-0:30": 88200, "2-00:00:05": 172805}
    assert {text: limit_seconds(text) for text in seconds} == seconds
    assert limit_seconds("") is None and limit_seconds("UNLIMITED") is None
    assert [warning_seconds(text) for text in ("", "1-0", "4", "1")] == [120, 120, 60, 15]


# ---- what the jobs decide ----


def test_the_first_rank_that_failed() -> None:
    said = "srun: warning: x\nsrun: error: n2: task 5: Killed\nsrun: error: n1: tasks 0-3: Exited with exit code 1\n"
    found = culprit(said)
    assert (str(found), found and found.was_killed) == ("rank 5 on n2: Killed", True)
    found = culprit("srun: error: n1: tasks 2-3: Exited with exit code 1\n")
    assert (str(found), found and found.was_killed) == ("rank 2 on n1: Exited with exit code 1", False)
    assert culprit("srun: Force Terminated StepId=6.0\n") is None


KILLED, ERROR = "srun: error: n2: task 1: Killed\n", "srun: error: n2: task 1: Exited with exit code 1\n"
LOST_NEIGHBOUR = "Traceback (most recent call last):\nRuntimeError: [gloo] Connection closed by peer [127.0.0.1]\n"
SOON = "EndTime=2020-01-01T00:00:00 TimeLimit=00:10:00"


@pytest.mark.parametrize(
    "status, said, log, state, idle, how",
    [
        (0, "", "", f"JobState=RUNNING {SOON}", 0, "requeued, saved at step 10: its time limit"),
        (0, "", "", "JobState=RUNNING EndTime=2099-01-01T00:00:00", 0, "requeued, saved at step 10: a signal"),
        (0, "", "", f"JobState=RUNNING {SOON} PreemptTime=2020-01-01T00:00:00", 9, "requeued, .* preempted"),
        (0, "", "", "JobState=COMPLETING Reason=None", 0, "SLURM ended it at step 10"),  # scancel, scontrol requeue
        (143, KILLED, "", "JobState=COMPLETING Reason=TimeLimit", 0, "requeued"),
        (137, KILLED, "", "JobState=RUNNING", 0, "requeued, saved at step 10: rank 1 on n2: Killed"),
        (137, KILLED, "", "JobState=RUNNING", 3, "given up: 3 starts in a row saved nothing"),
        (1, ERROR, "Traceback (most recent call last):\nValueError: x\n", "JobState=RUNNING", 0, "failed at step 10"),
        (1, ERROR, LOST_NEIGHBOUR, "JobState=RUNNING", 0, "requeued, .* rank 1 on n2: lost another rank"),
        (1, "", "", "", 0, "failed at step 10"),
    ],
)
def test_what_becomes_of_a_job(
    status: int, said: str, log: str, state: str, idle: int, how: str,
    tmp_path: Path, tiny_config: Path, programs: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = trained(tmp_path, tiny_config, 10)
    for number in range(idle):
        add_record(run, {"event": "start", "kind": "train", "job": "7", "restarts": number, "step": 10})
    run.logs.mkdir()
    (run.logs / "train.7.1.log").write_text(log)
    (tmp_path / "said").write_text(said)
    program(programs, "scontrol", f'echo "scontrol $*" >> "{tmp_path}/asked"; echo "JobId=7 {state}"')
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
    result = job.after(run, "train", status, tmp_path / "said")
    end = read_records(run)[-1]
    assert end["event"] == "end" and re.match(how, end["how"]), end
    requeued = "scontrol requeue 7" in (tmp_path / "asked").read_text().splitlines()
    assert requeued == how.startswith("requeued")
    assert (result == 0) == how.startswith("SLURM")


N1, N3 = "srun: error: n1: task 0: Terminated\n", "srun: error: n3: tasks 2-3: Killed\n"
FAILURE = "srun: error: Node failure on n1\n"
SCONTROL = """
case "$1 $2 $3" in
  "show hostnames "*) echo ${{3//,/ }};;
  "-o show job") echo "JobId=7 JobState={state}";;
  "-o show node") for n in ${{4//,/ }}; do
      [ $n = "{down}" ] && s="DOWN*" || s="MIXED*"
      echo "NodeName=$n Arch=x State=$s ThreadsPerCore=1"
    done;;
esac
"""


@pytest.mark.parametrize(
    "said, down, state, how",
    [
        (ERROR + N1, "", "RUNNING", "requeued, saved at step 10: node n3: lost"),  # it alone is silent
        (ERROR + N1 + FAILURE, "", "RUNNING", "requeued, saved at step 10: node n1: lost"),  # SLURM noticed as well
        (ERROR + N1 + N3, "", "RUNNING", "requeued, saved at step 10: rank 1 on n2: lost another rank"),
        (ERROR + N1 + N3, "n1", "RUNNING", "requeued, saved at step 10: node n1: lost"),  # SLURM has not told srun
        (N1, "", "RUNNING", "requeued, saved at step 10: a signal"),
        (N1, "n1", "RUNNING", "requeued, saved at step 10: node n1: lost"),
        ("", "n1", "NODE_FAIL", "SLURM ended it at step 10 (NODE_FAIL, node n1: lost)"),
        (FAILURE, "", "COMPLETING", "SLURM ended it at step 10 (COMPLETING, node n1: lost)"),
    ],
)
def test_a_lost_node_is_named(
    said: str, down: str, state: str, how: str,
    tmp_path: Path, tiny_config: Path, programs: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = trained(tmp_path, tiny_config, 10)
    run.logs.mkdir()
    (run.logs / "train.7.1.log").write_text(LOST_NEIGHBOUR)
    (tmp_path / "said").write_text(said)
    program(programs, "scontrol", SCONTROL.format(state=state, down=down))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1,n2,n3")
    monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
    job.after(run, "train", 1, tmp_path / "said")
    assert read_records(run)[-1]["how"].split(";")[0] == how
    (programs / "scontrol").unlink()
    assert job.hostnames("n1,n2") == []


def test_whoever_follows_a_run_is_told_of_the_node_too(tmp_path: Path, tiny_config: Path, programs: Path) -> None:
    run = trained(tmp_path, tiny_config, 10)
    run.logs.mkdir()
    (run.logs / "train.7.0.srun").write_text(N1 + "srun: error: Node failure on n2\n")
    said = following.failure(run, Submitted("train", "slurm", "7", 2))
    assert said == "first to fail: node n2: lost; its ranks left no last words"


def test_a_run_that_has_come_to_its_end(tmp_path: Path, tiny_config: Path, programs: Path) -> None:
    """Status 0, so that the evaluation starts; nothing is asked of SLURM."""
    assert job.after(trained(tmp_path, tiny_config, 20), "train", 0, tmp_path / "said") == 0


def test_the_next_start_names_the_lost_node(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, tiny_config, 10)
    run.logs.mkdir()
    (run.logs / "train.7.0.srun").write_text("srun: error: Node failure on n2\n")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for restarts in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        job.before(run, "train")
    ends = [(r["restarts"], r["culprit"]) for r in read_records(run) if r["event"] == "end"]
    assert ends == [(0, "node n2: lost"), (1, None)]
    said = capsys.readouterr()
    assert "node n2: lost" in said.err and "its first node was lost" in said.err
    assert all(line.isdecimal() for line in said.out.splitlines())  # the batch script takes it for the port


@pytest.fixture
def beside_a_job(tmp_path: Path, tiny_config: Path, programs: Path) -> Iterator[Beside]:
    """launch.beside with a process that stands for the batch script."""
    slurm_of_scripts(programs, tmp_path / "asked")
    program(programs, "scontrol", f'echo "scontrol $*" >> "{tmp_path}/asked"')
    run = trained(tmp_path, tiny_config, 10)
    add_record(run, {"event": "start", "kind": "train", "job": "7", "restarts": 0, "step": 0})
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"]) as script:
        words = ["-m", "launch.beside", str(run.root), "--script", str(script.pid), "--evaluation", "e.sbatch"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}
        with subprocess.Popen([sys.executable, *words], env=environment) as process:
            try:
                yield Beside(run, script, process, tmp_path / "asked")
            finally:
                process.kill()
                script.kill()


@dataclass
class Beside:
    run: RunDir
    script: subprocess.Popen[bytes]
    process: subprocess.Popen[bytes]
    asked: Path

    def leave(self, step: int) -> None:
        """As training does."""
        here = self.run.evaluation(step)
        here.export.mkdir(parents=True)
        (here.export / "model.safetensors").touch()

    def wait_for(self, text: str) -> list[str]:
        deadline = time.monotonic() + 60
        while not (self.asked.is_file() and text in self.asked.read_text()):
            assert time.monotonic() < deadline, self.asked.read_text() if self.asked.is_file() else "nothing asked"
            time.sleep(0.05)
        return self.asked.read_text().splitlines()


def test_a_batch_script_that_is_killed(beside_a_job: Beside) -> None:
    beside_a_job.leave(10)
    beside_a_job.wait_for("sbatch")
    beside_a_job.leave(20)  # which the job that waits scores too
    beside_a_job.script.kill()
    beside_a_job.script.wait()
    assert beside_a_job.process.wait(60) == 0
    evaluate = f"sbatch --parsable --nice={NICE} --dependency=singleton e.sbatch"
    assert beside_a_job.wait_for("scontrol") == [evaluate, "scontrol requeue 7"]
    end = read_records(beside_a_job.run)[-1]
    assert end["culprit"] == "the batch script on n1: Killed" and end["how"].startswith("requeued, at step 10")


@pytest.mark.parametrize("why", ["cancelled", "it has spoken", "no progress", "a node was lost"])
def test_a_batch_script_that_nobody_need_ask_for(beside_a_job: Beside, why: str) -> None:
    beside_a_job.leave(10)
    beside_a_job.wait_for("sbatch")  # it watches by now
    if why == "cancelled":  # SLURM tells all steps while the script lives
        beside_a_job.process.terminate()
        assert beside_a_job.process.wait(60) == 0
    if why == "it has spoken":
        add_record(beside_a_job.run, {"event": "end", "kind": "train", "job": "7", "restarts": 0, "how": "finished"})
    if why == "a node was lost":  # SLURM starts the job again by itself
        beside_a_job.run.logs.mkdir(exist_ok=True)
        (beside_a_job.run.logs / "train.7.0.srun").write_text("srun: error: Node failure on n2\n")
    for number in range(3 if why == "no progress" else 0):
        add_record(beside_a_job.run, {"event": "start", "kind": "train", "job": "7", "restarts": number, "step": 10})
    beside_a_job.script.kill()
    beside_a_job.script.wait()
    assert beside_a_job.process.wait(60) == 0
    assert "scontrol" not in beside_a_job.asked.read_text()
    last = read_records(beside_a_job.run)[-1]
    assert ("node n2: lost" in last.get("how", "")) == (why == "a node was lost")
    assert ("given up: 3 starts" in last.get("how", "")) == (why == "no progress")


def trained(tmp_path: Path, tiny_config: Path, step: int) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.begin(load_config(tiny_config))
    folder = run.checkpoints / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "early_stopped": False}))
    return run


def test_a_port_in_use_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        busy = taken.getsockname()[1]
        monkeypatch.setattr(job, "PORTS", range(busy, busy + 1))
        monkeypatch.setattr(job.random.SystemRandom, "sample", lambda self, ports, count: list(ports))
        with pytest.raises(OSError, match="no free port"):
            job.free_port()


def test_ranks_from_sruns_variables() -> None:
    step = {
        "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "n[08-10],m1",
    }  # fmt: skip
    found = slurm_rank_variables(step, visible_gpus=8)
    assert found.pop("MASTER_PORT") == str(12000 + 7 * 31)
    expected = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n08"}
    assert found == expected
    assert slurm_rank_variables(step, visible_gpus=1)["LOCAL_RANK"] == "0"  # srun --gpus-per-task=1
    assert slurm_rank_variables({**step, "MASTER_PORT": "1"}, 0)["MASTER_PORT"] == "1"
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "7", "SLURM_JOB_ID": "7"}
    assert slurm_rank_variables(batch, 0) == {} == slurm_rank_variables({}, 0)


# ---- the snapshot ----


def test_a_snapshot_is_the_checkout_at_that_moment(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vendored = tmp_path / "setuptools" / "_vendor"  # what setuptools brings along, once something imports it
    (vendored / "autocommand-2.2.2.dist-info").mkdir(parents=True)
    (vendored / "autocommand-2.2.2.dist-info" / "METADATA").write_text("Name: autocommand\nVersion: 2.2.2\n")
    monkeypatch.syspath_prepend(vendored)
    root = tmp_path / "checkout"
    (root / "diffcap_dist" / "__pycache__").mkdir(parents=True)
    (root / ".gitignore").write_text("__pycache__\n")
    (root / "diffcap_dist" / "a.py").write_text("1\n")
    (root / "diffcap_dist" / "__pycache__" / "a.pyc").write_text("x")
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *words], check=True)
    (root / "diffcap_dist" / "a.py").write_text("2\n")
    (root / "diffcap_dist" / "new.py").write_text("3\n")
    config = load_config(tiny_config)
    first = snapshot.take(root, config, tmp_path / "snapshots")
    assert sorted(p.name for p in (first / "code").rglob("*.*")) == ["a.py", "new.py"]
    assert "-1\n+2" in (first / "git.diff").read_text()
    assert "and changes in 2 files" in (first / "git.txt").read_text()
    freeze = [sys.executable, "-m", "pip", "freeze", "--all", "--disable-pip-version-check"]
    frozen = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.splitlines()
    installed = (first / "requirements.txt").read_text().splitlines()
    assert {line for line in frozen if not line.startswith(("#", "-e"))} == {x for x in installed if x[:2] != "-e"}
    assert load_config(first / "config.yaml") == config
    (first / "train.sbatch").write_text("x")
    assert snapshot.take(root, config, tmp_path / "snapshots") == first
    (root / "diffcap_dist" / "a.py").write_text("4\n")
    second = snapshot.take(root, config, tmp_path / "snapshots")
    assert second.name == "2" and snapshot.newest(tmp_path / "snapshots") == second
    assert (first / "code" / "diffcap_dist" / "a.py").read_text() == "2\n"
    shutil.rmtree(root / ".git")
    third = snapshot.take(root, config, tmp_path / "snapshots")
    assert "no git checkout" in (third / "git.txt").read_text()
    assert sorted(p.name for p in (third / "code").rglob("*.*")) == ["a.py", "new.py"]


# ---- the preflight ----


def test_what_a_preflight_finds_wrong() -> None:
    def report(rank: int, node: str, **changed: Any) -> dict[str, Any]:
        good = {"rank": rank, "node": node, "versions": {"torch": "2.15"}, "gpus": 8, "expected_gpus": 8, "errors": []}
        return {**good, "clock": 100.0, **changed}

    first = report(0, "n1")
    assert preflight.problems([first, report(1, "n2")]) == []
    bad = report(1, "n2", versions={"torch": "2.14"}, gpus=0, clock=107.5, errors=["shards: no such file"])
    assert preflight.problems([first, bad]) == [
        "rank 1 on n2: shards: no such file",
        "torch is 2.15 on n1, 2.14 on n2",
        "n2 has 8 GPUs to give, but torch sees none",
        "the nodes' clocks are 7.5 s apart",
    ]


def test_a_preflight_of_one_rank(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight.main([str(tiny_config)]) == 0
    said = capsys.readouterr().out
    assert "preflight: all well" in said and "shards 1 of train" in said and "torch 2." in said
    logs = load_config(tiny_config).run_dir + "/logs"
    assert list(Path(logs).iterdir()) == []
    tiny_config.write_text(tiny_config.read_text().replace("features: oracle", "features: none, train_split: nowhere"))
    shutil.rmtree(logs)
    Path(logs).touch()  # nothing can be written there
    assert preflight.main([str(tiny_config)]) == 1
    said = capsys.readouterr().out
    assert "WRONG: rank 0 on " in said and "write: FileExistsError" in said and "shards: ValueError" in said


# ---- real ranks ----


def checkout(folder: Path) -> Path:
    """The launcher and the packages, elsewhere."""
    for name in ("diffcap_dist", "launch", "shards"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "launch" / "submit.py"


def break_code(file: Path) -> None:
    """Whoever imports that checkout from now on fails."""
    train = file.parents[1] / "diffcap_dist" / "train.py"
    train.write_text('raise ValueError("broken after the submission")\n')


def run_submit(file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return subprocess.run(
        [sys.executable, str(file), *words], capture_output=True, text=True, timeout=200, env=environment
    )


@pytest.mark.slow
def test_two_ranks_here_run_what_was_submitted(spaced_config: Path, tmp_path: Path) -> None:
    """The code is broken after the submission; the job doesn't notice. A second start fails, and says who and why."""
    file = checkout(tmp_path / "checkout")
    words = ["--cluster", "local", "--nodes", "2", "--evaluate-every", "10", str(spaced_config)]
    done = run_submit(file, *words)
    assert done.returncode == 0, done.stderr
    break_code(file)
    run = RunDir(spaced_config.parent / "run")
    followed = run_submit(ROOT / "launch" / "submit.py", "logs", str(run.root), "--follow")
    assert followed.returncode == 0 and "trained to step 20" in followed.stdout, followed.stdout + followed.stderr
    assert json.loads(run.scores.read_text())["world_size"] == 2
    said = run_submit(file, "status", str(run.root)).stdout
    assert "step 10   BLEU-4" in said and "step 20   BLEU-4" in said and not run.waiting_evaluations()
    again = run_submit(file, "--cluster", "local", str(spaced_config), "--follow")
    assert again.returncode == 1 and "first to fail: rank" in again.stdout, again.stdout + again.stderr
    assert "ValueError: broken after the submission" in again.stdout
    assert [p.name for p in sorted(run.snapshots.iterdir())] == ["1", "2"]
