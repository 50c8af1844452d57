"""A real SLURM of two nodes on this machine, for tests and for trying things by hand: ``Cluster().start()``.

    make cluster && export SLURM_CONF=...      # printed; then sinfo, sbatch, launch/*.py
    make cluster-stop

In: Debian and root. Out: munge, MariaDB, slurmdbd, slurmctld and a slurmd for each of n1 and n2, with a folder, ports
and a munge key of their own, so that clusters can run beside each other. The packages are installed when missing.
Partitions: ``main`` (default) and ``low``, which main preempts: the job's --signal, GRACE seconds later SIGTERM, then
SIGKILL and requeue. Each node has 2 CPUs and 2 GPUs that are only counted. A requeued job starts again in 6 seconds.

In tests of tests/cluster, the fixture ``slurm`` is such a cluster, and SLURM_CONF is set to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ["munge", "slurm-wlm", "slurmdbd", "mariadb-server-core", "mariadb-client-core"]
PROGRAMS = ["munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "srun", "sacct"]
NODES = ("n1", "n2")
HOSTS = Path("/etc/hosts")
SESSION_PREFIX = "diffcap-slurm-"
GRACE = 8  # seconds between the signal of a preemption and SIGTERM

SLURM_CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[slurmctld]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its credential to expire: 120 s if nothing is said, 5 s at least.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# It looks at time limits every 30 s; SIGKILL comes KillWait after SIGTERM.
KillWait=10
EnforcePartLimits=ALL
SlurmdTimeout=10
ReturnToService=2
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[slurmdbd]}
AccountingStoragePass={folder}/munge/socket
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n1]} CPUs=2 RealMemory={memory} Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n2]} CPUs=2 RealMemory={memory} Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF DefaultTime=10
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} DefaultTime=10
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdPort={ports[slurmdbd]}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
"""


class ClusterUnavailable(RuntimeError):
    """This machine cannot run the cluster; the words say why."""


