"""A real SLURM on this machine: munged, slurmctld and one slurmd per fake 8xA100 node, as plain processes on loopback.

Nothing of the machine's own configuration is read or changed: all files lie below one folder, and each node lives in a
UTS and mount namespace of its own, where its host name is the node's (`n1`, `n2`, ...) and /etc/hosts knows these.

`python -m tests.slurm.cluster ROOT PREFIX` stops the cluster of that folder once its standard input ends: every cluster
has such a guard, so that none outlives the tests, however these end.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
_CODE = Path(__file__).resolve().parents[2]
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
PartitionName=gpu Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Starts, asks and stops the cluster.

    Args:
        root: A new folder for all its files.
        nodes: Number of fake nodes.
        prefix: Their names are this and a number. Control groups bear the names, so clusters that run side by side need
            different ones.
        grace: Seconds between the warning and the end of a preempted job.
        extra: Further lines for slurm.conf.
    """

    def __init__(self, root: Path, nodes: int = 2, prefix: str = "n", grace: int = 120, extra: str = "") -> None:
        self.root, self.prefix, self.grace, self.extra = root, prefix, grace, extra
        self.nodes = [f"{prefix}{i + 1}" for i in range(nodes)]
        self._guard: subprocess.Popen | None = None
        self.namespaces = subprocess.run(["unshare", "-m", "-u", "true"], capture_output=True).returncode == 0
        self.proctrack = "cgroup" if os.access(_FREEZER / "cgroup.procs", os.W_OK) else "linuxproc"
        self.env = os.environ | {
            "SLURM_CONF": str(root / "etc/slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{_SYSTEM_PATH}",
        }
        # A shell that already runs under SLURM, or has a site profile loaded, must not leak into the test.
        for name in [n for n in self.env if n.startswith(("SLURM_", "SBATCH_")) and n != "SLURM_CONF"]:
            del self.env[name]

    def _write_files(self) -> None:
        for folder in ("etc", "run", "log", "state", "dev", "munge", "jobs"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(8):
            (self.root / f"dev/nvidia{i}").symlink_to("/dev/null")
        for name in self.nodes:
            (self.root / "spool" / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        count = len(self.nodes)
        names = f"{self.prefix}[1-{count}]"
        line = f"NodeName={names} NodeAddr=127.0.0.1"
        if not self.namespaces:
            line += f" NodeHostname={host}"
        port = _free_ports(count + 1)
        etc = self.root / "etc"
        (etc / "slurm.conf").write_text(
            _CONF.format(
                host=host,
                user=subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip(),
                root=self.root,
                port=port,
                first_job=random.randrange(1, 60_000) * 1000,
                first=port + 1,
                last=port + count,
                names=names,
                nodes=line,
                proctrack=self.proctrack,
                grace=self.grace,
                extra=self.extra,
            )
        )
        (etc / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName={names} Name=gpu Type=a100 File={self.root}/dev/nvidia[0-7]\n"
        )
        version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, env=self.env, check=True).stdout
        release = tuple(int(n) for n in re.search(r"(\d+)\.(\d+)", version).groups())
        # "disabled" exists from 23.02 on; before, cgroup/v1 is inert unless a plugin asks for it.
        plugin = "disabled" if release >= (23, 2) and self.proctrack != "cgroup" else "cgroup/v1"
        (etc / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        (etc / "hosts").write_text("".join(f"127.0.0.1 {n}\n" for n in ("localhost", host, *self.nodes)))
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
        self._write_files()
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "tests.slurm.cluster", str(root), self.prefix],
            cwd=_CODE,
            stdin=subprocess.PIPE,
            start_new_session=True,  # a signal to the tests' process group must not reach it
        )
        self._run(
            *("munged", "--force", f"--socket={root}/run/munge.socket", f"--key-file={root}/munge/munge.key"),
            *(f"--log-file={root}/log/munged.log", f"--pid-file={root}/run/munged.pid"),
            f"--seed-file={root}/munge/seed",
        )
        self._run("slurmctld", "-i")
        for name in self.nodes:
            self.start_node(name)
        if not wait(lambda: len(self.idle()) == len(self.nodes), 30):
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
        """End all jobs and stop every daemon; kills what does not go by itself. Harmless when there is nothing."""
        if self._processes():
            self.run("scancel", "--user", str(os.getuid()), check=False)
            wait(self._no_jobs, 10)
        for number in (signal.SIGTERM, signal.SIGKILL):
            _signal(self._processes(), number)
            if wait(lambda: not self._processes(), 10):
                break
        if self.proctrack == "cgroup":
            # Deepest first; what is not empty belongs to another cluster, with nodes of the same names.
            for group in sorted(_FREEZER.glob(f"slurm_{self.prefix}[0-9]*/**/"), reverse=True):
                with contextlib.suppress(OSError):
                    group.rmdir()
        if self._guard is not None:
            self._guard.communicate()
            self._guard = None

    def _no_jobs(self) -> bool:
        """Kill what jobs have started by now, without the grace that SLURM would give it; True when none is left."""
        _signal(self._processes("SLURM_JOB_ID"), signal.SIGKILL)
        return not self.run("squeue", "--noheader", "--states=R,CG", check=False)

    def _processes(self, variable: str = "") -> list[int]:
        """Processes of this cluster: they carry its SLURM_CONF (and `variable`, where given)."""
        wanted = (f"\0SLURM_CONF={self.root}/etc/slurm.conf\0".encode(), f"\0{variable}".encode())
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = b"\0" + (folder / "environ").read_bytes() + b"\0"
            except OSError:
                continue
            if all(word in environment for word in wanted) and _alive(int(folder.name)):
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

    @contextlib.contextmanager
    def configured(self, line: str) -> Iterator[None]:
        """Within the context slurm.conf holds one more line."""
        path = self.root / "etc/slurm.conf"
        before = path.read_text()
        path.write_text(f"{before}{line}\n")
        self.run("scontrol", "reconfigure")
        try:
            yield
        finally:
            path.write_text(before)
            self.run("scontrol", "reconfigure")

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


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _alive(pid: int) -> bool:
    """A zombie, which pid 1 may reap late, counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    sys.stdin.read()
    Cluster(Path(sys.argv[1]), prefix=sys.argv[2]).stop()
