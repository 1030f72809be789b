"""The processes that train one model together, started by torchrun: which of them leads, and what they tell each other.

Rank 0 leads: it alone writes into a run's folder and talks to whoever waits. What it does alone, the others learn the
outcome of through the store that torchrun keeps, so that they can wait for as long as it takes, and hear signals.
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from auxin.errors import AuxinError, ConfigError, TrainingError, first_line
from auxin.training.meeting import meet
from auxin.training.watch import Watch

T = TypeVar("T")
STEP_SECONDS = 600.0
"""Longest wait for the others within a step, unless AUXIN_STEP_SECONDS says another: whoever takes longer hangs."""
_LONGEST_STEP = 10**7
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
"""Seconds between looks into the store."""
_FAREWELL = 10.0
"""Seconds that the leader waits at the end for those that may be gone."""
_END = "end"


class Ranks:
    """The processes, as one of them sees them. Without a store it is alone.

    Args:
        rank: which one this is, from 0.
        size: how many there are.
        store: what all of them read and write.
        silence: seconds without a sign of life from a process of another machine after which it is taken for dead.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: dist.Store | None = None, silence: float = STEP_SECONDS
    ) -> None:
        self.rank, self.size, self._store, self._silence = rank, size, store, silence
        self._told = self._met = self._ordered = self._step = 0
        self._since: float | None = None
        """Since when this process works alone within a step; None while it waits, and outside of steps."""
        self._waited = 0.0
        """When it began to wait last."""
        self._signs: dict[int, tuple[Any, float, float]] = {}
        """By rank: its last sign of life, when it was looked for last, and for how long it has been the last."""
        if self.several:
            self.say(f"process/{rank}", {"host": platform.node(), "number": os.getpid()})

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def add_up(self, values: Tensor) -> None:
        """Replace `values`, on any device, by their sum over the processes; the same bits in all of them."""
        if self.several:
            with self._exchange():
                dist.all_reduce(values)

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Within the context this process may wait for the others, for whom it did its work of the step until now."""
        works, self._since, self._waited = self._since is not None, None, time.monotonic()
        yield
        self._since = time.monotonic() if works else None

    def begin_step(self, step: int) -> None:
        """Note that this process is at work on a step, for whoever has to say which one they wait for."""
        self._step, self._since = step, time.monotonic()
        self._note(waits=False)

    def wait_for_others(self) -> None:
        """Note that what this process does alone in a step is done."""
        self._note(waits=True)

    def take_time(self) -> None:
        """Note that this process and the others may take as long as they need, up to the next step."""
        self._since = None

    def working(self) -> tuple[int, float] | None:
        """The step that this process is at work on alone, and since when by `time.monotonic`; None while it waits."""
        since = self._since
        return None if since is None else (self._step, since)

    def _note(self, waits: bool) -> None:
        if self.several:
            self.say(f"at/{self.rank}", {"step": self._step, "waits": waits})

    def behind(self) -> str:
        """Which processes the others wait for, in a sentence; empty where that is not known."""
        assert self._store is not None
        places: list[tuple[int, bool]] = []
        try:
            for rank in range(self.size):
                known = self._store.check([f"at/{rank}"])
                places.append(tuple(self.hear(f"at/{rank}", rank).values()) if known else (-1, False))
        except (AuxinError, RuntimeError):  # the store is gone, too
            return ""
        late = [rank for rank, place in enumerate(places) if place < max(places)]
        names = [f"{rank} ({self._at(rank, places[rank][0])})" for rank in late]
        return f"They wait for process {', '.join(names)}." if late else ""

    def _at(self, rank: int, step: int) -> str:
        """Where process `rank` is in a step, as far as it has said so."""
        assert self._store is not None
        if step < 0:
            return "not begun"
        with contextlib.suppress(AuxinError, RuntimeError):
            if self._store.check([f"where/{rank}"]):
                told = self.hear(f"where/{rank}", rank)
                if told["step"] == step:
                    return f"at step {step}: {told['where']}"
        if time.monotonic() - self._waited < self._silence:  # it has not been late for long
            return f"at step {step}"
        return f"at step {step}, and does not say where: it is stopped, or lets no other thread of Python run"

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in one of them; all of them ask together."""
        if not self.several:
            return flag
        flags = torch.tensor(int(flag))
        with self._exchange():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def told(self, make: Callable[[], T]) -> T:
        """What `make`, which the leader alone calls, returns: something that JSON has a form for.

        Raises:
            AuxinError: it raised one; in the others a TrainingError of the same words.
        """
        if not self.several:
            return make()
        self.take_time()
        self._told += 1
        key = f"told/{self._told}"
        if self.leads:
            try:
                value = make()
            except AuxinError as error:
                self.say(key, {"error": str(error)})
                raise
            self.say(key, {"value": value})
            return value
        message = self.hear(key)
        if "error" in message:
            raise TrainingError(message["error"])
        told: T = message["value"]
        return told

    def each(self, value: T) -> list[T]:
        """What each of them has, by rank: something that JSON has a form for."""
        if not self.several:
            return [value]
        self._met += 1
        keys = [f"met/{self._met}/{rank}" for rank in range(self.size)]
        self.say(keys[self.rank], {"value": value})
        return [self.hear(key, rank)["value"] for rank, key in enumerate(keys)]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What goes wrong within the context in one process goes wrong in all of them, so that none waits for it.

        Raises:
            AuxinError: its own error, or else a TrainingError with that of another, which it names.
        """
        error: AuxinError | None = None
        try:
            yield
        except AuxinError as raised:
            error = raised
        said = self.each(None if error is None else str(error))
        if error is None:
            for rank, message in enumerate(said):
                if message is not None:
                    raise TrainingError(f"process {rank} of {self.size}: {message}")
        if error is not None:
            raise error

    def same(self, what: str, value: str) -> None:
        """Make sure that all processes have the same `value` of `what`, which is named in the message.

        Raises:
            ConfigError: this one has another than the leader.
            TrainingError: another one has.
        """
        led = self.told(lambda: value)
        with self.together():
            if value != led:
                raise ConfigError(
                    f"{what} of this process differ from those of process 0. Give all the same: the same files and "
                    "settings, and a seed set (torch.manual_seed) before a model is made."
                )

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Within the context the others, which follow, wait for orders of this process; at its end they go home."""
        try:
            yield
        finally:
            # Where the others are gone already, nobody has to be told.
            with contextlib.suppress(RuntimeError):
                self.order({_END: True})

    def order(self, message: Mapping[str, Any]) -> None:
        """Give the others, which follow, an order."""
        if self.several:
            self.say(f"order/{self._ordered}", message)
            self._ordered += 1

    def orders(self) -> Iterator[dict[str, Any]]:
        """The leader's orders, as they come, up to the last."""
        for number in itertools.count():
            order = self.hear(f"order/{number}")
            if _END in order:
                return
            yield order

    def say(self, key: str, message: Mapping[str, Any]) -> None:
        """Leave a message for whoever asks for `key`."""
        assert self._store is not None
        self._store.set(key, json.dumps(message))

    def hear(self, key: str, of: int = 0) -> dict[str, Any]:
        """The message that process `of` leaves under `key`, as soon as it is there.

        Raises:
            TrainingError: that process has died, as far as can be seen from here.
        """
        assert self._store is not None
        self._wait(key, of, math.inf)
        message: dict[str, Any] = json.loads(self._store.get(key))
        return message

    def part(self) -> None:
        """Leave the others. The leader, with whom the store may end, lets them read what it said last."""
        self.say(f"left/{self.rank}", {})
        if self.leads:
            until = time.monotonic() + _FAREWELL
            for rank in range(1, self.size):
                with contextlib.suppress(TrainingError):
                    self._wait(f"left/{rank}", rank, until)

    def _wait(self, key: str, of: int, until: float) -> None:
        """Until there is a message of process `of` under `key`, or so long; TrainingError where it has died."""
        assert self._store is not None
        pause = _FIRST_PAUSE
        while not self._store.check([key]) and time.monotonic() < until:
            time.sleep(pause)
            if pause == _LONGEST_PAUSE and self._has_died(of) and not self._store.check([key]):
                raise TrainingError(f"process {of} of {self.size} has died. What was saved before is kept: run again.")
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _has_died(self, rank: int) -> bool:
        """Whether a process of this machine is there no more, or one of another machine has long said nothing."""
        assert self._store is not None
        if not self._store.check([f"process/{rank}"]):
            return False
        process = json.loads(self._store.get(f"process/{rank}"))
        if process["host"] != platform.node():
            return self._is_silent(rank)
        try:
            os.kill(process["number"], 0)
        except ProcessLookupError:
            return True
        return False

    def _is_silent(self, rank: int) -> bool:
        assert self._store is not None
        sign = self._store.get(f"alive/{rank}") if self._store.check([f"alive/{rank}"]) else None
        now = time.monotonic()
        known, looked, silent = self._signs.get(rank, (None, now, 0.0))
        # A look that comes late counts little: this process may have been suspended, and the other one with it.
        silent = silent + min(now - looked, 10 * _LONGEST_PAUSE) if sign == known else 0.0
        self._signs[rank] = (sign, now, silent)
        return silent > self._silence


