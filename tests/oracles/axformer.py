"""AxFormer's search, once more, from the paper's algorithm and with lists of numbers alone."""

from collections.abc import Callable, Sequence

Losses = Callable[[Sequence[str]], list[float]]


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def search(
    parts: Sequence[tuple[str, Sequence[str]]], losses: Losses, tolerance: float, votes: int
) -> tuple[list[str], list[tuple[str, bool]]]:
    """What goes, and everything that was tried, with whether it went.

    Args:
        parts: blocks with the elements that they are made of, in the order in which they are tried.
        losses: (what is gone) -> the loss of every sample.
        tolerance: how much a block's removal may cost for its elements to be tried.
        votes: more samples than this must be no worse off than at first.
    """
    original = losses([])
    gone: list[str] = []
    log: list[tuple[str, bool]] = []

    def accept(element: str) -> bool:
        new, best = losses([*gone, element]), mean(losses(gone))
        better = len([1 for one, other in zip(new, original, strict=True) if not one > other])
        return mean(new) < best and better > votes

    for block, elements in parts:
        if accept(block):
            gone.append(block)
            log.append((block, True))
            continue
        log.append((block, False))
        if mean(losses([*gone, block])) >= tolerance * mean(losses(gone)):
            continue
        left = len(elements)
        for element in elements:
            if left == 1:
                break
            yes = accept(element)
            log.append((element, yes))
            if yes:
                gone.append(element)
                left -= 1
    return gone, log
