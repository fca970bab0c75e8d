"""`python -m train.preflight [RUN_DIR]`: is this machine fit for the job? Seconds, before hours.

Run by every task of a job (`srun`); says what is wrong, on which host, and what to do. Exit code 0: fit; 2: not.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError, run_cli
from train.process.run_files import RunDir

MIN_FREE_GIB = 20.0
MAX_SKEW_SECONDS = 2.0
# A link this many times slower than the median link is worth a look.
SLOW_LINK = 4.0


@dataclass
class Report:
    """What one rank found.

    Attributes:
        host: Its host name.
        facts: Printed as they are.
        problems: Each ends the job; says what to do.
        warnings: Each is printed.
    """

    host: str = field(default_factory=lambda: socket.gethostname().split(".")[0])
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_devices(report: Report, asked: int) -> None:
    """GPUs seen = GPUs asked for on this node (where any are), and the versions that must agree."""
    import torch

    seen = torch.cuda.device_count()
    report.facts |= {"gpus": seen, "torch": torch.__version__}
    if asked and seen != asked:  # a job that asks for none may see those of its node
        report.problems.append(
            f"{asked} GPUs were asked for on this node, {seen} are visible (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); compare `nvidia-smi` on the node, ask for GPUs by "
            "--gpus-per-node and not --gpus-per-task, and give the container the devices"
        )
    if seen:
        driver = Path("/proc/driver/nvidia/version")
        words = driver.read_text(encoding="utf-8").split("Kernel Module", 1)[-1].split() if driver.exists() else []
        report.facts["driver"] = next((w for w in words if w[0].isdigit()), "unknown")
        report.facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))


def check_first_host(report: Report, address: str, rank: int, nodes: int) -> None:
    """MASTER_ADDR is where rank 0 runs."""
    if nodes > 1 and address in ("localhost", "127.0.0.1"):
        report.problems.append(f"MASTER_ADDR={address} with {nodes} nodes: each node would wait for itself alone")
    if rank == 0 and address.split(".")[0] not in (report.host, "localhost", "127.0.0.1"):
        report.problems.append(
            f"MASTER_ADDR={address}, but rank 0 runs on {report.host}; it must be the first host of the job "
            "(scontrol show hostnames $SLURM_JOB_NODELIST)"
        )


def check_space(report: Report, folders: list[Path], least_gib: float) -> None:
    """Room where the job writes."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free / 2**30
            writable = os.access(folder, os.W_OK)
        except OSError as error:
            report.problems.append(f"{folder} cannot be used ({error.strerror}); mount it or choose another")
            continue
        if not writable:
            report.problems.append(f"{folder} is not writable; choose another or correct its rights")
        elif free < least_gib:
            report.problems.append(f"{folder} has {free:.1f} GiB free, {least_gib:.0f} are wanted; free some")


def check_inputs(report: Report, run_dir: Path) -> None:
    """Weights and data are there, and are those of the run's checkpoint if it has one."""
    from model.loading import fingerprint
    from train import config as configuration
    from train.data import open_split, open_train_split
    from train.engine import checkpoint

    config = configuration.load(RunDir(run_dir).config)
    found, known = checkpoint.identity(run_dir)
    for name, path in (("llm", config.llm.path), ("vision", config.vision.path)):
        try:
            seen = fingerprint(path)
        except (ValueError, OSError) as error:
            report.problems.append(f"{name}: {error}")
            continue
        report.facts[name] = seen
        if known.get(name, seen) != seen:
            report.problems.append(
                f"{path} has fingerprint {seen}, but {found} was trained with {known[name]}; restore that {name}"
            )
    splits = [(source.path, open_train_split) for source in config.data.train]
    splits += [(config.data.val, open_split)] if config.data.val else []
    for path, opened in splits:
        try:
            report.facts[f"data {path}"] = opened(config.data, path).fingerprint[:16]
        except (ValueError, OSError) as error:
            report.problems.append(f"data: {error}")


def warm_ops(report: Report, run_dir: Path) -> None:
    """Build what the run compiles now, once per node: the CUDA merge, DeepSpeed's optimizer."""
    import torch

    from model.ops import set_merge
    from train import config as configuration

    config = configuration.load(RunDir(run_dir).config)
    if config.ops.merge == "cuda":
        try:
            set_merge("cuda", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        except (ValueError, UserError) as error:
            report.problems.append(str(error))
    builders = {"deepspeed_cpu_adam": "CPUAdamBuilder", "deepspeed_fused_adam": "FusedAdamBuilder"}
    name = builders.get(config.optim.name)
    if name is None:
        return
    import deepspeed.ops.op_builder as op_builder

    started = time.perf_counter()
    try:
        getattr(op_builder, name)().load(verbose=False)
    except Exception as error:  # whatever a compiler or its absence makes of it
        report.problems.append(
            f"DeepSpeed's {name} cannot be built ({' '.join(str(error).split())[:200]}); load a compiler and CUDA "
            "module in the site profile, or set optim.name=adamw. A build that hangs has a stale `lock` file below "
            f"{os.environ.get('TORCH_EXTENSIONS_DIR', '~/.cache/torch_extensions')}"
        )
    report.facts["ops ready"] = f"{time.perf_counter() - started:.0f} s"


def measure_links(device: Any, size_mib: int) -> dict[str, Any]:
    """Bandwidth of an all-reduce over all ranks, and of each link of the ring of ranks. Collective."""
    import torch
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    data = torch.ones(size_mib * 2**18, device=device)

    def seconds(action: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(3):
            dist.barrier()
            start = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    def ring() -> None:
        incoming = torch.empty_like(data)
        requests = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, data, (rank + 1) % world), dist.P2POp(dist.irecv, incoming, (rank - 1) % world)]
        )
        for request in requests:
            request.wait()

    bytes_ = data.numel() * 4
    reduced = seconds(lambda: dist.all_reduce(data))
    if not bool((data == data[0]).all()):
        raise UserError("an all-reduce gave wrong numbers; take this node out of service")
    own = bytes_ / seconds(ring) / 1e9 if world > 1 else 0.0
    links = [0.0] * world
    dist.all_gather_object(links, own)
    return {"all-reduce GB/s": 2 * (world - 1) / world * bytes_ / reduced / 1e9, "links": links}


