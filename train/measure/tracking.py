"""What a run writes about itself: `metrics.jsonl` always, and the same numbers to wandb."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from common.files import DamagedFile, read_text, sealed_json, unsealed, write_atomically
from train.config import RunConfig, TrackingConfig
from train.process.run_dir import read_record
from train.process.run_files import RunDir

_LONGEST = 128
"""Characters that wandb takes in a name."""
_REMEDY = "restore it, or remove it: the run does not need it, only its report does"


class Tracker:
    """Writes records of one run; made on rank 0 only.

    After a resume, records of steps that will be run again are taken out, so every step stands once.

    Args:
        config: The run's configuration.
        run_dir: Its directory.
        record: Its `run.json`.
        resumed_step: Step the run goes on from; 0 for a new one.
        facts: Further facts for wandb's config (parameter counts, world size, ...).
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, record: dict[str, Any], resumed_step: int, facts: dict[str, Any]
    ) -> None:
        self.path = RunDir(run_dir).metrics
        _drop_after(self.path, resumed_step)
        self._stream = self.path.open("a", buffering=1, encoding="utf-8")
        self._wandb: Any = None
        if config.tracking.wandb != "disabled":
            known = {"git_commit": record["git_commit"], "versions": record["versions"]}
            self._wandb = _run_page(config, run_dir, record, config={**asdict(config), **known, **facts})

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write one record of numbers."""
        self._stream.write(sealed_json({"step": step, **values}))
        if self._wandb is not None:
            # Not wandb's own step: it shifts or drops records of a step it has seen before.
            self._wandb.log({"step": step, **values})

    def table(self, step: int, name: str, columns: list[str | int], rows: list[list[Any]]) -> None:
        """Log a table whose cells may be PIL images (wandb only; files are the caller's)."""
        if self._wandb is None:
            return
        import wandb
        from PIL.Image import Image

        cells = [[wandb.Image(cell) if isinstance(cell, Image) else cell for cell in row] for row in rows]
        self._wandb.log({"step": step, name: wandb.Table(columns=columns, data=cells)})

    def finish(self, summary: dict[str, Any] | None = None) -> None:
        """Flush everything; offline wandb loses what is not finished."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        if self._wandb is not None:
            self._wandb.summary.update(summary or {})
            self._wandb.finish()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run, in order; [] when there are none yet. A torn last line, still being written, is left out.

    Steps that were made and have no record are a warning: the newest checkpoint tells how many were.

    Raises:
        DamagedFile: the file is no text, or another line is no record.
    """
    run = RunDir(run_dir)
    # Looked at first: the run may be going on.
    made = [int(path.name.removeprefix("step-")) for path in run.checkpoints.glob("step-*")]
    records, bad = _read(run.metrics, whole=run.done.exists())
    if bad:
        raise DamagedFile(f"{run.metrics}, line {bad[0]}, is no record, or not as it was written; {_REMEDY}")
    _warn_of_gaps(run.metrics, records, max(made, default=0))
    return records


def _read(path: Path, whole: bool = False) -> tuple[list[dict[str, Any]], list[int]]:
    """Records, and the numbers of the lines that are none; a torn last line is neither, but where the file is `whole`.

    Lines of release 0.1.0 have no checksum; among others that have one, a line without is damaged.
    """
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return [], []
    records, bad, bare = [], [], []
    lines = read_text(path, _REMEDY).split("\n")
    for number, line in enumerate(lines, 1):
        try:
            record, has_checksum = unsealed(line)
            record["step"] + 0
        except (ValueError, KeyError, TypeError):
            if line and (whole or number < len(lines)):
                bad.append(number)
            continue
        records.append(record)
        if not has_checksum:
            bare.append((number, record))
    if len(bare) < len(records):
        bad = sorted(bad + [number for number, _ in bare])
        records = [record for record in records if all(record is not other for _, other in bare)]
    return records, bad


def _warn_of_gaps(path: Path, records: list[dict[str, Any]], step: int) -> None:
    """Say which steps up to `step`, that were made, have no record."""
    missing = sorted(set(range(1, step + 1)) - {record["step"] for record in records if "loss" in record})
    if missing:
        some = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
        print(f"warning: {path} lacks {len(missing)} of the {step} steps made ({some})", file=sys.stderr)


def log_evaluation(config: RunConfig, run_dir: Path, name: str, summary: dict[str, Any]) -> None:
    """Put the scores of an evaluation on the run's own wandb page, see `log_scores`.

    As `accuracy/NAME/KIND` and `blind/NAME/KIND` in percent, and as the table `accuracy_table/NAME`.

    Args:
        config: The run's.
        run_dir: Its directory.
        name: Of the evaluation: split and images.
        summary: What `train.evaluate` writes.
    """
    figures, rows = {}, []
    for kind, score in summary["accuracy"].items():
        figures[f"accuracy/{name}/{kind}"] = score["percent"]
        blind = summary["blind_floor"][kind]["percent"] if summary["training_questions"] else None
        if blind is not None:
            figures[f"blind/{name}/{kind}"] = blind
        rows.append([kind, score["count"], score["percent"], score["low"], score["high"], blind])
    columns: list[str | int] = ["kind", "questions", "right %", "low %", "high %", "blind %"]
    log_scores(config, run_dir, figures, f"accuracy_table/{name}", columns, rows)


def log_scores(
    config: RunConfig,
    run_dir: Path,
    figures: dict[str, float],
    table: str,
    columns: list[str | int],
    rows: list[list[Any]],
) -> None:
    """Put scores on the run's own wandb page, at its last step and in its summary; nothing where that is disabled.

    A wandb that cannot be reached is one warning: the scores are in the run directory.

    Args:
        config: The run's.
        run_dir: Its directory.
        figures: By their names on the page.
        table: Name of the table.
        columns, rows: Its contents.
    """
    if config.tracking.wandb == "disabled" or not RunDir(run_dir).record.exists():  # an imported model has no page
        return
    try:
        page = _run_page(config, run_dir, read_record(run_dir))
        import wandb

        step = max((record["step"] for record in read_metrics(run_dir)), default=0)
        page.log({"step": step, **figures, table: wandb.Table(columns=columns, data=rows)})
        page.summary.update(figures)
        page.finish()
    except Exception as error:  # wandb's own errors share no class
        print(f"warning: the scores are not on the run's wandb page ({str(error).strip()[:200]})", file=sys.stderr)


def _run_page(run: RunConfig, run_dir: Path, record: dict[str, Any], **options: Any) -> Any:
    """The wandb run of a run directory: the same id, name, group and job type in all its lifetimes."""
    name, group = names(run, run_dir)
    page = start_wandb(
        replace(run.tracking, group=group),
        run_dir,
        name,
        tags=run.tracking.tags,
        job_type=run.stage.name,
        id=record["id"],
        resume="allow",
        **options,
    )
    page.define_metric("*", step_metric="step")
    return page


def names(config: RunConfig, run_dir: Path) -> tuple[str, str | None]:
    """Name and group of a run on wandb, where `tracking` gives none: its path below `output_root`, and the folder.

    `outputs/demo/vlora/pretrain` is `demo/vlora/pretrain` in the group `demo/vlora`; `outputs/first` is `first`, alone.
    Elsewhere the last two folders tell a run apart.
    """
    path, root = Path(os.path.abspath(run_dir)), Path(os.path.abspath(config.output_root))
    parts = path.relative_to(root).parts if path.is_relative_to(root) and path != root else path.parts[-2:]
    folder = "/".join(part for part in parts[:-1] if part != "/")
    name = config.tracking.name or "/".join(part for part in (folder, parts[-1]) if part)
    return name[-_LONGEST:], config.tracking.group or folder[-_LONGEST:] or None


def start_wandb(tracking: TrackingConfig, folder: Path, name: str, **options: Any) -> Any:
    """A new wandb run, as `tracking` asks for; its files go below `folder`.

    Args:
        name: Of the run.
        options: Further ones of `wandb.init`.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    # Its own place for files still to be sent is the home folder, which a node may not be able to write.
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb" / "data"))
    os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb" / "cache"))
    import wandb

    mode: Any = tracking.wandb
    # The panels of the system are worth their process's share of a core where there is a GPU to watch.
    settings = wandb.Settings(x_disable_stats=not torch.cuda.is_available(), console="off")
    return wandb.init(
        mode=mode,
        project=tracking.project,
        group=tracking.group,
        name=name,
        dir=str(folder),
        settings=settings,
        **options,
    )


def _drop_after(path: Path, step: int) -> None:
    """Keep the records up to `step`; a torn last line (the machine died while writing) goes too."""
    records, bad = _read(path)
    if bad:
        print(
            f"warning: {path}: {len(bad)} lines, first {bad[0]}, are no records, or not as they were written, and are "
            "taken out",
            file=sys.stderr,
        )
    # What was measured after that step, a validation loss, is measured again.
    kept = [record for record in records if record["step"] < step + ("loss" in record)]
    _warn_of_gaps(path, kept, step)
    if path.exists():
        write_atomically(path, "".join(map(sealed_json, kept)))
