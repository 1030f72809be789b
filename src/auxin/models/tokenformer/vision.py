"""TokenFormer for images (arXiv 2410.23168, section 4.2): a ViT whose projections are Pattention layers.

Patches, class token and positions are transformers' own `ViTEmbeddings`; layers and attention are those of the language
model without rotation, and every token sees all others.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput
from transformers.models.vit.modeling_vit import ViTEmbeddings
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from auxin.errors import ConfigError
from auxin.models.tokenformer.layers import ParameterTokensModel, TokenFormerLayer
from auxin.models.tokenformer.vision_configuration import VisionTokenFormerConfig


class VisionTokenFormerPreTrainedModel(ParameterTokensModel):
    """What the image models share beside what `ParameterTokensModel` says."""

    config: VisionTokenFormerConfig
    config_class = VisionTokenFormerConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = ["ViTEmbeddings", "TokenFormerLayer"]
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ViTEmbeddings):
            for parameter in (module.cls_token, module.position_embeddings):
                init.trunc_normal_(parameter, mean=0.0, std=self.config.initializer_range)


class VisionTokenFormerModel(VisionTokenFormerPreTrainedModel):
    """The TokenFormer for images without classifier: returns the normalised last hidden states."""

    def __init__(self, config: VisionTokenFormerConfig) -> None:
        super().__init__(config)
        self.embeddings = ViTEmbeddings(config)  # type: ignore[arg-type] # it reads sizes and dropout alone
        self.layers = nn.ModuleList(
            TokenFormerLayer(
                config,
                index,
                is_causal=False,
                norm_parameters=config.norm_parameters,
                dropout=config.hidden_dropout_prob,
            )
            for index in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Compute the last hidden states, (batch, 1 + patches, hidden_size), the class token first.

        Args:
            pixel_values: (batch, channels, height, width); cast to the type of the weights.
            interpolate_pos_encoding: whether images may have another size than the config's, for which the positions
                of square images are interpolated.
            attention_mask: (batch, 1 + patches), 1 for tokens that are seen and 0 for others; None: all are.
        """
        if pixel_values is None:
            raise ConfigError("Give pixel_values, (batch, channels, height, width).")
        dtype = self.embeddings.patch_embeddings.projection.weight.dtype
        hidden_states = self.embeddings(pixel_values.to(dtype), interpolate_pos_encoding=bool(interpolate_pos_encoding))
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class VisionTokenFormerForImageClassification(VisionTokenFormerPreTrainedModel):
    """The TokenFormer for images with a linear classifier that reads the class token behind the last norm, as ViT's."""

    def __init__(self, config: VisionTokenFormerConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = VisionTokenFormerModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Compute logits, (batch, classes), and, when `labels` are given, transformers' loss of classifiers.

        Args:
            pixel_values: see `VisionTokenFormerModel.forward`.
            labels: the images' classes (batch,).
            interpolate_pos_encoding: see there.
            attention_mask: see there.
        """
        outputs = self.model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, attention_mask=attention_mask, **kwargs
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0])
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# From here on the Auto classes know the classes themselves, and not what stood in for them until they were imported.
AutoModel.register(VisionTokenFormerConfig, VisionTokenFormerModel, exist_ok=True)
AutoModelForImageClassification.register(
    VisionTokenFormerConfig, VisionTokenFormerForImageClassification, exist_ok=True
)
