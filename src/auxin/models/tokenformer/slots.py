"""What the configs of models with parameter tokens share: sizes, slots of tokens and their groups, constants of the
scores, and how fresh tokens are drawn."""

import math
import sys
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from auxin.errors import ConfigError, shown, unknown_name
from auxin.nn.scores import SCALED, Gelu, ScoreFunction

Slot = Literal["qkv", "proj", "ffn"]
SLOTS: tuple[Slot, ...] = get_args(Slot)
"""The three places of a layer whose parameter tokens are counted separately."""


class ParameterTokensConfig(PreTrainedConfig):
    """Sizes and constants of layers whose weights all sit in Pattention (arXiv 2410.23168, section 3).

    The base of `TokenFormerConfig` and `VisionTokenFormerConfig`, and the type to ask for where no more than the tokens
    matters; no model has this config alone.

    Parameter tokens are given per slot: `qkv` (query, key and value have this many each), `proj` (the output projection
    of the attention) and `ffn`. A slot's tokens form one or more groups, each normalised on its own where there are
    norms; an int means one group. The lists of the three slots may differ in length. `*_tau` holds the scale of each
    group's normalised scores; None means the square root of the group's size, the rule of the official code.

    Args:
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
        layer_norm_eps: epsilon of all layer norms.
        initializer_range: standard deviation of embeddings at initialisation, and of keys that are normalised.
        key_initializer_range: standard deviation of keys, or None: `initializer_range`, but 1 / sqrt(d) in slots whose
            score function is "gelu" or "linear", so that the scores of a normalised input start at a root mean square
            of 1.
        value_initializer_range: standard deviation of values, or None: 2 / (L sqrt(d)), the released code's.

    Raises:
        ConfigError: a value is impossible; the message names the field, the value and the mend.
    """

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
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    key_initializer_range: float | None = None
    value_initializer_range: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            check_positive_int(field, getattr(self, field))
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
        if not all(is_number(value) and math.isfinite(value) and value > 0 for value in numbers):
            raise ConfigError(f"{field} must hold positive finite numbers, received {numbers!r}.")
        return [float(value) for value in numbers]

    def _check_heads(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"num_attention_heads must divide hidden_size, received {self.num_attention_heads} heads for a hidden "
                f"size of {self.hidden_size}. Choose one of "
                f"{[n for n in range(1, min(self.hidden_size, 64) + 1) if self.hidden_size % n == 0]}."
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
    def token_parameters(self) -> int:
        """Parameters of all parameter tokens: 2 L d (3 n_qkv + n_proj + n_ffn)."""
        tokens = 3 * sum(self.group_sizes("qkv")) + sum(self.group_sizes("proj")) + sum(self.group_sizes("ffn"))
        return 2 * self.num_hidden_layers * self.hidden_size * tokens


def is_number(value: Any) -> bool:
    """Whether `value` is a number; a truth value is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_deviation(field: str, value: Any, optional: bool) -> None:
    if optional and value is None:
        return
    if not is_number(value) or not 0 <= value <= sys.float_info.max:
        raise ConfigError(
            f"{field} is a standard deviation and must be a finite number of at least 0"
            f"{', or null' if optional else ''}, received {shown(value)}."
        )


def _check_named(field: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(unknown_name(field, str(value), known))


def check_positive_int(field: str, value: Any) -> None:
    """ConfigError where `value` is no positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{field} must be a positive whole number, received {value!r}.")


def _group_sizes(field: str, value: Any) -> list[int]:
    sizes = list(value) if isinstance(value, (list, tuple)) else [value]
    if not sizes:
        raise ConfigError(f"{field} must be a positive whole number or a list of them, received an empty list.")
    for size in sizes:
        check_positive_int(field, size)
    return sizes
