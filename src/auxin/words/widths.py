"""The widths of a transformer: the streams that have them, how many units each has where, and what configs call them.

A **stream** is a family of units that grow together: the residual, the query heads (which index the attention's output
too), the key-value heads, the hidden units of the feed-forward part, whole experts, the vocabulary. Whole attentions
and feed-forward parts ("sublayer") have a name of the same kind for where they go as units do; they are no width.

A width belongs to a stream and a **scope**: the model (""), a stack ("encoder.block"), a layer ("model.layers.3"), or
modules in layers ("model.layers.*.mlp.experts"). Where several scopes enclose a place, the innermost one's width holds.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

from auxin.words.paths import innermost

Stream = Literal[
    "residual", "query", "key_value", "ffn", "expert_ffn", "shared_expert_ffn", "expert", "vocabulary", "sublayer"
]
FEED_FORWARD: tuple[Stream, ...] = ("ffn", "expert_ffn", "shared_expert_ffn")
"""The streams of hidden units: of dense feed-forward parts (or of experts, where the config has one size for both), of
experts with a size of their own, and of the expert that all tokens share."""
IN_FEED_FORWARD: tuple[Stream, ...] = (*FEED_FORWARD, "expert")
"""The streams of the feed-forward part of a layer: its hidden units, and the experts among which a router chooses."""
SETTINGS: dict[Stream, str] = {
    "residual": "hidden_size",
    "query": "num_attention_heads",
    "key_value": "num_key_value_heads",
    "ffn": "intermediate_size",
    "expert_ffn": "moe_intermediate_size",
    "shared_expert_ffn": "shared_expert_intermediate_size",
    "expert": "num_experts",
}
"""What the width of a stream is called in the settings of methods."""


@dataclass(frozen=True)
class Width:
    """How many units a stream has in a scope."""

    stream: Stream
    scope: str
    units: int


@dataclass(frozen=True)
class Sizes:
    """The widths of a model, in units: those of its config, and those of narrower scopes that are others. Of stages
    with a residual each the model's are those of the first."""

    residual: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    ffn: int | None
    """None where the architecture has no such units; so for those of experts."""
    scoped: tuple[Width, ...] = ()
    """The widths that differ from those of the scopes around them; empty where all layers are alike."""
    expert_ffn: int | None = None
    shared_expert_ffn: int | None = None
    experts: int | None = None
    """Those among which a router chooses, in a layer that has some."""

    @classmethod
    def of(
        cls,
        residual: int,
        query_heads: int,
        key_value_heads: int,
        head_dim: int,
        feed_forward: Mapping[Stream, int | None],
    ) -> "Sizes":
        """The widths of a model whose layers are alike, those of `IN_FEED_FORWARD` by their streams."""
        ffn, expert, shared, experts = (feed_forward.get(stream) for stream in IN_FEED_FORWARD)
        heads = query_heads, key_value_heads, head_dim
        return cls(residual, *heads, ffn, expert_ffn=expert, shared_expert_ffn=shared, experts=experts)

    def units(self, stream: Stream, scope: str = "") -> int | None:
        """The units of `stream` at `scope`, which are those of the innermost scope around it that has a width; None
        where there are none (a vocabulary, or feed-forward units of an architecture without)."""
        widths = self._widths(stream)
        return widths[innermost(scope, widths)]

    def at(self, scope: str) -> "Sizes":
        """The widths that hold at `scope`, as those of a model."""
        query, key_value = self.units("query", scope), self.units("key_value", scope)
        assert query is not None
        assert key_value is not None
        inner = {stream: self.units(stream, scope) for stream in IN_FEED_FORWARD}
        residual = self.units("residual", scope)
        assert residual is not None
        return Sizes.of(residual, query, key_value, self.head_dim, inner)

    def with_widths(self, widths: Iterable[Width]) -> "Sizes":
        """The model's widths with these of narrower scopes instead of its own, of several for one the last;
        those that say nothing new are left out."""
        given = tuple({(width.stream, width.scope): width for width in widths}.values())
        others = {width: replace(self, scoped=tuple(w for w in given if w != width)) for width in given}
        return replace(self, scoped=tuple(w for w in others if w.units != others[w].units(w.stream, w.scope)))

    def _widths(self, stream: Stream) -> dict[str, int | None]:
        return {"": self._model_wide(stream)} | {w.scope: w.units for w in self.scoped if w.stream == stream}

    def _model_wide(self, stream: Stream) -> int | None:
        known = {
            "residual": self.residual,
            "query": self.query_heads,
            "key_value": self.key_value_heads,
            "ffn": self.ffn,
            "expert_ffn": self.expert_ffn,
            "shared_expert_ffn": self.shared_expert_ffn,
            "expert": self.experts,
        }
        return known.get(stream)


