"""Where a model's layers are, of any architecture, and the config's values that give them another order.

There is no table of architectures here: a stack is a list of modules that a value of the config counts, which is found
out by building the model with another value; and what depends on a layer's number is seen by comparing the layers that
a new config builds with those that they shall be.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.accounting.inputs import example_inputs
from auxin.accounting.shapes import shape_only_copy
from auxin.errors import PlanError
from auxin.models.anatomy import ANATOMIES, anatomy
from auxin.models.building import in_words, likeness
from auxin.models.configs import config_parts, config_path, config_value, edited_config
from auxin.models.layer_rules import Order, arranged, arranged_values, is_known, order_in_words
from auxin.models.loading import REFUSALS, skeleton
from auxin.models.scoped_config import unscoped
from auxin.words.anatomy import LayerStack
from auxin.words.paths import dotted

LENGTH_FIELDS = (
    "num_hidden_layers",
    "num_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "encoder_layers",
    "decoder_layers",
    "n_layers",
    "depth",
)
"""What configs call the length of a stack; other names (n_layer, ...) are mapped to these by the configs themselves,
or are found by what they are called and what they build."""
_COUNTS = re.compile(r"\w*(layers?|blocks?|depth)")
_NUMBERS = re.compile(r"layer|dense|sparse|first|last|start|end|interval|period|offset|step|pattern|every|freq|shared")
"""In the names of values that may speak of layers by number."""
_PLACES = re.compile(r"layer|block|idx|index|_id|depth|num")
"""In the names of attributes that hold a layer's number, or how many there are."""
_FIRST_HAS = re.compile(r"has_relative_\w+|relative_attention_bias")
"""What the first layer holds for all (T5): copies of it elsewhere don't, and do the same."""


def layer_stacks(model: PreTrainedModel) -> tuple[LayerStack, ...]:
    """The stacks of layers of `model`, which may be a skeleton: those that its architecture's anatomy tells of, else
    those that are found. Of the latter no more is known than where they are and which value counts them, a dotted name.

    Raises:
        PlanError: none is found; the message says why.
    """
    if ANATOMIES.get(model.config.model_type) is not None:
        return anatomy(model, complete=False).stacks
    return found_stacks(model)


def found_stacks(model: PreTrainedModel) -> tuple[LayerStack, ...]:
    """The stacks that can be seen in any model: the outermost lists of modules that a value of the config counts. Of
    several that one value counts they are those whose modules make hidden states of hidden states.

    Raises:
        PlanError: none is found; the message says so where layers run more than once.
    """
    plain = plain_skeleton(model)
    lists = {
        path: module
        for path, module in plain.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not re.search(r"\.\d+\.", path)
    }
    counted = {
        path: field
        for path, layers in lists.items()
        if all(_is_layer(layer) for layer in layers) and (field := _counted_by(plain, path, len(layers))) is not None
    }
    doubtful = {path for path, field in counted.items() if list(counted.values()).count(field) > 1}
    calls = _calls(plain, {path: lists[path] for path in (doubtful if counted else lists)})
    found = [
        LayerStack(path, field, ())
        for path, field in counted.items()
        if path not in doubtful or all(hidden for _, hidden in calls.get(path, ()))
    ]
    if not found:
        several = [
            f"{path}, whose {len(lists[path])} modules run {max(seen)[0]} times each" for path, seen in calls.items()
        ]
        several = [words for words, seen in zip(several, calls.values(), strict=True) if max(seen)[0] > 1]
        raise PlanError(
            f"No stack of layers is found in a {type(model).__name__}: no list of modules has a length that a value of "
            + (f"its config counts. Its layers share their weights: {several[0]}." if several else "its config counts.")
        )
    return tuple(found)


