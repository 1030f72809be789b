"""A feed-forward part whose hidden units are divided among experts.

A hidden unit is a row of the projections that come in (with its bias) and a column of the one that goes out, and the
part is the sum over its units. So it is the sum over any groups of them, too: with all experts on, the split part is
the function that it was, and its tensors are those of the dense part in another order. The output's bias is added once.
Dividing units is how MoEfication (arXiv 2110.01786), LLaMA-MoE (2406.16554) and Dense2MoE (2510.09094) begin; which
units go together is told by `units`.

With a router only some experts work on a token: those with the highest scores W x, beside the first `shared_experts`,
which always do. A softmax over n experts gives each about 1 / n, but the units belong at 1; gates are therefore
multiplied so that a router without preferences gives 1 to each.

| gates | gate of a chosen expert | as in |
|---|---|---|
| softmax | n softmax(W x), over all n routed experts | Dense2MoE, scaled |
| selected | k softmax(W x), over the k chosen ones | LLaMA-MoE, Mixtral |
| none | 1; the router gets no gradient from the part's result | MoEfication |
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from auxin.errors import PlanError
from auxin.nn.bricks import Brick, Roles, brick
from auxin.nn.calls import forward_arguments
from auxin.nn.linear import linear_class
from auxin.nn.made import take_over
from auxin.nn.splitting import ROUTER, Division, Gates, Projections, SplitMaking, projections_of
from auxin.words.roles import Access, ParameterRole


class Router(nn.Module):
    """Chooses experts for tokens: those with the highest scores W x. Parameter `weight` (experts, hidden size).

    Args:
        hidden_size: width of a token.
        experts: number of experts.
        chosen: k, how many of them work on a token.
        gates: see the module's table.
        scale: factor before the softmax.
        like: of the device and type that the weight shall have; it is not filled.
    """

    def __init__(self, hidden_size: int, experts: int, chosen: int, gates: Gates, scale: float, like: Tensor) -> None:
        super().__init__()
        self.chosen, self.gates, self.scale = chosen, gates, scale
        self.weight = nn.Parameter(like.new_empty(experts, hidden_size))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For tokens (T, hidden size): the softmax over all experts (T, experts), gates (T, k) and the experts chosen
        (T, k). The first two in float32 at least."""
        scores = F.linear(tokens, self.weight)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        shares, (best, experts) = scores.softmax(-1), scores.topk(self.chosen, dim=-1)
        if self.gates == "none":
            return shares, torch.ones_like(best), experts
        gates = shares.gather(-1, experts) if self.gates == "softmax" else best.softmax(-1)
        return shares, self.scale * gates, experts

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.chosen} of {self.weight.shape[0]}, gates={self.gates}"