ALONE = Ranks()
"""One process that trains by itself."""


def started_together() -> bool:
    """Whether torchrun, or what sets the same environment, has started this process with others.

    Raises:
        ConfigError: the environment does not say which one of how many this is.
    """
    if not os.environ.get("WORLD_SIZE") or "RANK" not in os.environ:
        return False
    size, rank = os.environ["WORLD_SIZE"], os.environ["RANK"]
    if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        raise ConfigError(
            f"WORLD_SIZE is {size!r} and RANK {rank!r} in the environment: that is no process of so many. Start by "
            "torchrun, which sets them, or unset both for one process."
        )
    return int(size) > 1


def processes_here() -> int | None:
    """How many processes torchrun has started on this machine; None where it does not say.

    Raises:
        ConfigError: what the environment says is no such number.
    """
    given = os.environ.get("LOCAL_WORLD_SIZE")
    if given is not None and not (given.isdecimal() and int(given) > 0):
        raise ConfigError(
            f"LOCAL_WORLD_SIZE is {given!r} in the environment: no number of processes. Start by torchrun, which sets "
            "it, or unset it."
        )
    return None if given is None else int(given)


def speaks() -> bool:
    """Whether this process says what is for a person to read: of those of a machine one does, for all of them."""
    try:
        return not started_together() or os.environ.get("LOCAL_RANK", os.environ["RANK"]) == "0"
    except ConfigError:
        return True


