"""The words in which a transformer's anatomy is written: streams, segments, roles of parameters, stacks of layers.

A **stream** is a family of units that grow together: the residual, the query heads (which index the attention's output
too), the key-value heads, the hidden units of the feed-forward part, the vocabulary. A parameter **writes** a stream
with the axis that produces its units (outputs, embeddings, gains, biases) and **reads** it with the axis that consumes
them.
"""

from dataclasses import dataclass
from typing import Literal

from auxin.errors import PlanError
from auxin.words.paths import path_pattern

Stream = Literal["residual", "query", "key_value", "ffn", "vocabulary"]
Access = Literal["writes", "reads"]
Kind = Literal["matrix", "bias", "embedding", "gain", "offset", "head", "query_gain", "key_gain", "mixing"]
"""What a parameter is: a matrix between streams, its bias, an embedding (of tokens, positions, types), a norm's gain or
its offset (the norm's bias), the output head, the gain of a norm on queries or keys, or what mixes a layer's input with
its output (AltUp)."""
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
    """What a head's unit is made of, a head dimension each: its query, key or value, or all three one after another.
    The attention's output is read as values are. Empty where a unit has no head dimensions."""

    @property
    def size(self) -> int:
        """Entries of the segment."""
        return self.unit * self.count


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

    def matches(self, name: str) -> bool:
        """Whether the parameter `name` has this role."""
        return path_pattern(self.pattern).fullmatch(name) is not None

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
    """Modules of a layer whose output is added to the residual, relative to the layer: "self_attn.o_proj"."""
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
    parallel: bool = False
    """Whether all parts of a layer read what enters it (GPT-NeoX), and not each what the one before it left."""

    @property
    def ends_in_norm(self) -> bool:
        """Whether `end` is a norm behind the layers, and not the module that runs them."""
        return not self.path.startswith(f"{self.end}.")

    def is_read_by(self, path: str) -> bool:
        """Whether the module at `path` reads what leaves the stack."""
        return any(path_pattern(reader).fullmatch(path) for reader in self.readers)


@dataclass(frozen=True)
class Sizes:
    """The widths of a model, in units."""

    residual: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    ffn: int | None


@dataclass(frozen=True)
class ConfigFields:
    """Under which names the config holds the widths; None where it has no such value."""

    hidden_size: str
    heads: str
    key_value_heads: str | None
    ffn: str | None
    head_dim: str | None
    """None: the head dimension is hidden size / heads."""
    epsilon: str | None


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
    attention_scaled: bool = True
    """Whether attention scores are divided by the square root of the head dimension."""
    logits_scaled: bool = False
    """Whether the tied head's logits are divided by the square root of the hidden size (T5)."""
    embedding_scaled: bool = False
    """Whether token embeddings are multiplied by the square root of the hidden size (Gemma)."""
    gain_offset: float = 0.0
    """What the norms add to their stored gain (Gemma: 1)."""
    heads_divide_hidden_size: bool = False
    """Whether the config insists on it although the head dimension is its own."""
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    """RMS norms on queries and keys: over each head, or over all heads together."""
    residual_blocks: ResidualBlocks = "one"
    """Whether the residual stream between layers is one block, or several (AltUp) that come from one embedding and end
    as one ("recycled"), or that embedding and head hold too ("wide")."""

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated by position."""
        return self.rotary_dim > 0

    @property
    def epsilon_field(self) -> str | None:
        """The config's attribute with the epsilon of the norms; None when it is fixed."""
        return self.fields.epsilon

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key-value head."""
        return self.sizes.key_value_heads < self.sizes.query_heads

    @property
    def norm_position(self) -> NormPosition:
        """Where the norms sit, the same in all stacks."""
        return self.stacks[0].norm_position

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
    return [
        ParameterRole(f"{module}.weight", (output, read), ("writes" if output else None, "reads"), kind),
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
