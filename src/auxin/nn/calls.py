"""How a module is called: by which names its forward knows what it is given."""

import inspect

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