@dataclass(frozen=True)
class FollowingWidth:
    """A width that follows from the hidden size."""

    ratio: Fraction
    """How many units for each of the residual, the product rounded down."""
    multiple: int = 1
    """And then up to a multiple of this."""

    def units(self, hidden: int) -> int:
        """The width for the hidden size `hidden`."""
        return -(-int(self.ratio * hidden) // self.multiple) * self.multiple


@dataclass(frozen=True)
class ConfigFields:
    """Under which names the config holds the widths, dotted where a config in it does; None where it has no such
    value."""

    hidden_size: str
    heads: str
    key_value_heads: str | None
    ffn: str | None
    head_dim: str | None
    """None: the head dimension is hidden size / heads, unless it can be said (`unsaid_head_dim`)."""
    epsilon: str | None
    expert_ffn: str | None = None
    shared_expert_ffn: str | None = None
    experts: str | None = None
    experts_per_token: str | None = None
    """How many experts a router chooses for a token."""
    like_hidden_size: tuple[str, ...] = ()
    """Further values that are the hidden size, under names of their own (OPT's word_embed_proj_dim)."""
    like_heads: tuple[str, ...] = ()
    """Further values that are the number of heads (DeepSeek's num_key_value_heads)."""
    like_head_dim: tuple[str, ...] = ()
    """Values that are hidden size / heads and can be nothing else (Helium's head_dim)."""
    unsaid_head_dim: str | None = None
    """The name under which the config can say the head dimension, where it doesn't yet and hidden size / heads holds.
    Growth leaves it so; what prunes heads or the residual alone says it."""
    residual_groups: str | None = None
    """The number of groups in which a convolution mixes units of the residual (wav2vec 2.0)."""
    of_layers: bool = False
    """Whether the config says no width of a layer as a number (SegFormer's lists, ratios of them; a ResNet's halves):
    linear layers, convolutions and norms take them one by one, and what runs goes by their shapes. The names of widths
    are empty then, and the head dimension stays where heads go."""
    by_stack: Mapping[str, Mapping[Stream, str]] = field(default_factory=dict)
    """Where each stack has widths of its own, their names by the stack's path (BART: encoder_ffn_dim, decoder_ffn_dim);
    the names above are those of the stack whose widths are the model's."""

    def names(self, stream: Stream) -> dict[str, str]:
        """The names under which the config holds the widths of `stream`, by the stack that each is for; "" for all."""
        own = {path: names[stream] for path, names in self.by_stack.items() if stream in names}
        name = self.of(stream)
        return own or ({"": name} if name else {})

    @property
    def heads_are_bound(self) -> bool:
        """Whether the hidden size can be nothing but heads x head dimension."""
        return self.head_dim is None and self.unsaid_head_dim is None and not self.of_layers

    @property
    def undotted(self) -> "ConfigFields":
        """The names in the config within that holds the values, which is the one that its modules have."""
        return self.renamed(lambda name: name.rpartition(".")[2])

    def renamed(self, rename: Callable[[str], str]) -> "ConfigFields":
        """The fields with other names."""
        names: dict[str, Any] = {
            field: rename(name) if isinstance(name, str) else tuple(map(rename, name))
            for field, name in vars(self).items()
            if isinstance(name, str | tuple)
        }
        own = {path: {stream: rename(name) for stream, name in of.items()} for path, of in self.by_stack.items()}
        return replace(self, **names, by_stack=own)

    def of(self, stream: Stream) -> str | None:
        """The name under which the config holds the width of `stream` of the model."""
        known = {
            "residual": self.hidden_size,
            "query": self.heads,
            "key_value": self.key_value_heads,
            "ffn": self.ffn,
            "expert_ffn": self.expert_ffn,
            "shared_expert_ffn": self.shared_expert_ffn,
            "expert": self.experts,
        }
        return known.get(stream)
