"""Models: what is where in transformers' architectures, loading and building them, and architectures of our own, which
are registered with the Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from auxin.models.tokenformer import TokenFormerConfig, TokenFormerForCausalLM, TokenFormerModel

AutoConfig.register(TokenFormerConfig.model_type, TokenFormerConfig, exist_ok=True)
AutoModel.register(TokenFormerConfig, TokenFormerModel, exist_ok=True)
AutoModelForCausalLM.register(TokenFormerConfig, TokenFormerForCausalLM, exist_ok=True)

__all__ = ["TokenFormerConfig", "TokenFormerForCausalLM", "TokenFormerModel"]
