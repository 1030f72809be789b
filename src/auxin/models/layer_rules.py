"""What a config says of its layers by their numbers, and how it says the same of the same layers in another order.

| what a config holds | examples | after a change of depth |
|---|---|---|
| a list with an entry per layer | `layer_types`, Gemma 3n's `intermediate_size` | the entries of the new layers |
| a list of numbers of layers | `mlp_only_layers`, `moe_layers`, `attn_layer_indices` | the numbers that they have now |
| the layers from which outputs are taken | `deepstack_visual_indexes` | the last layer that is or copies each |
| a rule for numbers | `first_k_dense_replace`, `attn_layer_period` | what says the same of each layer, if anything |
| a factor made of the number of layers | MiniCPM3's `scale_depth` | the value that gives the same factor |
| a table by number | `per_layer_config` | the entries of the new layers |

A layer that is put in afresh is as the layer before it.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from auxin.errors import PlanError

Order = Sequence[int | None]
"""New layer i is old layer order[i]; None is a fresh one."""

PER_LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "layers_block_type",
    "attention_layers",
    "block_types",
    "activation_sparsity_pattern",
    "intermediate_size",
    "attention_window",
    "compress_ratios",
    "swiglu_limits",
    "swiglu_limits_shared",
)
"""Values that hold one entry per layer, where they are lists as long as there are layers; so do those whose names say
that they are of layers, and those of which building the model shows it."""
NUMBER_LISTS = (
    "mlp_only_layers",
    "moe_layers",
    "attn_layer_indices",
    "attn_layer_idxs",
    "full_attn_idxs",
    "cross_attention_layers",
    "local_layer_ids",
    "ple_layer_ids",
    "hybrid_layer_ids",
    "global_attn_indexes",
    "fullatt_block_indexes",
    "window_block_indices",
    "residual_block_indices",
    "rope_scaling_layers",
    "look_ahead_layers",
    "look_backward_layers",
)
"""Values that hold the numbers of the layers that are of some kind."""
TAKEN_LISTS = ("deepstack_visual_indexes", "intermediate_layers_indices", "encode_proj_layers", "target_layer_ids")
"""Values that hold the numbers of layers whose outputs go elsewhere, each to a place of its own."""
_OF_LAYERS = re.compile(r"(?!mtp_)\w*_per_layer|layer_\w+")
_NOT_FOLLOWED = re.compile(r"vision_feature_layer|mtp_\w+|layer_norm\w*|layer_sizes|layer_dims?")


@dataclass(frozen=True)
class Rule:
    """A rule by which a config says of every number whether the layer is of some kind."""

    fields: tuple[str, ...]
    """The values that say it."""
    says: Callable[[Mapping[str, Any], int], list[bool]]
    """From the values and the number of layers to what they say of each."""
    ways: Callable[[Mapping[str, Any], list[bool]], Iterator[dict[str, Any]]]
    """From the values and what shall be said of each layer to values that may say it."""
    kind: str
    """What the layers are that it speaks of: "dense"."""

    def holds_for(self, values: Mapping[str, Any]) -> bool:
        """Whether a config with `values` has this rule."""
        return all(values.get(name) is not None for name in self.fields)


def _first(name: str, kind: str) -> Rule:
    return Rule(
        (name,),
        lambda values, length: [number < values[name] for number in range(length)],
        lambda values, wanted: iter([{name: sum(1 for _ in itertools.takewhile(bool, wanted))}]),
        kind,
    )


def _last(name: str, kind: str) -> Rule:
    return Rule(
        (name,),
        lambda values, length: [number >= length - values[name] for number in range(length)],
        lambda values, wanted: iter([{name: sum(1 for _ in itertools.takewhile(bool, reversed(wanted)))}]),
        kind,
    )


def _periodic(period: str, offset: str, kind: str) -> Rule:
    def ways(values: Mapping[str, Any], wanted: list[bool]) -> Iterator[dict[str, Any]]:
        for length in range(1, len(wanted) + 2):
            yield from ({period: length, offset: first} for first in range(length))

    return Rule(
        (period, offset),
        lambda values, length: [number % values[period] == values[offset] for number in range(length)],
        ways,
        kind,
    )


def _sparse(values: Mapping[str, Any], length: int) -> list[bool]:
    only, step = values["mlp_only_layers"], values["decoder_sparse_step"]
    return [number not in only and (number + 1) % step == 0 for number in range(length)]


def _sparse_ways(values: Mapping[str, Any], wanted: list[bool]) -> Iterator[dict[str, Any]]:
    yield {"mlp_only_layers": [number for number, sparse in enumerate(wanted) if not sparse], "decoder_sparse_step": 1}


def _between(values: Mapping[str, Any], length: int) -> list[bool]:
    first, interval = values["moe_layer_start_index"], values["moe_layer_interval"]
    last = length - 1 if values["moe_layer_end_index"] == -1 else values["moe_layer_end_index"]
    return [first <= number <= last and (number + 1) % interval == 0 for number in range(length)]


def _between_ways(values: Mapping[str, Any], wanted: list[bool]) -> Iterator[dict[str, Any]]:
    numbers = [number for number, sparse in enumerate(wanted) if sparse] or [len(wanted)]
    for interval in range(1, len(wanted) + 1):
        yield {
            "moe_layer_start_index": numbers[0],
            "moe_layer_end_index": min(numbers[-1], len(wanted) - 1),
            "moe_layer_interval": interval,
        }


RULES = (
    _first("first_k_dense_replace", "dense"),
    _first("num_dense_layers", "dense"),
    _first("num_hash_layers", "routed by hashes"),
    _first("num_first_full_attention_layers", "of full attention"),
    _last("num_last_full_attention_layers", "of full attention"),
    _last("num_kv_shared_layers", "without keys and values of their own"),
    _periodic("attn_layer_period", "attn_layer_offset", "of attention"),
    _periodic("expert_layer_period", "expert_layer_offset", "of experts"),
    Rule(("mlp_only_layers", "decoder_sparse_step"), _sparse, _sparse_ways, "of experts"),
    Rule(("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), _between, _between_ways, "of experts"),
)
"""The rules that configs of transformers have. Those that only fill in a list where the config is given none
(`sliding_window_pattern`, `full_attention_interval`, `interleave_moe_layer_step`) are not among them: the list is what
models read."""
ROOT_SCALES = ("scale_depth",)
"""Values that a model divides by the root of the number of layers."""


def arranged_values(config: PreTrainedConfig, order: Order, length: int) -> dict[str, Any]:
    """What `config`, which counts the layers itself, must say of them in a new order; the values that change.

    Args:
        config: of the model, or of the part that has the layers.
        order: the new order.
        length: how many layers there are.

    Raises:
        PlanError: a rule can't say of every layer in its new place what it says now; the message names it.
    """
    values = config.to_dict()
    found: dict[str, Any] = {}
    ruled = {name for rule in RULES if rule.holds_for(values) for name in rule.fields}
    for key, value in values.items():
        if isinstance(value, list | tuple) and key not in ruled and (is_per_layer(key, value, length)):
            found[key] = arranged(list(value), order)
        elif key in NUMBER_LISTS and key not in ruled and isinstance(value, list | tuple):
            flags = arranged([number in value for number in range(length)], order)
            found[key] = [number for number, named in enumerate(flags) if named]
        elif key in TAKEN_LISTS and isinstance(value, list | tuple):
            found[key] = [_heir(key, number, order, length) for number in value]
        elif key in ROOT_SCALES and isinstance(value, int | float):
            found[key] = _same_over_root(value, length, len(order))
    for rule in RULES:
        if rule.holds_for(values):
            found |= _following(rule, values, order, length)
    found |= _of_one_model(config, values, order, length)
    if per_layer := values.get("per_layer_config"):
        entries = [per_layer.get(layer, per_layer.get(str(layer))) for layer in range(length)]
        found["per_layer_config"] = {i: entry for i, entry in enumerate(arranged(entries, order)) if entry}
    return {key: value for key, value in found.items() if value != values.get(key) or key == "per_layer_config"}


def is_per_layer(key: str, value: Sequence[Any], length: int) -> bool:
    """Whether the name of a value that is a list says that it holds one entry for each of `length` layers."""
    named = key in PER_LAYER_LISTS or _OF_LAYERS.fullmatch(key) is not None
    return len(value) == length and named and _NOT_FOLLOWED.fullmatch(key) is None


def is_known(key: str) -> bool:
    """Whether `arranged_values` knows by its name what the value `key` is."""
    ruled = any(key in rule.fields for rule in RULES)
    return ruled or key in (*PER_LAYER_LISTS, *NUMBER_LISTS, *TAKEN_LISTS) or _OF_LAYERS.fullmatch(key) is not None


def arranged(entries: Sequence[Any], order: Order) -> list[Any]:
    """An entry per new layer; a fresh one gets that of the layer before it."""
    result: list[Any] = []
    for source in order:
        last = result[-1] if result else entries[0]
        result.append(copy.deepcopy(entries[source] if source is not None else last))
    return result


def order_in_words(order: Order) -> str:
    """The old layers in their new order: "0 1 1 new"."""
    return " ".join("new" if source is None else str(source) for source in order)


def _following(rule: Rule, values: Mapping[str, Any], order: Order, length: int) -> dict[str, Any]:
    wanted = arranged(rule.says(values, length), order)
    if rule.says(values, len(order)) == wanted:
        return {}
    for way in rule.ways(values, wanted):
        if rule.says({**values, **way}, len(order)) == wanted:
            return way
    said = ", ".join(f"{name} = {values[name]}" for name in rule.fields)
    named = [number for number, flag in enumerate(rule.says(values, length)) if flag]
    needed = [number for number, flag in enumerate(wanted) if flag]
    raise PlanError(
        f"by {said} these of {length} layers are {rule.kind}: {_numbers(named)}. In the order {order_in_words(order)} "
        f"they would be {_numbers(needed)}, and no value of {' and '.join(rule.fields)} says so. Choose an order for "
        "which one does"
    )


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _heir(key: str, number: int, order: Order, length: int) -> int:
    """The last new layer that is the old layer `number`, or a copy of it; counted from the end as `number` is."""
    source = number + length if number < 0 else number
    places = [place for place, old in enumerate(order) if old == source]
    if not places:
        raise PlanError(
            f"{key}: layer {number}, whose output is taken from there, is gone in the order {order_in_words(order)}. "
            "Keep it"
        )
    return places[-1] - len(order) if number < 0 else places[-1]


def _same_over_root(value: float, old: int, new: int) -> float:
    """The number that divided by the root of `new` is `value` divided by the root of `old`, to the last bit if any."""
    wanted, guess = value / math.sqrt(old), value * math.sqrt(new / old)
    near = [guess]
    for direction in (math.inf, -math.inf):
        step = guess
        for _ in range(4):
            step = math.nextafter(step, direction)
            near.append(step)
    return next((number for number in near if number / math.sqrt(new) == wanted), guess)


def _of_one_model(config: PreTrainedConfig, values: Mapping[str, Any], order: Order, length: int) -> dict[str, Any]:
    """Lists that are written in ways of their own."""
    found: dict[str, Any] = {}
    pattern = values.get("block_types")
    if isinstance(pattern, list | tuple) and pattern and hasattr(config, "layers_block_type"):
        # RecurrentGemma repeats it as often as it takes.
        found["block_types"] = arranged(list(itertools.islice(itertools.cycle(pattern), length)), order)
    if isinstance(values.get("attention_types"), list) and isinstance(values.get("attention_layers"), list):
        # GPT-Neo: [[[kinds], times], ...]
        found["attention_types"] = [[arranged(values["attention_layers"], order), 1]]
    characters = values.get("hybrid_override_pattern")
    if isinstance(characters, str) and len(characters) == length:
        found["hybrid_override_pattern"] = "".join(arranged(characters, order))
    return found
