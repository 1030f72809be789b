"""LoRA (Hu et al. 2021, arXiv 2106.09685): small matrices beside a model's, trained in their place, then merged.

A linear layer W becomes W + (alpha / rank) B A, with B zero at first, so that the function is as before. PEFT has the
layers; here is what a stage of a recipe asks of them.
"""

import importlib.util
from typing import Any, cast

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import PreTrainedModel

from auxin.errors import ConfigError, first_line
from auxin.settings import Settings


class Lora(Settings):
    """Which matrices, and how large."""

    rank: int = Field(default=8, gt=0)
    """Columns of B and rows of A."""
    alpha: int | None = Field(default=None, gt=0)
    """The product is multiplied by alpha / rank; None: twice the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what A is given, in training."""
    modules: list[str] = []
    """Ends of the paths of the layers (`q_proj`, `mlp.down_proj`); empty: all linear layers but the head."""
    parameters: list[str] = []
    """Ends of the paths of matrices that are no linear layer's: `key_tokens` and `value_tokens` of a TokenFormer."""

    @model_validator(mode="before")
    @classmethod
    def _no_rank_alone(cls, values: Any) -> Any:
        if isinstance(values, int) and not isinstance(values, bool):
            raise ValueError(f"a rank alone is no LoRA. Write {{rank: {values}}}")
        return values


def add_lora(model: PreTrainedModel, settings: Lora, seed: int) -> None:
    """Give `model` a LoRA, in place, which alone is trained from then on.

    Args:
        model: a model without an adapter; on the meta device its LoRA is, too.
        settings: which.
        seed: of the numbers that A begins with.

    Raises:
        ConfigError: PEFT is not installed, the model has no such layers, or the rank is larger than all of them.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("lora: needs peft, which is not installed. Run: pip install peft")
    import peft

    modules = settings.modules if settings.modules or settings.parameters else "all-linear"
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=modules,
        target_parameters=settings.parameters or None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model.add_adapter(config)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"lora: {model.config.model_type} can't have it: {first_line(error)} Name layers in modules, or "
                "matrices in parameters (a TokenFormer's are key_tokens and value_tokens)."
            ) from error
    if settings.rank > (largest := _largest_rank(model)):
        raise ConfigError(
            f"lora.rank: {settings.rank} is more than any of the matrices has: the smaller side of the largest is "
            f"{largest}. Give less, or train the whole model (leave lora out)."
        )


def _largest_rank(model: PreTrainedModel) -> int:
    """Of the matrices beside which `model` has a LoRA: a product of one can't have a higher rank than that."""
    from peft.tuners.lora import LoraLayer

    sides: list[int] = []
    for module in model.modules():
        if isinstance(module, LoraLayer):
            pairs: Any = zip(module.lora_A.values(), module.lora_B.values(), strict=True)
            sides += [min(one.weight.shape[-1], other.weight.shape[0]) for one, other in pairs]
    return max(sides, default=1)


def merge_lora(model: PreTrainedModel) -> None:
    """Add to the weights of `model` what its LoRA adds, and take the LoRA away; all are trained from then on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for path, module in layers.items():
        # Where several matrices of a module have one, their layers are around each other: the outermost has all.
        if path.rpartition(".")[0] not in layers:
            model.set_submodule(path, _merged(cast(nn.Module, module)))
    model._hf_peft_config_loaded = False
    del model.peft_config
    model.requires_grad_(True)


def _merged(module: nn.Module) -> nn.Module:
    """What a LoRA's layer, or several around each other, stand for, with what they add in its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    while isinstance(module, BaseTunerLayer):
        module.merge()
        module = cast(Any, module).base_layer
    return module
