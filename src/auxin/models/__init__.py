"""Models: what is where in transformers' architectures, loading and building them, and architectures of our own, which
are registered with the Auto classes on import; their code is imported with the first model."""

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from auxin.models.deferred import deferred
from auxin.models.tokenformer.configuration import TokenFormerConfig
from auxin.words.first_use import on_first_use

_MODELING = "auxin.models.tokenformer.modeling"

if TYPE_CHECKING:
    from auxin.models.tokenformer.modeling import TokenFormerForCausalLM, TokenFormerModel
else:
    __getattr__, __dir__ = on_first_use(__name__, {_MODELING: ("TokenFormerForCausalLM", "TokenFormerModel")})

AutoConfig.register(TokenFormerConfig.model_type, TokenFormerConfig, exist_ok=True)
AutoModel.register(TokenFormerConfig, deferred(_MODELING, "TokenFormerModel", TokenFormerConfig), exist_ok=True)
AutoModelForCausalLM.register(
    TokenFormerConfig, deferred(_MODELING, "TokenFormerForCausalLM", TokenFormerConfig), exist_ok=True
)

__all__ = ["TokenFormerConfig", "TokenFormerForCausalLM", "TokenFormerModel"]
