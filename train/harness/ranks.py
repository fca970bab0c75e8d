"""A run answered by lmms-eval's own processes, one per GPU: its model `vlora`, under torchrun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from train.harness import server

_ROWS = 16


@dataclass
class Ranks:
    """What answers in place of servers.

    Attributes:
        run: Run directory with an export.
        count: Processes.
        moved: `llm`, `vision`: where the run's base models are now, if they have moved.

    Raises:
        ConfigError: a path that lmms-eval's `--model_args` would take apart.
    """

    run: Path
    count: int
    moved: dict[str, str]

    def __post_init__(self) -> None:
        for path in (str(self.run), *self.moved.values()):
            if set(path) & set(",={}[]\"'"):
                raise ConfigError(f"{path}: lmms-eval reads no path with one of ,={{}}[]\"' in it; use ranks=null")
        devices = server.gpus()
        if devices[0] is not None and self.count > len(devices):
            raise ConfigError(f"ranks={self.count}: this machine has {len(devices)} GPUs that may be used")

    @property
    def label(self) -> str:
        """Stands in records."""
        return f"{self.count} rank{'s' * (self.count > 1)}"

    def words(self, images: str) -> list[str]:
        """Of lmms-eval's command line, that it answers itself, showing one of `catalogue.IMAGES`."""
        model = "vlora" if images == "own" else f"vlora_{images}"
        places = {"run": str(self.run.resolve()), **self.moved}
        arguments = ",".join(f"{key}={value}" for key, value in places.items())
        # `torch.distributed.run` on this machine alone, on a free port.
        several = ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.count}", "-m"]
        launched = ["-m", *(several if self.count > 1 else []), "lmms_eval"]
        return [*launched, "--model", model, "--model_args", arguments, "--batch_size", str(_ROWS)]

    def variables(self) -> dict[str, str]:
        """Of lmms-eval's environment: the GPUs, which clients of servers do not see."""
        devices = [gpu for gpu in server.gpus() if gpu is not None]
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices), "ACCELERATE_USE_CPU": str(not devices).lower()}
