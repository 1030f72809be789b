"""The anatomy of wav2vec 2.0 and HuBERT: convolutions over a waveform, and a transformer over what they give."""

from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import attention_roles, base_prefix, head_of, sizes_of
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Axes, ParameterRole, embedding, linear, norm
from auxin.words.widths import ConfigFields, Stream

READERS = ("lm_head", "projector", "classifier", "project_hid")
"""What reads what leaves the encoder."""


def _wav2vec2(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = sizes_of(config, config.intermediate_size)
    axes, prefix = Axes.of(sizes, config.vocab_size), base_prefix(model)
    fixed: tuple[tuple[Stream, str], ...] = ()
    if getattr(config, "conv_pos_batch_norm", False):
        fixed = (("residual", "the means and variances of conv_pos_batch_norm can't be widened. Leave it out."),)
    # The norms of layers come before or after the sums; so does the one around all layers.
    stable = config.do_stable_layer_norm
    return Anatomy(
        family=config.model_type,
        sizes=sizes,
        fields=ConfigFields(
            "hidden_size",
            "num_attention_heads",
            None,
            "intermediate_size",
            None,
            "layer_norm_eps",
            residual_groups="num_conv_pos_embedding_groups",
        ),
        stacks=(
            LayerStack(
                f"{prefix}encoder.layers",
                "num_hidden_layers",
                ("attention.out_proj", "feed_forward.output_dense", "adapter_layer.linear_2"),
                () if stable else ("layer_norm", "final_layer_norm"),
                "before" if stable else "after_residual",
                tuple(f"{prefix}{entry}" for entry in _ENTRIES[stable]),
                f"{prefix}encoder.layer_norm" if stable else f"{prefix}encoder",
                READERS,
                ("feed_forward",),
            ),
        ),
        roles=(
            *_front_roles(prefix, axes),
            *_layer_roles(f"{prefix}encoder.layers.*", axes),
            *_head_roles(model, axes),
        ),
        norm="layer",
        norm_has_gain=True,
        tied=False,
        final_norm=f"{prefix}encoder.layer_norm" if stable else None,
        head=head_of(model, READERS),
        embeddings=(f"{prefix}feature_projection.projection.weight",),
        residual_groups=config.num_conv_pos_embedding_groups,
        no_padding=f"{prefix}encoder.pos_conv_embed, a convolution whose groups are alike",
        fixed_widths=fixed,
    )


_ENTRIES = {True: ("feature_projection.projection", "encoder.pos_conv_embed"), False: ("encoder.layer_norm",)}
"""What is added up before the first layer, by whether norms come before."""


def _front_roles(prefix: str, axes: Axes) -> list[ParameterRole]:
    """The roles of what comes before the layers. The convolutions over the waveform have widths that never change; that
    over positions reads, for each group of the residual's units, the units of this group."""
    convolution = f"{prefix}feature_extractor.conv_layers.*"
    features, positions = f"{prefix}feature_projection", f"{prefix}encoder.pos_conv_embed.conv"
    return [
        embedding(f"{convolution}.conv.weight", (), (), ()),
        embedding(f"{convolution}.conv.bias", ()),
        *norm(f"{convolution}.layer_norm", ()),
        *norm(f"{features}.layer_norm", ()),
        embedding(f"{features}.projection.weight", axes.residual, ()),
        embedding(f"{features}.projection.bias", axes.residual),
        embedding(f"{prefix}masked_spec_embed", axes.residual),
        ParameterRole(f"{positions}.parametrizations.weight.original0", ((), (), ()), (None, None, None), "length"),
        embedding(f"{positions}.parametrizations.weight.original1", axes.residual, (), ()),
        embedding(f"{positions}.weight", axes.residual, (), ()),
        embedding(f"{positions}.bias", axes.residual),
        *norm(f"{prefix}encoder.pos_conv_embed.batch_norm", axes.residual),
        *norm(f"{prefix}encoder.layer_norm", axes.residual),
    ]


def _layer_roles(layer: str, axes: Axes) -> list[ParameterRole]:
    return [
        *attention_roles(f"{layer}.attention", axes),
        *norm(f"{layer}.layer_norm", axes.residual),
        *linear(f"{layer}.feed_forward.intermediate_dense", axes.ffn, axes.residual),
        *linear(f"{layer}.feed_forward.output_dense", axes.residual, axes.ffn),
        *norm(f"{layer}.final_layer_norm", axes.residual),
        # Of models with an adapter for each language.
        *norm(f"{layer}.adapter_layer.norm", axes.residual),
        *linear(f"{layer}.adapter_layer.linear_1", (), axes.residual),
        *linear(f"{layer}.adapter_layer.linear_2", axes.residual, ()),
    ]


def _head_roles(model: PreTrainedModel, axes: Axes) -> list[ParameterRole]:
    """The roles of the heads; the classifier of a text reads the projector, that of a frame the residual."""
    return [
        *linear("lm_head", axes.vocabulary, axes.residual, "head"),
        *linear("projector", (), axes.residual, "head"),
        *linear("classifier", (), () if hasattr(model, "projector") else axes.residual, "head"),
        *linear("project_hid", (), axes.residual, "head"),
        *linear("project_q", (), (), "head"),
        *linear("quantizer.weight_proj", (), (), "head"),
        ParameterRole("quantizer.codevectors", ((), (), ()), (None, None, None), "embedding"),
        ParameterRole("layer_weights", ((),), (None,), "mixing"),
    ]


for _family in ("wav2vec2", "hubert"):
    ANATOMIES.add(_family, _wav2vec2)
