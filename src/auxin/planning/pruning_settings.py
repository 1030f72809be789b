"""What a method that prunes widths is told: how much stays of what, or how small the model shall be."""

from typing import Literal, Self

from pydantic import Field, StrictFloat, StrictInt, model_validator

from auxin.planning.kept_paths import KeptPaths
from auxin.planning.target import Target
from auxin.settings import Settings
from auxin.words.widths import FEED_FORWARD, Stream

Part = Literal["heads", "ffn", "experts", "hidden"]
STREAMS: dict[Part, tuple[Stream, ...]] = {
    "heads": ("query",),
    "ffn": FEED_FORWARD,
    "experts": ("expert",),
    "hidden": ("residual",),
}
ALONE = ("ffn", "experts", "sublayers")
"""What goes whatever the other widths are."""
DEFAULT: tuple[Part, ...] = ("heads", "ffn")
"""What a target shrinks where nothing else is said."""


def check_amount(name: str, amount: int | float, alike: bool) -> None:
    """ValueError for what is neither a share nor a count that can stay.

    Args:
        name: of the setting.
        amount: a share if it is a float, or a count.
        alike: whether all layers keep as many.
    """
    if isinstance(amount, float) and not amount <= 1:
        raise ValueError(f"{name} = {amount} is no share. Give one up to 1.0, or a whole number of units.")
    if isinstance(amount, int) and not alike:
        raise ValueError(f"{name} = {amount} would be that of every layer. Give a share, or uniform = true.")


class Pruning(Settings):
    """What stays: shares (0.5, at most 1.0) or counts (whole numbers) of `heads`, `ffn`, `experts` and `hidden`; or a
    `target`."""

    heads: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Query heads of a layer that stay. They go with their key-value heads."""
    ffn: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Feed-forward units of a layer that stay; of experts, those of each. Where a model has several sizes (of experts
    and of others), a share of each."""
    experts: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Experts of a layer that stay, of those among which a router chooses. Where fewer are left than a token gets, it
    gets all of them."""
    hidden: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Units of the residual that stay, the same in all layers."""
    target: Target | None = None
    """How small or fast the model shall be, instead: `target.parameters`, `target.flops`, `target.latency` or
    `target.latency_ms`."""
    streams: list[Part] | None = Field(default=None, min_length=1)
    """What the target takes from; None: heads and feed-forward units, where they can go."""
    uniform: bool = True
    """Whether every layer keeps as many."""
    normalised: bool = True
    """Where layers may differ, whether scores are standardised within the layer: less their mean, by their spread."""
    keep: KeptPaths = ()
    """Where layers may differ, the paths of those of which all heads, feed-forward units and experts stay, `*` for any
    one part: "model.layers.0"."""
    multiple_of: int = Field(default=1, gt=0)
    """The number of feed-forward units that stay is a multiple of this."""
    part: str | None = None
    """Of a model of several towers the one that is pruned: "text" or "vision"."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.keep and self.uniform:
            raise ValueError(
                "keep: where all layers keep as many units, no layer can keep them all. Set uniform = false."
            )
        given = {name: amount for name in STREAMS if (amount := getattr(self, name)) is not None}
        if self.target is not None and given:
            raise ValueError(f"give target, or {' and '.join(given)}, not both.")
        if self.target is None and not given and self.parts_left is None:
            raise ValueError("give what stays (heads, ffn, experts, hidden), or a target.")
        if self.streams is not None and self.target is None:
            raise ValueError("streams says what a target takes from, and there is no target. Leave it out.")
        if self.streams is not None and len(set(self.streams)) < len(self.streams):
            raise ValueError("streams names one more than once.")
        for name, amount in given.items():
            check_amount(name, amount, self.uniform or name == "hidden")
        return self

    @property
    def chosen(self) -> tuple[Part, ...]:
        """What is pruned."""
        if self.target is not None:
            return tuple(self.streams or DEFAULT)
        return tuple(name for name in STREAMS if getattr(self, name) is not None)

    @property
    def parts_left(self) -> int | float | None:
        """How many attentions and feed-forward parts stay, or what share of them; with a target, how many at least.
        None: all, which is so for methods that prune nothing but widths."""
        return None

    @property
    def optional(self) -> bool:
        """Whether what can't go may stay, since nobody named it."""
        return self.target is not None and self.streams is None
