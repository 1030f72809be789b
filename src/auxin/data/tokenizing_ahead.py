"""What the process does that tokenizes shards ahead; `shards_ahead` starts it and talks to it.

Its input has a line for each wish: a list of shards in place of those before, or null for the end. It ends, too, when
its input does, and its input does when whoever started it ends, however that is."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator

from auxin.data.sources import Document
from auxin.data.streamed_text import StreamedText
from auxin.errors import DataError
from auxin.interruption import SIGNALS

_NICE = 5
"""By how much it stands back behind those who train."""
_PATIENCE = 3.0
"""Seconds after the end of the input in which it removes what it has not finished."""


class _Wishes:
    """The newest wish, which a thread of its own reads."""

    def __init__(self) -> None:
        self._newest: list[int] | None = None
        self._changed = threading.Condition()
        self.over = False
        threading.Thread(target=self._read, daemon=True).start()

    def take(self) -> list[int] | None:
        """The shards wished for, as soon as there is a wish that was not taken; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self.over or self._newest is not None)
            wish, self._newest = self._newest, None
            return None if self.over else wish

    @property
    def is_new(self) -> bool:
        """Whether there is a newer one than that which was taken."""
        return self.over or self._newest is not None

    def _read(self) -> None:
        for line in sys.stdin:
            wish = json.loads(line)
            if wish is None:
                break
            with self._changed:
                self._newest = wish
                self._changed.notify()
        with self._changed:
            self.over = True
            self._changed.notify()
        threading.Event().wait(_PATIENCE)
        os._exit(0)


def work() -> None:
    """Tokenize what is wished for, up to the end of the input."""
    for asked in SIGNALS:  # what they ask for is the business of who trains, with whom this process ends
        signal.signal(asked, signal.SIG_IGN)
    os.nice(_NICE)
    wishes = _Wishes()
    data = StreamedText.load(sys.argv[1])

    def read(number: int) -> Iterable[Document]:
        return _until_over(data.documents(number), wishes)

    cache = data.new_cache(read)
    while (wish := wishes.take()) is not None:
        for number in wish:
            if wishes.is_new:
                break
            try:
                cache.ensure(number)
            except DataError:
                break  # who trains meets it, too, and says it


def _until_over(documents: Iterable[Document], wishes: _Wishes) -> Iterator[Document]:
    for document in documents:
        if wishes.over:
            raise SystemExit
        yield document
