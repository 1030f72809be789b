"""The anatomy of OPT, whose token embeddings may have a width of their own."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import HEADS, attention_roles, base_prefix, head_of, head_roles, is_tied, sizes_of
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Axes, embedding, linear, norm
from auxin.words.widths import ConfigFields


def _opt(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = sizes_of(config, config.ffn_dim)
    axes, decoder = Axes.of(sizes, config.vocab_size), f"{base_prefix(model)}decoder"
    layer = f"{decoder}.layers.*"
    # Two matrices lead from narrower embeddings to the residual and back; these embeddings and heads stay as they are.
    projected = config.word_embed_proj_dim != config.hidden_size
    outside = replace(axes, residual=()) if projected else axes
    norms = ("self_attn_layer_norm", "final_layer_norm")
    roles = [
        embedding(f"{decoder}.embed_tokens.weight", axes.vocabulary, outside.residual),
        embedding(f"{decoder}.embed_positions.weight", (), axes.residual),
        *linear(f"{decoder}.project_in", axes.residual, ()),
        *linear(f"{decoder}.project_out", (), axes.residual),
        *(role for name in norms for role in norm(f"{layer}.{name}", axes.residual)),
        *attention_roles(f"{layer}.self_attn", axes),
        *linear(f"{layer}.fc1", axes.ffn, axes.residual),
        *linear(f"{layer}.fc2", axes.residual, axes.ffn),
        *norm(f"{decoder}.final_layer_norm", axes.residual),
        *head_roles(outside),
    ]
    before = config.do_layer_norm_before
    has_gain = config.layer_norm_elementwise_affine
    ends_in_norm = before and not config._remove_final_layer_norm
    end = f"{decoder}.final_layer_norm" if ends_in_norm else decoder
    return Anatomy(
        family="opt",
        sizes=sizes,
        # The norms have the usual epsilon, whatever the config says.
        fields=ConfigFields(
            "hidden_size",
            "num_attention_heads",
            None,
            "ffn_dim",
            None,
            None,
            like_hidden_size=() if projected else ("word_embed_proj_dim",),
        ),
        stacks=(
            LayerStack(
                f"{decoder}.layers",
                "num_hidden_layers",
                ("self_attn.out_proj", "fc2"),
                () if before else norms,
                "before" if before else "after_residual",
                (f"{decoder}.{'project_in' if projected else 'embed_tokens'}", f"{decoder}.embed_positions"),
                # Where it projects, what the decoder gives is no residual any more.
                "" if projected and not ends_in_norm else end,
                (f"{decoder}.project_out",) if projected else HEADS,
                attentions=("self_attn",),
            ),
        ),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=has_gain,
        tied=is_tied(model) and not projected,
        final_norm=f"{decoder}.final_layer_norm" if ends_in_norm and has_gain else None,
        head=head_of(model),
        embeddings=tuple(f"{decoder}.embed_{what}.weight" for what in ("tokens", "positions")),
    )


ANATOMIES.add("opt", _opt)
