"""Batches that a Python user gives as calibration data, looked at before any work starts."""

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from auxin.accounting.inputs import (
    DECODER_IDS,
    IDS,
    PIXELS,
    call_arguments,
    placeholder_tokens,
    takes_pairs,
    text_config,
    text_positions,
)
from auxin.data.question_source import ANSWER
from auxin.errors import DataError
from auxin.models.loading import is_ctc
from auxin.objectives.objective import IGNORED, is_encoder_decoder

Batch = Tensor | Mapping[str, Tensor]
NUMBERS = (PIXELS, "input_features", "input_values")
"""Inputs that are numbers: images, spectrograms and waveforms."""


def given_batches(model: PreTrainedModel, batches: Iterable[Batch]) -> tuple[dict[str, Tensor], ...]:
    """The batches as inputs of `model` by name, with labels, on the CPU.

    Args:
        model: the model that they are for; its weights are not looked at.
        batches: as of `Calibration.of_batches`.

    Raises:
        DataError: they are no list of batches, or there is none; a batch has no labels or no sample, holds what is no
            tensor, ids or labels that the model does not know, or what has not the type or the shape of such.
    """
    if isinstance(batches, str | bytes | Tensor | Mapping) or not hasattr(batches, "__iter__"):
        what = f"one tensor of shape {list(batches.shape)}" if isinstance(batches, Tensor) else reprlib.repr(batches)
        raise DataError(
            f"The calibration data is {what}. Give a list of batches: token ids of shape (samples, tokens), or "
            "mappings of the model's inputs by name, with labels."
        )
    kept = tuple(_checked(model, batch, f"Batch {number} (from 0)") for number, batch in enumerate(batches))
    if not kept:
        raise DataError("The calibration data has no batch. Give at least one.")
    return kept


def _checked(model: PreTrainedModel, batch: Any, place: str) -> dict[str, Tensor]:
    if not isinstance(batch, Tensor | Mapping):
        raise DataError(
            f"{place} is {reprlib.repr(batch)}. Give token ids as a tensor of shape (samples, tokens), or a mapping of "
            "the model's inputs by name, with labels."
        )
    inputs = {IDS: batch} if isinstance(batch, Tensor) else dict(batch)
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise DataError(f"{place}: {name} is {reprlib.repr(value)}, and no tensor. Give a tensor, or leave it out.")
    _check_samples(inputs, place)
    for name in (IDS, DECODER_IDS):
        if name in inputs:
            _check_ids(model, name, inputs[name], place)
    for name in NUMBERS:
        if name in inputs and not inputs[name].is_floating_point():
            raise DataError(
                f"{place}: {name} is of type {inputs[name].dtype}, and has to be numbers as the model was trained on. "
                "Give what the model's processor makes."
            )
    if finds_answers(model):
        _check_answers(model, inputs, place)
    elif "labels" in inputs:
        _check_labels(model, inputs, place)
    else:
        inputs["labels"] = _own_labels(model, inputs)
    return {name: tensor.detach().cpu() for name, tensor in inputs.items()}


