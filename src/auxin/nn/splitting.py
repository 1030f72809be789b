"""How the tensors of a feed-forward part are divided among experts, and put together again: pure functions.

`auxin.nn.experts` has the modules, and says what the settings are for.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from auxin.errors import PlanError
from auxin.nn.bricks import Making, Shapes, Tensors

Gates = Literal["softmax", "selected", "none"]
"""By what the result of a routed expert is multiplied; see above."""
ROUTER = "router.weight"
ROUTER_SPREAD = 0.1
"""Standard deviation of a fresh router's scores on an input of root mean square 1."""


@dataclass(frozen=True)
class Projections:
    """What the parts of a feed-forward module are called."""

    up: str
    """Into the hidden units."""
    down: str
    """Out of them."""
    activation: str
    gate: str | None = None
    """Into what is multiplied with them, after the activation; None: there is no such thing, and the activation is on
    the hidden units."""
    dropout: Literal["hidden", "output"] | None = None
    """Where the module `dropout` is; None: there is none."""

    @property
    def all(self) -> list[str]:
        """Their names, the way out last."""
        return [name for name in (self.gate, self.up, self.down) if name is not None]


KNOWN = (
    Projections("up_proj", "down_proj", "act_fn", gate="gate_proj"),  # Llama and most others
    Projections("c_fc", "c_proj", "act", dropout="output"),  # GPT-2
    Projections("dense_h_to_4h", "dense_4h_to_h", "act"),  # GPT-NeoX
    Projections("wi", "wo", "act", dropout="hidden"),  # T5
    Projections("wi_1", "wo", "act", gate="wi_0", dropout="hidden"),  # T5 1.1
    Projections("fc1", "fc2", "activation_fn"),  # ViT, CLIP
)
"""The feed-forward modules that are known, by the names of their projections."""


@dataclass(frozen=True)
class Division:
    """The settings of a split feed-forward part."""

    num_experts: int
    """Into how many groups of equal size the hidden units go."""
    units: Sequence[int] | None = None
    """The hidden units in the order in which they are dealt out: the first expert gets the first of them. None: as they
    are."""
    experts_per_token: int | None = None
    """How many of the routed experts work on a token, from 0 (with shared ones) to all but one. None: all work on all
    tokens, and there is no router."""
    shared_experts: int = 0
    """How many experts, the first ones, work on all tokens beside those."""
    gates: Gates = "softmax"
    """By what the result of a routed expert is multiplied."""
    gate_scale: float | None = None
    """The factor before the softmax of the gates; None: with which equal scores give gates of 1."""

    def __post_init__(self) -> None:
        if self.num_experts < 2:
            raise PlanError(f"num_experts {self.num_experts} divides nothing; give 2 or more")
        if not 0 <= self.shared_experts < self.num_experts:
            raise PlanError(
                f"shared_experts {self.shared_experts} is none of 0 to {self.num_experts - 1}: some of the "
                f"{self.num_experts} experts must be left to choose from"
            )
        if self.gates not in get_args(Gates):
            raise PlanError(f"gates {self.gates!r} is none of {', '.join(get_args(Gates))}")
        if self.experts_per_token is None and (self.shared_experts or self.gates != "softmax"):
            raise PlanError("shared_experts and gates have no effect without a router; give experts_per_token")
        least = 0 if self.shared_experts else 1
        if self.experts_per_token is not None and not least <= self.experts_per_token < self.routed:
            raise PlanError(
                f"experts_per_token {self.experts_per_token} is none of {least} to {self.routed - 1}, of "
                f"{self.routed} experts that a router chooses from; leave it out if all shall work on all tokens"
            )
        if self.gate_scale is not None and (not self.experts_per_token or self.gates == "none"):
            raise PlanError("gate_scale has no effect without a router whose gates are a softmax; leave it out")
        if self.gate_scale is not None and self.gate_scale <= 0:
            raise PlanError(f"gate_scale {self.gate_scale} must be more than 0")
        if self.units is not None and sorted(self.units) != list(range(len(self.units))):
            raise PlanError(
                f"units must name each of the hidden units once, 0 to {len(self.units) - 1}, in the order in which the "
                "experts get them"
            )

    @property
    def routed(self) -> int:
        """The number of experts that a router chooses from."""
        return self.num_experts - self.shared_experts

    @property
    def scale(self) -> float:
        """The factor before the softmax of the gates."""
        usual = {"softmax": self.routed, "selected": self.experts_per_token or 0, "none": 1}[self.gates]
        return float(usual if self.gate_scale is None else self.gate_scale)

    @property
    def order(self) -> Tensor | None:
        """The units in their order; None where that is their own."""
        return None if self.units is None else torch.tensor(self.units)


