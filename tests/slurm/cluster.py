"""A real SLURM on this machine: munged, slurmctld and one slurmd per fake 8xA100 node, as plain processes on loopback.

Nothing of the machine's own configuration is read or changed: all files lie below one folder, and each node lives in a
UTS and mount namespace of its own, where its host name is `n1`, `n2`, ... and /etc/hosts knows these names.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PACKAGES = "slurmctld slurmd slurm-client munge"
_FREEZER = Path("/sys/fs/cgroup/freezer")
_SYSTEM_PATH = "/usr/sbin:/sbin"
_ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "RESIZING", "SIGNALING"}

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits cred_expire seconds; below 5 the default of 120 is used.
AuthInfo=socket={root}/run/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
MailProg=/bin/true
# With cgroups SLURM signals only the process it started, as on a real cluster; linuxproc signals all descendants.
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
MinJobAge=3600
# Two clusters side by side have nodes, and so control groups, of the same names; jobs must not share one.
FirstJobId={first_job}
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60
{extra}
# CPUs, memory and GPUs that this machine does not have, so that production headers are accepted as they are.
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes} Port=[{first}-{last}] Sockets=2 CoresPerSocket=64 RealMemory=1000000 Gres=gpu:a100:8 Feature=a100 State=UNKNOWN
PartitionName=gpu Nodes=n[1-{count}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=n[1-{count}] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Starts, asks and stops the cluster.

    Args:
        root: A new folder for all its files.
        nodes: Number of fake nodes.
        grace: Seconds between the warning and the end of a preempted job.
        extra: Further lines for slurm.conf.
    """

    def __init__(self, root: Path, nodes: int = 2, grace: int = 120, extra: str = "") -> None:
        self.root, self.nodes = root, nodes
        self.namespaces = subprocess.run(["unshare", "-m", "-u", "true"], capture_output=True).returncode == 0
        self.proctrack = "cgroup" if os.access(_FREEZER / "cgroup.procs", os.W_OK) else "linuxproc"
        self.env = os.environ | {
            "SLURM_CONF": str(root / "etc/slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{_SYSTEM_PATH}",
        }
        # A shell that already runs under SLURM, or has a site profile loaded, must not leak into the test.
        for name in [n for n in self.env if n.startswith(("SLURM_", "SBATCH_")) and n != "SLURM_CONF"]:
            del self.env[name]
        self._write_files(grace, extra)

    def _write_files(self, grace: int, extra: str) -> None:
        for folder in ("etc", "run", "log", "state", "dev", "munge", "jobs"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(8):
            (self.root / f"dev/nvidia{i}").symlink_to("/dev/null")
        names = [f"n{i + 1}" for i in range(self.nodes)]
        for name in names:
            (self.root / "spool" / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        line = f"NodeName=n[1-{self.nodes}] NodeAddr=127.0.0.1"
        if not self.namespaces:
            line += f" NodeHostname={host}"
        port = _free_ports(self.nodes + 1)
        etc = self.root / "etc"
        (etc / "slurm.conf").write_text(
            _CONF.format(
                host=host,
                user=subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip(),
                root=self.root,
                port=port,
                first_job=random.randrange(1, 60_000) * 1000,
                first=port + 1,
                last=port + self.nodes,
                count=self.nodes,
                nodes=line,
                proctrack=self.proctrack,
                grace=grace,
                extra=extra,
            )
        )
        (etc / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=n[1-{self.nodes}] Name=gpu Type=a100 File={self.root}/dev/nvidia[0-7]\n"
        )
        version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, env=self.env, check=True).stdout
        release = tuple(int(n) for n in re.search(r"(\d+)\.(\d+)", version).groups())
        # "disabled" exists from 23.02 on; before, cgroup/v1 is inert unless a plugin asks for it.
        plugin = "disabled" if release >= (23, 2) and self.proctrack != "cgroup" else "cgroup/v1"
        (etc / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        (etc / "hosts").write_text("".join(f"127.0.0.1 {n}\n" for n in ("localhost", host, *names)))
        (self.root / "munge").chmod(0o700)
        key = self.root / "munge/munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def start(self) -> None:
        """Start all daemons and wait until every node is idle.

        Raises:
            RuntimeError: a daemon does not come up; holds the end of the logs.
        """
        root = self.root
        self._run(
            *("munged", "--force", f"--socket={root}/run/munge.socket", f"--key-file={root}/munge/munge.key"),
            *(f"--log-file={root}/log/munged.log", f"--pid-file={root}/run/munged.pid"),
            f"--seed-file={root}/munge/seed",
        )
        self._run("slurmctld", "-i")
        for i in range(self.nodes):
            self.start_node(f"n{i + 1}")
        if not wait(lambda: len(self.idle()) == self.nodes, 30):
            logs = "".join(log.read_text()[-2000:] for log in sorted((root / "log").glob("*.log")))
            raise RuntimeError(f"the test cluster does not come up:\n{logs}")

    def start_node(self, name: str) -> None:
        """Start the daemon of one node."""
        if self.namespaces:
            script = 'hostname "$1"; mount --bind "$2" /etc/hosts; exec slurmd -N "$1"'
            hosts = str(self.root / "etc/hosts")
            self._run("unshare", "-m", "-u", "--propagation", "private", "sh", "-c", script, "_", name, hosts)
        else:
            self._run("slurmd", "-N", name)

    def stop(self) -> None:
        """Cancel all jobs and stop every daemon; kills what does not go by itself."""
        subprocess.run(["scancel", "--full", "--user", str(os.getuid())], env=self.env, capture_output=True)
        wait(lambda: not self.run("squeue", "--noheader", "--states=R,CG", check=False), 20)
        pids = [int(f.read_text()) for f in sorted((self.root / "run").glob("*.pid")) if f.read_text().strip()]
        pids = [p for p in pids if _command(p) in DAEMONS]  # never a reused pid
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                if _alive(pid):
                    os.kill(pid, number)
            if wait(lambda: not any(map(_alive, pids)), 10):
                break
        # Job steps outlive their daemon.
        leftover = [p for p in self._own_processes() if p != os.getpid()]
        for pid in leftover:
            os.kill(pid, signal.SIGKILL)
        wait(lambda: not any(map(_alive, leftover)), 10)
        for folder in _FREEZER.glob("slurm_n*") if self.proctrack == "cgroup" else ():
            for group in sorted(folder.rglob("*/"), reverse=True) + [folder]:
                if group.is_dir():
                    wait(lambda group=group: _removed(group), 5)

    def _own_processes(self) -> list[int]:
        """Processes started by this cluster: they carry its SLURM_CONF."""
        mark = f"SLURM_CONF={self.root}/etc/slurm.conf".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark in variables and b"SLURM_JOB_ID" in b"\0".join(variables):
                found.append(int(folder.name))
        return found

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """Output of a SLURM command."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.env | variables, cwd=cwd)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
        return done.stdout.strip()

    def _run(self, *command: str) -> None:
        # No pipes: a daemon would keep them open.
        subprocess.run(command, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)

    def idle(self) -> list[str]:
        """Names of the idle nodes."""
        return self.run("sinfo", "-hN", "-p", "gpu", "-t", "idle", "-o", "%N", check=False).split()

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a dictionary; the first element of an array."""
        text = self.run("scontrol", "-o", "show", "job", job).splitlines()[0]
        return dict(re.findall(r"(\w[\w:/]*)=(\S*)", text))

    def state(self, job: str) -> str:
        """JobState."""
        return self.show(job)["JobState"]

    def finish(self, job: str, timeout: float) -> str:
        """Wait for the end of a job (all elements of an array) and return its state.

        Polls: `sbatch --wait` looks less and less often.

        Raises:
            TimeoutError: it still runs.
        """

        def states() -> list[str]:
            return re.findall(r"JobState=(\S+)", self.run("scontrol", "-o", "show", "job", job))

        if not wait(lambda: not _ACTIVE.intersection(states()), timeout):
            raise TimeoutError(f"job {job} is {states()} after {timeout:.0f} s")
        return " ".join(sorted(set(states())))


def available() -> str | None:
    """Why no cluster can be had here; None when it can."""
    path = f"{os.environ['PATH']}:{_SYSTEM_PATH}"
    missing = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install --no-install-recommends {PACKAGES})"
    return None


def wait(condition: Callable[[], bool], timeout: float, interval: float = 0.1) -> bool:
    """Poll until the condition holds; False when it does not within `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(interval)
    return True


def _free_ports(count: int) -> int:
    """First of `count` consecutive free ports."""
    for first in range(27000, 32000, 50):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports for the test cluster")


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    """A zombie, which pid 1 may reap late, counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
