"""TokenFormer: a transformer that grows by appending parameter tokens (arXiv 2410.23168)."""

from auxin.models.tokenformer.configuration import TokenFormerConfig
from auxin.models.tokenformer.modeling import TokenFormerForCausalLM, TokenFormerModel

__all__ = ["TokenFormerConfig", "TokenFormerForCausalLM", "TokenFormerModel"]
