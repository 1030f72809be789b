"""TokenFormer: a transformer that grows by appending parameter tokens (arXiv 2410.23168), of text and of images."""

from typing import TYPE_CHECKING

from auxin.models.tokenformer.configuration import PUBLISHED, TokenFormerConfig
from auxin.models.tokenformer.vision_configuration import VISION_PUBLISHED, VisionTokenFormerConfig
from auxin.words.first_use import on_first_use

if TYPE_CHECKING:
    from auxin.models.tokenformer.modeling import TokenFormerForCausalLM, TokenFormerModel
    from auxin.models.tokenformer.presets import PRESETS, VISION_PRESETS, check_growable, preset_config
    from auxin.models.tokenformer.vision import VisionTokenFormerForImageClassification, VisionTokenFormerModel
else:
    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            "auxin.models.tokenformer.modeling": ("TokenFormerForCausalLM", "TokenFormerModel"),
            "auxin.models.tokenformer.presets": ("PRESETS", "VISION_PRESETS", "check_growable", "preset_config"),
            "auxin.models.tokenformer.vision": ("VisionTokenFormerForImageClassification", "VisionTokenFormerModel"),
        },
    )

__all__ = [
    "PRESETS",
    "PUBLISHED",
    "VISION_PRESETS",
    "VISION_PUBLISHED",
    "TokenFormerConfig",
    "TokenFormerForCausalLM",
    "TokenFormerModel",
    "VisionTokenFormerConfig",
    "VisionTokenFormerForImageClassification",
    "VisionTokenFormerModel",
    "check_growable",
    "preset_config",
]
