"""The anatomy of a transformer: its widths, the roles of its parameters, its stacks of layers, and what keeps it from
another size. `auxin.models.anatomy` has those of the architectures."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from auxin.errors import PlanError
from auxin.words.paths import encloses, path_pattern
from auxin.words.roles import ParameterRole
from auxin.words.widths import ConfigFields, FollowingWidth, Sizes, Stream

NormPosition = Literal["before", "after_output", "after_residual"]
ResidualBlocks = Literal["one", "recycled", "wide"]


@dataclass(frozen=True)
class LayerStack:
    """A list of like layers that one field of the config counts."""

    path: str
    """The module list: "model.layers"."""
    length_field: str
    """The config's attribute with the number of layers; "" where a list has those of several stacks."""
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
    layers_shared: bool = False
    """Whether its layers share their parameters and are run several times."""
    causal: bool = False
    """Whether its attentions see no later tokens although their modules don't say so (`is_causal`)."""
    maps: bool = False
    """Whether its layers give maps (samples, width, rows, columns), and not tokens (samples, tokens, width)."""
    tower: str = ""
    """The tower that it belongs to, of a model of several; "" where there is one."""

    @property
    def ends_in_norm(self) -> bool:
        """Whether `end` is a norm behind the layers, and not the module that runs them."""
        return not self.path.startswith(f"{self.end}.")

    def parts(self, parameters: Collection[str]) -> tuple[str, ...]:
        """The modules whose outputs are the parts of a layer: `outputs`, but a whole feed-forward part where it is some
        of its parameters that give them (experts).

        Args:
            parameters: the names of a layer's, relative to it; or those of all layers.
        """
        within = [name for name in self.outputs if name in parameters]
        whole = [part for part in self.feed_forward if part and any(name.startswith(f"{part}.") for name in within)]
        found = (next((part for part in whole if name.startswith(f"{part}.")), name) for name in self.outputs)
        return tuple(dict.fromkeys(found))

    def is_in(self, part: str) -> bool:
        """Whether `part` names the stack's tower, a part of its path, or its path up to some part."""
        return part == self.tower or part in self.path.split(".") or encloses(part, self.path)

    def is_read_by(self, path: str) -> bool:
        """Whether the module at `path` reads what leaves the stack."""
        return any(path_pattern(reader).fullmatch(path) for reader in self.readers)


@dataclass(frozen=True)
class Routing:
    """How many experts routers choose for a token, and among which."""

    per_token: int
    """How many where nothing else is said: those of the config."""
    groups: int = 1
    """Stretches of equally many experts; a token gets experts of its best groups alone."""
    chosen_groups: int = 1
    """How many groups those are."""
    scored_by: int = 1
    """How many of a group's experts say how good it is, so that it has at least that many."""

    def most(self, experts: int) -> int:
        """How many of `experts` a token can get, and gets at most."""
        return min(self.per_token, experts // self.groups * self.chosen_groups)


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
    unnormed_readers: tuple[str, ...] = ()
    """What reads the residual without a norm before it: patterns of parameters, and outputs of the model by name."""
    towers: tuple[str, ...] = ()
    """The towers of a model of several where none is chosen: every one has widths of its own, which the anatomy of one
    tower tells. Its parameters run along no stream then, and `sizes` and `fields` are those of the first."""
    ffn_follows: FollowingWidth | None = None
    """How the number of feed-forward units follows from the hidden size, where the config has no value for it; None: in
    proportion."""
    has_stages: bool = False
    """Whether every stack has a residual stream of its own, one after the other, whose widths may differ. Their scopes
    are the stacks then."""
    routing: Routing | None = None
    """How routers choose among the experts of a layer; None where there are no routers."""
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
