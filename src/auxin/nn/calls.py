"""How a module is called: by which names its forward knows what it is given, and what happens around that."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


def forward_arguments(module: nn.Module) -> tuple[str, ...]:
    """The names of what `module` takes by position, in order; empty where that is not known.

    Classes that only pass on what they get (and modules around an `inner` one) are looked through.
    """
    for cls in type(module).__mro__:
        if "forward" not in vars(cls):
            continue
        parameters = list(inspect.signature(vars(cls)["forward"]).parameters.values())
        if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            return tuple(p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    inner = getattr(module, "inner", None)
    return forward_arguments(inner) if isinstance(inner, nn.Module) else ()


def first_argument(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """The hidden states that a module was called with, by position or by name."""
    return arguments[0] if arguments else named.get("hidden_states", next(iter(named.values())))


@contextmanager
def computing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, `module` computes `forward` when it is called; its hooks are called as before."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def as_if_called(module: nn.Module) -> Iterator[None]:
    """Within the context, the own tensors of `module` are there to be read as they are while it is called.

    Where a model is offloaded (accelerate, to the CPU or a disk), a module's tensors have data during its calls alone.
    """
    hook: Any = vars(module).get("_hf_hook")  # accelerate's name for it
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
