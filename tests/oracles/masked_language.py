"""Masked language modelling as BERT's paper says it (arXiv 1810.04805, section 3.1), token by token; imports nothing of
auxin."""

import math


def hidden_count(length: int, probability: float) -> int:
    """Tokens of a context that are to be named: the share, rounded, at least one."""
    return max(1, round(length * probability))


def restored(inputs: list[int], labels: list[int], ignored: int) -> list[int]:
    """The text: what was to be named, and the inputs elsewhere."""
    return [seen if label == ignored else label for seen, label in zip(inputs, labels, strict=True)]


def treatments(inputs: list[int], labels: list[int], ignored: int, mask: int) -> list[str]:
    """What was done to each token that is to be named, as far as it shows."""
    chosen = [(seen, label) for seen, label in zip(inputs, labels, strict=True) if label != ignored]
    return ["mask" if seen == mask else "same" if seen == label else "other" for seen, label in chosen]


def shown_shares(mask_share: float, random_share: float, vocabulary: int) -> dict[str, float]:
    """How often each treatment shows, where the mask is no token of the text: a random token may be the right one."""
    hit = random_share / vocabulary
    return {"mask": mask_share, "same": 1 - mask_share - random_share + hit, "other": random_share - hit}


def mean_loss(logits: list[list[list[float]]], labels: list[list[int]], ignored: int) -> float:
    """The mean over all places to be named of -log softmax(logits)[label], in nats."""
    losses = []
    for rows, row_labels in zip(logits, labels, strict=True):
        for values, label in zip(rows, row_labels, strict=True):
            if label != ignored:
                top = max(values)
                losses.append(math.log(sum(math.exp(value - top) for value in values)) + top - values[label])
    return sum(losses) / len(losses)
