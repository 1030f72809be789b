"""TokenFormer language model (arXiv 2410.23168): a pre-norm transformer whose weights all sit in Pattention layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from auxin.errors import ConfigError
from auxin.models.tokenformer.configuration import TokenFormerConfig
from auxin.models.tokenformer.layers import ParameterTokensModel, TokenFormerLayer


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


def loss_in_float64(
    logits: Tensor, labels: Tensor, vocab_size: int, shift_labels: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """transformers' loss of causal language models, which goes to float32, for logits in float64."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=kwargs.get("ignore_index", -100))[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    return fixed_cross_entropy(logits.reshape(-1, vocab_size), targets, **kwargs)


class TokenFormerPreTrainedModel(ParameterTokensModel):
    """What the language models share beside what `ParameterTokensModel` says."""

    config: TokenFormerConfig
    config_class = TokenFormerConfig
    _skip_keys_device_placement = ["past_key_values"]


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
