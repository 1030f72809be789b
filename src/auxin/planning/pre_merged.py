"""Products that keep the matrix which they stand for, and multiply by it where there are few tokens at once.

Source: "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers" (arXiv
2406.16450), section 3.1, "pre-merge": below a number of tokens, which depends on the machine, one multiplication by the
whole matrix is faster than two by its factors.
"""

from torch import nn
from transformers import PreTrainedModel

from auxin.errors import ConfigError, PlanError
from auxin.nn.bricks import Brick
from auxin.nn.linear import widths
from auxin.planning.product_times import TOKENS, ProductTimes


def pre_merge(model: PreTrainedModel, below: int | None = None) -> dict[str, int]:
    """Let the products of a model that is to answer, and not to learn, multiply by the whole matrix for few tokens.

        pre_merge(model)           # measures, layer by layer, from how many tokens on factors are faster here
        pre_merge(model, below=16)
        pre_merge(model, below=0)  # ends it

    Numbers are those of factors within rounding. Every such layer takes the memory of a dense one beside its factors.
    Nothing of it is saved: call it after loading. It serves in evaluation mode, without gradients.

    Args:
        model: with products in place of linear layers (greenformers, structured-ffn).
        below: tokens at once, of all sequences together, from which on factors are used; None: measured on this
            machine, for each shape once.

    Returns:
        That number by the path of the layer; 0 where factors are always faster. Where they never are, it is more than
        any number that was measured.

    Raises:
        ConfigError: `below` is no number of tokens.
        PlanError: the model has no such layer.
    """
    if below is not None and (not isinstance(below, int) or isinstance(below, bool) or below < 0):
        raise ConfigError(f"below = {below!r} is no number of tokens. Give 0 or more, or None to measure it.")
    found = {path: module for path, module in model.named_modules() if isinstance(module, Brick) and module.pre_merges}
    if not found:
        raise PlanError(
            f"pre_merge: the {type(model).__name__} has no layer that is a product. Make some first (greenformers, "
            "structured-ffn)."
        )
    told = {path: _measured(module) if below is None else below for path, module in found.items()}
    for path, module in found.items():
        module.merge_below(told[path])
    return told


def _measured(product: Brick) -> int:
    """The least number of tokens at which factors are faster than the matrix."""
    parameters = dict(product.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    dense = nn.Linear(*widths(product), bias="bias" in parameters, device="meta", dtype=dtype)
    start = ProductTimes(dtype).start(dense, product)
    if start is None:
        return 2 * TOKENS[-1]
    return 0 if start == TOKENS[0] else start
