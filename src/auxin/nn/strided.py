"""The arguments of a layer, for every k-th token only (see `auxin.nn.token_groups`)."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import ConfigError
from auxin.nn.calls import forward_arguments
from auxin.nn.token_groups import Chunk, every, taken

CACHES = ("past_key_values", "layer_past")
"""What layers call the argument that holds the cache."""
BIASES = ("position_bias", "encoder_decoder_position_bias")
"""What T5's layers hand on to each other: they take these and give them back behind their hidden states."""


def argument_names(layer: nn.Module) -> tuple[str, ...]:
    """The names of what `layer` takes by position after its hidden states; empty where that is not known."""
    return forward_arguments(layer)[1:]


def strided_arguments(
    arguments: Mapping[str, Any], chunk: Chunk, pooled: bool = False, flash: bool = False, window: int | None = None
) -> dict[str, Any]:
    """The arguments of a layer for the anchors of `chunk`.

    Positions of anchors stay what they are: 0, k, 2k of a text that begins with the first token.

    Args:
        arguments: by name, for all tokens. Known are attention_mask (additive or boolean, (batch, heads or 1, queries
            or 1, keys), or (batch, keys)), position_embeddings (tensors (batch or 1, sequence, dim), or one),
            position_ids (batch or 1, sequence), position_bias (batch or 1, heads, queries, keys; or MPT's (heads, 1,
            keys), where the last keys are meant), relative_pos (batch or 1, queries, keys), alibi (what is added to
            scores, (batch, heads, 1, keys) or (batch heads, 1, keys)), encoder_attention_mask and
            encoder_decoder_position_bias (whose keys are the encoder's tokens), and what belongs to no token: caches,
            encoder_hidden_states, rel_embeddings, num_items_in_batch. Any argument may be None or a bool.
        chunk: which tokens these are.
        pooled: whether an anchor stands for its whole group, which is then masked only if all of it is.
        flash: whether attention takes position_ids that are not consecutive for sequences packed into one.
        window: tokens that a token sees, itself included; None: all before it.

    Raises:
        ConfigError: an argument that is not known, that has another size than these tokens, or that can't be told
            apart by anchors.
    """
    arguments = {**arguments, "attention_mask": mask_of(arguments)} if "attention_mask" in arguments else arguments
    result = {name: _strided(name, value, chunk, pooled, flash) for name, value in arguments.items()}
    if chunk.starts is not None and chunk.seen > 0 and result.get("attention_mask") is None:
        result["attention_mask"] = _made_mask(chunk, flash, window)
    if _names_hidden(result):
        result["attention_mask"] = ~result["attention_mask"]
    return result


def mask_of(arguments: Mapping[str, Any]) -> Any:
    """The attention_mask among the arguments of a layer, boolean ones with the tokens that are seen."""
    mask: Any = arguments.get("attention_mask")
    return ~mask if _names_hidden(arguments) else mask


def _names_hidden(arguments: Mapping[str, Any]) -> bool:
    """Whether a boolean mask has the tokens that are hidden, as MPT's has, which comes with MPT's bias."""
    mask, bias = arguments.get("attention_mask"), arguments.get("position_bias")
    is_boolean = isinstance(mask, Tensor) and mask.dtype == torch.bool
    return is_boolean and isinstance(bias, Tensor) and bias.dim() == 3


def _strided(name: str, value: Any, chunk: Chunk, pooled: bool, flash: bool) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if name not in _KNOWN:
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f", a {type(value).__name__}"
        raise ConfigError(
            f"A strided layer (Sequence-AltUp) does not know the argument {name}{shape}, and so not what of it belongs "
            "to anchors. Leave it out, or give strides to layers that don't take it."
        )
    if name == "attention_mask" and isinstance(value, Tensor):
        return _pooled_mask(name, value, chunk) if pooled else _mask(name, value, chunk, flash)
    if name == "position_ids" and flash:
        return _ids_for_flash(value)
    return _KNOWN[name](name, value, chunk)


def _whole(name: str, value: Any, chunk: Chunk) -> Any:
    return value


def _not_told(name: str, value: Any, chunk: Chunk) -> Any:
    raise ConfigError(
        f"A strided layer (Sequence-AltUp) can't tell which tokens {name} means. Load the model with "
        "attn_implementation = sdpa, and give a mask of numbers."
    )


def _positions(name: str, value: Any, chunk: Chunk) -> Any:
    """Rotations: a tensor, or a tuple of tensors."""
    if isinstance(value, tuple):
        return tuple(_queries(name, part, chunk) for part in value)
    return _queries(name, value, chunk)


def _ids(name: str, value: Tensor, chunk: Chunk) -> Tensor:
    return _rows(name, value, -1, chunk)


def _ids_for_flash(value: Tensor) -> None:
    if value.shape[0] == 1 and bool((value.diff(dim=-1) != 1).any()):
        raise ConfigError(
            "position_ids: flash attention takes these for sequences packed into one, whose anchors are not known. "
            "Load the model with attn_implementation = sdpa."
        )
    # Nor would it understand those of anchors. Rotations by position are computed before.


def _bias(name: str, value: Tensor, chunk: Chunk) -> Tensor:
    if value.dim() == 3:  # MPT's grows evenly with the key, so that a shift of all keys cancels
        return every(value[..., -chunk.total :], -1, 0, chunk.stride)[..., : chunk.slots]
    return _keys(name, _queries(name, value, chunk), chunk)


def _distances(name: str, value: Tensor, chunk: Chunk) -> Tensor:
    """Of an encoder. They are the same in all sequences, whatever groups are counted from."""
    unshifted = replace(chunk, starts=None, shifts=(0,))
    return _keys(name, _queries(name, value, unshifted), unshifted)[..., : chunk.groups, : chunk.slots]


