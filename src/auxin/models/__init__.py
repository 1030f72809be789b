"""Models: what is where in transformers' architectures, loading and building them, and architectures of our own, which
are registered with the Auto classes on import; their code is imported with the first model."""

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

from auxin.models.deferred import deferred
from auxin.models.tokenformer.configuration import TokenFormerConfig
from auxin.models.tokenformer.vision_configuration import VisionTokenFormerConfig
from auxin.words.first_use import on_first_use

_MODELING = "auxin.models.tokenformer.modeling"
_VISION = "auxin.models.tokenformer.vision"

if TYPE_CHECKING:
    from auxin.models.tokenformer.modeling import TokenFormerForCausalLM, TokenFormerModel
    from auxin.models.tokenformer.vision import VisionTokenFormerForImageClassification, VisionTokenFormerModel
else:
    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            _MODELING: ("TokenFormerForCausalLM", "TokenFormerModel"),
            _VISION: ("VisionTokenFormerForImageClassification", "VisionTokenFormerModel"),
        },
    )

for _config, _module, _auto_class, _name in (
    (TokenFormerConfig, _MODELING, AutoModel, "TokenFormerModel"),
    (TokenFormerConfig, _MODELING, AutoModelForCausalLM, "TokenFormerForCausalLM"),
    (VisionTokenFormerConfig, _VISION, AutoModel, "VisionTokenFormerModel"),
    (VisionTokenFormerConfig, _VISION, AutoModelForImageClassification, "VisionTokenFormerForImageClassification"),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _auto_class.register(_config, deferred(_module, _name, _config), exist_ok=True)

__all__ = [
    "TokenFormerConfig",
    "TokenFormerForCausalLM",
    "TokenFormerModel",
    "VisionTokenFormerConfig",
    "VisionTokenFormerForImageClassification",
    "VisionTokenFormerModel",
]