@dataclass
class Cluster:
    """One cluster in ``folder``. ``start`` and ``stop`` may be called twice."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are to use this cluster; free of the variables of a job that we may be in."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return {**outer, "SLURM_CONF": str(self.conf)}

    def start(self) -> Cluster:
        install()
        if self.conf.exists() and self._run("sinfo", check=False).returncode == 0:
            return self
        self.stop()  # what a killed start left
        for name in ("munge", "log", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        try:
            change_hosts(lambda text: text + self._hosts_line())
            self._write_configuration()
            self._start_munge()
            self._start_accounting()
            self._daemon("slurmctld", "slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node, wait=False)
            self.reset()
        except BaseException:
            self.stop()
            raise
        return self

    def reset(self) -> None:
        """No jobs, both nodes idle: for the next test."""
        self.scancel("--user=root")
        for node in NODES:
            if not (self.folder / "pids" / node).exists():
                self.start_node(node, wait=False)
        self._until("two idle nodes", lambda: self.node_states() == dict.fromkeys(NODES, "idle"))

    def stop(self) -> None:
        """Everything gone: jobs, daemons, files, the names of the nodes."""
        for node in NODES:
            self.kill_node(node)
        for file in sorted(self.folder.glob("pids/*")):
            self._kill(file.name)
        change_hosts(lambda text: text.replace(self._hosts_line(), ""))
        shutil.rmtree(self.folder, ignore_errors=True)

    # What tests do with it

    def sbatch(self, *words: str, script: str | None = None) -> str:
        """Submit; the id of the job."""
        return self._run("sbatch", "--parsable", *words, input=script).stdout.strip()

    def scontrol(self, *words: str) -> str:
        return self._run("scontrol", *words).stdout

    def scancel(self, *words: str) -> None:
        self._run("scancel", *words)

    def job_state(self, job: str) -> str:
        """Now, e.g. RUNNING; of an array, all states. From slurmctld, which knows before the accounting does."""
        return " ".join(re.findall(r"JobState=(\w+)", self.scontrol("show", "job", job)))

    def wait_for_job(self, job: str, state: str, seconds: float = 60) -> None:
        """Until it is in ``state``; an end also in the accounting, which is a moment later."""
        self._until(f"job {job} {state}", lambda: self.job_state(job) == state, seconds, lambda: self.job_state(job))
        if state not in ("PENDING", "RUNNING"):
            self._until(f"job {job} in sacct", lambda: self.sacct(job)[0]["State"].split()[0] == state)

    def sacct(self, job: str, fields: str = "JobID,State,ExitCode", duplicates: bool = False) -> list[dict[str, str]]:
        """The job and its steps as the accounting has them; with ``duplicates`` those before a requeue too."""
        words = ["-j", job, "-P", "-o", fields, *(["-D"] if duplicates else [])]
        head, *rows = [line.split("|") for line in self._run("sacct", *words).stdout.splitlines()]
        return [dict(zip(head, row)) for row in rows]

    def node_states(self) -> dict[str, str]:
        lines = self._run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t", check=False).stdout.splitlines()
        return dict(line.split() for line in lines)

    def kill_node(self, name: str) -> None:
        """As a power cut: its slurmd, its steps and their processes. slurmctld notices in about 30 s."""
        self._kill(name)
        for pid in self._processes_on(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, name: str, wait: bool = True) -> None:
        self._daemon(name, "slurmd", "-D", "-N", name)
        if wait:
            self._until(f"{name} up", lambda: self.node_states().get(name) in ("idle", "mix", "alloc"), 60)

    # How it is made

    def _hosts_line(self) -> str:
        return f"127.0.0.1 {' '.join(NODES)} # diffcap-dist {self.folder}\n"

    def _write_configuration(self) -> None:
        values = {
            "name": f"c{secrets.token_hex(3)}",
            "host": socket.gethostname(),
            "folder": self.folder,
            "ports": free_ports("slurmctld", "slurmdbd", *NODES),
            "memory": min(8000, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // 2),
            "grace": GRACE,
        }
        for gpu in ("gpu0", "gpu1"):  # files stand for the devices
            (self.folder / gpu).touch()
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-1]\n")
        (self.folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**values))
        (self.folder / "slurmdbd.conf").chmod(0o600)
        self.conf.write_text(SLURM_CONF.format(**values))

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        (folder / "key").write_bytes(secrets.token_bytes(128))
        (folder / "key").chmod(0o400)
        files = [f"--{name}-file={folder / name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "munged", "--foreground", "--force", f"--socket={folder / 'socket'}", *files)
        self._until("munge", (folder / "socket").exists)

    def _start_accounting(self) -> None:
        data, where = self.folder / "database", f"--socket={self.folder / 'database.socket'}"
        first = ["mariadb-install-db", "--no-defaults", "--user=root", "--skip-test-db", f"--datadir={data}"]
        self._run(*first, "--auth-root-authentication-method=normal")
        quick = ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0"]
        server = ["mariadbd", "--no-defaults", "--user=root", "--skip-networking", f"--datadir={data}", where]
        self._daemon("mariadbd", *server, *quick)
        self._until("MariaDB", (self.folder / "database.socket").exists)
        self._daemon("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=str(self.folder / "database.socket"))
        self._until("slurmdbd", lambda: self._run("sacctmgr", "-n", "list", "cluster", check=False).returncode == 0)

    def _daemon(self, name: str, *command: str, **environment: str) -> None:
        """Start in the background, in a session of its own so that Ctrl-C in pytest is not for it."""
        with (self.folder / "log" / name).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.environment, **environment},
                start_new_session=True,
            )
        self.processes[name] = process
        (self.folder / "pids").mkdir(exist_ok=True)
        (self.folder / "pids" / name).write_text(str(process.pid))

    def _kill(self, name: str) -> None:
        file = self.folder / "pids" / name
        if not file.exists():
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)
        if name in self.processes:
            self.processes.pop(name).wait()
        file.unlink()

    def _processes_on(self, node: str) -> Iterator[int]:
        """slurmstepd of the node, by their sockets in its spool folder, and all that runs in its jobs."""
        sockets = set()
        for line in Path("/proc/net/unix").read_text().splitlines():
            if f" {self.folder}/spool-{node}/" in line:
                sockets.add(f"socket:[{line.split()[6]}]")
        marks = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.conf}".encode()}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                named = marks <= set((folder / "environ").read_bytes().split(b"\0"))
                if named or any(str(file.readlink()) in sockets for file in (folder / "fd").iterdir()):
                    yield int(folder.name)

    def _run(self, *command: str, check: bool = True, input: str | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, capture_output=True, text=True, input=input, env=self.environment, timeout=120)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def _until(
        self, what: str, holds: Callable[[], bool], seconds: float = 60, now: Callable[[], str] = lambda: ""
    ) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                why = f"{', '.join(dead)} died" if dead else f"not in {seconds:g} s {now()}"
                logs = [f"{p.name}: {p.read_text(errors='replace')[-600:]}" for p in self.folder.glob("log/*")]
                raise RuntimeError(f"waiting for {what}: {why}\n" + "\n".join(logs))
            time.sleep(0.1)


def install() -> None:
    """The packages, when missing. Raises ``ClusterUnavailable`` with the reason."""
    if os.geteuid() != 0:
        raise ClusterUnavailable("the daemons of a SLURM cluster need root")
    if shutil.which("apt-get") is None:
        raise ClusterUnavailable("SLURM is installed from Debian's packages, and there is no apt-get here")
    if all(shutil.which(program) for program in PROGRAMS):
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        command = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=100", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=quiet, timeout=240)
        if done.returncode != 0:
            raise ClusterUnavailable(f"apt-get {words[0]} failed: {done.stderr.strip()[-500:]}")


def change_hosts(change: Callable[[str], str]) -> None:
    """In place, since a container may have it mounted; one process at a time."""
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = file.read()
        after = change(before)
        if after != before:
            file.seek(0)
            file.write(after)
            file.truncate()


def remove_orphans() -> None:
    """Clusters of test sessions that were killed before they could stop them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SESSION_PREFIX}*"):
        stat = Path("/proc") / folder.name.removeprefix(SESSION_PREFIX) / "stat"
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":  # dead, and not waited for
            Cluster(folder).stop()


def session_folder() -> Path:
    """Of the cluster that this process starts and stops; outside pytest's folders, which other users cannot enter."""
    return Path(tempfile.gettempdir()) / f"{SESSION_PREFIX}{os.getpid()}"


def free_ports(*names: str) -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in names]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return {name: probe.getsockname()[1] for name, probe in zip(names, probes)}


def main(action: str) -> None:
    """``make cluster`` and ``make cluster-stop``: one cluster, whatever the number of calls."""
    cluster = Cluster(Path(tempfile.gettempdir()) / "diffcap-cluster")
    if action == "stop":
        cluster.stop()
        print(f"stopped; {cluster.folder} is gone")
        return
    try:
        cluster.start()
    except ClusterUnavailable as reason:
        sys.exit(f"no cluster: {reason}")
    print(f"nodes n1 and n2 with 2 CPUs each; partitions main and low; logs in {cluster.folder}/log\n")
    print(f"    export SLURM_CONF={cluster.conf}\n    sinfo; srun -N 2 hostname; sacct\n    make cluster-stop")


if __name__ == "__main__":
    main(*sys.argv[1:])
