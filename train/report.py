"""`python -m train.report run=RUN[,RUN...] [out=DIR]`: what runs were, how they went, and what they see, as a page.

    python -m train.report run=outputs/RUN
    python -m train.report run=outputs/PRETRAIN,outputs/FINETUNE out=report

For any run and any data set, finished or not, evaluated or not: curves, accuracy by kind of question with the right
image, a wrong one and none, confusions, mistakes, samples, and the size of the image's weights by layer. What is
missing is named with the command that would make it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError, run_cli
from common.options import parse_options
from common.settings import setting
from train.cluster import sweep
from train.measure import report, results
from train.process.run_files import RunDir


@dataclass
class Options:
    """Keys of the command line.

    Attributes:
        run: Run directories, divided by commas, in the order in which they trained.
        out: Folder for report.md and its pictures; null: `report` in the run, or beside several runs.
    """

    run: str = setting("???", path=True)
    out: str | None = setting(None, path=True)


def main() -> int:
    """Write one report."""
    options: Options = parse_options(Options, sys.argv[1:], __doc__)
    named = [options.run] if Path(options.run).exists() else options.run.split(",")
    paths = [Path(name).expanduser() for name in named]
    for path in paths:
        if (path / sweep.MANIFEST).exists():
            raise ConfigError(f"run={path} is a sweep: python -m train.sweep_report {path}, or name its points")
        if not RunDir(path).config.exists():
            raise ConfigError(f"run={options.run}: {str(path) or 'an empty name'} is no run directory (no config.yaml)")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError(f"run={options.run}: a run is named twice")
    runs = results.load(paths)
    beside = Path(runs[0].path if len(runs) == 1 else results.common_folder(paths)) / RunDir(Path()).report.name
    title = ", ".join(run.label for run in runs)
    print(f"report: {report.write(Path(options.out or beside), runs, f'Report of {title}')}")
    return 0


if __name__ == "__main__":
    run_cli(main)
