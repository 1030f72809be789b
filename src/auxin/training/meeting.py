"""How processes that are started together find each other in the store that torchrun keeps.

torchrun may keep its store when it starts them again, with all that was said in it. Its count of restarts tells one
attempt from the next on one machine alone: where a worker dies, its own torchrun counts a restart, and another, which
starts its workers again because the first one asks, does not.
"""

import json
import time
import uuid

import torch.distributed as dist

from auxin.errors import TrainingError

_PAUSE = 0.02
"""Seconds between looks into the store."""


def meet(store: dist.Store, rank: int, size: int, seconds: float) -> dist.Store:
    """The part of `store` that belongs to the processes that are there now, and to none of an earlier attempt; all of
    them call it together.

    Each leaves a name that nobody had before. The leader says which names it sees, until all have answered that theirs
    is among them; its own name is that of the attempt.

    Args:
        store: what all of them read and write.
        rank: which one this is, from 0.
        size: how many there are.
        seconds: longest wait for the others.

    Raises:
        TrainingError: others have not come in that time.
    """
    name, until = uuid.uuid4().hex, time.monotonic() + seconds
    store.set(f"here/{rank}", name)
    if rank:
        names = _called(store, name, until)
        store.set(_answer(names, rank), "")
    else:
        names = _gathered(store, size, until)
    return dist.PrefixStore(f"attempt/{names[0]}", store)


def _gathered(store: dist.Store, size: int, until: float) -> list[str]:
    """The names of all processes, by rank, when each of them knows that it is among them."""
    told: list[str] = []
    while True:
        missing = [rank for rank in range(size) if not store.check([f"here/{rank}"])]
        if not missing:
            # A name may be that of an earlier attempt until the process of this one has come.
            names = [store.get(f"here/{rank}").decode() for rank in range(size)]
            if names != told:
                told = names
                store.set("called", json.dumps(told))
            missing = [rank for rank in range(1, size) if not store.check([_answer(told, rank)])]
        if not missing:
            return told
        _pause(until, f"Processes {', '.join(map(str, missing))} of {size} have not come")


def _called(store: dist.Store, name: str, until: float) -> list[str]:
    """The names of all processes, as soon as `name` is among them."""
    while True:
        if store.check(["called"]):
            names: list[str] = json.loads(store.get("called"))
            if name in names:
                return names
        _pause(until, "Process 0 has not called the others together")


def _answer(names: list[str], rank: int) -> str:
    """Where process `rank` answers a leader that has called these names."""
    return f"answer/{names[0]}/{names[rank]}"


def _pause(until: float, told: str) -> None:
    if time.monotonic() > until:
        raise TrainingError(
            f"{told} in the time that a step may take (AUXIN_STEP_SECONDS). Look at what they say, or whether the "
            "machines reach each other, and start all of them again."
        )
    time.sleep(_PAUSE)