class Split(Brick):
    """What both kinds of split parts are.

    Parameters, by the names P of the projections: P (num_experts, units of one, hidden size), `P_bias` (num_experts,
    units of one) and the output's (hidden size,) where the dense part has them; with a router, `router.weight`.

    Args:
        module: the feed-forward module that it replaces (with `nn.Linear`s for SplitFeedForward, `Conv1D`s for
            SplitFeedForwardConv1D), also on the meta device; or a split one, which may get another router. Filled from
            it where it has values.
        settings: see `Division`.

    Raises:
        PlanError: the module is none that is known, or can't be divided so.
    """

    layer: ClassVar[type[nn.Module]]
    """The class of the projections."""
    making: ClassVar[SplitMaking]
    plain_form = "merge it back (the edit merge_module); all experts are on then, for all tokens"

    def __init__(self, module: nn.Module, **settings: Any) -> None:
        super().__init__()
        old = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        division, self.projections = Division(**settings), projections_of(old)
        if type(module) is not type(self):
            _check_parts(module, self.projections, self.layer)
        self.num_experts, self.experts_per_token = division.num_experts, division.experts_per_token
        self.shared_experts = division.shared_experts
        shapes, tensors = {**old, **self.making.shapes(old, **settings)}, dict(module.named_parameters())
        for part in self.projections.all:
            for name, dense in ((part, f"{part}.weight"), (f"{part}_bias", f"{part}.bias")):
                like = tensors.get(name, tensors.get(dense))
                self.register_parameter(name, None if like is None else nn.Parameter(like.new_empty(shapes[name])))
        setattr(self, self.projections.activation, getattr(module, self.projections.activation))
        if self.projections.dropout:
            self.dropout = cast(nn.Module, module.dropout)
        if division.experts_per_token:
            up = getattr(self, self.projections.up)
            self.router = Router(
                up.shape[2], division.routed, division.experts_per_token, division.gates, division.scale, up
            )
        take_over(self, module, self.making, **settings)
        self.train(module.training)

    @classmethod
    def replacing(cls, module: nn.Module, **settings: Any) -> Self:
        """The split part for `module`; see the class."""
        return cls(module, **settings)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden size) -> (..., hidden size)."""
        always = self.num_experts if self.experts_per_token is None else self.shared_experts
        result = self._together(hidden_states, always) if always else None
        if self.experts_per_token:
            tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
            _, gates, chosen = self.router(tokens)
            routed = self._apart(tokens, gates, chosen + self.shared_experts).reshape(hidden_states.shape)
            result = routed if result is None else result + routed
        assert result is not None, "some expert works on every token"
        bias = self._bias(self.projections.down)
        result = result if bias is None else result + bias
        return self.dropout(result) if self.projections.dropout == "output" else result

    def roles(self, replaced: Roles) -> Roles:
        """They read and write the residual stream as before. The units are divided among experts and are no stream of
        the model any more."""
        found: dict[str, ParameterRole] = {}
        for name in self.projections.all:
            whole, bias = replaced.get(f"{name}.weight"), replaced.get(f"{name}.bias")
            if whole is None:
                continue
            out, path = name == self.projections.down, whole.pattern.removesuffix(f"{name}.weight")
            access: Access = "writes" if out else "reads"
            stream = whole.axes[whole.access.index(access)]
            found[name] = ParameterRole(f"{path}{name}", ((), (), stream), (None, None, access), whole.kind)
            if bias is not None:
                axes, accesses = (bias.axes, bias.access) if out else (((), ()), (None, None))
                found[f"{name}_bias"] = ParameterRole(f"{path}{name}_bias", axes, accesses, bias.kind)
            if name == self.projections.up and self.experts_per_token:
                found[ROUTER] = ParameterRole(f"{path}{ROUTER}", ((), stream), (None, "reads"), "matrix")
        return found

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """The projection out of the hidden units and its bias."""
        down = self.projections.down
        names = (name for name in (down, f"{down}_bias") if getattr(self, name) is not None)
        return dict.fromkeys(names if plain else (), factor)

    def extra_repr(self) -> str:
        routed = "" if self.experts_per_token is None else f", {self.experts_per_token} per token"
        shared = f" beside {self.shared_experts} shared" if self.shared_experts else ""
        experts, units, hidden = getattr(self, self.projections.up).shape
        return f"{hidden} -> {experts} x {units} -> {hidden}{routed}{shared}"

    def _bias(self, projection: str) -> Tensor | None:
        return cast(Tensor | None, getattr(self, f"{projection}_bias"))

    def _activated(self, into: Callable[[str], Tensor]) -> Tensor:
        """The hidden units, given what each projection makes."""
        activation = getattr(self, self.projections.activation)
        if self.projections.gate is None:
            hidden = activation(into(self.projections.up))
        else:
            hidden = activation(into(self.projections.gate)) * into(self.projections.up)
        hidden = self.dropout(hidden) if self.projections.dropout == "hidden" else hidden
        return hidden.to(getattr(self, self.projections.down).dtype)  # T5 may keep the last one in float32

    def _together(self, x: Tensor, experts: int) -> Tensor:
        """What the first of the experts give, added up: one dense part."""

        def into(name: str) -> Tensor:
            bias = self._bias(name)
            return F.linear(
                x, getattr(self, name)[:experts].flatten(0, 1), None if bias is None else bias[:experts].flatten()
            )

        return self._activated(into) @ getattr(self, self.projections.down)[:experts].flatten(0, 1)

    def _apart(self, tokens: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """What the experts chosen for each token (T, k) give, times their gates (T, k), added up."""
        order = chosen.flatten().argsort(stable=True)
        experts, rows = chosen.flatten()[order], tokens[order // chosen.shape[1]]
        products = _Products(rows, experts, self.num_experts)

        def into(name: str) -> Tensor:
            result, bias = products(rows, getattr(self, name).mT), self._bias(name)
            return result if bias is None else result + bias[experts]

        result = products(self._activated(into), getattr(self, self.projections.down))
        result = result * gates.flatten()[order, None].to(result.dtype)
        return torch.empty_like(result).index_copy(0, order, result).unflatten(0, chosen.shape).sum(1)


@brick("split_feed_forward")
class SplitFeedForward(Split):
    """A feed-forward part of `nn.Linear`s, split into experts."""

    layer = nn.Linear
    making = SplitMaking()


@brick("split_feed_forward_conv1d")
class SplitFeedForwardConv1D(Split):
    """A feed-forward part of `transformers.pytorch_utils.Conv1D`s (GPT-2), split into experts."""

    layer = Conv1D
    making = SplitMaking(transposed=True)


class _Products:
    """Products of rows with a matrix each, their experts', which come in order: row r with weights[experts[r]].

    One product per expert, of all its rows. On shapes, which don't tell how many those are, one per row.
    """

    def __init__(self, rows: Tensor, experts: Tensor, number: int) -> None:
        self._experts, self._counts = experts, None
        if not isinstance(rows, FakeTensor) and not torch.compiler.is_compiling():
            self._counts = torch.bincount(experts, minlength=number).tolist()

    def __call__(self, rows: Tensor, weights: Tensor) -> Tensor:
        """(R, in), (experts, in, out) -> (R, out)."""
        if self._counts is None:
            return torch.bmm(rows[:, None], weights[self._experts])[:, 0]
        parts = zip(rows.split(self._counts), weights.unbind(), strict=True)
        return torch.cat([part @ weight for part, weight in parts])


def _check_parts(module: nn.Module, projections: Projections, layer: type[nn.Module]) -> None:
    """PlanError unless the module is a feed-forward part of plain projections and nothing else."""
    parts: Mapping[str, nn.Module] = dict(module.named_children())
    for name in projections.all:
        if linear_class(parts.get(name, module)) is not layer:
            other = " (the brick split_feed_forward_conv1d takes these)" if type(parts.get(name)) is Conv1D else ""
            raise PlanError(
                f"{name} of the {type(module).__name__} is a {type(parts.get(name)).__name__} and no plain "
                f"{layer.__name__}{other}; take off what was put there, or split another part"
            )
    known = {*projections.all, projections.activation} | ({"dropout"} if projections.dropout else set())
    lacking = [name for name in sorted(known) if not hasattr(module, name)]
    more = sorted(parts.keys() - known)
    arguments = forward_arguments(module)
    if lacking or more or len(arguments) != 1:
        raise PlanError(
            f"a {type(module).__name__} is more than the feed-forward part that its projections "
            f"{', '.join(projections.all)} make: it lacks {lacking}, has {more} beside them, and takes {arguments}"
        )
