"""torch's autocast, whatever the caller has on: inside of one of his contexts the same numbers as outside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")


def autocast_switches() -> Callable[[], None]:
    """What turns autocast on and off again as it is now."""
    before = {kind: torch.is_autocast_enabled(kind) for kind in DEVICE_TYPES}

    def put_back() -> None:
        for kind, enabled in before.items():
            torch.set_autocast_enabled(kind, enabled)

    return put_back


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within the context, every operation is computed in the type of what it is given.

    It sets the switches and opens no `torch.autocast`: an interrupt between two instructions of that one's `with`
    leaves torch's count of open contexts too high, and with it the weights of a moment in the cache of all later ones.
    """
    put_back = autocast_switches()
    try:
        for kind in DEVICE_TYPES:
            torch.set_autocast_enabled(kind, False)
        yield
    finally:
        put_back()


@contextmanager
def bfloat16_autocast(device_type: str, enabled: bool, cached: bool = True) -> Iterator[None]:
    """Within the context, products are computed in bfloat16 where `enabled`, and else in the type of their factors.

    Where `cached`, a weight is converted once, and what it became stays up to the end. The cache is emptied then, which
    torch leaves to the outermost context: within one of the caller's, a second step would be computed with the weights
    of the first.
    """
    try:
        with torch.autocast(device_type, torch.bfloat16, enabled=enabled, cache_enabled=cached):
            yield
    finally:
        torch.clear_autocast_cache()
