"""Tiny mixtures of experts: the families that have routers, with more experts than those of `tiny_models`."""

from typing import Any

from transformers import PreTrainedModel

from tiny_models import tiny

EXPERTS: dict[str, str] = {
    "mixtral": "num_local_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_local_experts",
    "olmoe": "num_experts",
    "granitemoe": "num_local_experts",
    "gpt_oss": "num_local_experts",
    "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
    "glm4_moe": "n_routed_experts",
    "dots1": "n_routed_experts",
    "ernie4_5_moe": "moe_num_experts",
}
"""By model type: what the config calls the number of experts."""
TWO_GROUPS = ("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1")
"""Those whose router chooses one of two groups first."""
SHARES = ("mixtral", "granitemoe", "gpt_oss", "deepseek_v3", "glm4_moe", "ernie4_5_moe")
"""Those whose gates do not depend on experts that were not chosen."""


def mixture(family: str, experts: int = 8, **values: Any) -> PreTrainedModel:
    """A tiny model of `family` with so many experts in a layer."""
    return tiny(family, **{EXPERTS[family]: experts, **values})


def experts_at(model: PreTrainedModel) -> dict[str, Any]:
    """The experts of every layer that has some, by the layer's path."""
    return {
        name.rpartition(".")[0].rpartition(".")[0]: m for name, m in model.named_modules() if name.endswith(".experts")
    }


def router_of(model: PreTrainedModel, layer: str) -> Any:
    """The router of a layer."""
    names = [f"{layer}.{part}" for part in ("mlp.gate", "mlp.router", "block_sparse_moe.router")]
    modules = dict(model.named_modules())
    return next(modules[name] for name in names if name in modules)
