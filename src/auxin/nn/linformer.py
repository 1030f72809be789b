"""Linformer's attention (Wang et al. 2020, arXiv 2006.04768, equation 7): keys and values are projected along the
sequence, from n tokens to k, before the queries read them:

    softmax(Q (E K)^T / sqrt(d)) (F V),        E, F (k, n)

so that time and memory grow with n k and not with n^2. All heads of a layer share E and F ("headwise sharing").
A head reads k mixtures of tokens, each of which has all tokens in it: there is no order among them that a causal mask
could go by, and attentions that are causal are refused.

**Start**: the mixtures are the means of n / k neighbours (the paper's pooling, section 4), so that with k = n texts of
n tokens are read as they were. Otherwise another function is computed, and the model has to be trained.

**Lengths**: texts of fewer than n tokens are projected by the first columns. Padding is zero before it is projected:
what stands there does not matter, and a text that is padded on the right is read as it is alone.
"""

from collections.abc import Collection
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from auxin.errors import PlanError
from auxin.nn.attention_functions import handed, handing_to, refuse_others
from auxin.nn.bricks import Brick, Making, Roles, Shapes, Tensors, brick
from auxin.nn.extension import extended
from auxin.words.roles import ParameterRole

LINFORMER = "auxin_linformer_attention"
"""What the function is called in transformers' table of attention functions."""
KEYS, VALUES = "key_projection", "value_projection"


class LinformerMaking(Making):
    """E and F; all tensors of the attention stay."""

    def shapes(self, old: Shapes, **settings: Any) -> Shapes:
        """Both (k, n); none where they are there, and of that shape."""
        shape = settings["projected_length"], settings["max_length"]
        return {name: shape for name in (KEYS, VALUES) if old.get(name) != shape}

    def keeps(self, old: Shapes, **settings: Any) -> Collection[str]:
        """All that the attention had."""
        return old.keys() - self.shapes(old, **settings).keys()

    def values(self, old: Tensors, draw: torch.Generator, **settings: Any) -> dict[str, Tensor]:
        """Means of neighbours; nothing is drawn."""
        like = next(tensor for tensor in old.values() if tensor.is_floating_point())
        shapes = self.shapes({name: tuple(tensor.shape) for name, tensor in old.items()}, **settings)
        return {name: means_of_neighbours(*shape).to(like) for name, shape in shapes.items()}

    def back(self, new: Tensors, **settings: Any) -> dict[str, Tensor]:
        """Nothing has to be made: the attention is all there."""
        return {}


def means_of_neighbours(rows: int, columns: int) -> Tensor:
    """The matrix (rows, columns) that takes the mean of each of `rows` stretches of an axis, whose lengths differ by at
    most 1; float32."""
    owner = torch.arange(columns) * rows // columns
    chosen = (owner == torch.arange(rows)[:, None]).float()
    return chosen / chosen.sum(1, keepdim=True)


@brick("linformer_attention")
class LinformerAttention(Brick):
    """An attention module of transformers whose keys and values are projected along the sequence. It takes and gives
    the same; maps that it gives are (samples, heads, queries, k).

    Parameters, beside the module's: `key_projection` E and `value_projection` F, (k, n).
    """

    making = LinformerMaking()
    key_projection: nn.Parameter
    value_projection: nn.Parameter

    @classmethod
    def replacing(cls, module: nn.Module, projected_length: int, max_length: int) -> Self:
        """`module`, an attention of one of transformers' models, so extended.

        Args:
            module: also on the meta device. Whether it reads its own sequence or another one, as a decoder does an
                encoder's, does not matter.
            projected_length: k, from 1 to n.
            max_length: n, the most tokens that are read.

        Raises:
            PlanError: the lengths are none, or the module is causal or computes its attention by itself.
        """
        if not 1 <= projected_length <= max_length:
            raise PlanError(
                f"linformer_attention: projected_length = {projected_length} of max_length = {max_length}. Give 1 to "
                "max_length."
            )
        _check(module)
        new = extended(module, cls)
        like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        settings = {"projected_length": projected_length, "max_length": max_length}
        for name, shape in cls.making.shapes(shapes, **settings).items():
            empty = torch.empty(shape, device=like.device, dtype=like.dtype)
            new.register_parameter(name, nn.Parameter(empty))
            if not like.is_meta:
                empty.copy_(means_of_neighbours(*shape))
        return new

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention.

        Raises:
            PlanError: there are more tokens than max_length, or a mask that is more than padding; the attention is a
                hard one, too; the model's implementation of attention is one that makes masks of its own kind.
        """
        why = "linformer_attention zeroes what is masked"
        with handing_to(self, LINFORMER, (self.key_projection, self.value_projection), why):
            return super().forward(*args, **kwargs)

    def roles(self, replaced: Roles) -> Roles:
        """Those of E and F, which run along the sequence and no stream."""
        along_none: Roles = {name: ParameterRole(name, ((), ()), (None, None), "mixing") for name in (KEYS, VALUES)}
        return {**super().roles(replaced), **along_none}

    def extra_repr(self) -> str:
        """k and n."""
        projected, most = self.key_projection.shape
        return f"projected_length={projected}, max_length={most}"


def linformer_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in the place of an attention function, with arguments as those of
    `auxin.nn.attention_functions.reading`.

    Returns:
        What the heads give, (samples, queries, heads, head width), and the map (samples, heads, queries, k), where the
        model's implementation gives one.
    """
    (to_keys, to_values), attend = handed(module)
    length = key.shape[-2]
    if length > to_keys.shape[1]:
        raise PlanError(
            f"linformer_attention: {length} tokens, and it was made for at most {to_keys.shape[1]}. Give shorter "
            "texts, or apply the edit with a larger max_length."
        )
    if named.get("position_bias") is not None or named.get("sliding_window") is not None or named.get("is_causal"):
        raise PlanError(f"linformer_attention: {_MORE_THAN_PADDING}")
    if attention_mask is not None:
        visible = _visible(attention_mask)[..., None]
        key, value = key * visible, value * visible
    key, value = to_keys[:, :length].to(key) @ key, to_values[:, :length].to(value) @ value
    # A mixture has no place, so that there is nothing left to be masked.
    return attend(module, query, key, value, None, **named)


ALL_ATTENTION_FUNCTIONS.register(LINFORMER, linformer_attention)

_MORE_THAN_PADDING = (
    "the attention's mask or its biases tell pairs of tokens apart, and keys are mixtures of all tokens. Leave "
    "attentions out that have relative positions, read near tokens alone, or read several texts in one sequence."
)


def _visible(mask: Tensor) -> Tensor:
    """Which keys are read, (samples, 1, keys), by every query alike.

    Raises:
        PlanError: queries differ, or a score is biased.
    """
    of_first = mask[..., :1, :]
    seen = of_first if mask.dtype == torch.bool else of_first == 0
    if not mask.is_meta:
        alike = mask.shape[-2] == 1 or mask.stride(-2) == 0 or bool((mask == of_first).all())
        if not alike or (mask.dtype != torch.bool and bool((of_first[~seen] > torch.finfo(mask.dtype).min / 2).any())):
            raise PlanError(f"linformer_attention: {_MORE_THAN_PADDING}")
    return seen[..., 0, :]


def _check(module: nn.Module) -> None:
    refuse_others(module, "linformer_attention", "no other can be put in its place")
    if getattr(module, "is_causal", True):
        raise PlanError(
            f"linformer_attention: the {type(module).__name__} is causal. Each projected key is a mixture of all "
            "tokens, those to come among them, so that nothing could be masked. Name attentions of an encoder."
        )
