"""Gated attention (Bondarenko et al. 2023, arXiv 2306.12929, equations 5 to 8): a head's output is multiplied by a
sigmoid before the output projection, so that a head can do nothing without a large score,

    y_h = sigmoid(G_h(x)) (P_h V_h),        x the attention's input.

| gate | G | parameters of a layer |
|---|---|---|
| all-heads | one linear layer of the whole input, D -> H | H (D + 1) |
| per-head | for each head a linear layer of its own slice of the input, d -> 1; D = H d | H (d + 1) |
| mlp | for each head d -> n -> 1 of that slice, with a ReLU between | H (n (d + 2) + 1) |
| elementwise | one linear layer without a bias, D -> H d, a gate for every entry (Qwen, arXiv 2505.06708) | D H d |

D is the width of the residual stream, H the number of query heads, d the width of what a head gives.

**Start**: the last weights of a gate are zero and its bias logit(pi), so that all gates stand at pi whatever the input;
what reads the heads is then to be divided by pi (`auxin.methods.restructure.gated_attention`). The bias is a number
next to logit(pi) whose sigmoid is nearest to pi in the parameters' type. For a pi of 1/2 or 1/4 nothing is rounded
then, whatever the type; of smaller powers of two some have no such number (1/32 in float32, 1/8 in float16).
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from auxin.errors import PlanError
from auxin.nn.attention_functions import handed, handing_to, refuse_others
from auxin.nn.bricks import Brick, Making, Roles, Shapes, Tensors, brick
from auxin.nn.calls import first_argument
from auxin.nn.extension import extended
from auxin.words.roles import Kind, ParameterRole
from auxin.words.widths import Stream

GATED = "auxin_gated_attention"
"""What the function is called in transformers' table of attention functions."""
Gate = Literal["all-heads", "per-head", "mlp", "elementwise"]
WEIGHT, BIAS, INNER_WEIGHT, INNER_BIAS = "gate_weight", "gate_bias", "gate_inner_weight", "gate_inner_bias"
MEND = "Take the gates out first, by the inverse of the plan that put them in, or change the size before that."


class GatedAttentionMaking(Making):
    """The gate; all tensors of the attention stay."""

    def shapes(  # type: ignore[override]
        self,
        old: Shapes,
        gate: Gate,
        heads: int,
        head_width: int,
        width: int,
        opening: float,
        hidden: int | None = None,
    ) -> Shapes:
        """Those of the gate."""
        inner = head_width // 4 if hidden is None else hidden
        found: dict[Gate, Shapes] = {
            "all-heads": {WEIGHT: (heads, width), BIAS: (heads,)},
            "per-head": {WEIGHT: (heads, head_width), BIAS: (heads,)},
            "mlp": {
                INNER_WEIGHT: (heads, inner, head_width),
                INNER_BIAS: (heads, inner),
                WEIGHT: (heads, inner),
                BIAS: (heads,),
            },
            "elementwise": {WEIGHT: (heads * head_width, width)},
        }
        return found[gate]

    def values(  # type: ignore[override]
        self, old: Tensors, draw: torch.Generator, opening: float, **settings: Any
    ) -> dict[str, Tensor]:
        """Zeros and logit(pi); the first layer of an mlp is drawn as torch draws linear layers."""
        like = next(tensor for tensor in old.values() if tensor.is_floating_point())
        shapes = self.shapes({name: tuple(tensor.shape) for name, tensor in old.items()}, opening=opening, **settings)
        made = {}
        for name, shape in shapes.items():
            if name == BIAS:
                made[name] = like.new_full(shape, bias_for(opening, like.dtype))
            elif name == WEIGHT:
                made[name] = like.new_zeros(shape)
            else:
                bound = settings["head_width"] ** -0.5
                made[name] = ((2 * torch.rand(shape, generator=draw) - 1) * bound).to(like)
        return made

    def back(self, new: Tensors, **settings: Any) -> dict[str, Tensor]:
        """Nothing has to be made: the attention is all there. Its heads give 1 / pi times what they gave at first."""
        return {}


def bias_for(opening: float, dtype: torch.dtype) -> float:
    """Of the numbers next to logit(`opening`) the one whose sigmoid, in `dtype`, is nearest to `opening`."""
    start = torch.tensor(math.log(opening / (1 - opening)), dtype=dtype)
    near = [start]
    for end in (-math.inf, math.inf):
        step = start
        for _ in range(4):
            step = torch.nextafter(step, torch.tensor(end, dtype=dtype))
            near.append(step)
    return min((one.item() for one in near), key=lambda one: abs(_sigmoid(one, dtype) - opening))


def _sigmoid(value: float, dtype: torch.dtype) -> float:
    # Of several numbers: torch may compute a single one by another code.
    return torch.full((64,), value, dtype=dtype).sigmoid()[0].item()


