"""Hard attention: each query reads the tokens with its K largest attention probabilities, and no others.

    A = softmax(Q K^T / sqrt(d) + mask),    A'_ij = A_ij where it is one of the K largest of row i, else 0,    O = A' V

A' is not renormalised, so that its rows sum to 1 or less (AxFormer, Nagarajan et al. 2022, arXiv 2010.03688). As in the
paper's code, dropout of the probabilities, where a model is trained with some, comes before the choice. Of equal
probabilities at the border any may be taken.

transformers' attentions hand queries, keys and values to a function that the config names. An attention that is one of
these becomes hard by giving them to another function, which has the architecture's own eager one compute A: soft caps,
sinks and position biases are in it. No fused kernel gives A, so that it takes memory for heads x queries x keys. Where
there are at most K keys the model's own implementation computes what it always does.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from auxin.errors import PlanError
from auxin.nn.bricks import Brick, brick
from auxin.nn.extension import extended

NAME = "auxin_hard_attention"
"""What the function is called in transformers' table of attention functions."""
IMPLEMENTATIONS = ("eager", "sdpa")
"""Implementations of a model whose masks are known."""
_INTERFACE, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"


@brick("hard_attention")
class HardAttention(Brick):
    """An attention module of transformers in which each query reads the K most probable tokens alone. It has the
    module's parameters and takes and gives the same. The map that it gives is A', whose rows sum to 1 or less."""

    keep: int
    """K."""
    config: Any

    @classmethod
    def replacing(cls, module: nn.Module, keep: int = 30) -> Self:
        """`module`, an attention of one of transformers' models, so extended.

        Args:
            module: also on the meta device.
            keep: K, 1 or more.

        Raises:
            PlanError: `keep` is below 1, or the module computes its attention by itself, where no other can be put in.
        """
        if keep < 1:
            raise PlanError(f"hard_attention: keep = {keep}. A query reads 1 token or more; give that.")
        if not hardens(module):
            raise PlanError(
                f"hard_attention: a {type(module).__name__} does not hand its queries and keys to an attention "
                "function of transformers, so that no other can be put in its place. Name the attention module itself, "
                "or leave hard attention out for this architecture."
            )
        return extended(module, cls, keep=keep)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention.

        Raises:
            PlanError: the model's implementation of attention is one that makes masks of its own kind.
        """
        config = self.config
        own = config._attn_implementation
        if own is not None and own not in IMPLEMENTATIONS:
            raise PlanError(
                f"hard_attention computes attention probabilities, and the model's attention is {own!r}, which has "
                f"masks of another kind. Call model.set_attn_implementation({IMPLEMENTATIONS[1]!r})."
            )
        # What an attention reads of its config tells it which function to call; no one else sees this one.
        self.config = _Naming(config)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.config = config

    def extra_repr(self) -> str:
        """K."""
        return f"keep={self.keep}"


def hardens(module: nn.Module) -> bool:
    """Whether `module` is an attention that can be made hard: one that hands queries, keys and values to one of
    transformers' attention functions."""
    return _eager(module) is not None


def hard(probabilities: Tensor, keep: int) -> Tensor:
    """The `keep` largest of each row, (..., keys), and zeros for the others."""
    largest = probabilities.topk(keep, dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, largest.indices, largest.values)


def hard_attention(
    module: HardAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in the place of an attention function.

    Args:
        module: the attention.
        query: (samples, heads, queries, head width).
        key, value: (samples, key-value heads, keys, head width).
        attention_mask: as the model's implementation has it: True for what is read, or numbers that are added to
            scores; None: everything is read, by a causal attention what came before.
        named: whatever else its function is given.

    Returns:
        What the heads give, (samples, queries, heads, head width), and A', (samples, heads, queries, keys).
    """
    eager, own = _eager(module), module.config._own
    assert eager is not None
    keys = key.shape[-2]
    if keys <= module.keep:
        result: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS.get_interface(own or "eager", eager)(
            module, query, key, value, attention_mask, **named
        )
        return result
    if own == "sdpa":
        attention_mask = _added(module, query, keys, attention_mask, named.get("is_causal"))
    # The product with the values is made again, of what is left; here with a single entry of each.
    _, probabilities = eager(module, query, key, value[..., :1], attention_mask, **named)
    kept = hard(probabilities, module.keep)
    read = value.repeat_interleave(kept.shape[1] // value.shape[1], dim=1)
    return (kept @ read).transpose(1, 2).contiguous(), kept


ALL_ATTENTION_FUNCTIONS.register(NAME, hard_attention)


class _Naming:
    """A config that names hard attention, and is another one in all else."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    @property
    def _own(self) -> str | None:
        name: str | None = self._config._attn_implementation
        return name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _added(module: nn.Module, query: Tensor, keys: int, mask: Tensor | None, causal: bool | None) -> Tensor | None:
    """The mask that eager attention adds to scores, for one that a fused kernel takes; None: everything is read."""
    queries = query.shape[-2]
    if mask is None:
        # By the rule of transformers' sdpa: one query reads everything, several are as many as the keys.
        if queries == 1 or not (getattr(module, "is_causal", True) if causal is None else causal):
            return None
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )


def _eager(module: nn.Module) -> Callable[..., Any] | None:
    """The eager attention function of the architecture of `module`; None where it is no attention that calls one."""
    for cls in type(module).__mro__:
        written = vars(cls).get("forward")
        if written is None or issubclass(cls, Brick):
            continue
        function: Any = inspect.unwrap(written)
        code = getattr(function, "__code__", None)
        names: tuple[str, ...] = getattr(code, "co_names", ())
        if _INTERFACE in names and "_attn_implementation" in names:
            place: Mapping[str, Any] = function.__globals__
            return place.get(_EAGER) if _EAGER in names else None
        if "super" not in names:
            return None
    return None
