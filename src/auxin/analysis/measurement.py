"""What a measurement is: settings, what it needs of a pass over the data, and an observer that follows the pass.

A measurement is one module: its settings, a subclass of `Measurement`; what it finds, a subclass of `Result`; and an
`Observer` that turns one into the other. The module names it as `MEASUREMENT`; other packages name theirs in the entry
point group "auxin.measurements". `auxin.analysis.measure` runs it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.accounting.inputs import without_cache
from auxin.data.question_source import ANSWER
from auxin.errors import DataError, PlanError
from auxin.settings import Settings
from auxin.words.registry import Registry

Batch = Mapping[str, Tensor]
"""Inputs of a model by name, the samples along the first axis of each."""
Needs = Literal["weights", "batches", "layers", "logits"]
"""What a measurement needs: the weights alone; the data's batches, on which it runs the model itself (with gradients,
or with parts of it changed); or that the model is run on them, up to its last layer or up to its logits."""


class CalibrationData(Protocol):
    """Samples on which a model is measured, of any kind."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal samples, whatever the size of the batches."""

    @property
    def samples(self) -> int:
        """How many there are."""

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """All samples once, always in the same order: inputs of the model by name, with labels, on the CPU."""


class Table(NamedTuple):
    """A part of a result as text; the first column says what a row is about."""

    title: str
    header: list[str]
    rows: list[list[str]]


class Result(Settings):
    """What a measurement found: plain data, which JSON holds, and how a person reads it."""

    def tables(self) -> list[Table]:
        """The numbers, in tables of at most 80 columns."""
        raise NotImplementedError

    def findings(self) -> list[str]:
        """What they say, a sentence each."""
        return []

    def picture(self, title: str) -> str | None:
        """An SVG of them under `title`; None where there is nothing to draw."""
        return None


Found = TypeVar("Found", bound=Result)
FoundBy = TypeVar("FoundBy", bound=Result, covariant=True)


@dataclass(frozen=True)
class Tap:
    """A place of the model from which hidden states are read while the model runs."""

    module: nn.Module
    where: Literal["input", "output"]
    """The module's first argument, or its result (the first part of one that has several)."""
    read: Callable[[Tensor], None]
    """Called with them, of shape (samples, tokens, width) at most places. Must not change them, and must not keep them
    beyond the batch: memory stays bounded by what is made of them."""


class Observer(Protocol[FoundBy]):
    """One measurement of one model: is told of every batch, and says in the end what it found."""

    @property
    def taps(self) -> Sequence[Tap]:
        """Where it reads; none for one that runs the model itself."""

    def before(self, batch: Batch) -> None:
        """A batch is about to go through the model: inputs by name, on its device."""

    def after(self, batch: Batch, output: Any) -> None:
        """It has. Taps are closed and autograd is off.

        Args:
            batch: the inputs, on the model's device.
            output: the model's, for a measurement that needs logits; None for others.
        """

    def result(self) -> FoundBy:
        """What was found; called once, after the last batch."""


class Measurement(Settings, Generic[Found]):
    """One measurement with its settings, which are the fields. Results are cached under them."""

    name: ClassVar[str]
    """By which it is called: lower case, digits and hyphens."""
    title: ClassVar[str]
    """What it measures, in one line."""
    needs: ClassVar[Needs]
    """Of the pass over the data."""
    version: ClassVar[int] = 1
    """Raised when the same settings come to mean another number: results of older versions are measured anew."""
    result_type: ClassVar[type[Result]]
    """What it finds."""

    def observe(self, model: PreTrainedModel) -> Observer[Found]:
        """An observer of `model`, which has its weights. Looks at everything that could go wrong, and may look at
        weights, but doesn't run the model.

        Raises:
            AuxinError: the model can't be measured so.
        """
        raise NotImplementedError


def measurements() -> dict[str, type[Measurement[Any]]]:
    """Every measurement that is installed, by name, in the order of the names."""
    return _MEASUREMENTS.all()


def measurement(name: str, **settings: Any) -> Measurement[Any]:
    """The measurement called `name`.

    Args:
        name: of `measurements()`.
        settings: its settings.

    Raises:
        ConfigError: there is none of that name, or a setting is unknown or wrong.
    """
    return _MEASUREMENTS.find(name).parse(settings, source=name)


