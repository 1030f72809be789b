"""What a model has an entry in for every token, which ids its config names, and which it has no room for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.edits.structure import edited_config, edited_skeleton, skeleton_of
from auxin.edits.tensor_names import shapes_of
from auxin.errors import PlanError
from auxin.models.token_ids import is_token_id, named_ids
from auxin.words.paths import dotted

TOKEN_COUNTS = ("vocab_size", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size")
"""Fields of configs that say how many tokens there are."""
SECOND_COUNTS = ("vocab_size_per_layer_input",)
"""Fields that say how many of them a second table has entries for, which need not be all (Gemma 3n, Gemma 4)."""

LEGACY_CLIP_END = 2
"""What early configs of CLIP say is the end of a text, and no token: texts are then pooled at their largest id."""


@dataclass(frozen=True)
class TokenTable:
    """A parameter, or a buffer in checkpoints, one of whose axes tokens index."""

    name: str
    """The first of its names, where it is tied."""
    axis: int
    """The axis that tokens index."""
    length: int
    """Of that axis."""
    fields: tuple[str, ...]
    """Config values, by dotted names, that say the length."""


def table_length(config: PreTrainedConfig) -> int:
    """How many tokens a model reads and writes.

    Raises:
        PlanError: it has no vocabulary, or one for each.
    """
    lengths = _said(config, TOKEN_COUNTS)
    if not lengths:
        raise PlanError(
            f"A model of type {config.model_type!r} has no vocabulary: its config has no vocab_size. Choose a language "
            "model."
        )
    if len(set(lengths.values())) > 1 or getattr(config, "share_encoder_decoder_embeddings", True) is False:
        said = " and ".join(f"{name} = {length}" for name, length in lengths.items())
        raise PlanError(
            f"A model of type {config.model_type!r} with {said} reads tokens of one vocabulary and writes those of "
            "another, and one tokenizer is changed here. Change one side by edits by hand (pad_parameter, "
            "slice_parameter, set_config)."
        )
    return next(iter(lengths.values()))


def token_tables(model: PreTrainedModel) -> list[TokenTable]:
    """All whose length is that of the vocabulary: embedding, head and its bias wherever they are, tied ones once,
    a bias that is a buffer (BART's final_logits_bias), embeddings per layer.

    The architecture is asked, which finds whatever else follows the vocabulary. Weights are not looked at.

    Raises:
        PlanError: the model has no vocabulary, or something in it can't follow another one.
    """
    length = table_length(model.config)
    skeleton = skeleton_of(model)
    tables = list(_followers(skeleton, tuple(_said(skeleton.config, TOKEN_COUNTS)), length))
    parameters = {name for name, _ in skeleton.named_parameters()}
    if not any(table.name in parameters for table in tables):
        raise PlanError(
            f"No parameter of a {type(model).__name__} has rows for the {length} tokens that its config tells of, so "
            "that there is nothing to change. Choose a model that reads or writes text."
        )
    for field, count in _said(skeleton.config, SECOND_COUNTS).items():
        tables += _followers(skeleton, (field,), count)
    return tables


def refuse_whole_numbers(model: PreTrainedModel, tables: Sequence[TokenTable]) -> None:
    """PlanError when one of a model's `tables` has entries of which there is no mean, so that new tokens have none."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for table in tables:
        tensor = tensors[table.name]
        if not tensor.is_floating_point():
            raise PlanError(
                f"{table.name} {list(tensor.shape)} holds whole numbers for the tokens, such as the experts that they "
                "are sent to or their order. New tokens have none, and a mean of them is none; the vocabulary of this "
                "model can't grow."
            )


def config_ids(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The values that name tokens, by their names, of the config and of those in it that are of what reads or writes
    text, by theirs; "" is the config's own."""
    found = {}
    for path, part in _parts(config):
        if path and not any(part is text for text in _texts(config)):
            continue
        values = {name: value for name, value in vars(part).items() if is_token_id(name)}
        if part.model_type == "clip_text_model" and values.get("eos_token_id") == LEGACY_CLIP_END:
            del values["eos_token_id"]
        found[path] = values
    return found


def ids_that_stay(model: PreTrainedModel) -> set[int]:
    """Ids that a smaller vocabulary must have, too: those that the model's config names and, where positions are
    counted from the padding token's id on (RoBERTa), all up to that."""
    length = table_length(model.config)
    found: set[int] = set()
    for values in config_ids(model.config).values():
        found |= set().union(*named_ids(values).values())
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    counted = (path.rpartition(".")[2] for path, module in model.named_modules() if _has_padding(module))
    if padding is not None and any("position" in name for name in counted):
        found |= set(range(padding + 1))
    return {token for token in found if token < length}


def _has_padding(module: nn.Module) -> bool:
    return getattr(module, "padding_idx", None) is not None


def refuse_shared_ids(config: PreTrainedConfig) -> None:
    """PlanError when some ids of a model are for something else than the tokens of its tables, behind which they are
    counted: other tokens could not get other ids then."""
    for path, part in _parts(config):
        for field in ("vocab_offset", "additional_vocab_size", "unpadded_vocab_size"):
            if value := getattr(part, field, None):
                raise PlanError(
                    f"With {dotted(path, field)} = {value} ids of this model mean something else than rows of its "
                    "tables (images, sound, additional tokens, or padding), so that tokens can't get other ones. "
                    "Change the language model alone, in its class for text."
                )


def refuse_taken_ids(config: PreTrainedConfig, count: int) -> None:
    """PlanError when a model that had `count` tokens would take some of their ids for something else, or never write
    them.

    Args:
        config: of the model, before it grows.
        count: tokens, the new ones included.
    """
    for path, part in _parts(config):
        if (offset := getattr(part, "vocab_offset", None)) is not None and count > offset:
            raise PlanError(
                f"With {dotted(path, 'vocab_offset')} = {offset} the model reads ids from there on as images or sound, "
                f"and the ids of the new tokens would go up to {count - 1}. Grow the language model alone, in "
                "its class for text (such as Gemma3nForCausalLM)."
            )
        if (additional := getattr(part, "additional_vocab_size", None)) and count > part.vocab_size:
            raise PlanError(
                f"With {dotted(path, 'additional_vocab_size')} = {additional} the ids from {part.vocab_size} on are "
                "taken by other tokens of the model's, so that the vocabulary can't grow there. Choose a model "
                "without them."
            )
        if (written := getattr(part, "unpadded_vocab_size", None)) is not None and count > written:
            raise PlanError(
                f"With {dotted(path, 'unpadded_vocab_size')} = {written} the model gives no logits behind these, and "
                f"the ids of the new tokens would go up to {count - 1}. Set it in the config to {count} or more first."
            )


def _parts(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """The config and those in it, by their names."""
    yield "", config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield name, part


def _texts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configs of what reads and of what writes text."""
    sides = [getattr(config, side, None) for side in ("encoder", "decoder") if side in config.sub_configs]
    both = [side for side in sides if side is not None]
    return [config.get_text_config(), *(both if len(both) == 2 else ())]


def _said(config: PreTrainedConfig, fields: Sequence[str]) -> dict[str, int]:
    """The values of `fields`, by dotted names, in the configs of what reads and of what writes text."""
    lengths = {}
    for path, part in _parts(config):
        if not any(part is text for text in _texts(config)):
            continue
        for field in fields:
            length = getattr(part, field, None)
            is_alias = part.attribute_map.get(field) in fields
            if isinstance(length, int) and length > 0 and not is_alias:
                lengths[dotted(path, field)] = length
    return lengths


def _followers(skeleton: PreTrainedModel, fields: tuple[str, ...], length: int) -> Iterator[TokenTable]:
    """What is longer where `fields` of the config say one more than `length`."""
    larger = edited_config(skeleton.config, dict.fromkeys(fields, length + 1))
    before, after = (shapes_of(each) for each in (skeleton, edited_skeleton(larger, type(skeleton))))
    if odd := sorted(before.keys() ^ after.keys()):
        raise PlanError(f"With another vocabulary the model has other parameters ({odd[0]}); it can't be changed.")
    for name in (name for name in before if before[name] != after[name]):
        old, new = before[name], after[name]
        axes = [axis for axis in range(len(old)) if new == (*old[:axis], length + 1, *old[axis + 1 :])]
        if not axes or old[axes[0]] != length:
            raise PlanError(
                f"With another vocabulary {name} would get shape {list(new)} from {list(old)}; it can't be changed."
            )
        yield TokenTable(name, axes[0], length, fields)