def clock_skew() -> float:
    """Largest difference between the ranks' clocks, seconds, less the time the question took. Collective."""
    import torch.distributed as dist

    dist.barrier()
    before = time.time()
    clocks: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(clocks, before)
    return max(0.0, max(clocks) - min(clocks) - (time.time() - before))


def summarise(reports: list[Report], links: dict[str, Any] | None, skew: float) -> tuple[str, bool]:
    """The printed report of all ranks, and whether the job may start."""
    lines = ["preflight"]
    for name in dict.fromkeys(key for r in reports for key in r.facts):
        seen: dict[str, set[str]] = {}
        for r in reports:
            if name in r.facts:
                seen.setdefault(str(r.facts[name]), set()).add(r.host)
        if len(seen) == 1:
            lines.append(f"  {name}: {next(iter(seen))}")
        else:
            listed = "; ".join(f"{value} on {', '.join(sorted(hosts))}" for value, hosts in seen.items())
            lines.append(f"  {name}: {listed}")
            if name not in ("ops ready",):
                reports[0].problems.append(f"{name} differs between nodes ({listed}); use nodes with one image")
    if links is not None and len(reports) > 1:
        rates = links["links"]
        hosts = [r.host for r in reports]
        named = [(rate, f"{i} ({hosts[i]}) -> {(i + 1) % len(hosts)} ({hosts[(i + 1) % len(hosts)]})")
                 for i, rate in enumerate(rates)]  # fmt: skip
        lines.append(f"  all-reduce over {len(reports)} ranks: {links['all-reduce GB/s']:.2f} GB/s (bus bandwidth)")
        for kind, inside in (("inside a node", True), ("between nodes", False)):
            group = [n for i, n in enumerate(named) if (hosts[i] == hosts[(i + 1) % len(hosts)]) == inside]
            if not group:
                continue
            slowest = min(group)
            middle = sorted(group)[len(group) // 2][0]
            lines.append(f"  links {kind}: median {middle:.2f} GB/s, slowest {slowest[0]:.2f} GB/s, rank {slowest[1]}")
            if slowest[0] * SLOW_LINK < middle:
                reports[0].warnings.append(
                    f"the link of rank {slowest[1]} is {middle / slowest[0]:.0f} times slower than its kind's median; "
                    "look at its NIC, NCCL_IB_HCA and NCCL_SOCKET_IFNAME"
                )
    lines.append(f"  clock skew: {skew:.3f} s")
    if skew > MAX_SKEW_SECONDS:
        reports[0].warnings.append(f"clocks differ by {skew:.1f} s; start the nodes' time service (chrony)")
    for kind in ("warnings", "problems"):
        texts: dict[str, set[str]] = {}
        for r in reports:
            for text in getattr(r, kind):
                texts.setdefault(text, set()).add(r.host)
        word = "warning" if kind == "warnings" else "error"
        lines += [f"{word}: {', '.join(sorted(hosts))}: {text}" for text, hosts in texts.items()]
    return "\n".join(lines), not any(r.problems for r in reports)


def main() -> int:
    """Check this rank, gather what all found, print it on rank 0."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print((__doc__ or "").strip())
        return 0
    if len(sys.argv) > 2:
        print("usage: python -m train.preflight [RUN_DIR]", file=sys.stderr)
        return 2
    run_dir = Path(sys.argv[1]) if len(sys.argv) == 2 else None
    import torch.distributed as dist

    from train.process import distributed

    report = Report()
    local_rank = int(os.environ.get("SLURM_LOCALID", os.environ.get("LOCAL_RANK", "0")))
    rank = int(os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0")))
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    check_devices(report, int(os.environ.get("SLURM_GPUS_ON_NODE") or 0))
    if "MASTER_ADDR" in os.environ:
        check_first_host(report, os.environ["MASTER_ADDR"], rank, nodes)
    if local_rank == 0:
        folders = [Path(os.environ[name]) for name in ("VLORA_SCRATCH", "VLORA_CACHE") if os.environ.get(name)]
        least = float(os.environ.get("VLORA_MIN_FREE_GIB", MIN_FREE_GIB))
        check_space(report, [*folders, *([run_dir] if run_dir else [])], least)
        if run_dir is not None:
            check_inputs(report, run_dir)
            warm_ops(report, run_dir)
    if "MASTER_ADDR" not in os.environ:
        text, fit = summarise([report], None, 0.0)
        print(text, flush=True)
        return 0 if fit else 2

    # A rank with too few GPUs could not join NCCL; it still has to tell the others, so objects go over gloo.
    distributed.map_slurm_environment()
    dist.init_process_group("gloo")
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    links, skew = None, clock_skew()
    if not any(r.problems for r in reports):
        dist.destroy_process_group()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        device = distributed.init(timeout_minutes=2)
        links = measure_links(device, size_mib=256 if device.type == "cuda" else 4)
    # The same verdict on every rank: srun ends all when one fails.
    text, fit = summarise(reports, links, skew)
    if dist.get_rank() == 0:
        print(text, flush=True)
    dist.barrier()
    distributed.shutdown()
    return 0 if fit else 2


if __name__ == "__main__":
    run_cli(main)
