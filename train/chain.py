"""`python -m train.chain FOLDER [overrides]`: prepare, pretrain, finetune and evaluate as one chain of SLURM jobs.

    python -m train.chain outputs/paper --source easy_vqa --nodes 4 experiment=vlora_7b
    python -m train.chain outputs/paper --status

Each job waits for the success of the one before it. When a link fails SLURM cancels those behind it, and `--status`
says which link failed and why. Both stages are composed and checked here, before anything is submitted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from common import places
from common.arguments import Parser, whole
from common.errors import UserError, run_cli
from common.files import read_json, write_json
from train.cluster import slurm
from train.process.run_files import RunDir

RECORD = "chain.json"


def prepare(folder: Path, stage: str, overrides: list[str], workers: int) -> Path:
    """Compose and check one stage and make its run directory.

    Raises:
        UserError: the configuration is refused; its error has been printed.
    """
    run = folder / stage
    init = [] if stage == "pretrain" else [f"init_from='{folder / 'pretrain'}'"]
    settings = ["launch=slurm", f"launch.workers={workers}", f"stage={stage}", f"run_dir='{run}'", *init]
    command = [sys.executable, "-m", "train", *settings, *overrides]
    if subprocess.run(command, cwd=places.checkout("a chain of jobs")).returncode:
        raise UserError(f"nothing is submitted: the configuration of {stage} was refused; see above")
    return run


def submit(arguments: argparse.Namespace) -> dict[str, str]:
    """Submit all links; returns their job ids."""
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / RECORD).exists():
        raise UserError(f"{folder} holds a chain already; see `--status`, or choose another folder")
    workers = arguments.nodes * arguments.tasks_per_node
    for stage in ("pretrain", "finetune"):
        prepare(folder, stage, arguments.overrides, workers)
    shape = {"nodes": arguments.nodes, "ntasks-per-node": arguments.tasks_per_node, **arguments.options}
    jobs: dict[str, str] = {}

    def link(name: str, script: str, words: list[str], **extra: object) -> None:
        after = {"dependency": f"afterok:{list(jobs.values())[-1]}", "kill-on-invalid-dep": "yes"} if jobs else {}
        jobs[name] = slurm.submit(slurm.command(script, words, {"job-name": f"{folder.name}-{name}", **after, **extra}))
        write_json(folder / RECORD, jobs)

    if arguments.source:
        link("prepare", "data_prep.sbatch", [f"source={arguments.source}"], **arguments.prepare_options)
    for stage in ("pretrain", "finetune"):
        link(stage, f"{stage}.sbatch", ["--run-dir", str(folder / stage)], **shape)
    link("evaluate", "evaluate.sbatch", [f"run={folder / 'finetune'}"], **arguments.evaluate_options)
    return jobs


def status(folder: Path) -> str:
    """One line per link, and the reason when the chain has stopped."""
    if not (folder / RECORD).exists():
        raise UserError(f"{folder} holds no chain (no {RECORD})")
    jobs: dict[str, str] = read_json(folder / RECORD, "remove it and submit the chain again")
    lines, stopped = [], None
    for name, job in jobs.items():
        run = folder / name
        state = ",".join(sorted(set(slurm.states(job).values()))) or "unknown to SLURM"
        if RunDir(run).done.exists():
            state = "COMPLETED"
        why = RunDir(run).failed.read_text(encoding="utf-8").strip() if RunDir(run).failed.exists() else ""
        if stopped and "CANCELLED" in state:
            why = f"not started, because {stopped} did not succeed"
        elif any(word in state for word in ("FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY")):
            stopped = stopped or name
            why = why or f"see the log of job {job} in slurm/logs"
        lines.append(f"{name:<10}job {job:<10}{state:<14}{why}".rstrip())
    if stopped:
        lines.append(f"the chain stopped at {stopped}; mend it, remove {folder / RECORD} and submit the chain again: "
                     "finished stages are kept")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    """Parse the command line; submit or show."""
    parser = Parser(prog="python -m train.chain", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="runs of the chain: FOLDER/pretrain, FOLDER/finetune")
    parser.add_argument("overrides", nargs="*", help="overrides of both stages")
    parser.add_argument("--status", action="store_true", help="show the chain in FOLDER, submit nothing")
    parser.add_argument("--source", help="data set to prepare first (see `python -m data_prep`); default none")
    parser.add_argument("--nodes", type=whole(1, 65536), default=1)
    parser.add_argument("--tasks-per-node", type=whole(1, 1024), default=8)
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="for the training jobs")
    for name in ("prepare", "evaluate"):
        parser.add_argument(f"--{name}-sbatch", action="append", default=[], metavar="OPTION=VALUE")
    arguments = parser.parse_intermixed_args()
    arguments.folder = arguments.folder.absolute()
    if not arguments.status:
        for name in ("", "prepare_", "evaluate_"):
            words = getattr(arguments, f"{name}sbatch")
            if bare := next((word for word in words if not all(word.partition("=")[::2])), None):
                parser.error(f"--{name.replace('_', '-')}sbatch {bare}: write OPTION=VALUE")
            setattr(arguments, f"{name}options", dict(word.partition("=")[::2] for word in words))
        submit(arguments)
    print(status(arguments.folder))
    return 0


if __name__ == "__main__":
    run_cli(main)