def config_for_order(model: PreTrainedModel, path: str, order: Order) -> dict[str, Any]:
    """What the config of `model` must say, by dotted names, for the stack at `path` to have the old layers `order`.

    Args:
        model: the model, or its skeleton.
        path: of the stack.
        order: the old layer that each new one is or copies; None for a fresh one.

    Raises:
        PlanError: the config can't say it: nothing counts the layers, a rule by numbers says something else of a layer
            in its new place, or layers hold one module together.
    """
    plain = plain_skeleton(model)
    layers = cast(nn.ModuleList, plain.get_submodule(path))
    prefix = config_path(plain, path)
    config = config_parts(unscoped(plain.config))[prefix]
    _check_shared(path, layers, order)
    values = arranged_values(config, order, len(layers))
    for key in _lists_read_by_layer(plain, path, prefix, len(layers)):
        values[key] = arranged(list(getattr(config, key)), order)
    values = {dotted(prefix, key): value for key, value in values.items()}
    values |= _taken_elsewhere(plain, prefix, order, len(layers))
    after, said = None, values
    if len(order) == len(layers):
        after = _built(plain, values)
    else:
        for field in _length_fields(config, path, len(layers)):
            said = {**values, dotted(prefix, field): len(order)}
            after = _built(plain, said, quiet=True)
            if after is not None and len(cast(nn.ModuleList, after.get_submodule(path))) == len(order):
                break
        else:
            # What is wrong with the likeliest name says more than that there is none.
            if fields := _length_fields(config, path, len(layers)):
                _built(plain, {**values, dotted(prefix, fields[0]): len(order)})
            raise PlanError(
                f"no value of {type(config).__name__} says that {path} has {len(layers)} layers; known names: "
                f"{', '.join(LENGTH_FIELDS)}"
            )
    assert after is not None
    _check_layers(plain, after, path, prefix, order)
    return said


def depends_on_numbers(model: PreTrainedModel, path: str) -> str | None:
    """The value by which layers of the stack at `path` compute something that depends on their number although they are
    built alike, as "NAME = VALUE"; None where there is none."""
    config = config_parts(unscoped(model.config))[config_path(model, path)]
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return "scale_attn_by_inverse_layer_idx = True"
    return None


def held_by_the_first(name: str) -> bool:
    """Whether what is called `name` in a layer is held by the first one for all of them, as T5's position bias is."""
    return any(_FIRST_HAS.fullmatch(part) for part in name.split("."))


