"""What a stream of packed text is, derived from its page: shards of documents, their contexts, and their order."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch

Encode = Callable[[str], list[int]]


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def is_held_out(text: str, seed: int, fraction: float) -> bool:
    key = digest(f"{seed}:".encode() + digest(text.encode()))
    return int.from_bytes(key[:8], "big") / 2**64 < fraction


def contexts_of(
    texts: Sequence[str], encode: Encode, separator: int, length: int, seed: int, fraction: float
) -> list[list[int]]:
    """A shard's contexts: the texts that are learnt, each once, in their order; what fills none is left out."""
    stream: list[int] = []
    for text in dict.fromkeys(texts):
        if text.strip() and not is_held_out(text, seed, fraction):
            stream += [*encode(text), separator]
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def shuffled(things: Sequence, label: str) -> list:
    generator = torch.Generator().manual_seed(int.from_bytes(digest(label.encode())[:8], "big") // 2)
    return [things[index] for index in torch.randperm(len(things), generator=generator).tolist()]


def in_order(shards: Sequence[list[list[int]]], window: int, seed: int) -> Iterator[list[int]]:
    """The contexts of shards, epoch after epoch."""
    assert any(shards)
    epoch = 0
    while True:
        order = shuffled(shards, f"{seed}:{epoch}")
        for number, start in enumerate(range(0, len(order), window)):
            together = [context for shard in order[start : start + window] for context in shard]
            yield from shuffled(together, f"{seed}:{epoch}:{number}")
        epoch += 1


def lines_by_bytes(content: bytes, wanted: int) -> list[list[bytes]]:
    """The lines of a file by the part in which they begin, of parts of equal length, of the wanted bytes at most."""
    count = -(-len(content) // wanted)
    parts: list[list[bytes]] = [[] for _ in range(count)]
    at = 0
    for line in content.splitlines(keepends=True):
        parts[max(part for part in range(count) if len(content) * part // count <= at)].append(line)
        at += len(line)
    return parts