@brick("gated_attention")
class GatedAttention(Brick):
    """An attention module of transformers whose heads are gated. It takes and gives the same.

    Parameters, beside the module's: `gate_weight` and, but for elementwise, `gate_bias` (H,); of an mlp, too,
    `gate_inner_weight` (H, n, d) and `gate_inner_bias` (H, n).
    """

    making = GatedAttentionMaking()
    in_float = (WEIGHT, INNER_WEIGHT)
    gate: Gate
    gate_weight: nn.Parameter
    gate_bias: nn.Parameter
    gate_inner_weight: nn.Parameter
    gate_inner_bias: nn.Parameter

    @classmethod
    def replacing(
        cls,
        module: nn.Module,
        heads: int,
        head_width: int,
        width: int,
        gate: Gate = "all-heads",
        opening: float = 0.5,
        hidden: int | None = None,
    ) -> Self:
        """`module`, an attention of one of transformers' models, so extended.

        Args:
            module: also on the meta device. Its first argument are the hidden states that queries are made of.
            heads: H, of queries.
            head_width: d.
            width: D.
            gate: see the module.
            opening: pi, at which all gates begin; 0.5 of elementwise.
            hidden: n, of an mlp; None: d // 4.

        Raises:
            PlanError: a number is out of range or does not fit the gate, or the module computes its attention by
                itself, where no other can be put in.
        """
        check_gate(gate, heads, head_width, width, opening, hidden)
        refuse_others(module, "gated_attention", "nothing can be put between its heads and what reads them")
        new = extended(module, cls, gate=gate)
        sizes = {"heads": heads, "head_width": head_width, "width": width}
        settings = {**sizes, "gate": gate, "opening": opening, "hidden": hidden}
        old = module.state_dict()
        like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
        made = (
            {name: like.new_empty(shape) for name, shape in cls.making.shapes({}, **settings).items()}  # type: ignore[arg-type]
            if like.is_meta
            else cls.making.values(old, torch.default_generator, **settings)  # type: ignore[arg-type]
        )
        for name, value in made.items():
            new.register_parameter(name, nn.Parameter(value))
        return new

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention."""
        gates = self.gates(first_argument(args, kwargs))
        with handing_to(self, GATED, gates, "gated_attention multiplies what heads give", implementations=None):
            return super().forward(*args, **kwargs)

    def gates(self, hidden: Tensor) -> Tensor:
        """The gates for `hidden`, (..., tokens, D): (..., tokens, H, 1), or (..., tokens, H, d) of elementwise."""
        if self.gate == "all-heads":
            return F.linear(hidden, self.gate_weight, self.gate_bias).sigmoid()[..., None]
        if self.gate == "elementwise":
            return F.linear(hidden, self.gate_weight).sigmoid()
        inner = hidden.unflatten(-1, (len(self.gate_bias), -1))
        if self.gate == "mlp":
            inner = torch.einsum("...hd,hnd->...hn", inner, self.gate_inner_weight) + self.gate_inner_bias
            inner = inner.relu()
        return ((inner * self.gate_weight).sum(-1) + self.gate_bias).sigmoid()[..., None]

    def roles(self, replaced: Roles) -> Roles:
        """Those of the gate, which count as along no stream, since their sizes are settings."""
        own = {name: parameter for name, parameter in self.named_parameters(recurse=False) if name.startswith("gate_")}
        return {**super().roles(replaced), **{name: _along_none(name, tensor.dim()) for name, tensor in own.items()}}

    def fixed_widths(self) -> Mapping[Stream, str]:
        """Those that a gate reads and writes."""
        return dict.fromkeys(("residual", "query"), f"attentions have gates of the old size. {MEND}")

    def extra_repr(self) -> str:
        """The gate."""
        return f"gate={self.gate}"


def check_gate(gate: str, heads: int, head_width: int, width: int, opening: float, hidden: int | None) -> None:
    """PlanError for a gate that can't be: see `GatedAttention.replacing`."""
    kinds: Collection[str] = get_args(Gate)
    if gate not in kinds:
        raise PlanError(f"gate: {gate!r} is none. Give one of {', '.join(kinds)}.")
    if not 0 < opening < 1:
        raise PlanError(
            f"opening = {opening}: a gate stands between 0 and 1. Give a number between them, such as 0.25."
        )
    if gate == "elementwise" and opening != 0.5:
        raise PlanError(f"opening = {opening}: an elementwise gate has no bias and begins at 0.5. Leave opening out.")
    if hidden is not None and (gate != "mlp" or hidden < 1):
        raise PlanError(f"hidden = {hidden}: hidden units, 1 or more, are those of gate = mlp. Leave hidden out.")
    if gate == "mlp" and hidden is None and head_width < 4:
        raise PlanError(f"gate = mlp: heads of width {head_width} would have no hidden unit, d // 4. Give hidden.")
    if gate in ("per-head", "mlp") and heads * head_width != width:
        raise PlanError(
            f"gate = {gate}: each head reads its own slice of the input, and {heads} heads of {head_width} are no "
            f"input of {width}. Take all-heads."
        )


def _along_none(name: str, axes: int) -> ParameterRole:
    kind: Kind = "matrix" if name.endswith("weight") else "bias"
    return ParameterRole(name, ((),) * axes, (None,) * axes, kind)


def gated_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in the place of an attention function; see `reading`.

    Returns:
        What the heads give, (samples, queries, heads, head width), gated, and what the model's own implementation gives
        beside it.
    """
    gates, attend = handed(module)
    read, weights = attend(module, query, key, value, attention_mask, **named)
    gates = gates if gates.shape[-1] == 1 else gates.unflatten(-1, read.shape[-2:])
    if gates.shape[:-1] != read.shape[:-1]:
        raise PlanError(
            f"gated_attention: the heads give (samples, tokens, heads) = {tuple(read.shape[:-1])}, and there are gates "
            f"for {tuple(gates.shape[:-1])}. Leave gates out of attentions that read their input in pieces."
        )
    return read * gates.to(read.dtype), weights


ALL_ATTENTION_FUNCTIONS.register(GATED, gated_attention)
