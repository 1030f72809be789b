"""The order of the contexts of a stream: a function of the seed, of the shards' numbers of contexts, and of nothing
else.

Each epoch goes through the shards in a permutation of its own, so many at a time: a window. The contexts of a window,
those of its first shard first, are shuffled together. Epochs are laid end to end, as `loader.ShuffledBatches` has it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from auxin.data.loader import permutation
from auxin.errors import DataError

_ROWS = 32
"""Bits of a context's number that are its row in the shard; those above are the shard's number."""

Contexts = Callable[[int], int | None]
"""How many contexts a shard has; None: nobody knows yet."""
Ready = Callable[[Sequence[int], Sequence[int]], None]
"""Makes the shards of a window ready, and begins with those that come behind it; then `Contexts` knows the former."""


def place_of(number: int) -> tuple[int, int]:
    """The shard, and the row in it, of the context that an order calls `number`."""
    return number >> _ROWS, number & (1 << _ROWS) - 1


class StreamOrder:
    """Endless batches of contexts, by their numbers; see `place_of`.

    Args:
        shards: how many there are.
        window: how many of them are shuffled together.
        seed: of the order.
        batch_size: contexts per batch.
        contexts, ready: what is known of the shards, and learnt.
        position: the batch that will be asked for first; its window is made ready at once.

    Raises:
        DataError: a shard can't be made ready, or none has a context.
    """

    def __init__(
        self, shards: int, window: int, seed: int, batch_size: int, contexts: Contexts, ready: Ready, position: int = 0
    ) -> None:
        self._shards, self._width, self._seed, self._batch_size = shards, window, seed, batch_size
        self._contexts, self._ready = contexts, ready
        self._windows = -(-shards // window)
        self._of_epoch: tuple[int, list[int]] = (-1, [])
        self._of_all: int | None = None
        self._entered: tuple[int, int] | None = None
        self._begin()
        self._enter(position * batch_size)

    def batch(self, position: int) -> list[int]:
        """The numbers of the contexts of batch number `position`."""
        found: list[int] = []
        while len(found) < self._batch_size:
            sample = position * self._batch_size + len(found)
            self._enter(sample)
            first = sample - self._start
            found += self._numbers[first : first + self._batch_size - len(found)].tolist()
        return found

    def _begin(self) -> None:
        """Go to the first window of the first epoch."""
        self._epoch = self._window = self._start = 0
        self._size = self._count()

    def _enter(self, sample: int) -> None:
        """Go to the window that holds a sample of the epochs laid end to end, and shuffle it."""
        if sample < self._start:
            self._begin()
        while sample >= self._start + self._size:
            self._next(sample)
        if self._entered == (self._epoch, self._window):
            return
        shards = self._in_window(self._epoch, self._window)
        self._ready(shards, self._behind())
        each = [np.arange(self._contexts(shard) or 0) + (shard << _ROWS) for shard in shards]
        order = permutation(self._size, f"{self._seed}:{self._epoch}:{self._window}").numpy()
        self._numbers = np.concatenate(each)[order]
        self._entered = self._epoch, self._window

    def _next(self, sample: int) -> None:
        """Go on by a window; from the end of an epoch to that in which `sample` is."""
        self._start += self._size
        self._window += 1
        if self._window == self._windows:
            if self._of_all is None:
                self._of_all = self._start // (self._epoch + 1)
            if not self._of_all:
                raise DataError(
                    "No shard of the stream has a context to learn from. Give more text, a shorter context_length, or "
                    "larger shard_bytes."
                )
            more = (sample - self._start) // self._of_all
            self._start += more * self._of_all
            self._epoch, self._window = self._epoch + 1 + more, 0
        self._size = self._count()

    def _count(self) -> int:
        """Contexts in the window; its shards are made ready where nobody knows yet how many they have."""
        shards = self._in_window(self._epoch, self._window)
        if any(self._contexts(shard) is None for shard in shards):
            self._ready(shards, self._behind())
        return sum(self._contexts(shard) or 0 for shard in shards)

    def _behind(self) -> list[int]:
        """Shards of the next window."""
        last = self._window + 1 == self._windows
        return self._in_window(self._epoch + last, 0 if last else self._window + 1)

    def _in_window(self, epoch: int, window: int) -> list[int]:
        if epoch != self._of_epoch[0]:
            self._of_epoch = epoch, permutation(self._shards, f"{self._seed}:{epoch}").tolist()
        return self._of_epoch[1][window * self._width : (window + 1) * self._width]
