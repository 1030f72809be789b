"""Architectures that the Hub library lacks, registered with transformers' Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from auxin.models.tokenformer import TokenFormerConfig, TokenFormerForCausalLM, TokenFormerModel

AutoConfig.register(TokenFormerConfig.model_type, TokenFormerConfig, exist_ok=True)
AutoModel.register(TokenFormerConfig, TokenFormerModel, exist_ok=True)
AutoModelForCausalLM.register(TokenFormerConfig, TokenFormerForCausalLM, exist_ok=True)

__all__ = ["TokenFormerConfig", "TokenFormerForCausalLM", "TokenFormerModel"]
