"""`python -m data_prep source=NAME [key=value ...]`: prepare a data set (`--help` lists the keys)."""

from __future__ import annotations

import sys
from pathlib import Path

from common.errors import run_cli
from data_prep import config, report
from data_prep.prepare import prepare


def main() -> int:
    """Prepare what the command line names; a second run with the same inputs does nothing."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(f"{(__doc__ or '').strip()}\n\n{config.help_text(sys.argv[1:])}")
        return 0
    settings = config.load(sys.argv[1:])
    folder = Path(settings.root) / settings.name
    result = prepare(
        settings.build_source(),
        folder,
        settings.options,
        settings.build_task(),
        settings.workers,
        progress=sys.stderr.isatty(),
        overwrite=settings.overwrite,
    )
    for wrong in result.damaged:
        print(f"{wrong}: its shard was made anew")
    for split in result.manifests:
        # Also where a process was killed between manifest and report.
        if split in result.made or not report.is_current(folder / split):
            report.write(folder / split)
    for split, manifest in result.manifests.items():
        state = "made" if split in result.made else "up to date"
        dropped = sum(manifest.dropped.values())
        left_out = f", {dropped} dropped (why: {report.REPORT} there)" if dropped else ""
        print(
            f"{folder / split}: {state}: {manifest.samples} samples, {manifest.images} images "
            f"({manifest.unique_images} different), {manifest.dialogues} dialogues{left_out}"
        )
        for note in report.to_look_at(manifest):
            print(f"{folder / split}: note: {note}")
    for split, missing in result.waiting.items():
        print(f"{folder / split}: {missing} shards are left to other tasks")
    return 0


if __name__ == "__main__":
    run_cli(main)
