"""TokenFormer language model (arXiv 2410.23168): a pre-norm transformer whose weights all sit in Pattention layers."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from auxin.errors import ConfigError, PlanError
from auxin.models.tokenformer.configuration import SLOTS, Slot, TokenFormerConfig
from auxin.nn.pattention import Pattention, outputs_of

SLOT_OF_MODULE: dict[str, Slot] = {
    "attention.query": "qkv",
    "attention.key": "qkv",
    "attention.value": "qkv",
    "attention.proj": "proj",
    "mlp": "ffn",
}
"""The slot whose tokens each Pattention of a layer holds, by the module's name inside the layer."""


def rotary_cos_sin(
    position_ids: Tensor, rotary_dim: int, base: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, (batch, sequence, rotary_dim), in `dtype` or float32 if that is finer.

    The frequencies are recomputed at each call (a few numbers) rather than kept in a buffer, so that casting the model
    to bfloat16 can't round them and loading on the meta device can't leave them empty.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, rotary_dim, 2, dtype=dtype, device=position_ids.device) / max(rotary_dim, 1)
    angles = position_ids[..., None].to(dtype) * base**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


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


def loss_in_float64(
    logits: Tensor, labels: Tensor, vocab_size: int, shift_labels: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """transformers' loss of causal language models, which goes to float32, for logits in float64."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=kwargs.get("ignore_index", -100))[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    return fixed_cross_entropy(logits.reshape(-1, vocab_size), targets, **kwargs)


def _pattention(config: TokenFormerConfig, slot: Slot) -> Pattention:
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
    """Causal multi-head attention between tokens whose four projections are Pattention layers."""

    def __init__(self, config: TokenFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.query = _pattention(config, "qkv")
        self.key = _pattention(config, "qkv")
        self.value = _pattention(config, "qkv")
        self.proj = _pattention(config, "proj")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over (batch, sequence, hidden_size); returns the output and, with eager attention, the weights."""
        shape = hidden_states.shape[:-1]
        query, key, value = (
            output.view(*shape, -1, self.head_dim).transpose(1, 2)
            for output in outputs_of(hidden_states, self.query, self.key, self.value)
        )
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.proj(output.reshape(*shape, -1)), weights


class TokenFormerLayer(GradientCheckpointingLayer):
    """h = x + Attention(N(x)); y = h + Pattention(N(h)), with N a layer norm without parameters."""

    def __init__(self, config: TokenFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_norm_eps = config.layer_norm_eps
        self.attention = TokenFormerAttention(config, layer_idx)
        self.mlp = _pattention(config, "ffn")

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map (batch, sequence, hidden_size) to the same shape; the rest goes to the attention."""
        hidden_states = hidden_states + self.attention(self._norm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self._norm(hidden_states))

    def _norm(self, hidden_states: Tensor) -> Tensor:
        return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.layer_norm_eps)


class TokenFormerPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and what can be done to the groups of parameter tokens."""

    config: TokenFormerConfig
    config_class = TokenFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenFormerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
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


class TokenFormerModel(TokenFormerPreTrainedModel):
    """The TokenFormer without output head: returns the normalised last hidden states."""

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TokenFormerLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the last hidden states.

        Args:
            input_ids: token ids (batch, sequence); exactly one of this and `inputs_embeds`.
            attention_mask: (batch, past + sequence), 1 for tokens and 0 for padding.
            position_ids: (batch, sequence); counted from the cache's length when not given.
            past_key_values: the cache of earlier calls.
            inputs_embeds: embedded tokens (batch, sequence, hidden_size).
            use_cache: whether to return a cache; the config's setting when None.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = rotary_cos_sin(
            position_ids, self.config.rotary_dim, self.config.rope_theta, inputs_embeds.dtype
        )
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class TokenFormerForCausalLM(TokenFormerPreTrainedModel, GenerationMixin):
    """The TokenFormer with a language-model head, tied to the embedding by default."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config)
        self.model = TokenFormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits and, when `labels` are given, the mean next-token cross-entropy in nats.

        Args:
            input_ids: see `TokenFormerModel.forward`, as the next four.
            attention_mask: see there.
            position_ids: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: token ids (batch, sequence), shifted inside; -100 is left out of the loss.
            use_cache: see there.
            logits_to_keep: compute logits of the last so many positions (0: all), or of the positions given.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss_function = self.loss_function
            if logits.dtype == torch.float64 and loss_function is ForCausalLMLoss:
                loss_function = loss_in_float64
            loss = loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# From here on the Auto classes know the classes themselves, and not what stood in for them until they were imported.
AutoModel.register(TokenFormerConfig, TokenFormerModel, exist_ok=True)
AutoModelForCausalLM.register(TokenFormerConfig, TokenFormerForCausalLM, exist_ok=True)
