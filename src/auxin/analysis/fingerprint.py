"""What a model is known by: under the same fingerprint it computes the same.

That is more than class, config and weights: whoever changes a module's activation, or a number that it goes by, has
another model. What can't be told in words, such as a hook, makes a model that no fingerprint knows (`is_known`).
"""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from operator import itemgetter
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from auxin.edits.structure import config_values, refuse_quantized
from auxin.models.evaluating import configs_of
from auxin.models.fingerprint import add_weights

_NOT_THE_MODEL = ("transformers_version", "architectures", "dtype", "use_cache", "_name_or_path")
"""Values of a config that say nothing about what the model computes, or that the weights say themselves."""
_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
"""Attributes of a config that no file has: by which code attention and experts are computed."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes in which torch keeps weights, children, hooks and the mode."""
_OF_NO_MODULE = ("_hf", "_is_hf", "_output_capturing", "_old_forward")
"""Beginnings of names under which transformers and accelerate note what they have done."""
_BOOKS = (
    *("config", "generation_config", "name_or_path", "all_tied_weights_keys", "kernel_config"),
    *("gradient_checkpointing", "warnings_issued", "quantization_method", "is_quantized"),
)
"""Attributes of a whole transformers model that say where it comes from, how it is trained or how it writes."""
_NO_CHANGE = ("transformers.utils.output_capturing",)
"""Modules whose hooks read and change nothing."""


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hex SHA-256 of a model: class, configs, parameters and buffers, and of every module the class, the code of its
    forward pass, and its attributes that are plain values, functions or tensors.

    It is the same in every process. Where the weights lie and how the module tree came about doesn't matter. Code that
    is called from a forward pass is known by the names under which it is called, not by what it does.

    Raises:
        ConfigError: the model has no weights.
        PlanError: they are packed by a quantizer.
    """
    digest = hashlib.sha256(f"{type(model).__name__}\n".encode())
    for config in configs_of(model):
        values = _of_the_model(config_values(config))
        if config is not model.config:  # it may hold a copy, older or newer, of what the model's own says of all
            values.pop("quantization_config", None)
        names = [getattr(config, name, None) for name in _IMPLEMENTATIONS]
        attention = ALL_ATTENTION_FUNCTIONS.get(names[0])
        digest.update(f"{json.dumps(values, sort_keys=True)} {names} {_told(attention)}\n".encode())
    try:
        add_weights(digest, model)
    except NotImplementedError:  # tensors of torchao's hold no bytes to be read in order
        refuse_quantized(model)
        raise
    for fact in _facts(model):
        digest.update(f"{fact}\n".encode())
    return digest.hexdigest()


def is_known(model: PreTrainedModel) -> bool:
    """Whether the fingerprint of `model` says what it computes: its modules have no hooks that may change something,
    no forward pass of their own instead of their class's, and no attributes that can't be told."""
    return not any(map(_is_changed, model.modules())) and not any(
        _told(value) is None for module in model.modules() for _, value in _attributes(module)
    )


def _of_the_model(values: Any) -> Any:
    """The values of a config, and of those that it holds, that say what the model computes."""
    if not isinstance(values, dict):
        return values
    return {key: _of_the_model(value) for key, value in values.items() if key not in _NOT_THE_MODEL}


def _is_changed(module: nn.Module) -> bool:
    hooks = (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *torch_module._global_forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
    )
    if any(getattr(hook, "__module__", None) not in _NO_CHANGE for hook in hooks):
        return True
    # accelerate puts a forward pass around that moves tensors between devices.
    moved = type(vars(module).get("_hf_hook")).__module__.startswith("accelerate.")
    return "forward" in vars(module) and not moved


def _facts(model: PreTrainedModel) -> Iterator[str]:
    """What there is to say of every module, without its weights."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield f"{name} {_name(type(module))} {_code(type(module).forward)}"
        for attribute, value in _attributes(module):
            yield f"{name}.{attribute} {_told(value)}"


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes on which what `module` computes may depend, in the order of their names."""
    whole = isinstance(module, PreTrainedModel)
    for name, value in sorted(vars(module).items()):
        if name in _OF_EVERY_MODULE or name in ("config", "forward") or name.startswith(_OF_NO_MODULE):
            continue
        if not (whole and (name in _BOOKS or name.startswith(("_", "hf_")))):
            yield name, value


def _told(value: Any) -> str | None:
    """A value in words that are the same in every process; None where there are none."""
    try:
        return _words(value)
    except (RecursionError, ValueError):  # it holds itself, or a function something that is not there yet
        return None


def _words(value: Any) -> str | None:
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype):
        return repr(value)
    if isinstance(value, dict):
        return _words(sorted(((repr(key), item) for key, item in value.items()), key=itemgetter(0)))
    if isinstance(value, list | tuple | set | frozenset):
        each = [words for item in value if (words := _words(item)) is not None]
        whole = len(each) == len(value)
        return str(sorted(each) if isinstance(value, set | frozenset) else each) if whole else None
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, torch.device):
        return "a device"
    return _name(value) if isinstance(value, type) else _of_function(value)


def _of_function(value: Any) -> str | None:
    if isinstance(value, functools.partial):
        return _words([value.func, value.args, value.keywords])
    if inspect.ismethod(value):
        return _words([value.__func__, type(value.__self__)])
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return _words([_name(value), _code(value), held, value.__defaults__, value.__kwdefaults__])
    return _name(value) if isinstance(value, BuiltinFunctionType) else None


def _of_tensor(tensor: Tensor) -> str | None:
    if tensor.is_meta:
        return None
    values = tensor.detach().to("cpu").contiguous().reshape(-1)
    digest = hashlib.sha256(values.view(torch.uint8).numpy().data if values.numel() else b"").hexdigest()
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest}"


def _name(of: Any) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def _code(function: Callable[..., Any]) -> str:
    """Hex SHA-256 of what a function of Python does by itself; empty for others."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return "" if code is None else hashlib.sha256(_of_code(code).encode()).hexdigest()


def _of_code(code: CodeType) -> str:
    return f"{code.co_code.hex()} {code.co_names} {[_of_constant(value) for value in code.co_consts]}"


def _of_constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return _of_code(value)
    return str(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
