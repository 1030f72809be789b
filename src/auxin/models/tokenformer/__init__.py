"""TokenFormer: a transformer that grows by appending parameter tokens (arXiv 2410.23168)."""

from auxin.models.tokenformer.configuration import TokenFormerConfig
from auxin.models.tokenformer.modeling import TokenFormerForCausalLM, TokenFormerModel
from auxin.models.tokenformer.presets import PRESETS, check_growable, preset_config

__all__ = [
    "PRESETS",
    "TokenFormerConfig",
    "TokenFormerForCausalLM",
    "TokenFormerModel",
    "check_growable",
    "preset_config",
]
