"""Configuration of TokenFormer language models."""

import math
import sys
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from auxin.errors import ConfigError, shown, unknown_name
from auxin.nn.scores import SCALED, Gelu, ScoreFunction

Slot = Literal["qkv", "proj", "ffn"]
SLOTS: tuple[Slot, ...] = get_args(Slot)
"""The three places of a layer whose parameter tokens are counted separately."""

PUBLISHED: dict[str, Any] = {
    "score_function": "l2_norm_gelu",
    "gelu": "erf",
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000.0,
    "layer_norm_eps": 1e-5,
}
"""What the released models share; a new model's `score_function` and `partial_rotary_factor` are others (see
`TokenFormerConfig`)."""


class TokenFormerConfig(PreTrainedConfig):
    """Shape and constants of a TokenFormer (arXiv 2410.23168, section 3).

    The default size is the released 150M model's. Three defaults are not the paper's, because in short trainings a
    small TokenFormer then learns as well as a dense Transformer, and much worse with the paper's (docs/parity.md):
    scores become weights without a norm, keys are therefore drawn so that scores start at a size of 1, and each head is
    rotated whole.
    `PUBLISHED` asks for the paper's; the presets, converted checkpoints, and whatever was saved before have them.

    Parameter tokens are given per slot: `qkv` (query, key and value have this many each), `proj` (the output projection
    of the attention) and `ffn`. A slot's tokens form one or more groups, each normalised on its own where there are
    norms; an int means one group. The lists of the three slots may differ in length. `*_tau` holds the scale of each
    group's normalised scores; None means the square root of the group's size, the rule of the official code.

    Args:
        vocab_size: rows of the token embedding.
        hidden_size: width d of the residual stream; growth never changes it.
        num_hidden_layers: number of layers L.
        num_attention_heads: heads of the token-token attention; must divide `hidden_size`.
        qkv_tokens: parameter tokens of query, key and value each: an int, or the sizes of the groups.
        proj_tokens: parameter tokens of the attention's output projection, likewise.
        ffn_tokens: parameter tokens of the feed-forward part, likewise.
        qkv_tau: scale of each group of `qkv_tokens`, or None.
        proj_tau: scale of each group of `proj_tokens`, or None.
        ffn_tau: scale of each group of `ffn_tokens`, or None.
        score_function: how scores become weights, see `auxin.nn.pattention.pattention`: "l2_norm_gelu" (the paper's),
            "gelu_l2_norm", "gelu" (a new model's), "linear" or "softmax".
        qkv_score_function: another one for query, key and value, or None.
        proj_score_function: another one for the attention's output projection, or None.
        ffn_score_function: another one for the feed-forward part, or None.
        gelu: "erf" (the official PyTorch code) or "tanh" (the official JAX code).
        pattention_eps: added to the norm of the scores.
        qkv_eps: what is added to the norm of each group of `qkv_tokens` instead, or None for `pattention_eps`. Where
            every token of a group was copied c times, the norm is sqrt(c) times as large, and so must this be.
        proj_eps: the same for each group of `proj_tokens`, or None.
        ffn_eps: the same for each group of `ffn_tokens`, or None.
        partial_rotary_factor: fraction of each head's dimensions that is rotated; 0 means no position encoding.
        rope_theta: base of the rotary frequencies.
        layer_norm_eps: epsilon of all layer norms; those inside the layers have no parameters, the final one has.
        max_position_embeddings: context length in tokens; nothing is allocated by it.
        tie_word_embeddings: whether the output head is the embedding.
        initializer_range: standard deviation of embeddings at initialisation, and of keys that are normalised.
        key_initializer_range: standard deviation of keys, or None: `initializer_range`, but 1 / sqrt(d) in slots whose
            score function is "gelu" or "linear", so that the scores of a normalised input start at a root mean square
            of 1.
        value_initializer_range: standard deviation of values, or None: 2 / (L sqrt(d)), the released code's.
        use_cache: whether the model returns its keys and values for decoding.
        bos_token_id: id that starts a text; `<|endoftext|>` of the official tokenizer.
        eos_token_id: id (or ids) that ends a text.
        pad_token_id: id of padding.

    Raises:
        ConfigError: a value is impossible; the message names the field, the value and the mend.
    """

    model_type = "tokenformer"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50304
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    qkv_tokens: int | list[int] = 768
    proj_tokens: int | list[int] = 768
    ffn_tokens: int | list[int] = 3072
    qkv_tau: list[float] | None = None
    proj_tau: list[float] | None = None
    ffn_tau: list[float] | None = None
    score_function: ScoreFunction = "gelu"
    qkv_score_function: ScoreFunction | None = None
    proj_score_function: ScoreFunction | None = None
    ffn_score_function: ScoreFunction | None = None
    gelu: Gelu = "erf"
    pattention_eps: float = 1e-6
    qkv_eps: list[float] | None = None
    proj_eps: list[float] | None = None
    ffn_eps: list[float] | None = None
    partial_rotary_factor: float = 1.0
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    key_initializer_range: float | None = None
    value_initializer_range: float | None = None
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            _check_positive_int(field, getattr(self, field))
        for slot in SLOTS:
            setattr(self, f"{slot}_tokens", _group_sizes(f"{slot}_tokens", getattr(self, f"{slot}_tokens")))
            for field in (f"{slot}_tau", f"{slot}_eps"):
                setattr(self, field, self._checked_numbers(field, slot))
        self._check_heads()
        for field in ("initializer_range", "key_initializer_range", "value_initializer_range"):
            _check_deviation(field, getattr(self, field), optional=field != "initializer_range")
        _check_named("score_function", self.score_function, get_args(ScoreFunction))
        _check_named("gelu", self.gelu, get_args(Gelu))
        for slot in SLOTS:
            _check_named(f"{slot}_score_function", self.slot_score_function(slot), get_args(ScoreFunction))
        super().__post_init__(**kwargs)

    def _checked_numbers(self, field: str, slot: Slot) -> list[float] | None:
        """A positive number for each group of `slot`, or None."""
        numbers, sizes = getattr(self, field), self.group_sizes(slot)
        if numbers is None:
            return None
        if not isinstance(numbers, (list, tuple)) or len(numbers) != len(sizes):
            raise ConfigError(
                f"{field} must be a list of one number per group of {slot}_tokens ({len(sizes)}), or be left out; "
                f"received {shown(numbers)}."
            )
        if not all(_is_number(value) and math.isfinite(value) and value > 0 for value in numbers):
            raise ConfigError(f"{field} must hold positive finite numbers, received {numbers!r}.")
        return [float(value) for value in numbers]

    def _check_heads(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"num_attention_heads must divide hidden_size, received {self.num_attention_heads} heads for a hidden "
                f"size of {self.hidden_size}. Choose one of "
                f"{[n for n in range(1, min(self.hidden_size, 64) + 1) if self.hidden_size % n == 0]}."
            )
        if not _is_number(self.partial_rotary_factor) or not 0 <= self.partial_rotary_factor <= 1:
            raise ConfigError(f"partial_rotary_factor must lie in 0..1, received {self.partial_rotary_factor!r}.")
        if self.rotary_dim % 2 or (self.partial_rotary_factor > 0 and self.rotary_dim == 0):
            raise ConfigError(
                f"partial_rotary_factor {self.partial_rotary_factor} of {self.head_dim} dimensions per head rotates "
                f"{self.rotary_dim}, which must be even and not zero (0.0 asks for no position encoding). "
                "Use fewer heads or another factor."
            )

    def group_sizes(self, slot: Slot) -> list[int]:
        """The sizes of the groups of `slot`, oldest first."""
        return list(getattr(self, f"{slot}_tokens"))

    def slot_score_function(self, slot: Slot) -> ScoreFunction:
        """How scores of `slot` become weights, the default filled in."""
        own: ScoreFunction | None = getattr(self, f"{slot}_score_function")
        return self.score_function if own is None else own

    def key_std(self, score_function: ScoreFunction) -> float:
        """Standard deviation of fresh keys whose scores become weights by `score_function`."""
        if self.key_initializer_range is not None:
            return self.key_initializer_range
        return self.initializer_range if score_function in SCALED else self.hidden_size**-0.5

    @property
    def value_std(self) -> float:
        """Standard deviation of fresh values."""
        if self.value_initializer_range is not None:
            return self.value_initializer_range
        return 2 / (self.num_hidden_layers * math.sqrt(self.hidden_size))

    def group_tau(self, slot: Slot) -> list[float]:
        """The scale of each group of `slot`, defaults filled in."""
        tau = getattr(self, f"{slot}_tau")
        return [math.sqrt(size) for size in self.group_sizes(slot)] if tau is None else list(tau)

    def group_eps(self, slot: Slot) -> list[float]:
        """What is added to the norm of each group of `slot`, defaults filled in."""
        eps = getattr(self, f"{slot}_eps")
        return [self.pattention_eps] * len(self.group_sizes(slot)) if eps is None else list(eps)

    @property
    def num_groups(self) -> int:
        """The number of groups of the slot that has most."""
        return max(len(self.group_sizes(slot)) for slot in SLOTS)

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of one attention head."""
        return int(self.partial_rotary_factor * self.head_dim)

    def num_parameters(self) -> int:
        """Parameters of the language model: 2 L d (3 n_qkv + n_proj + n_ffn) + V d (twice when untied) + 2 d."""
        tokens = 3 * sum(self.group_sizes("qkv")) + sum(self.group_sizes("proj")) + sum(self.group_sizes("ffn"))
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return 2 * self.num_hidden_layers * self.hidden_size * tokens + embeddings + 2 * self.hidden_size


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_deviation(field: str, value: Any, optional: bool) -> None:
    if optional and value is None:
        return
    if not _is_number(value) or not 0 <= value <= sys.float_info.max:
        raise ConfigError(
            f"{field} is a standard deviation and must be a finite number of at least 0"
            f"{', or null' if optional else ''}, received {shown(value)}."
        )


def _check_named(field: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(unknown_name(field, str(value), known))


def _check_positive_int(field: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{field} must be a positive whole number, received {value!r}.")


def _group_sizes(field: str, value: Any) -> list[int]:
    sizes = list(value) if isinstance(value, (list, tuple)) else [value]
    if not sizes:
        raise ConfigError(f"{field} must be a positive whole number or a list of them, received an empty list.")
    for size in sizes:
        _check_positive_int(field, size)
    return sizes