def tensors_by_layer(model: PreTrainedModel, path: str, order: Order) -> dict[str, tuple[int, int]]:
    """The parameters outside of the stack at `path` that hold entries of each of its layers, one layer after the other
    along an axis (Gemma 3n's embeddings per layer): by their names the axis, and how many entries each layer has."""
    plain = plain_skeleton(model)
    length = len(cast(nn.ModuleList, plain.get_submodule(path)))
    prefix = config_path(plain, path)
    config = config_parts(unscoped(plain.config))[prefix].to_dict()
    units = {value for key, value in config.items() if "per_layer" in key and type(value) is int and value > 0}
    outside = {name: p.shape for name, p in plain.named_parameters() if not name.startswith(f"{path}.")}
    found = [
        (name, axis, size // length)
        for name, shape in outside.items()
        for axis, size in enumerate(shape)
        if "per_layer" in name and size in {length * unit for unit in units}
    ]
    if not found or list(order) == list(range(length)):
        return {}
    # Sizes may be alike by chance; another number of layers tells.
    other = config_for_order(plain, path, [*range(length), length - 1])
    after = skeleton(edited_config(unscoped(plain.config), other), type(plain))
    shapes = {name: p.shape for name, p in after.named_parameters()}
    return {name: (axis, unit) for name, axis, unit in found if shapes[name][axis] == outside[name][axis] + unit}


def plain_skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The skeleton of `model` as its architecture builds it, without edits of its modules."""
    edited = getattr(model.config, "quantization_config", None) is not None
    on_meta = all(parameter.is_meta for parameter in model.parameters())
    return skeleton(unscoped(model.config), type(model)) if edited or not on_meta else model


def _built(model: PreTrainedModel, values: dict[str, Any], quiet: bool = False) -> PreTrainedModel | None:
    """The skeleton with other values; None where none can be built and `quiet` says so."""
    try:
        config = edited_config(unscoped(model.config), values)
        check_said(config, values)
        return skeleton(config, type(model))
    except PlanError:
        if quiet:
            return None
        raise
    except REFUSALS as error:
        if quiet:
            return None
        told = ", ".join(f"{key} = {value}" for key, value in values.items())
        raise PlanError(f"no {type(model).__name__} can be built with {told}: {error!r}") from error


def _length_fields(config: PreTrainedConfig, path: str, length: int) -> list[str]:
    """The names of the values of `config` that may count the layers, the likeliest first. Encoder and decoder have one
    each."""
    decoder = "decoder" in path.split(".")
    names = sorted(LENGTH_FIELDS, key=lambda name: ("decoder" in name) != decoder)
    others = [key for key in config.to_dict() if _COUNTS.fullmatch(key) and key not in names]
    counted = {name: getattr(config, name, None) for name in [*names, *others]}
    return [name for name, value in counted.items() if value == length and type(value) is int]


def _counted_by(model: PreTrainedModel, path: str, length: int) -> str | None:
    """The dotted name of the value that counts the modules at `path`; None where no value does."""
    prefix = config_path(model, path)
    config = config_parts(unscoped(model.config))[prefix]
    fields = _length_fields(config, path, length)
    # Without its last layer a model can be built by almost any rule; where it can't, the last one is doubled.
    for order in ([*range(length - 1)], [*range(length), length - 1]):
        try:
            values = arranged_values(config, order, length)
        except PlanError:
            continue
        for field in fields if order else []:
            after = _built(model, {dotted(prefix, k): v for k, v in {**values, field: len(order)}.items()}, quiet=True)
            if after is not None and _length_at(after, path) == len(order):
                return dotted(prefix, field)
    return None


def _length_at(model: PreTrainedModel, path: str) -> int | None:
    try:
        found = model.get_submodule(path)
    except AttributeError:
        return None
    return len(found) if isinstance(found, nn.ModuleList) else None


def _is_layer(module: nn.Module) -> bool:
    """Whether there are several modules with parameters in it: a projection in a list of such is none."""
    return sum(1 for part in module.modules() if any(True for _ in part.parameters(recurse=False))) > 1


def _calls(model: PreTrainedModel, lists: Mapping[str, nn.ModuleList]) -> dict[str, list[tuple[int, bool]]]:
    """By the paths of lists of modules: how often each of those that run on example inputs does, and whether it makes
    hidden states of hidden states. Lists of which none runs are left out; all, where the model does not run."""
    found: dict[str, dict[int, tuple[int, bool]]] = {}

    def seen(path: str, place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            made = output[0] if isinstance(output, tuple) and output else output
            like = isinstance(made, Tensor) and bool(given) and made.shape == given[0].shape
            times, so_far = found.setdefault(path, {}).get(place, (0, True))
            found[path][place] = (times + 1, so_far and like)

        return hook

    if not lists:
        return {}
    try:
        with shape_only_copy(model) as fake:
            copy = cast(PreTrainedModel, fake).eval()
            copy.set_experts_implementation("batched_mm")  # which runs on shapes of any type
            for path, layers in lists.items():
                for place in range(len(layers)):
                    copy.get_submodule(f"{path}.{place}").register_forward_hook(seen(path, place), with_kwargs=True)
            copy(**example_inputs(copy, 1, 4))
    except Exception:  # an architecture whose inputs are not known here may raise anything
        return {}
    return {path: list(calls.values()) for path, calls in found.items()}


def _check_shared(path: str, layers: nn.ModuleList, order: Order) -> None:
    """PlanError when layers that hold one tensor together (Zamba2) would be copied, dropped or reordered."""
    holders: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for number, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            holders.setdefault(id(parameter), []).append(number)
            names.setdefault(id(parameter), name)
    groups = {tuple(numbers): names[key] for key, numbers in holders.items() if len(set(numbers)) > 1}
    sharing = sorted({number for numbers in groups for number in numbers})
    if sharing and [source for source in order if source in sharing] != sharing:
        numbers, name = next(iter(groups.items()))
        raise PlanError(
            f"layers {', '.join(map(str, numbers))} of {path} hold one tensor ({name}), and the model counts the "
            f"layers that do: an order must keep {', '.join(map(str, sharing))} as they are, each once. Copy, drop and "
            "reorder the others"
        )


def _lists_read_by_layer(model: PreTrainedModel, path: str, prefix: str, length: int) -> Iterator[str]:
    """The lists, unknown by name, whose entries each build one layer: seen by what other entries build."""
    config = config_parts(unscoped(model.config))[prefix]
    layers = cast(nn.ModuleList, model.get_submodule(path))
    for key, value in config.to_dict().items():
        if not isinstance(value, list | tuple) or len(value) != length or is_known(key) or key.startswith("_"):
            continue
        for changed, places in _changes(list(value)):
            after = _built(model, {dotted(prefix, key): changed}, quiet=True)
            if after is None or _length_at(after, path) != length:
                continue
            others = cast(nn.ModuleList, after.get_submodule(path))
            if {i for i in range(length) if likeness(layers[i]) != likeness(others[i])} == places:
                yield key
            break


def _changes(entries: list[Any]) -> Iterator[tuple[list[Any], set[int]]]:
    """Lists that differ from `entries` in places that are told: one that is as another, two exchanged, or one number
    doubled."""
    other = next((place for place, entry in enumerate(entries) if entry != entries[0]), None)
    if other is not None:
        # Alone, since all layers may read a list that is by chance as long as they are many (DeBERTa's pos_att_type).
        yield [entries[other], *entries[1:]], {0}
        yield [entries[{0: other, other: 0}.get(place, place)] for place in range(len(entries))], {0, other}
    elif type(entries[-1]) in (int, float):
        yield [*entries[:-1], 2 * entries[-1]], {len(entries) - 1}


def _taken_elsewhere(model: PreTrainedModel, prefix: str, order: Order, length: int) -> dict[str, Any]:
    """The values of the configs around that of an image's encoder that say which of its hidden states are read: 0 is
    what enters, n what layer n - 1 makes, negative numbers count from the end."""
    if "." in prefix or not prefix.startswith("vision"):
        return {}
    found: dict[str, Any] = {}
    for key, value in model.config.to_dict().items():
        if key != "vision_feature_layer" or value is None:
            continue
        states = value if isinstance(value, list | tuple) else [value]
        moved = [_moved_state(key, state, order, length) for state in states]
        if moved != list(states):
            found[key] = moved if isinstance(value, list | tuple) else moved[0]
    return found


def _moved_state(key: str, state: int, order: Order, length: int) -> int:
    number = state + length + 1 if state < 0 else state
    if number == 0:
        return state
    places = [place for place, source in enumerate(order) if source == number - 1]
    if not places:
        raise PlanError(
            f"{key} = {state}: what layer {number - 1} makes is read, which is gone in the order "
            f"{order_in_words(order)}. Keep it, or read another"
        )
    return places[-1] + 1 - (len(order) + 1 if state < 0 else 0)


def check_said(config: PreTrainedConfig, values: Mapping[str, Any]) -> None:
    """PlanError when `config`, which was given `values`, makes something else of a list among them (Gemma 4: the last
    layer attends to everything)."""
    for key, value in values.items():
        now = config_value(config, key)
        if isinstance(value, list) and isinstance(now, list | tuple) and list(now) != value:
            wrong = [place for place, (one, other) in enumerate(zip(value, now, strict=False)) if one != other]
            where, one, other = (f"{key}[{wrong[0]}]", value[wrong[0]], now[wrong[0]]) if wrong else (key, value, now)
            raise PlanError(
                f"{where} would have to be {one!r}, and {type(config).__name__} makes {other!r} of it, whatever it is "
                "given. Choose another order, or another value"
            )


def _check_layers(before: PreTrainedModel, after: PreTrainedModel, path: str, prefix: str, order: Order) -> None:
    """PlanError when the new config builds another layer in a place than the one that shall be there. A copy may have
    what the copied layer has no place for (ModernBERT's first one, a norm before its attention)."""
    old, new = (cast(nn.ModuleList, model.get_submodule(path)) for model in (before, after))
    outlines = [likeness(layer) for layer in old]
    for place, source in enumerate(order):
        if source is None:
            continue
        outline, likely = outlines[source], likeness(new[place])
        if source in order[:place]:
            absent = [f"{name}." for name, module in old[source].named_modules() if type(module) is nn.Identity]
            outline, likely = ({k: v for k, v in o.items() if not _lies_in(k, absent)} for o in (outline, likely))
        found = _difference(outline, likely, source, place, order, len(old))
        if found is None or (found[0].endswith("scaling") and depends_on_numbers(before, path)):
            continue
        name, was, now = found
        fields = _speaking_of_numbers(before, path, prefix)
        blamed = f"What says what a layer is by its number: {', '.join(fields)}. " if fields else ""
        raise PlanError(
            f"in the order {order_in_words(order)} layer {place} of {path} is the old layer {source}, but the config "
            f"builds another one there: {name} is {now} instead of {was}. {blamed}No value is known that follows. "
            "Choose an order in which that layer stays where it is, or a place of the same kind"
        )


def _lies_in(key: str, above: Sequence[str]) -> bool:
    """Whether what `likeness` sees under `key` is one of some modules, or lies in it."""
    return any(f"{key}.".startswith(path) for path in above)


def _difference(
    old: dict[str, Any], new: dict[str, Any], source: int, place: int, order: Order, length: int
) -> tuple[str, Any, Any] | None:
    """The first thing, its old value and its new one, by which one layer is not another in another place."""
    for key in (*old, *(key for key in new if key not in old)):
        was, now = old.get(key), new.get(key)
        name = key.rpartition(".")[2]
        if was == now or held_by_the_first(key) or "drop" in name:
            continue
        if type(was) is type(now) is int and _PLACES.search(name) and _is_same_layer(was, now, source, place, order):
            continue
        if type(was) is type(now) is int and _COUNTS.fullmatch(name) and (was, now) == (length, len(order)):
            continue
        if type(was) is type(now) is float and math.isclose(was, now, rel_tol=1e-12):
            continue
        if isinstance(was, dict | list | tuple) and type(was) is type(now) and _is_moved(was, now, order, length):
            continue
        return key.lstrip(".") or type(was).__name__, in_words(was), in_words(now)
    return None


def _is_same_layer(was: int, now: int, source: int, place: int, order: Order) -> bool:
    """Whether a layer's number, its own or that of another one, means the same layer before and after."""
    return (was, now) == (source, place) or (0 <= now < len(order) and order[now] == was)


def _is_moved(was: Any, now: Any, order: Order, length: int) -> bool:
    """Whether a table of all layers, a table by numbers of layers or a list of such says the same of the new layers."""
    if not isinstance(was, dict) and len(was) == length and arranged(was, order) == list(now):
        return True
    if not all(type(number) is int and 0 <= number < len(order) for number in now):
        return False
    if isinstance(was, dict):
        return [(order[number], value) for number, value in now.items()] == list(was.items())
    return [order[number] for number in now] == list(was)


def _speaking_of_numbers(model: PreTrainedModel, path: str, prefix: str) -> list[str]:
    """The values of a config, as "NAME = VALUE", of which others build some of the layers differently and not all."""
    config = config_parts(unscoped(model.config))[prefix]
    layers = cast(nn.ModuleList, model.get_submodule(path))
    outlines = [likeness(layer) for layer in layers]
    found = []
    for key, value in config.to_dict().items():
        if type(value) is not int or not _NUMBERS.search(key) or getattr(config, key, None) in (None, len(layers)):
            continue
        for other in (value + 1, value - 1):
            after = _built(model, {dotted(prefix, key): other}, quiet=True)
            if after is None or _length_at(after, path) != len(layers):
                continue
            changed = [likeness(layer) != old for layer, old in zip(after.get_submodule(path), outlines, strict=True)]  # type: ignore[call-overload]
            if any(changed) and not all(changed):
                found.append(f"{key} = {value}")
            break
    return found
