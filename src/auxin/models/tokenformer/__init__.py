"""TokenFormer: a transformer that grows by appending parameter tokens (arXiv 2410.23168)."""

from typing import TYPE_CHECKING

from auxin.models.tokenformer.configuration import PUBLISHED, TokenFormerConfig
from auxin.words.first_use import on_first_use

if TYPE_CHECKING:
    from auxin.models.tokenformer.modeling import TokenFormerForCausalLM, TokenFormerModel
    from auxin.models.tokenformer.presets import PRESETS, check_growable, preset_config
else:
    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            "auxin.models.tokenformer.modeling": ("TokenFormerForCausalLM", "TokenFormerModel"),
            "auxin.models.tokenformer.presets": ("PRESETS", "check_growable", "preset_config"),
        },
    )

__all__ = [
    "PRESETS",
    "PUBLISHED",
    "TokenFormerConfig",
    "TokenFormerForCausalLM",
    "TokenFormerModel",
    "check_growable",
    "preset_config",
]
