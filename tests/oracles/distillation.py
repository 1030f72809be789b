"""Distillation by hand: Hinton et al. (arXiv 1503.02531, section 2) and the layers' mean squared differences, in
float64 and number by number; imports nothing of auxin."""

import numpy as np

IGNORED = -100


def softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(np.asarray(values, np.float64) - np.max(values))
    return raised / raised.sum()


def soft_loss(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """T^2 times the mean over the targets of sum_k p_k log(p_k / q_k), p the teacher's and q the student's; logits
    (places, classes), labels (places,). A class that only the student has is impossible to the teacher."""
    total, targets = 0.0, 0
    for s, t, label in zip(student, teacher, labels, strict=True):
        if label == IGNORED:
            continue
        q, p = softmax(s / temperature), softmax(t[: len(s)] / temperature)
        total += sum(p[k] * (np.log(p[k]) - np.log(q[k])) for k in range(len(p)))
        targets += 1
    return temperature**2 * total / targets


def soft_gradient(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """Its derivative by the student's logits, (places, classes): T (q - p) / targets (the paper's equation 2, times
    T^2)."""
    targets = int((labels != IGNORED).sum())
    gradient = np.zeros(student.shape)
    for row, (s, t, label) in enumerate(zip(student, teacher, labels, strict=True)):
        if label != IGNORED:
            told = np.zeros(len(s))
            p = softmax(t[: len(s)] / temperature)
            told[: len(p)] = p
            gradient[row] = temperature * (softmax(s / temperature) - told) / targets
    return gradient


def hard_loss(student: np.ndarray, labels: np.ndarray) -> float:
    """The mean cross-entropy of the targets, in nats."""
    losses = [-np.log(softmax(s)[label]) for s, label in zip(student, labels, strict=True) if label != IGNORED]
    return float(np.mean(losses))


def squared_distance(student: list[np.ndarray], teacher: list[np.ndarray], targets: np.ndarray) -> float:
    """The mean over pairs of layers of the mean squared difference of a sample, each sample weighing as many targets as
    it has; (samples, ...) each, without padding."""
    found = []
    for ours, theirs in zip(student, teacher, strict=True):
        by_sample = [float(np.mean((np.float64(a) - np.float64(b)) ** 2)) for a, b in zip(ours, theirs, strict=True)]
        found.append(sum(w * d for w, d in zip(targets, by_sample, strict=True)) / sum(targets))
    return float(np.mean(found))


def relations(vectors: np.ndarray, heads: int, seen: list[list[int]]) -> list[list[np.ndarray]]:
    """MiniLMv2's (arXiv 2012.15828): by relation head and place the softmax of the scaled products with the places that
    it sees; vectors (places, width)."""
    size = vectors.shape[1] // heads
    found = []
    for head in range(heads):
        split = np.float64(vectors[:, head * size : (head + 1) * size])
        rows = []
        for place, others in enumerate(seen):
            rows.append(softmax(np.array([split[place] @ split[other] / np.sqrt(size) for other in others])))
        found.append(rows)
    return found


def relation_distance(
    student: list[np.ndarray], teacher: list[np.ndarray], heads: int, seen: list[list[int]], counted: list[int]
) -> float:
    """Of one sample: KL(teacher || student), the sum over queries, keys and values, (places, width) each, of the mean
    over relation heads and the counted places."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        q, p = relations(ours, heads, seen), relations(theirs, heads, seen)
        for head in range(heads):
            for place in counted:
                ps, qs = p[head][place], q[head][place]
                total += sum(a * (np.log(a) - np.log(b)) for a, b in zip(ps, qs, strict=True) if a > 0)
    return float(total / heads / len(counted))


def seen_places(places: int, causal: bool, real: list[int]) -> list[list[int]]:
    """By place those that it sees: the real ones, of which a causal attention sees none behind it."""
    return [[other for other in real if other <= place or not causal] or [place] for place in range(places)]


def best_map(ours: np.ndarray, theirs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What the best affine map makes of `ours` (places, width) beside `theirs` (places, other width), places by
    `weights`: by numpy's least squares."""
    root = np.sqrt(weights)[:, None]
    with_one = np.hstack([ours, np.ones((len(ours), 1))])
    return with_one @ np.linalg.lstsq(root * with_one, root * theirs, rcond=None)[0]
