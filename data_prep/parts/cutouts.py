"""Cut-outs for composed scenes: `python -m data_prep.parts.cutouts [emoji] [stamps]`.

`emoji`: two drawings (Noto, Twemoji) of the same names, from the npm packages emoji-datasource-google and -twitter,
fetched by `npm pack`. `stamps`: half photo-like pictures of Debian's tuxpaint-stamps-default, fetched by `apt-get
download`, which needs no root. Each archive is checked by its sha256; nothing of it is run; pictures are written under
names of our own beside `cutouts.json`, which lists them and their licences (`data_prep.sources.scenes`).
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from common.arguments import Parser
from common.files import file_sha256
from data_prep.parts.builtin import cache_dir
from data_prep.sources.scenes import LIST, Cutout
from data_prep.store.errors import DataError, Defect
from data_prep.store.images import MAX_BYTES, open_image, with_alpha

SIDE = 160
"""Longest side of a stored cut-out in pixels."""
LEAST = 100
"""Fewer cut-outs mean that an archive was not understood."""
EMOJI = {
    "Animals & Nature": "nature", "Food & Drink": "food", "Travel & Places": "travel", "Activities": "activity",
    "Objects": "object", "Smileys & Emotion": "smiley",
}  # fmt: skip
"""Categories of emoji that are used, and the word that answers for each; people, flags and symbols are left out."""
STAMPS = {
    "animals": "animal", "clothes": "clothing", "food": "food", "household": "household", "plants": "plant",
    "sports": "sport", "town": "building", "vehicles": "vehicle", "hobbies": "hobby", "people": "person",
}  # fmt: skip
"""The same of stamps; letters and signs are left out."""


@dataclass(frozen=True)
class Archive:
    """A package to fetch: the client's command, the file it leaves, its sha256 and licence."""

    command: tuple[str, ...]
    file: str
    sha256: str
    licence: str


SETS: dict[str, tuple[Archive, ...]] = {
    "emoji": (
        Archive(
            ("npm", "pack", "--silent", "emoji-datasource-google@16.0.0"),
            "emoji-datasource-google-16.0.0.tgz",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            "google: Noto Emoji, Apache-2.0; list: emoji-datasource, MIT",
        ),
        Archive(
            ("npm", "pack", "--silent", "emoji-datasource-twitter@16.0.0"),
            "emoji-datasource-twitter-16.0.0.tgz",
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            "twitter: Twemoji graphics, CC-BY-4.0",
        ),
    ),
    "stamps": (
        Archive(
            ("apt-get", "download", "tuxpaint-stamps-default=2022.06.04-1"),
            "tuxpaint-stamps-default_2022.06.04-1_all.deb",
            "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
            "stamps: Tux Paint stamps, GPL-2",
        ),
    ),
}


def ensure(name: str, cache: Path | None = None, downloads: Path | None = None) -> Path:
    """Folder of a set of cut-outs, fetched and made when it is not there.

    Args:
        name: A key of `SETS`.
        cache: Where parts are; default `cache_dir()`.
        downloads: Folder in which the archives are looked for and kept; default `<cache>/wheels`.

    Raises:
        DataError: no such set, its archive is not to be had or has another sha256.
    """
    if name not in SETS:
        raise DataError(f"no set of cut-outs {name!r}; there are {', '.join(SETS)}")
    cache = cache or cache_dir()
    target = cache / "data_raw" / "cutouts" / name
    if (target / LIST).is_file():
        return target
    files = [_fetch(archive, downloads or cache / "wheels") for archive in SETS[name]]
    target.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
    try:
        found: list[Cutout] = []
        for file in files:
            found += _emoji(file, working) if name == "emoji" else _stamps(file, working)
        if len(found) < LEAST:
            raise DataError(f"{files[0]} gave {len(found)} cut-outs only: it is not as this program knows it")
        listed = {"licences": [archive.licence for archive in SETS[name]], "cutouts": [asdict(each) for each in found]}
        (working / LIST).write_text(json.dumps(listed, indent=0) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)  # without its list, of a command that was killed
        working.rename(target)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return target