def kept_tokens(model: PreTrainedModel, batch: Batch, decoder: bool = False) -> Tensor | None:
    """Which hidden states belong to tokens and not to padding: (samples, tokens) boolean; None: all of them.

    Args:
        model: the model.
        batch: its inputs. An `attention_mask` is looked at. The decoder of an encoder-decoder has a mask of its own,
            `decoder_attention_mask`; without one, labels of -100 are padding in it.
        decoder: whether the hidden states are those of an encoder-decoder's decoder.

    Raises:
        DataError: the mask has another form, or a sample has no token at all.
    """
    mask: Tensor | None
    if not (decoder and model.config.is_encoder_decoder):
        name, mask = "attention_mask", batch.get("attention_mask")
    elif "decoder_attention_mask" in batch or "labels" not in batch:
        name, mask = "decoder_attention_mask", batch.get("decoder_attention_mask")
    else:
        name, mask = "labels", batch["labels"] != -100
    if mask is None:
        return None
    if mask.dim() != 2:
        raise DataError(f"{name} has shape {tuple(mask.shape)}. Give one of (samples, tokens), 1 for tokens.")
    mask = mask != 0
    if not mask.any(dim=1).all():
        raise DataError(f"{name}: a sample has no token, only padding. Leave it out of the data.")
    return mask


def as_model_has(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """A batch on the device of `model`, what is floating-point in its type."""
    device = next(model.parameters()).device
    return {name: x.to(device, model.dtype if x.is_floating_point() else None) for name, x in batch.items()}


def samples_of(batch: Batch) -> int:
    """How many samples a batch holds."""
    return len(next(iter(batch.values())))


def kept_by_decoder(model: PreTrainedModel, batch: Batch) -> dict[bool, Tensor | None]:
    """`kept_tokens` of what is not in an encoder-decoder's decoder (False), and of what is (True)."""
    return {decoder: kept_tokens(model, batch, decoder) for decoder in (False, True)}


def result_of(model: PreTrainedModel, inputs: Batch) -> Any:
    """What `model` gives for `inputs`, without what it does for generation (a cache) and what routers add to a loss."""
    routers = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
    return model(**inputs, **without_cache(model), **routers)


def without_loss(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """What `model` is called with where its logits are wanted alone: no cache, and no labels or ends of answers, which
    would have it compute a loss; but the labels of an encoder-decoder are what its decoder reads."""
    unneeded = ANSWER if model.config.is_encoder_decoder else ("labels", *ANSWER)
    return {name: value for name, value in batch.items() if name not in unneeded} | without_cache(model)


GIVE_A_HEAD = "Give a model whose head gives such, a language model or a classifier say"
"""What to do where a model gives no logits, or several kinds."""


def logits_of(model: PreTrainedModel, output: Any, mend: str = GIVE_A_HEAD + ".") -> Tensor:
    """The logits in an output of `model`, where they are of one kind.

    Args:
        model: the model.
        output: of its call.
        mend: what to do where there are none, in a sentence.

    Raises:
        PlanError: there are none.
    """
    logits = output.get("logits") if hasattr(output, "get") else None
    if not isinstance(logits, Tensor):
        several = [name for name in output or () if str(name).endswith("_logits")]
        found = f"{' and '.join(several)}, and logits of one kind are compared" if several else "no logits to compare"
        raise PlanError(f"The {type(model).__name__} gives {found}. {mend}")
    return logits


def token_means(values: Tensor, kept: Tensor | None) -> Tensor:
    """The mean over each sample's tokens, (samples,).

    Args:
        values: (samples, tokens).
        kept: (samples, tokens), which of them count; None: all.

    Raises:
        DataError: there are other numbers of tokens in the two.
    """
    if kept is None:
        return values.mean(dim=1)
    check_mask(kept, values.shape)
    return torch.where(kept, values, 0).sum(dim=1) / kept.sum(dim=1)


def check_mask(kept: Tensor, shape: Sequence[int]) -> None:
    """DataError for a mask of other than (samples, tokens) = `shape`."""
    if tuple(kept.shape) != tuple(shape):
        raise DataError(
            f"A mask of (samples, tokens) = {tuple(kept.shape)} was given, but there are hidden states for "
            f"{tuple(shape)}. Give a mask of the inputs' length."
        )


def wide(hidden: Tensor) -> Tensor:
    """`hidden` without its graph, in float32 at least: what is added up over tokens."""
    return hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32))


def _measurements_in(loaded: Any) -> Iterator[tuple[str, type[Measurement[Any]]]]:
    if isinstance(loaded, ModuleType):
        if not hasattr(loaded, "MEASUREMENT"):
            return
        loaded = loaded.MEASUREMENT
    if not (isinstance(loaded, type) and issubclass(loaded, Measurement)):
        raise TypeError(f"{loaded!r} is no subclass of auxin.analysis.Measurement")
    yield loaded.name, loaded


_MEASUREMENTS: Registry[type[Measurement[Any]]] = Registry("measurement", "auxin.analysis", _measurements_in)
