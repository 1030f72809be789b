"""Products of blocks as the definitions say them, one number at a time, and the errors of the nearest ones."""

import numpy as np


def block_dense(x: np.ndarray, output: np.ndarray, blocks: list[np.ndarray]) -> np.ndarray:
    """U blockdiag(V_1, ..., V_B) x for x (in,)."""
    diagonal = np.zeros((sum(len(block) for block in blocks), len(x)))
    row = column = 0
    for block in blocks:
        diagonal[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return output @ (diagonal @ x)


def block_shuffle(x: np.ndarray, outputs: list[np.ndarray], inputs: list[np.ndarray]) -> np.ndarray:
    """The Monarch product for x (in,): every inner unit j goes to block j mod B, whose outputs are l, l + B, ..."""
    count, width = len(inputs), inputs[0].shape[1]
    inner = [value for block in range(count) for value in inputs[block] @ x[block * width : (block + 1) * width]]
    result = np.zeros(count * len(outputs[0]))
    for block in range(count):
        mine = np.array([value for unit, value in enumerate(inner) if unit % count == block])
        for number, value in enumerate(outputs[block] @ mine):
            result[block + number * count] = value
    return result


def least_error(weight: np.ndarray, form: str, blocks: int, rank: int = 0) -> float:
    """The sum of squares between `weight` (out, in) and the nearest product of a form: of every piece the singular
    values that its share of the inner units does not hold."""
    outputs, inputs = weight.shape
    width = inputs // blocks
    stretches = [weight[:, block * width : (block + 1) * width] for block in range(blocks)]
    if form == "block-dense":
        pieces, each = stretches, rank // blocks
    else:
        pieces = [stretch[first::blocks] for stretch in stretches for first in range(blocks)]
        each = min(outputs, inputs) // blocks**2
    return float(sum((np.linalg.svd(piece, compute_uv=False)[each:] ** 2).sum() for piece in pieces))
