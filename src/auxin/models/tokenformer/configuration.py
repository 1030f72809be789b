"""Configuration of TokenFormer language models."""

from typing import Any

from auxin.errors import ConfigError
from auxin.models.tokenformer.slots import ParameterTokensConfig, check_positive_int, is_number

PUBLISHED: dict[str, Any] = {
    "score_function": "l2_norm_gelu",
    "gelu": "erf",
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000.0,
    "layer_norm_eps": 1e-5,
}
"""What the released models share; a new model's `score_function` and `partial_rotary_factor` are others (see
`TokenFormerConfig`)."""


class TokenFormerConfig(ParameterTokensConfig):
    """Shape and constants of a TokenFormer (arXiv 2410.23168, section 3).

    The default size is the released 150M model's. Three defaults are not the paper's, because in short trainings a
    small TokenFormer then learns as well as a dense Transformer, and much worse with the paper's (docs/parity.md):
    scores become weights without a norm, keys are therefore drawn so that scores start at a size of 1, and each head is
    rotated whole.
    `PUBLISHED` asks for the paper's; the presets, converted checkpoints, and whatever was saved before have them.

    What concerns its layers and their parameter tokens is said by `ParameterTokensConfig`, whose fields it has as well.

    Args:
        vocab_size: rows of the token embedding.
        partial_rotary_factor: fraction of each head's dimensions that is rotated; 0 means no position encoding.
        rope_theta: base of the rotary frequencies.
        layer_norm_eps: epsilon of all layer norms; those inside the layers have no parameters, the final one has.
        max_position_embeddings: context length in tokens; nothing is allocated by it.
        tie_word_embeddings: whether the output head is the embedding.
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
    partial_rotary_factor: float = 1.0
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_positive_int("vocab_size", self.vocab_size)
        super().__post_init__(**kwargs)
        self._check_rotary()

    def _check_rotary(self) -> None:
        if not is_number(self.partial_rotary_factor) or not 0 <= self.partial_rotary_factor <= 1:
            raise ConfigError(f"partial_rotary_factor must lie in 0..1, received {self.partial_rotary_factor!r}.")
        if self.rotary_dim % 2 or (self.partial_rotary_factor > 0 and self.rotary_dim == 0):
            raise ConfigError(
                f"partial_rotary_factor {self.partial_rotary_factor} of {self.head_dim} dimensions per head rotates "
                f"{self.rotary_dim}, which must be even and not zero (0.0 asks for no position encoding). "
                "Use fewer heads or another factor."
            )

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of one attention head."""
        return int(self.partial_rotary_factor * self.head_dim)

    def num_parameters(self) -> int:
        """Parameters of the language model: 2 L d (3 n_qkv + n_proj + n_ffn) + V d (twice when untied) + 2 d."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.token_parameters + embeddings + 2 * self.hidden_size
