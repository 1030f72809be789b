"""The heads that stand on encoders of text: masked language models, classifiers, answers, in the names of transformers.

A head may begin with a layer from the residual to a stream like it: the transform of a masked language model, which has
a norm of its own, or a pooler, which has none. Where the embeddings have a width of their own, the transform leads to
that one.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from auxin.models.anatomy.parts import base_prefix, is_tied
from auxin.words.roles import Axes, ParameterRole, Segment, linear, norm


@dataclass(frozen=True)
class Vocabulary:
    """A head that gives logits over the vocabulary."""

    transform: str
    """The layer that reads what leaves the encoder."""
    norm: str
    """The norm behind it."""
    decoder: str
    """The layer to the vocabulary; "" where the embedding's weight is used without a layer."""
    bias: str = ""
    """A bias beside the decoder."""


VOCABULARIES = (
    Vocabulary(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
        "cls.predictions.bias",
    ),
    Vocabulary("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
    Vocabulary("lm_predictions.lm_head.dense", "lm_predictions.lm_head.LayerNorm", "", "lm_predictions.lm_head.bias"),
    Vocabulary("predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias"),
    Vocabulary("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"),
    Vocabulary("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    Vocabulary("head.dense", "head.norm", "decoder"),
)
POOLERS = (
    "pooler.dense",
    "pooler",
    "classifier.dense",
    "pre_classifier",
    "sequence_summary.summary",
    "discriminator_predictions.dense",
)
"""Layers from the residual to a like stream, without a norm, in the base model or beside it."""
CLASSIFIERS = (
    "classifier",
    "classifier.out_proj",
    "qa_outputs",
    "cls.seq_relationship",
    "sop_classifier.classifier",
    "discriminator_predictions.dense_prediction",
)
"""The last layers, to classes of a text, a token or a pair, or to the ends of an answer. They read what the transform
or the pooler gives, where there is one."""


@dataclass(frozen=True)
class Heads:
    """What stands on an encoder."""

    roles: tuple[ParameterRole, ...]
    readers: tuple[str, ...]
    """The layers that read what leaves the encoder."""
    last: str | None
    """The layer that gives the output; None for a model without a head, or where it is the embedding alone."""
    norm: str | None = None
    """The norm right before it."""
    tied: bool = False
    """Whether the token embedding reads a stream like the residual as the last layer."""


def heads(model: PreTrainedModel, axes: Axes, embedding: tuple[Segment, ...]) -> Heads:
    """The heads of `model`, also none.

    Args:
        model: an encoder of text, with a head or without.
        axes: of its streams.
        embedding: what the token embedding's second axis runs along; nothing where it has a width of its own.
    """
    modules = {path for path, module in model.named_modules() if not isinstance(module, nn.Identity)}
    prefix = base_prefix(model)
    poolers = _layers(modules, dict.fromkeys(f"{at}{name}" for name in POOLERS for at in (prefix, "")))
    classifiers = _layers(modules, CLASSIFIERS)
    roles = [role for path in poolers for role in linear(path, axes.residual, axes.residual)]
    roles += [role for path in classifiers for role in linear(path, (), axes.residual, "head")]
    found = next((vocabulary for vocabulary in VOCABULARIES if vocabulary.transform in modules), None)
    if found is None:
        # Without a pooler it is the classifier that reads the encoder; the ends of an answer are never pooled.
        readers = [*poolers, *(path for path in classifiers if not poolers or path == "qa_outputs")]
        return Heads(tuple(roles), tuple(readers), classifiers[0] if classifiers else None)
    roles += [
        *linear(found.transform, embedding, axes.residual),
        *norm(found.norm, embedding),
        *linear(found.decoder, axes.vocabulary, embedding, "head"),
        ParameterRole(found.bias, (axes.vocabulary,), ("writes",), "bias"),
    ]
    last = next((path for path in (found.decoder, *classifiers) if path in modules), None)
    tied = bool(embedding) and (not found.decoder or is_tied(model))
    return Heads(tuple(roles), (found.transform, *poolers), last, found.norm, tied)


def _layers(modules: Collection[str], paths: Iterable[str]) -> list[str]:
    """Those of `paths` that are one layer in this model, and not a module that holds others of them."""
    there = [path for path in paths if path in modules]
    return [path for path in there if not any(other.startswith(f"{path}.") for other in there)]
