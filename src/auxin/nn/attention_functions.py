"""Other functions in the place of those that transformers' attentions call.

An attention of transformers hands queries, keys and values to a function that the config names. Within `handing_to` it
hands them to a function of ours, which finds its settings and the model's own implementation by `handed`, and which may
have the architecture's own eager function compute the probabilities (`reading`): soft caps, sinks and position biases
are in them. No fused kernel gives those, so that this takes memory for heads x queries x keys.
"""

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from auxin.errors import PlanError

IMPLEMENTATIONS = ("eager", "sdpa")
"""Implementations of a model whose masks are known."""
_INTERFACE, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"


def calls_a_function(module: nn.Module) -> bool:
    """Whether `module` is an attention that hands queries, keys and values to one of transformers' attention functions,
    in whose place another one can be put."""
    return _eager(module) is not None


def refuse_others(module: nn.Module, brick: str, why: str) -> None:
    """PlanError when `module` is no such attention.

    Args:
        module: what the brick is to replace.
        brick: its name.
        why: what follows for the brick, in words that follow "so that ".
    """
    if not calls_a_function(module):
        raise PlanError(
            f"{brick}: a {type(module).__name__} does not hand its queries and keys to an attention function of "
            f"transformers, so that {why}. Name the attention module itself, or leave it out for this architecture."
        )


@contextlib.contextmanager
def handing_to(
    module: nn.Module, function: str, settings: Any, why: str, implementations: Collection[str] | None = IMPLEMENTATIONS
) -> Iterator[None]:
    """Within the context, `module` hands queries, keys and values to a function of transformers' table, which finds its
    settings and the model's own implementation by `handed`.

    Args:
        module: an attention that `calls_a_function`.
        function: what the function is registered as.
        settings: of it.
        why: what it does, for a message that goes on ", and ..".
        implementations: those of a model beside which it works; None: all.

    Raises:
        PlanError: the model's implementation of attention is another one, which makes masks of its own kind, or the
            attention hands to another function already.
    """
    before: Any = module.config
    if isinstance(before, _Naming) and before._attn_implementation != function:
        raise PlanError(
            f"{why}, and the attention is another brick already, which does something else with them. Merge that one "
            "back first, or leave it."
        )
    config = before.around if isinstance(before, _Naming) else before
    own = config._attn_implementation
    if own is not None and implementations is not None and own not in implementations:
        raise PlanError(
            f"{why}, and the model's attention is {own!r}, which has masks of another kind. Call "
            f"model.set_attn_implementation({IMPLEMENTATIONS[1]!r})."
        )
    # What an attention reads of its config tells it which function to call; nobody else sees this one.
    module.config = _Naming(config, own, function, settings)  # type: ignore[assignment]
    try:
        yield
    finally:
        module.config = before


def handed(module: nn.Module) -> tuple[Any, Callable[..., tuple[Tensor, Tensor | None]]]:
    """The settings of the function that `module` hands to, and the attention function that it would call otherwise."""
    config: Any = module.config
    assert isinstance(config, _Naming)
    eager = _eager(module)
    assert eager is not None
    own = ALL_ATTENTION_FUNCTIONS.get_interface(config.own or "eager", eager)

    def attend(module: Any, *args: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        # Some ask the config of the module which of them they are.
        module.config = config.around
        try:
            return own(module, *args, **named)
        finally:
            module.config = config

    return config.settings, attend


def reading(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    change: Callable[[Tensor], Tensor],
    **named: Any,
) -> tuple[Tensor, Tensor]:
    """As the architecture's own eager attention, but with other weights than its probabilities.

    Args:
        module: the attention, within `handing_to`.
        query: (samples, heads, queries, head width).
        key, value: (samples, key-value heads, keys, head width).
        attention_mask: as the model's implementation has it: True for what is read, or numbers that are added to
            scores; None: everything is read, by a causal attention what came before.
        named: whatever else its function is given.
        change: (probabilities) -> weights, both (samples, heads, queries, keys).

    Returns:
        What the heads give, (samples, queries, heads, head width), and the weights.
    """
    eager, config = _eager(module), module.config
    assert eager is not None
    assert isinstance(config, _Naming)
    if config.own == "sdpa":
        attention_mask = _added(module, query, key.shape[-2], attention_mask, named.get("is_causal"))
    # The product with the values is made again, of other weights; here with no entry of any.
    _, probabilities = eager(module, query, key, value[..., :0], attention_mask, **named)
    weights = change(probabilities)
    read = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
    return (weights @ read).transpose(1, 2).contiguous(), weights


class _Naming:
    """A config that names another attention function, and is another one in all else.

    Args:
        around: the other one.
        own: the implementation that it names.
        function: what the function is registered as.
        settings: of the function.
    """

    def __init__(self, around: Any, own: str | None, function: str, settings: Any) -> None:
        self.around, self.own, self.settings = around, own, settings
        self._attn_implementation = function

    def __getattr__(self, name: str) -> Any:
        return getattr(self.around, name)


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
        if written is None:
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
