"""Reads DeepSpeed's checkpoint files without running what may stand in them, whoever wrote them.

`python -m train.engine.weights_only CHECKPOINT FOLDER` converts one to DeepSpeed's universal form, with the same care.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from common.errors import UserError
from common.files import inside


class UnsafeCheckpoint(UserError):
    """A checkpoint file holds something else than tensors and plain containers."""


def _safe_globals() -> list[Any]:
    """What a checkpoint of ours holds besides tensors and plain containers: three plain classes without side effects,
    tried with ZeRO 0 to 3 in both precisions.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def unsafe(file: Path) -> str | None:
    """What to say of a file of `torch.save` that names something else; None where it does not, or is another file.

    Looks at its pickle without unpickling or reading a tensor, so that all ranks can look before any of them loads.
    """
    if not zipfile.is_zipfile(file):
        return None
    with torch.serialization.safe_globals(_safe_globals()):
        try:
            found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception:  # no such file, or a pickle that nobody would write: `weights_only` says what it thinks of it
            return None
    return _refused(file, f"`{sorted(found)[0]}`") if found else None


def _refused(file: Path, what: str) -> str:
    return (
        f"{file} holds {what}, which is neither a tensor nor a plain container: refused, nothing of it was run. This "
        "program wrote no such file; remove that checkpoint"
    )


@contextmanager
def weights_only() -> Iterator[None]:
    """Inside, every `torch.load` is weights-only, whatever its caller asks for: DeepSpeed asks for pickle everywhere.

    Raises:
        UnsafeCheckpoint: a file holds something else; names it. Nothing of it was run.
    """
    load = torch.load

    def checked(file: Any, *args: Any, **options: Any) -> Any:
        try:
            return load(file, *args, **{**options, "weights_only": True})
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)", str(error))
            what = f"`{found[1] or found[2]}`" if found else "something"
            raise UnsafeCheckpoint(_refused(file, what)) from None

    with torch.serialization.safe_globals(_safe_globals()), mock.patch.object(torch, "load", checked):
        yield


def main() -> int:
    """Convert one checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m train.engine.weights_only")
    parser.add_argument("checkpoint")
    parser.add_argument("folder")
    arguments = parser.parse_args()
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=arguments.checkpoint,
        output_folder=arguments.folder,
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    save = torch.save

    def confined(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        # It makes paths of the parameters' names, which stand in the checkpoint.
        save(value, inside(Path(arguments.folder), os.path.relpath(file, arguments.folder)), *args, **kwargs)

    with weights_only(), mock.patch.object(torch, "save", confined):
        ds_to_universal.main(options)
    return 0


if __name__ == "__main__":
    from common.errors import run_cli

    run_cli(main)