def _fetch(archive: Archive, folder: Path) -> Path:
    """The checked archive, downloaded by its package client when it is not there."""
    file = folder / archive.file
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = " ".join(archive.command)
        try:
            done = subprocess.run(archive.command, cwd=folder, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise DataError(f"{archive.command[0]} is not installed; or put {archive.file} into {folder}") from error
        if done.returncode != 0 or not file.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"{command} failed: {last}; or put {archive.file} into {folder}")
    if (got := file_sha256(file)) != archive.sha256:
        raise DataError(f"wrong sha256 of {file}: expected {archive.sha256}, got {got}; delete it and fetch it again")
    return file


def _emoji(file: Path, out: Path) -> Iterator[Cutout]:
    """Cut-outs of one emoji package: a picture per name, without variants of skin or gender."""
    style = file.name.split("-")[2]
    with tarfile.open(file, "r:gz") as archive:
        packed = {member.name: member for member in archive if member.isreg() and member.size <= MAX_BYTES}

        def read(name: str) -> bytes:
            stream = archive.extractfile(packed[name])
            return stream.read() if stream else b""

        for entry in json.loads(read("package/emoji.json")):
            short, picture = entry["short_name"], f"package/img/{style}/64/{entry['image']}"
            if entry["category"] in EMOJI and re.fullmatch(r"[a-z0-9_-]+", short) and picture in packed:
                name = re.sub(r"[_-]+", " ", short).strip()
                if len(name.split()) <= 3 and _store(read(picture), out / style / f"{short}.png"):
                    yield Cutout(f"{style}/{short}.png", name, EMOJI[entry["category"]], style)


def _stamps(file: Path, out: Path) -> Iterator[Cutout]:
    """Cut-outs of the stamps whose English description is a name of at most three words."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        plain = Path(folder) / "data.tar"
        with plain.open("wb") as stream:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", str(file)], stdout=stream, check=True)
        with tarfile.open(plain, "r:") as archive:
            packed = {member.name: member for member in archive if member.isreg() and member.size <= MAX_BYTES}

            def read(name: str) -> bytes:
                stream = archive.extractfile(packed[name])
                return stream.read() if stream else b""

            for number, member in enumerate(sorted(packed)):
                path = PurePosixPath(member)
                text = member.removesuffix(".png") + ".txt"
                if path.suffix != ".png" or "stamps" not in path.parts or text not in packed:
                    continue
                category = STAMPS.get(path.parts[path.parts.index("stamps") + 1])
                lines = read(text).decode("utf-8", "replace").splitlines()
                name = re.sub(r"^(an?|the|some) ", "", lines[0].strip().lower().rstrip(".!")) if lines else ""
                sound = re.fullmatch(r"[a-z]+( [a-z]+){0,2}", name)
                if category and sound and _store(read(member), out / "stamps" / f"{number}.png"):
                    yield Cutout(f"stamps/{number}.png", name, category, "stamps")


def _store(data: bytes, file: Path) -> bool:
    """Write a cut-out, its longest side at most `SIDE`; false where it is no picture with transparency."""
    try:
        clear = with_alpha(open_image(data))
    except Defect:
        return False
    if clear is None or clear.getchannel("A").getextrema()[0] == 255:
        return False
    clear.thumbnail((SIDE, SIDE))
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    clear.save(stream, "PNG")
    file.write_bytes(stream.getvalue())
    return True


def main() -> int:
    """Fetch and make sets of cut-outs."""
    parser = Parser(prog="python -m data_prep.parts.cutouts", description=main.__doc__)
    parser.add_argument("names", nargs="*", default=["emoji"], metavar="SET", help=f"of {', '.join(SETS)} (emoji)")
    parser.add_argument("--cache", type=Path, help="default: $VLORA_CACHE, or .cache of the repository")
    parser.add_argument("--downloads", type=Path, help="folder of the archives (default: CACHE/wheels)")
    arguments = parser.parse_args()
    for name in arguments.names:
        print(f"{name}: {ensure(name, arguments.cache, arguments.downloads)}")
    return 0


if __name__ == "__main__":
    from common.errors import run_cli

    run_cli(main)
