"""What TokenFormers of text and of images share (arXiv 2410.23168): attention and layers whose weights all sit in
Pattention, and what can be done to a model's groups of parameter tokens."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from auxin.errors import ConfigError, PlanError
from auxin.models.tokenformer.slots import SLOTS, ParameterTokensConfig, Slot
from auxin.nn.pattention import Pattention, outputs_of

SLOT_OF_MODULE: dict[str, Slot] = {
    "attention.query": "qkv",
    "attention.key": "qkv",
    "attention.value": "qkv",
    "attention.proj": "proj",
    "mlp": "ffn",
}
"""The slot whose tokens each Pattention of a layer holds, by the module's name inside the layer."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of each head, (batch, heads, sequence, head_dim), in halves as GPT-NeoX does."""
    rotary_dim = cos.shape[-1]
    turned, passed = x[..., :rotary_dim].to(torch.promote_types(x.dtype, cos.dtype)), x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return torch.cat((turned.to(x.dtype), passed), dim=-1)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for `attn_implementation="eager"`, which alone can return the weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def _pattention(config: ParameterTokensConfig, slot: Slot) -> Pattention:
    return Pattention(
        config.hidden_size,
        config.hidden_size,
        config.group_sizes(slot),
        tau=config.group_tau(slot),
        score_function=config.slot_score_function(slot),
        gelu=config.gelu,
        eps=config.group_eps(slot),
    )


class TokenFormerAttention(nn.Module):
    """Multi-head attention between tokens whose four projections are Pattention layers.

    Args:
        config: the model's.
        layer_idx: number of the layer, from 0.
        is_causal: whether a token sees those before it alone (text), or all (images).
    """

    def __init__(self, config: ParameterTokensConfig, layer_idx: int, is_causal: bool = True) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = is_causal
        self.query = _pattention(config, "qkv")
        self.key = _pattention(config, "qkv")
        self.value = _pattention(config, "qkv")
        self.proj = _pattention(config, "proj")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over (batch, sequence, hidden_size); returns the output and, with eager attention, the weights.

        `position_embeddings` are cosine and sine of rotary angles; None where positions were added before the layers.
        """
        shape = hidden_states.shape[:-1]
        query, key, value = (
            output.view(*shape, -1, self.head_dim).transpose(1, 2)
            for output in outputs_of(hidden_states, self.query, self.key, self.value)
        )
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.proj(output.reshape(*shape, -1)), weights


class TokenFormerLayer(GradientCheckpointingLayer):
    """h = x + Attention(N(x)); y = h + Pattention(N'(h)), with N and N' layer norms.

    Args:
        config: the model's.
        layer_idx: number of the layer, from 0.
        is_causal: whether a token sees those before it alone (text), or all (images).
        norm_parameters: whether the norms have gains and biases, in modules `attention_norm` and `mlp_norm`; the
            published ones have none, and are no modules.
        dropout: probability at which a number that a part adds is left out in training.
    """

    def __init__(
        self,
        config: ParameterTokensConfig,
        layer_idx: int,
        is_causal: bool = True,
        norm_parameters: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer_norm_eps = config.layer_norm_eps
        self.norm_parameters = norm_parameters
        self.dropout = dropout
        self.attention = TokenFormerAttention(config, layer_idx, is_causal)
        self.mlp = _pattention(config, "ffn")
        if norm_parameters:
            self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Map (batch, sequence, hidden_size) to the same shape; the rest goes to the attention."""
        normed = self._norm(hidden_states, "attention_norm")
        attended = self.attention(normed, attention_mask=attention_mask, **kwargs)[0]
        hidden_states = hidden_states + self._dropped(attended)
        return hidden_states + self._dropped(self.mlp(self._norm(hidden_states, "mlp_norm")))

    def _norm(self, hidden_states: Tensor, name: str) -> Tensor:
        if self.norm_parameters:
            normed: Tensor = getattr(self, name)(hidden_states)
            return normed
        return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.layer_norm_eps)

    def _dropped(self, added: Tensor) -> Tensor:
        return F.dropout(added, self.dropout, self.training) if self.dropout else added