class SplitMaking(Making):
    """The tensors of a dense part in another order, and back; the router's are fresh.

    A part that is split already keeps its experts; it may get another router, or lose it.

    Args:
        transposed: whether the weights are (in, out), as of a Conv1D.
    """

    def __init__(self, transposed: bool = False) -> None:
        self._transposed = transposed

    def keeps(self, old: Shapes, **settings: Any) -> Collection[str]:
        """Nothing of a dense part; all of a split one, which gets another router."""
        return old.keys() if projections_of(old).up in old else ()

    def shapes(self, old: Shapes, **settings: Any) -> Shapes:
        """Per projection (num_experts, units of one, hidden size), its bias beside it (num_experts, units of one); the
        output's bias (hidden size,); the router's weight (routed experts, hidden size).

        Raises:
            PlanError: these are not the tensors of a feed-forward module that is known, or its hidden units can't be
                divided so.
        """
        division, projections = Division(**settings), projections_of(old)
        if projections.up in old:
            experts, units, hidden = old[projections.up]
            if experts != division.num_experts:
                raise PlanError(
                    f"the part has {experts} experts already and can't get {division.num_experts}; merge it back first"
                )
            made: dict[str, tuple[int, ...]] = {}
        else:
            units, hidden = self._sizes(old, projections)
            if units % division.num_experts:
                raise PlanError(
                    f"num_experts {division.num_experts} does not divide the {units} hidden units; give a divisor"
                )
            shape = (division.num_experts, units // division.num_experts)
            made = dict.fromkeys(projections.all, (*shape, hidden))
            made |= {f"{name}_bias": shape for name in projections.all[:-1] if f"{name}.bias" in old}
            made |= {f"{projections.down}_bias": (hidden,)} if f"{projections.down}.bias" in old else {}
            if division.units is not None and len(division.units) != units:
                raise PlanError(f"units names {len(division.units)} hidden units of {units}; name each once")
        router = (division.routed, hidden)
        if division.experts_per_token and old.get(ROUTER) != router:
            made[ROUTER] = router
        return made

    def values(self, old: Tensors, draw: torch.Generator, **settings: Any) -> dict[str, Tensor]:
        """The same numbers in another order; the router's normal, so that its scores on an input of root mean square 1
        have a standard deviation of 0.1, and gates are near 1."""
        shapes = self.shapes({name: tuple(tensor.shape) for name, tensor in old.items()}, **settings)
        made = self._split(old, Division(**settings))
        if ROUTER in shapes:
            like = next(tensor for name, tensor in old.items() if name != ROUTER and tensor.is_floating_point())
            router = torch.randn(shapes[ROUTER], generator=draw) * (ROUTER_SPREAD / shapes[ROUTER][1] ** 0.5)
            made[ROUTER] = router.to(like)
        return made

    def moments(self, old: Tensors, moments: Tensors, order: int, **settings: Any) -> dict[str, Tensor]:
        """Those of the dense part in the other order; a new router starts anew."""
        return self._split(moments, Division(**settings))

    def back(self, new: Tensors, **settings: Any) -> dict[str, Tensor]:
        """The dense part: all experts on, with gates of 1. What a router has learned is lost."""
        return self._joined(new, projections_of(new), Division(**settings))

    def moments_back(self, new: Tensors, moments: Tensors, order: int, **settings: Any) -> dict[str, Tensor]:
        """As the values."""
        return self._joined(moments, projections_of(new), Division(**settings))

    def _split(self, old: Tensors, division: Division) -> dict[str, Tensor]:
        """Those of a dense part's tensors that there are, divided."""
        made: dict[str, Tensor] = {}
        for name, tensor in old.items():
            module, _, kind = name.rpartition(".")
            row = next((known for known in KNOWN if module in known.all), None)
            if row is None:
                continue
            if kind == "bias" and module == row.down:
                made[f"{module}_bias"] = tensor.clone()
                continue
            rows = self._turned(tensor, module == row.down) if kind == "weight" else tensor
            order = division.order
            rows = rows.clone(memory_format=torch.contiguous_format) if order is None else rows[order.to(rows.device)]
            divided = rows.unflatten(0, (division.num_experts, -1))
            made[module if kind == "weight" else f"{module}_bias"] = divided
        return made

    def _joined(self, new: Tensors, projections: Projections, division: Division) -> dict[str, Tensor]:
        """The other way round."""
        made: dict[str, Tensor] = {}
        for name in projections.all:
            out = name == projections.down
            for key, tensor in ((f"{name}.weight", new.get(name)), (f"{name}.bias", new.get(f"{name}_bias"))):
                if tensor is None:
                    continue
                if tensor.dim() == 1:
                    made[key] = tensor.clone()
                    continue
                rows, order = tensor.flatten(0, 1), division.order
                rows = rows if order is None else rows[order.argsort().to(rows.device)]
                rows = self._turned(rows, out) if key.endswith("weight") else rows
                made[key] = rows.clone(memory_format=torch.contiguous_format)
        return made

    def _turned(self, weight: Tensor, out: bool) -> Tensor:
        """From a layer's weight to (units, hidden size), or back."""
        return weight if out == self._transposed else weight.mT

    def _sizes(self, old: Shapes, projections: Projections) -> tuple[int, int]:
        """Hidden units and hidden size of a dense part."""
        found = {}
        for name in projections.all:
            shape = old[f"{name}.weight"]
            found[name] = shape if (name == projections.down) == self._transposed else shape[::-1]
        if len(set(found.values())) > 1:
            raise PlanError(f"the projections have different hidden units or hidden sizes: {found}")
        return cast(tuple[int, int], next(iter(found.values())))


def projections_of(tensors: Collection[str]) -> Projections:
    """What the projections of a feed-forward part with these tensors are called, dense or split.

    Raises:
        PlanError: it is none that is known.
    """
    for known in KNOWN:
        dense = {f"{name}.weight" for name in known.all}, {f"{name}.bias" for name in known.all}
        split = set(known.all), {f"{name}_bias" for name in known.all} | {ROUTER}
        rest = {name for name in tensors if not name.startswith(f"{known.activation}.")}
        if any(needed <= rest <= needed | possible for needed, possible in (dense, split)):
            return known
    raise PlanError(
        f"no feed-forward part that is known has the tensors {sorted(tensors)}. One module must have all projections, "
        f"called {', or '.join(', '.join(known.all) for known in KNOWN)}; where they lie in several modules (BERT), "
        "the part can't be split."
    )
