"""The anatomy of BERT."""

from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import is_tied, sizes_of
from auxin.words.roles import Anatomy, Axes, ConfigFields, LayerStack, ParameterRole, embedding, linear, norm


def _bert(model: PreTrainedModel) -> Anatomy:
    config: Any = model.config
    sizes = sizes_of(config, config.intermediate_size)
    axes = Axes.of(sizes, config.vocab_size)
    layer, head = "bert.encoder.layer.*", "cls.predictions"
    parts = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    roles = [
        embedding("bert.embeddings.word_embeddings.weight", axes.vocabulary, axes.residual),
        *(embedding(f"bert.embeddings.{part}.weight", (), axes.residual) for part in parts[1:]),
        *norm("bert.embeddings.LayerNorm", axes.residual),
        *linear(f"{layer}.attention.self.query", axes.query, axes.residual),
        *linear(f"{layer}.attention.self.key", axes.key, axes.residual),
        *linear(f"{layer}.attention.self.value", axes.value, axes.residual),
        *linear(f"{layer}.attention.output.dense", axes.residual, axes.attended),
        *norm(f"{layer}.attention.output.LayerNorm", axes.residual),
        *linear(f"{layer}.intermediate.dense", axes.ffn, axes.residual),
        *linear(f"{layer}.output.dense", axes.residual, axes.ffn),
        *norm(f"{layer}.output.LayerNorm", axes.residual),
        *linear("bert.pooler.dense", axes.residual, axes.residual),
        # The masked language model's head: a layer from the residual to a like stream, its norm, the tied decoder.
        *linear(f"{head}.transform.dense", axes.residual, axes.residual),
        *norm(f"{head}.transform.LayerNorm", axes.residual),
        ParameterRole(f"{head}.bias", (axes.vocabulary,), ("writes",), "bias"),
        *linear(f"{head}.decoder", axes.vocabulary, axes.residual, "head"),
        *linear("classifier", (), axes.residual, "head"),
    ]
    stack = LayerStack(
        "bert.encoder.layer",
        "num_hidden_layers",
        ("attention.output.dense", "output.dense"),
        ("attention.output.LayerNorm", "output.LayerNorm"),
        "after_residual",
        ("bert.embeddings",),
        "bert.encoder",
        # Without a pooler it is the classifier that reads the encoder.
        (f"{head}.transform.dense", "bert.pooler.dense" if model.base_model.pooler is not None else "classifier"),
    )
    return Anatomy(
        family="bert",
        sizes=sizes,
        fields=ConfigFields("hidden_size", "num_attention_heads", None, "intermediate_size", None, "layer_norm_eps"),
        stacks=(stack,),
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=True,
        tied=is_tied(model),
        final_norm=f"{head}.transform.LayerNorm" if hasattr(model, "cls") else None,
        head=f"{head}.decoder" if hasattr(model, "cls") else "classifier",
        embeddings=tuple(f"bert.embeddings.{part}.weight" for part in parts),
        embedding_norm="bert.embeddings.LayerNorm",
    )


ANATOMIES.add("bert", _bert)