class ParameterTokensModel(PreTrainedModel):
    """Initialisation, loading and what can be done to the groups of parameter tokens, of text and of images."""

    config: ParameterTokensConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenFormerLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": TokenFormerLayer, "attentions": TokenFormerAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Pattention):
            init.normal_(module.key_tokens, mean=0.0, std=self.config.key_std(module.score_function))
            init.normal_(module.value_tokens, mean=0.0, std=self.config.value_std)
            # A buffer that checkpoints don't hold: after loading on the meta device nothing else fills it.
            module.reset_tau()

    def set_tau(
        self,
        qkv: Sequence[float] | None = None,
        proj: Sequence[float] | None = None,
        ffn: Sequence[float] | None = None,
    ) -> None:
        """Set the scale of each group in every layer and in the config; None leaves a slot as it is.

        Raises:
            ConfigError: not one positive finite number per group; nothing has been changed.
        """
        wanted = {slot: tau for slot, tau in zip(SLOTS, (qkv, proj, ffn), strict=True) if tau is not None}
        checked = {slot: [float(value) for value in tau] for slot, tau in wanted.items()}
        for slot, tau in checked.items():
            size = len(self.config.group_sizes(slot))
            if len(tau) != size or not all(math.isfinite(value) and value > 0 for value in tau):
                raise ConfigError(f"{slot} tau must hold {size} positive finite numbers, one a group; received {tau}.")
        for slot, module in self._slot_modules():
            if slot in checked:
                module.set_tau(checked[slot])
        for slot, tau in checked.items():
            setattr(self.config, f"{slot}_tau", tau)

    @torch.inference_mode(False)
    def truncate_groups(self, num_groups: int) -> Self:
        """Return a new model of the first `num_groups` groups of each slot; a slot that has fewer keeps all of its own.

        The new model shares no memory with this one. Nothing is promised about its loss: only where the later groups
        were trained for it is it a good model. Groups are counted in each slot on its own: where the slots did not
        always grow together, the first groups of one may be younger than those of another, and the result is no
        earlier stage of this model.

        Raises:
            PlanError: `num_groups` is less than 1 or more than the model has.
        """
        most = self.config.num_groups
        if not 1 <= num_groups <= most:
            raise PlanError(
                f"The model has {most} group(s) of parameter tokens, received {num_groups}. Ask for 1..{most}."
            )
        values = self.config.to_dict()
        for slot in SLOTS:
            for field in (f"{slot}_tokens", f"{slot}_tau", f"{slot}_eps"):
                values[field] = values[field][:num_groups] if values[field] is not None else None
        config = type(self.config).from_dict(values)
        config._attn_implementation = self.config._attn_implementation
        with torch.device("meta"):
            smaller = type(self)(config)
        rows = {name: parameter.shape[0] for name, parameter in smaller.named_parameters(remove_duplicate=False)}
        weights = {name: tensor[: rows[name]].clone() for name, tensor in self.state_dict().items()}
        smaller.load_state_dict(weights, assign=True)
        smaller.tie_weights()
        for (_, old), (_, new) in zip(self._slot_modules(), smaller._slot_modules(), strict=True):
            new.tau = old.tau[: len(new.group_sizes)].clone()
        if self.can_generate():
            smaller.generation_config = copy.deepcopy(self.generation_config)
        return smaller.train(self.training)

    def _slot_modules(self) -> list[tuple[Slot, Pattention]]:
        """Every Pattention of the model with its slot, in the order of the layers."""
        layers = self.base_model.get_submodule("layers").children()
        return [
            (slot, cast(Pattention, layer.get_submodule(name)))
            for layer in layers
            for name, slot in SLOT_OF_MODULE.items()
        ]