def _own_labels(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a causal language model is asked for by ids alone."""
    if IDS not in inputs or not isinstance(model, GenerationMixin) or is_encoder_decoder(model.config):
        raise DataError(
            f"The batches hold {', '.join(inputs)} and no labels, without which a {type(model).__name__} has no loss. "
            "Give mappings with labels."
        )
    return inputs[IDS].long()


def finds_answers(model: PreTrainedModel) -> bool:
    """Whether `model` tells at which tokens of a text an answer begins and ends, and nothing else is asked of it."""
    arguments = set(call_arguments(model))
    return set(ANSWER) <= arguments and "labels" not in arguments


def _check_answers(model: PreTrainedModel, inputs: Mapping[str, Tensor], place: str) -> None:
    """Refuse batches without a first and a last token of an answer for each sample, in this order."""
    name = type(model).__name__
    if missing := [which for which in ANSWER if which not in inputs]:
        raise DataError(
            f"{place} holds {', '.join(inputs)} and no {missing[0]}, without which a {name} has no loss. Give mappings "
            f"with {ANSWER[0]} and {ANSWER[1]}, the numbers of the first and the last token of each answer."
        )
    start, end = (inputs[which] for which in ANSWER)
    tokens = inputs[IDS].shape[-1] if IDS in inputs else None
    for which, positions in zip(ANSWER, (start, end), strict=True):
        if positions.dtype != torch.int64 or positions.shape != (len(positions),):
            raise DataError(
                f"{place}: {which} is of type {positions.dtype} and shape {list(positions.shape)}, and a {name} takes "
                "torch.long and one number for each sample. Give such numbers."
            )
        odd = positions[(positions < 0) | (positions >= (tokens or positions.max() + 1))]
        if odd.numel():
            raise DataError(
                f"{place}: {which} holds {int(odd[0])}, and the tokens of a sample are 0 to {(tokens or 0) - 1}. Give "
                "the number of a token; where a text has no answer, that of its first one, as the model learnt it."
            )
        mask = inputs.get("attention_mask")
        if mask is not None and tokens is not None and mask.shape == (len(positions), tokens):
            padding = positions[mask.gather(1, positions[:, None]).flatten() == 0]
            if padding.numel():
                raise DataError(
                    f"{place}: {which} holds {int(padding[0])} of a sample whose attention_mask says that this is "
                    "padding. Give the number of a token of the text."
                )
    if bool((end < start).any()):
        raise DataError(f"{place}: {ANSWER[1]} holds a token before {ANSWER[0]}. Give the last token of each answer.")


def _check_samples(inputs: Mapping[str, Tensor], place: str) -> None:
    sizes = {name: len(tensor) if tensor.dim() else None for name, tensor in inputs.items()}
    if len(set(sizes.values())) != 1 or set(sizes.values()) & {None, 0}:
        raise DataError(
            f"{place} has along the first axis of its tensors {sizes} (None: it has no axis). Give tensors of the same "
            "number of samples, at least one."
        )


def _check_ids(model: PreTrainedModel, name: str, ids: Tensor, place: str) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise DataError(
            f"{place}: {name} is of type {ids.dtype}, and ids are whole numbers (torch.long). Give the tokenizer's ids."
        )
    if ids.dim() < 2 or not ids.shape[-1]:
        raise DataError(
            f"{place}: {name} has shape {list(ids.shape)}. Give (samples, tokens), at least one token; one sample "
            "alone is tensor[None]."
        )
    decoder = name == DECODER_IDS
    positions = text_positions(model, decoder)
    if positions is not None and ids.shape[-1] > positions and _counts_positions(model, positions):
        raise DataError(
            f"{place}: {name} has {ids.shape[-1]} tokens a sample, and the model has {positions} positions. Give "
            "shorter samples."
        )
    vocabulary = getattr(text_config(model.config, decoder), "vocab_size", None)
    alone = not model.config.sub_configs or is_encoder_decoder(model.config) or takes_pairs(model)
    if vocabulary is None or not alone:
        return  # what looks at images or sounds, too, may have ids for these anywhere
    known = torch.tensor(placeholder_tokens(model.config), dtype=ids.dtype, device=ids.device)
    odd = ids[((ids < 0) | (ids >= vocabulary + _further(model))) & ~torch.isin(ids, known)]
    if odd.numel():
        raise DataError(
            f"{place}: {name} holds {int(odd[0])}, and the model's tokens are 0 to {vocabulary - 1}. Give ids of its "
            "own tokenizer."
        )


def _check_labels(model: PreTrainedModel, inputs: Mapping[str, Tensor], place: str) -> None:
    """Refuse labels that the model's loss can't take, where it is known what it takes."""
    labels, classes = inputs["labels"], _classes(model)
    name = type(model).__name__
    ends = "Classification"  # whose labels may be numbers, too: of a regression, or of several classes at once
    if classes is None or (name.endswith(ends) and labels.is_floating_point()):
        return
    if labels.dtype != torch.int64:
        raise DataError(f"{place}: labels is of type {labels.dtype}, and a {name} takes torch.long. Give such labels.")
    per_sample = name.endswith(("SequenceClassification", "ImageClassification"))
    text = IDS in inputs and not model.config.sub_configs and not is_encoder_decoder(model.config)
    per_token = text and not name.endswith(ends)
    wrong = (per_sample and labels.numel() != len(labels)) or (per_token and labels.shape != inputs[IDS].shape)
    if wrong and getattr(model.config, "problem_type", None) != "multi_label_classification":
        wanted = f"the shape {list(inputs[IDS].shape)} of {IDS}" if per_token else "one for each sample"
        raise DataError(
            f"{place}: labels has shape {list(labels.shape)}, and a {name} takes {wanted}. Give such labels, "
            f"{IGNORED} where nothing is asked."
        )
    below = labels < 0 if not is_ctc(model) else torch.zeros_like(labels, dtype=torch.bool)
    if is_encoder_decoder(model.config) and labels.dim() == 2 and DECODER_IDS in inputs:
        read = inputs[DECODER_IDS]
        if labels.shape != read.shape and model.get_output_embeddings() is not None:
            raise DataError(
                f"{place}: labels has shape {list(labels.shape)}, and {DECODER_IDS} {list(read.shape)}. Give a label "
                f"for each of these, {IGNORED} where nothing is asked; or leave {DECODER_IDS} out, which the model "
                "makes of the labels."
            )
    odd = labels[((labels >= classes) | below) & (labels != IGNORED)]
    if odd.numel():
        raise DataError(
            f"{place}: labels holds {int(odd[0])}, and the classes of this {name} are 0 to {classes - 1}. Give one of "
            f"these, or {IGNORED} where nothing is asked."
        )


def _classes(model: PreTrainedModel) -> int | None:
    """How many classes the labels name; None where that is not known."""
    if model.get_output_embeddings() is not None or is_ctc(model):
        vocabulary: int | None = getattr(text_config(model.config, decoder=True), "vocab_size", None)
        return None if vocabulary is None else vocabulary + _further(model)
    classes = int(model.config.num_labels or 0)
    return classes if type(model).__name__.endswith("Classification") and classes > 1 else None


def _further(model: PreTrainedModel) -> int:
    """Tokens that lie behind the config's vocabulary (Idefics)."""
    return getattr(model.config, "additional_vocab_size", None) or 0


def _counts_positions(model: PreTrainedModel, positions: int) -> bool:
    """Whether the model has learnt each of its positions, and so has no further one."""
    tables = (path.rpartition(".")[2] for path, module in model.named_modules() if _is_table(module, positions))
    return any("position" in name or name == "wpe" for name in tables)


def _is_table(module: nn.Module, positions: int) -> bool:
    return isinstance(module, nn.Embedding) and module.num_embeddings >= positions
