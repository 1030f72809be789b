"""LiGO's operator as the paper writes it, a dense matrix on vectors: vec W' = blockdiag(A (x) B) (w (x) I) vec W."""

from collections.abc import Sequence

import numpy as np


def widening(new_rows: np.ndarray) -> np.ndarray:
    """B = [I; S]."""
    return np.concatenate([np.eye(new_rows.shape[1]), new_rows])


def grown_matrices(
    old: Sequence[np.ndarray], w: np.ndarray, outputs: Sequence[np.ndarray], inputs: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The matrices (out, in) of all new layers.

    Args:
        old: those of the L old layers, (out, in) each.
        w: depth weights (L', L).
        outputs: B of every new layer, (out', out).
        inputs: A of every new layer, (in', in).
    """
    stacked = np.concatenate([matrix.flatten(order="F") for matrix in old])  # vec stacks columns
    blended = np.kron(w, np.eye(old[0].size)) @ stacked
    blocks = [np.kron(a, b) for a, b in zip(inputs, outputs, strict=True)]
    rows, columns = blocks[0].shape
    dense = np.zeros((rows * len(blocks), columns * len(blocks)))
    for layer, block in enumerate(blocks):
        dense[layer * rows : (layer + 1) * rows, layer * columns : (layer + 1) * columns] = block
    shape = (outputs[0].shape[0], inputs[0].shape[0])
    return [part.reshape(shape, order="F") for part in np.split(dense @ blended, len(blocks))]
