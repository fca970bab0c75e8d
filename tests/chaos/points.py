"""Where a process can be killed: named places of the program, reached for the n-th time, by the rank that is to die.

The plan is put in place in the front end before it starts anything, and its ranks are forks of it.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TRAINING = {
    "start-up": "train.engine.stage:build_loader|train.engine.stage:TrainLoader",
    "engine": "train.engine.engine:Engine.__init__",
    "load": "train.engine.checkpoint:load",
    "forward": "train.engine.engine:Engine.forward",
    "backward": "train.engine.engine:Engine.backward",
    "optimizer": "train.engine.engine:Engine.micro_step",
    "checkpoint write": "torch:save",
    "checkpoint sums": "train.engine.saving:seal",
    "checkpoint record": "train.engine.saving:write_json",
    "rename": "os:replace",
    "prune": "shutil:rmtree",
    "samples": "train.measure.samples:predict",
    "validation": "train.engine.validation:validation_loss",
    "export": "vlora.folder:save_file",
    "end": "train.worker:write_atomically",
}
PREPARATION = {
    "plan": "data_prep.prepare:_plan",
    "shard": "data_prep.prepare:make_shard",
    "add": "data_prep.store.writer:ShardWriter.add",
    "rename": "os:replace",
    "index": "data_prep.store.manifest:_merge_index",
    "manifest": "data_prep.prepare:write_manifest",
    "report": "data_prep.report:write",
}
SAVING = ("checkpoint write", "checkpoint sums", "checkpoint record", "prune")
FIRST_RANK_ONLY = {"checkpoint record", "rename", "prune", "export", "end"}
OFTEN = {
    "prune": 4,
    "checkpoint record": 3,
    "forward": 8,
    "backward": 8,
    "optimizer": 8,
    "add": 200,
    "rename": 6,
    "checkpoint write": 4,
    "shard": 4,
}
"""How often a place is reached in a short run, about; the others: once."""


@dataclass(frozen=True)
class Plan:
    """One kill.

    Attributes:
        place: Key of `TRAINING` or `PREPARATION`.
        nth: At its n-th call in one process.
        after: Once the call has returned, not before it.
        delay: Seconds after that moment, so that the process dies in the middle of something.
        victim: `rank` (the one that gets there), `all` or `front end`.
        rank: Which rank is to get there; None: the process itself (data preparation has no ranks).
    """

    place: str
    nth: int = 1
    after: bool = False
    delay: float = 0.0
    victim: str = "rank"
    rank: int | None = 0

    @classmethod
    def draw(cls, dice: random.Random, ranks: int, places: Iterable[str] = ()) -> Plan:
        """A random one, at one of `places`, by default at any; `ranks=0` for data preparation."""
        place = dice.choice(sorted(places or (TRAINING if ranks else PREPARATION)))
        return cls(
            place,
            dice.randint(1, OFTEN.get(place, 1)),
            dice.random() < 0.5,
            dice.choice([0.0, 0.0, dice.random() * 0.05, dice.random()]),
            dice.choice(["rank", "all", "front end"]) if ranks else "all",
            None if not ranks else 0 if place in FIRST_RANK_ONLY else dice.randrange(ranks),
        )


def arm(plan: dict[str, Any]) -> None:
    """Put a plan in place, in the front end."""
    chosen = Plan(**plan)
    targets = (TRAINING if chosen.rank is not None else PREPARATION)[chosen.place]
    front_end, calls = os.getpid(), [0]
    rank = None if chosen.rank is None else str(chosen.rank)

    def kill() -> None:
        if chosen.victim == "rank":
            os.kill(os.getpid(), signal.SIGKILL)
        elif chosen.victim == "front end":
            os.kill(front_end, signal.SIGKILL)
        else:
            os.killpg(os.getpgid(0), signal.SIGKILL)

    def reached() -> None:
        if chosen.delay:
            threading.Timer(chosen.delay, kill).start()
        else:
            kill()

    for target in targets.split("|"):
        module, _, path = target.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        if not hasattr(owner, name):
            continue

        original = getattr(owner, name)

        def wrapped(*args: Any, original: Any = original, **options: Any) -> Any:
            calls[0] += os.environ.get("RANK") == rank
            due = calls[0] == chosen.nth and os.environ.get("RANK") == rank
            if due and not chosen.after:
                reached()
            value = original(*args, **options)
            if due and chosen.after:
                reached()
            return value

        setattr(owner, name, wrapped)