def _alibi(name: str, value: Tensor, chunk: Chunk) -> Tensor:
    if chunk.starts is None or value.dim() == 4:
        return _keys(name, value, chunk)
    return _keys(name, value.unflatten(0, (len(chunk.starts), -1)), chunk).flatten(0, 1)


def _across(name: str, value: Tensor, chunk: Chunk) -> Tensor:
    """What says what the encoder's tokens are to those of this call."""
    return value if value.dim() == 2 else _queries(name, value, chunk)


_KNOWN: dict[str, Callable[[str, Any, Chunk], Any]] = {
    "attention_mask": _not_told,  # one of numbers is told before: see `_strided`
    "position_embeddings": _positions,
    "position_ids": _ids,
    "position_bias": _bias,
    "relative_pos": _distances,
    "alibi": _alibi,
    "encoder_attention_mask": _across,
    "encoder_decoder_position_bias": _across,
    **dict.fromkeys((*CACHES, "encoder_hidden_states", "rel_embeddings", "num_items_in_batch"), _whole),
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"), _not_told),
}
"""What becomes of each argument that is known."""

_AXES = {"position_embeddings": 3, "position_ids": 2, "position_bias": 4}
"""How many axes an argument must have for its first one to be the batch."""


def _rows(name: str, x: Tensor, axis: int, chunk: Chunk) -> Tensor:
    """The entries of anchors along `axis`, which holds the tokens of this call."""
    if chunk.starts is not None and (x.dim() != _AXES.get(name, 4) or x.shape[0] not in (1, len(chunk.starts))):
        raise ConfigError(
            f"{name} has the shape {tuple(x.shape)}, in which a strided layer (Sequence-AltUp) can't find the "
            f"{len(chunk.starts)} sequences, whose groups begin at different places. Pad each sequence on the left by "
            f"a multiple of the stride ({chunk.stride})."
        )
    return chunk.anchors(x, axis)


def _queries(name: str, x: Tensor, chunk: Chunk) -> Tensor:
    """The rows (the axis before the last) of anchors; one row that is for all stays."""
    if x.shape[-2] == chunk.length:
        return _rows(name, x, -2, chunk)
    return _one_for_all(name, x, -2, chunk.length)


def _keys(name: str, x: Tensor, chunk: Chunk) -> Tensor:
    """The columns (the last axis) of anchors, of this call and the calls before; one that is for all stays."""
    first = 0 if x.dim() == 2 else chunk.first_key
    if x.shape[-1] != chunk.total - first:
        return _one_for_all(name, x, -1, chunk.total - first)
    if chunk.starts is None:
        return every(x, -1, -first % chunk.stride, chunk.stride)
    tokens, _ = chunk.key_tokens()
    return taken(x, (tokens - first).clamp(0, x.shape[-1] - 1), -1)


def _one_for_all(name: str, x: Tensor, axis: int, tokens: int) -> Tensor:
    if x.shape[axis] != 1:
        raise ConfigError(
            f"{name} has the shape {tuple(x.shape)}; a strided layer (Sequence-AltUp) expects {tokens} entries on its "
            f"axis {axis}, one for each token."
        )
    return x


def _mask(name: str, mask: Tensor, chunk: Chunk, flash: bool) -> Tensor:
    """The mask for anchors, with slots hidden that hold none yet."""
    new = _keys(name, mask if mask.dim() == 2 else _queries(name, mask, chunk), chunk)
    if chunk.starts is None or chunk.seen == 0:
        return new
    _refuse_flash(flash)
    hidden = ~chunk.key_tokens()[1]
    bottom = torch.finfo(new.dtype).min if new.is_floating_point() and new.dim() > 2 else 0
    return new.masked_fill(hidden if new.dim() == 2 else hidden[:, None, None], bottom)


def _made_mask(chunk: Chunk, flash: bool, window: int | None) -> Tensor:
    """A mask (batch, 1, queries, slots) where none was given, as all tokens that a layer without a stride would see are
    visible: slots may hold no anchor yet."""
    _refuse_flash(flash)
    assert chunk.starts is not None
    keys, held = chunk.key_tokens()
    keys, queries = keys[:, None], (chunk.seen + chunk.anchor_places())[:, :, None]
    seen = held[:, None] & (keys <= queries) & (keys >= chunk.starts[:, None, None])
    return (seen if window is None else seen & (keys > queries - window))[:, None]


def _refuse_flash(flash: bool) -> None:
    if flash:
        raise ConfigError(
            "Sequences that are padded by different numbers of tokens have anchors at different places in a cache, "
            "which flash attention can't be told. Load the model with attn_implementation = sdpa, or give use_cache = "
            "False."
        )


def _pooled_mask(name: str, mask: Tensor, chunk: Chunk) -> Tensor:
    """The mask for groups: a group sees what any of its tokens sees, and is seen if any of them is."""
    for axis in (-1,) if mask.dim() == 2 else (-1, -2):
        if mask.shape[axis] != chunk.length:
            _one_for_all(name, mask, axis, chunk.length)
        elif chunk.starts is not None:
            mask = taken(mask, chunk.order(), axis)
    # A group that is not whole has some token at least, which is no less than this.
    bottom = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
    behind = -mask.shape[-1] % chunk.stride
    mask = nn.functional.pad(mask, (0, behind), value=bottom).unflatten(-1, (-1, chunk.stride)).amax(-1)
    if mask.dim() == 2:
        return mask
    behind = -mask.shape[-2] % chunk.stride
    return nn.functional.pad(mask, (0, 0, 0, behind), value=bottom).unflatten(-2, (-1, chunk.stride)).amax(-2)
