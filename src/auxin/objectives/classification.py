"""Classification: tell which of several classes a sample has, be it a text, a pair of texts or an image."""

from typing import Any, ClassVar, Literal

from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedConfig

from auxin.accounting.inputs import PIXELS
from auxin.data.dataset import SampleForm
from auxin.errors import ConfigError
from auxin.objectives.objective import learnt_from
from auxin.objectives.task import TaskObjective, TaskSettings

PROBLEM = "single_label_classification"
LABELS = "labels"


class ClassificationObjective(TaskObjective):
    """Samples with a class each, in `labels` (samples,)."""

    def describe(self) -> dict[str, str]:
        """The classes."""
        labels = self.form.labels or ()
        return {"classes": f"{len(labels)} ({', '.join(labels)})"}


class Classification(TaskSettings):
    """Tell which of several classes a text, a pair of texts or an image has, with an encoder or a decoder. Losses are
    nats per example."""

    kind: Literal["classification"] = "classification"
    """Says that this is classification."""
    bound: ClassVar[type[TaskObjective]] = ClassificationObjective
    of_samples: ClassVar[tuple[str, ...]] = (LABELS,)

    def auto_class(self, form: SampleForm) -> Any:
        """Image classifiers where samples hold pixels, sequence classifiers elsewhere."""
        return AutoModelForImageClassification if PIXELS in form.tensors else AutoModelForSequenceClassification

    def check_config(self, config: PreTrainedConfig) -> None:
        """Refuse encoder-decoders, and models whose examples have several classes or a number; ConfigError."""
        super().check_config(config)
        if config.problem_type not in (None, PROBLEM):
            raise ConfigError(
                f"problem_type: the model's config says {config.problem_type!r}, and here each example has one class. "
                f"Set it to {PROBLEM!r}, or give another model."
            )

    def check_form(self, form: SampleForm) -> None:
        """Refuse samples without a class, such as packed text; ConfigError."""
        if LABELS not in form.tensors:
            raise ConfigError(
                f"objective: 'classification' needs a class for each sample, and a sample of this data holds "
                f"{', '.join(form.tensors)} alone. Set data.kind: labelled_text (or labelled_images), or "
                f"training.objective: {learnt_from(form)}."
            )

    def config_values(self, form: SampleForm) -> dict[str, Any]:
        """The classes, where they are known."""
        if form.labels is None:
            return {}
        names = dict(enumerate(form.labels))
        return {"id2label": names, "label2id": {name: n for n, name in names.items()}, "problem_type": PROBLEM}

    def _check_both(self, config: PreTrainedConfig, form: SampleForm) -> None:
        _check_labels(config, form)
        _check_images(config, form)


def _check_labels(config: PreTrainedConfig, form: SampleForm) -> None:
    """Refuse a head of other classes; ConfigError."""
    if form.labels is None:
        return
    if config.num_labels != len(form.labels):
        raise ConfigError(
            f"num_labels: the model tells {config.num_labels} classes apart, and the data has {len(form.labels)} "
            f"({', '.join(form.labels)}). Give data of the model's classes, a checkpoint without a classification "
            "head, or a new model."
        )
    named: Any = config.id2label
    own = tuple(named[number] for number in range(config.num_labels))
    unnamed = tuple(f"LABEL_{number}" for number in range(config.num_labels))
    if own not in (form.labels, unnamed):
        raise ConfigError(
            f"id2label: the model's classes are {', '.join(own)}, and the data's {', '.join(form.labels)}, so that "
            "what it has learnt would be taken for something else. Set data.labels to the model's, in its order."
        )


def _check_images(config: PreTrainedConfig, form: SampleForm) -> None:
    """Refuse a model of other images than the data's, and patches that would leave a border out; ConfigError."""
    part = getattr(config, "vision_config", config)
    for name in ("image_size", "num_channels"):
        own, given = getattr(part, name, None), form.config_values.get(name)
        if own is not None and given is not None and _sides(own) != _sides(given):
            raise ConfigError(
                f"{name}: the model's is {own}, and the data's {given}. Set data.{name}: {own}, or give a new model."
            )
    size, patch = form.config_values.get("image_size"), getattr(part, "patch_size", None)
    if size is None or patch is None:
        return
    for side, step in zip(_sides(size), _sides(patch), strict=True):
        if side % step:
            whole = " or ".join(f"{count * step}" for count in (side // step, side // step + 1) if count)
            raise ConfigError(
                f"patch_size: images of {side} pixels are not cut evenly into patches of {step}, and the model would "
                f"not see the rest. Set data.image_size: {whole}, or a patch_size that divides {side}."
            )


def _sides(size: Any) -> tuple[int, ...]:
    """Height and width."""
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


OBJECTIVE = Classification
