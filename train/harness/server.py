"""Our server, one per GPU, on a port of its own, for as long as a suite runs."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from train.harness.environment import Process

NAME = "vlora"
ROWS = 16
_READY_SECONDS = 1800


@dataclass
class Server:
    """A running server.

    Attributes:
        process: Its process.
        address: `http://127.0.0.1:PORT/v1`.
        key: What it asks of clients: other users of the machine have none.
    """

    process: Process
    address: str
    key: str

    label = "server"

    def words(self, images: str) -> list[str]:
        """Of lmms-eval's command line, that it asks this server, showing one of `catalogue.IMAGES`."""
        client = "openai" if images == "own" else f"openai_{images}"
        arguments = f"model_version={NAME},num_concurrent={2 * ROWS},max_retries=3"
        return ["-m", "lmms_eval", "--model", client, "--model_args", arguments, "--batch_size", "1"]

    def variables(self) -> dict[str, str]:
        """Of lmms-eval's environment."""
        return {"OPENAI_API_BASE": self.address, "OPENAI_API_KEY": self.key}

    @classmethod
    def start(cls, run: Path, log: Path, gpu: str | None, moved: dict[str, str]) -> Server:
        """Start one; it loads while the caller goes on.

        Args:
            run: Run directory with an export.
            log: File for its output.
            gpu: The one it may use, as CUDA_VISIBLE_DEVICES names it; None: it runs on the CPU.
            moved: `llm`, `vision`: where the run's base models are now, if they have moved.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        key = secrets.token_hex(16)
        # The images of documents are large, and PNG makes them larger; the answers wait for nobody but our own client.
        limits = [f"max_rows={ROWS}", f"max_waiting={4 * ROWS}", "max_body_mb=500", "max_pixels=1000000000"]
        command = [sys.executable, "-m", "serve", f"run={run}", f"port={port}", f"name={NAME}", "timeout=3600"]
        command += [*limits, f"device={'cpu' if gpu is None else 'cuda'}"]
        command += [f"{part}.path={path}" for part, path in moved.items()]
        variables = {**os.environ, "VLORA_API_KEY": key, "PYTHONUNBUFFERED": "1"}
        if gpu is not None:
            variables["CUDA_VISIBLE_DEVICES"] = gpu
        for taken in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
            variables.pop(taken, None)
        return cls(Process(command, variables, log), f"http://127.0.0.1:{port}/v1", key)

    def wait(self) -> None:
        """Until it answers.

        Raises:
            UserError: it has ended, or has not answered for half an hour.
        """
        end = time.monotonic() + _READY_SECONDS
        while time.monotonic() < end:
            if self.process.popen.poll() is not None:
                raise UserError(f"the server ended: {self.process.tail().removeprefix('error: ')} ({self.process.log})")
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with suppress(urllib.error.URLError, OSError):
                opener.open(self.address.replace("/v1", "/health"), timeout=5).close()
                return
            time.sleep(0.5)
        raise UserError(f"the server did not answer within {_READY_SECONDS} s; see {self.process.log}")


def gpus() -> list[str | None]:
    """The GPUs of this machine that we may use, one server each; [None] without any: one on the CPU."""
    import torch

    count = torch.cuda.device_count()
    allowed = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    return [*allowed[:count]] if allowed and count else [str(number) for number in range(count)] or [None]
