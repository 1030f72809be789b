"""The words in which a transformer's anatomy is written: streams, scopes, segments, roles of parameters, stacks.

A **stream** is a family of units that grow together: the residual, the query heads (which index the attention's output
too), the key-value heads, the hidden units of the feed-forward part, the vocabulary. A parameter **writes** a stream
with the axis that produces its units (outputs, embeddings, gains, biases) and **reads** it with the axis that consumes
them.

A width belongs to a stream and a **scope**: the model (""), a stack ("encoder.block"), a layer ("model.layers.3"), or
modules in layers ("model.layers.*.mlp.experts"). Where several scopes enclose a place, the innermost one's width holds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal

from auxin.errors import PlanError
from auxin.words.paths import innermost, path_pattern

Stream = Literal["residual", "query", "key_value", "ffn", "expert_ffn", "shared_expert_ffn", "vocabulary"]
FEED_FORWARD: tuple[Stream, ...] = ("ffn", "expert_ffn", "shared_expert_ffn")
"""The streams of hidden units: of dense feed-forward parts (or of experts, where the config has one size for both), of
experts with a size of their own, and of the expert that all tokens share."""
SETTINGS: dict[Stream, str] = {
    "residual": "hidden_size",
    "query": "num_attention_heads",
    "key_value": "num_key_value_heads",
    "ffn": "intermediate_size",
    "expert_ffn": "moe_intermediate_size",
    "shared_expert_ffn": "shared_expert_intermediate_size",
}
"""What the width of a stream is called in the settings of methods."""
Access = Literal["writes", "reads"]
Kind = Literal[
    "matrix",
    "bias",
    "embedding",
    "gain",
    "offset",
    "head",
    "query_gain",
    "key_gain",
    "scale",
    "mixing",
    "shape",
    "length",
]
"""What a parameter is: a matrix between streams, its bias, an embedding (of tokens, positions, types), a norm's gain or
its offset (the norm's bias), the output head, the gain of a norm on queries or keys, a factor of units that a matrix
writes or reads, what mixes a layer's input with its output (AltUp), a number in an activation function or a router that
runs along no stream, or the length that a weight norm gives to a parameter over all units of the residual."""
HeadPart = Literal["query", "key", "value"]
NormPosition = Literal["before", "after_output", "after_residual"]
ResidualBlocks = Literal["one", "recycled", "wide"]


@dataclass(frozen=True)
class Segment:
    """A stretch of an axis: `count` units of `unit` consecutive entries each."""

    stream: Stream
    unit: int
    count: int
    parts: tuple[HeadPart, ...] = ()
    """What a head's unit is made of: its query, key or value, or all three one after another. The attention's output is
    read as values are. Empty where a unit has no head dimensions."""
    part_sizes: tuple[int, ...] = ()
    """Entries of each part; empty where all have the head dimension."""
    scope: str = ""
    """Where this width holds, in the module's words; "" is the whole model."""
    dealt: bool = False
    """Whether the axis is laid out by key-value heads: for each of them its share of every segment, and not one segment
    after the other. All segments of an axis are, or none."""

    @property
    def size(self) -> int:
        """Entries of the segment."""
        return self.unit * self.count

    @property
    def sizes_of_parts(self) -> tuple[int, ...]:
        """Entries of each part."""
        return self.part_sizes or (self.unit // max(len(self.parts), 1),) * len(self.parts)


def laid_out(segments: Sequence[Segment], units: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Where the entries of an axis are: entry i of the axis is entry `laid_out(...)[i]` of its segments one after the
    other. The same numbers, in order, where segments are not dealt out.

    Args:
        segments: of the axis.
        units: how many units each has.
        sizes: how many entries a unit of each has.
    """
    starts = list(accumulate((count * size for count, size in zip(units, sizes, strict=True)), initial=0))
    if not any(segment.dealt for segment in segments):
        return list(range(starts[-1]))
    heads = min(units)
    shares = [count // heads * size for count, size in zip(units, sizes, strict=True)]
    return [
        start + head * share + entry
        for head in range(heads)
        for start, share in zip(starts, shares, strict=False)
        for entry in range(share)
    ]


@dataclass(frozen=True)
class ParameterRole:
    """What the parameters of one pattern are and what their axes run along."""

    pattern: str
    """Dotted name, `*` for one part."""
    axes: tuple[tuple[Segment, ...], ...]
    """Per axis the segments that make it up, concatenated; an empty tuple for an axis along no stream."""
    access: tuple[Access | None, ...]
    """Per axis whether the parameter writes or reads the stream there."""
    kind: Kind
    added: bool = False
    """Whether a brick has it beside the parameters of the module that it replaces or wraps."""

    def matches(self, name: str) -> bool:
        """Whether the parameter `name` has this role."""
        return path_pattern(self.pattern).fullmatch(name) is not None

    def vector(self, axis: int, kind: Kind) -> "ParameterRole":
        """The role of a vector that runs along one axis of this parameter: a bias, or a factor of its units. What reads
        units does not produce them; a factor of them does."""
        access: Access | None = "writes" if self.axes[axis] else None
        return ParameterRole(self.pattern, (self.axes[axis],), (access,), kind)

    def beside(self, axis: int, place: int) -> "ParameterRole":
        """The role of a matrix that does along its axis `place`, 0 or 1, what this parameter does along `axis`, and
        whose other axis runs along no stream (one of two factors, say)."""
        ends = [(self.axes[axis], self.access[axis]), ((), None)]
        (one, how), (other, so) = ends if place == 0 else reversed(ends)
        return ParameterRole(self.pattern, (one, other), (how, so), "matrix")

    def along(self, stream: Stream, access: Access | None = None) -> bool:
        """Whether an axis runs along `stream` (and is accessed so)."""
        return any(
            segment.stream == stream and access in (None, how)
            for segments, how in zip(self.axes, self.access, strict=True)
            for segment in segments
        )


@dataclass(frozen=True)
class LayerStack:
    """A list of like layers that one field of the config counts."""

    path: str
    """The module list: "model.layers"."""
    length_field: str
    """The config's attribute with the number of layers."""
    outputs: tuple[str, ...]
    """Modules of a layer whose output is added to the residual, relative to the layer: "self_attn.o_proj"; or single
    parameters, where a module has others beside (experts): "mlp.experts.down_proj". Layers may lack some."""
    output_norms: tuple[str, ...] = ()
    """Norms between such an output and the residual, relative to the layer."""
    norm_position: NormPosition = "before"
    """Where the norms sit: before each part, after its output, or after the sum of output and residual."""
    entries: tuple[str, ...] = ()
    """The modules whose results, added up, enter the first layer: embedding tables, or one module with all of them."""
    end: str = ""
    """The norm behind the last layer; where there is none, the module that runs the layers."""
    readers: tuple[str, ...] = ()
    """The linear layers that read what leaves the stack, `*` for one part; those that a model lacks are left out."""
    feed_forward: tuple[str, ...] = ("",)
    """The modules of a layer that take the number of feed-forward units from their config, relative to the layer; "" is
    the layer itself."""
    attentions: tuple[str, ...] = ("",)
    """The modules of a layer that take the numbers of heads from their config, relative to the layer."""
    parallel: bool = False
    """Whether all parts of a layer read what enters it (GPT-NeoX), and not each what the one before it left."""
    reader_of_entry: str = ""
    """A module beside the layers that reads what enters the first one (DeBERTa's convolution); "" where none does."""
    layers_stay: str = ""
    """Why there can't be more layers, in a sentence that follows the path of the stack; empty where there can."""
    tower: str = ""
    """The tower that it belongs to, of a model of several; "" where there is one."""

    @property
    def ends_in_norm(self) -> bool:
        """Whether `end` is a norm behind the layers, and not the module that runs them."""
        return not self.path.startswith(f"{self.end}.")

    def is_in(self, part: str) -> bool:
        """Whether `part` names the stack's tower, or a part of its path."""
        return part == self.tower or part in self.path.split(".")

    def is_read_by(self, path: str) -> bool:
        """Whether the module at `path` reads what leaves the stack."""
        return any(path_pattern(reader).fullmatch(path) for reader in self.readers)


@dataclass(frozen=True)
class Width:
    """How many units a stream has in a scope."""

    stream: Stream
    scope: str
    units: int


@dataclass(frozen=True)
class Sizes:
    """The widths of a model, in units: those of its config, and those of narrower scopes that are others."""

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

    @classmethod
    def of(
        cls,
        residual: int,
        query_heads: int,
        key_value_heads: int,
        head_dim: int,
        feed_forward: Mapping[Stream, int | None],
    ) -> "Sizes":
        """The widths of a model whose layers are alike, those of `FEED_FORWARD` by their streams."""
        ffn, expert, shared = (feed_forward.get(stream) for stream in FEED_FORWARD)
        heads = query_heads, key_value_heads, head_dim
        return cls(residual, *heads, ffn, expert_ffn=expert, shared_expert_ffn=shared)

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
        inner = {stream: self.units(stream, scope) for stream in FEED_FORWARD}
        return Sizes.of(self.residual, query, key_value, self.head_dim, inner)

    def with_widths(self, widths: Iterable[Width]) -> "Sizes":
        """The model's widths with these of narrower scopes instead of its own; those that say nothing new are left
        out."""
        given = tuple(widths)
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
    """None: the head dimension is hidden size / heads."""
    epsilon: str | None
    expert_ffn: str | None = None
    shared_expert_ffn: str | None = None
    like_hidden_size: tuple[str, ...] = ()
    """Further values that are the hidden size, under names of their own (OPT's word_embed_proj_dim)."""
    like_heads: tuple[str, ...] = ()
    """Further values that are the number of heads (DeepSeek's num_key_value_heads)."""
    like_head_dim: tuple[str, ...] = ()
    """Values that are hidden size / heads and can be nothing else (Helium's head_dim)."""
    residual_groups: str | None = None
    """The number of groups in which a convolution mixes units of the residual (wav2vec 2.0)."""
    by_stack: Mapping[str, Mapping[Stream, str]] = field(default_factory=dict)
    """Where each stack has widths of its own, their names by the stack's path (BART: encoder_ffn_dim, decoder_ffn_dim);
    the names above are those of the stack whose widths are the model's."""

    def names(self, stream: Stream) -> dict[str, str]:
        """The names under which the config holds the widths of `stream`, by the stack that each is for; "" for all."""
        own = {path: names[stream] for path, names in self.by_stack.items() if stream in names}
        name = self.of(stream)
        return own or ({"": name} if name else {})

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
        }
        return known.get(stream)


@dataclass(frozen=True)
class Anatomy:
    """Everything about a model's build that a change of its size has to respect."""

    family: str
    sizes: Sizes
    fields: ConfigFields
    stacks: tuple[LayerStack, ...]
    roles: tuple[ParameterRole, ...]
    norm: Literal["rms", "layer"]
    norm_has_gain: bool
    """Whether the norms inside the layers have gains."""
    tied: bool
    """Whether the head is the token embedding."""
    final_norm: str | None
    """The module whose gain comes right before the head; None where that norm has no gain."""
    head: str | None
    """The output head's module."""
    embeddings: tuple[str, ...]
    """The parameters that are added up to the first residual."""
    epsilon: float = 0.0
    """Epsilon of the norms; set where the config holds it."""
    rotary_dim: int = 0
    """How many of a head's dimensions are rotated by position; 0: none."""
    rope_type: str = "default"
    """How the rotary frequencies depend on the dimension, in the words of transformers."""
    rotary_pairs: Literal["halves", "neighbours"] = "halves"
    """Which dimensions are rotated together: i and i + r/2 of r, or 2i and 2i + 1."""
    rotary_dim_stays: bool = False
    """Whether the config has a number of rotated dimensions, and not their share of the head dimension (GPT-J)."""
    attention_scaled: bool = True
    """Whether attention scores are divided by the square root of the head dimension."""
    logits_scaled: bool = False
    """Whether the logits are divided by the square root of the hidden size (T5)."""
    embedding_scaled: bool = False
    """Whether token embeddings are multiplied by the square root of the hidden size (Gemma)."""
    gain_offset: float = 0.0
    """What the norms add to their stored gain (Gemma: 1)."""
    heads_divide_hidden_size: bool = False
    """Whether the config insists on it although the head dimension is its own."""
    embedding_norm: str | None = None
    """The norm between the embeddings and the first layer (BERT, BLOOM), whose result is the residual."""
    heads_clipped: str = ""
    """What clips queries and keys behind their matrices, in words: "clip_qkv = 8"; empty where nothing does."""
    single_key_value_head: bool = False
    """Whether all query heads read one key-value head, whatever their number, and no value of the config says so."""
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    """RMS norms on queries and keys: over each head, or over all heads together."""
    residual_blocks: ResidualBlocks = "one"
    """Whether the residual stream between layers is one block, or several (AltUp) that come from one embedding and end
    as one ("recycled"), or that embedding and head hold too ("wide")."""
    heads_stay: str = ""
    """Why the number of heads can't change although their dimension can, in a sentence that follows
    "num_attention_heads = 8: "; empty where it can."""
    before_norms: tuple[str, ...] = ()
    """Modules outside the layers whose output, with the residual or alone, goes into a norm right away."""
    never_hidden_size: tuple[tuple[int, str], ...] = ()
    """Hidden sizes that the model can't get, and why, in sentences that follow "hidden_size = 64: "."""
    residual_groups: int = 0
    """In how many groups, one after the other, a convolution mixes units of the residual; 0: none does. Whole copies
    have groups of their own."""
    no_padding: str = ""
    """What padding of the residual does not pass, whatever the norms are, so that it takes whole copies alone, in words
    that follow "does not pass "; empty where there is nothing."""
    bare: tuple[str, ...] = ()
    """What reads the residual without a norm before it: patterns of parameters, and outputs of the model by name."""
    towers: tuple[str, ...] = ()
    """The towers of a model of several where none is chosen: every one has widths of its own, which the anatomy of one
    tower tells. Its parameters run along no stream then, and `sizes` and `fields` are those of the first."""
    ffn_follows: FollowingWidth | None = None
    """How the number of feed-forward units follows from the hidden size, where the config has no value for it; None: in
    proportion."""
    fixed_widths: tuple[tuple[Stream, str], ...] = ()
    """The streams whose width can't change, because of the architecture or of a brick, and why, in sentences that
    follow "WIDTH = 64: "."""

    @property
    def residual_stays(self) -> bool:
        """Whether the residual takes no other width, or none but whole copies in order."""
        return self.residual_groups > 0 or any(stream == "residual" for stream, _ in self.fixed_widths)

    @property
    def token_embeddings(self) -> list[str]:
        """The parameters that hold a row for each token; a model of two stacks may have several."""
        return [role.pattern for role in self.roles if role.kind == "embedding" and role.along("vocabulary")]

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated by position."""
        return self.rotary_dim > 0

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key-value head, in the model or in one of its layers."""
        places = [self.sizes.at(scope) for scope in ("", *(width.scope for width in self.sizes.scoped))]
        return any(sizes.key_value_heads < sizes.query_heads for sizes in places)

    @property
    def norm_position(self) -> NormPosition:
        """Where the norms sit, the same in all stacks."""
        return self.stacks[0].norm_position

    def scopes(self, stream: Stream) -> list[str]:
        """The scopes by which the roles tell the widths of `stream` apart; "" alone where it has one width."""
        segments = (segment for role in self.roles for axis in role.axes for segment in axis)
        return list(dict.fromkeys(segment.scope for segment in segments if segment.stream == stream))

    def stack_of(self, path: str) -> LayerStack | None:
        """The stack at or in which `path`, which may be a pattern, lies."""
        return next((s for s in self.stacks if path == s.path or path.startswith(f"{s.path}.")), None)

    def role(self, name: str) -> ParameterRole:
        """The role of the parameter `name`; PlanError when it has none."""
        for role in self.roles:
            if role.matches(name):
                return role
        raise PlanError(f"The {self.family} model has a parameter {name} that its anatomy does not know.")


@dataclass(frozen=True)
class Axes:
    """The segments of a model's streams, from which roles are written down."""

    residual: tuple[Segment, ...]
    query: tuple[Segment, ...]
    key: tuple[Segment, ...]
    value: tuple[Segment, ...]
    attended: tuple[Segment, ...]
    """The attention's output before it goes back to the residual."""
    ffn: tuple[Segment, ...]
    vocabulary: tuple[Segment, ...]

    @classmethod
    def of(cls, sizes: Sizes, vocabulary: int) -> "Axes":
        """The axes of a model of these sizes."""
        return cls(
            residual=(Segment("residual", 1, sizes.residual),),
            query=(Segment("query", sizes.head_dim, sizes.query_heads, ("query",)),),
            key=(Segment("key_value", sizes.head_dim, sizes.key_value_heads, ("key",)),),
            value=(Segment("key_value", sizes.head_dim, sizes.key_value_heads, ("value",)),),
            attended=(Segment("query", sizes.head_dim, sizes.query_heads, ("value",)),),
            ffn=(Segment("ffn", 1, sizes.ffn),) if sizes.ffn else (),
            vocabulary=(Segment("vocabulary", 1, vocabulary),),
        )


def linear(
    module: str, output: tuple[Segment, ...], read: tuple[Segment, ...], kind: Kind = "matrix"
) -> list[ParameterRole]:
    """The roles of a Linear's weight (out, in) and bias (out,)."""
    access: tuple[Access | None, ...] = ("writes" if output else None, "reads" if read else None)
    return [
        ParameterRole(f"{module}.weight", (output, read), access, kind),
        ParameterRole(f"{module}.bias", (output,), ("writes" if output else None,), "bias"),
    ]


def conv1d(module: str, output: tuple[Segment, ...], read: tuple[Segment, ...]) -> list[ParameterRole]:
    """The roles of a GPT-2 Conv1D's weight (in, out) and bias (out,)."""
    return [
        ParameterRole(f"{module}.weight", (read, output), ("reads", "writes"), "matrix"),
        ParameterRole(f"{module}.bias", (output,), ("writes",), "bias"),
    ]


def norm(module: str, segments: tuple[Segment, ...], kind: Kind = "gain") -> list[ParameterRole]:
    """The roles of a norm's gain and offset."""
    return [
        ParameterRole(f"{module}.weight", (segments,), ("writes" if segments else None,), kind),
        ParameterRole(f"{module}.bias", (segments,), ("writes" if segments else None,), "offset"),
    ]


def embedding(parameter: str, *axes: tuple[Segment, ...]) -> ParameterRole:
    """The role of an embedding: it writes along every axis that has a stream."""
    return ParameterRole(parameter, axes, tuple("writes" if segments else None for segments in axes), "embedding")
