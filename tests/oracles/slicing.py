"""SliceGPT with one rotation, without rotating anything: principal components token by token, and a model of full width
whose stream is projected onto some of them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oracles.importance import entering

Array = NDArray[np.float64]


def components(model: Any, norms: Sequence[str], batches: Sequence[Mapping[str, Tensor]], epsilon: float) -> Array:
    """Principal components in columns, the first one first, of what enters `norms`, each token at length sqrt(width)
    (nearly, by epsilon). Tokens of an `attention_mask` of 0 are left out."""
    rows = []
    for batch in batches:
        kept = np.asarray(batch.get("attention_mask", torch.ones_like(batch["input_ids"])), dtype=bool)
        for path in norms:
            rows += [
                token / np.sqrt(np.mean(token**2) + epsilon) for token in entering(model, path, batch).numpy()[kept]
            ]
    # Without the square: the right singular vectors of all tokens.
    return np.linalg.svd(np.stack(rows), full_matrices=True)[2].T


def projected(model: Any, onto: Array, writers: Sequence[str]) -> Any:
    """A copy of `model` of which everything that writes the stream, embeddings included, is projected onto the span of
    the columns of `onto`.

    Args:
        model: of full width.
        onto: (width, units), orthonormal columns.
        writers: paths of linear layers; `model.model.embed_tokens` is another one.
    """
    made, project = copy.deepcopy(model), torch.from_numpy(onto @ onto.T)
    with torch.no_grad():
        table = made.model.embed_tokens.weight
        table.copy_(table @ project)
        for path in writers:
            layer = made.get_submodule(path)
            layer.weight.copy_(project @ layer.weight)
            if layer.bias is not None:
                layer.bias.copy_(project @ layer.bias)
    return made