def _step_seconds() -> float:
    given = os.environ.get("AUXIN_STEP_SECONDS", str(STEP_SECONDS))
    with contextlib.suppress(ValueError):
        if 0 < float(given) <= _LONGEST_STEP:
            return float(given)
    raise ConfigError(
        f"AUXIN_STEP_SECONDS is {given!r} in the environment: no number of seconds from above 0 to {_LONGEST_STEP:,}. "
        f"Unset it for {STEP_SECONDS:g}."
    )


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Within the context, the processes that torchrun has started know each other; ALONE where it has started none.

    On CUDA each takes the device of its local rank.

    Raises:
        ConfigError: the environment says that there are others, and not where they meet, or something else is wrong
            with it.
    """
    if not started_together():
        yield ALONE
        return
    seconds = _step_seconds()
    try:
        store, rank, size = next(iter(dist.rendezvous("env://")))
        store = meet(store, rank, size, seconds)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes can't meet: {error} Start them by torchrun "
            "(torchrun --nproc-per-node 2 -m auxin run ...), or unset WORLD_SIZE for one process."
        ) from error
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=seconds),
        )
    except RuntimeError as error:
        raise TrainingError(
            f"Process {rank} of {size} can't reach the others ({first_line(error)}). Start all of them again; where "
            "machines have several networks, name the one between them (GLOO_SOCKET_IFNAME=eth0, NCCL_SOCKET_IFNAME)."
        ) from error
    ranks = Ranks(rank, size, dist.PrefixStore("auxin", store), silence=seconds)
    watch = Watch(ranks.say, ranks.working, rank, seconds)
    watch.start()
    try:
        try:
            yield ranks
        except AuxinError:
            ranks.part()
            raise
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            told = (
                f"Process {rank} of {size} waited in vain for the others ({first_line(error)}).",
                ranks.behind(),
                "What was saved before is kept: run again to go on from there.",
            )
            raise TrainingError(" ".join(filter(None, told))) from error
        ranks.part()
    finally:
        watch.stop()
        dist.destroy_process_group()
