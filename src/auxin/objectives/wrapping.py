"""Objectives that add something to another one, by which they are fed, counted and measured."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.data.dataset import SampleForm
from auxin.objectives.causal import Causal
from auxin.objectives.objective import OBJECTIVES, Objective, ObjectiveSettings
from auxin.words.one_of import OneOf

_OF_THE_CLASS = ("target", "shifted", "whole_text", "answers", "noisy", "adds_up", "sees_heads", "call")


class WrappingSettings(ObjectiveSettings):
    """The base of the settings of objectives that wrap another one."""

    objective: Annotated[ObjectiveSettings, OneOf(OBJECTIVES)] = Causal()
    """The objective that this adds to: `masked_language`, `{kind: span_corruption, noise_density: 0.2}`, ..."""

    def auto_class(self, form: SampleForm) -> Any:
        """As of the wrapped objective."""
        return self.objective.auto_class(form)

    def check_config(self, config: PreTrainedConfig) -> None:
        """As of the wrapped objective."""
        self.objective.check_config(config)

    def check_form(self, form: SampleForm) -> None:
        """As of the wrapped objective."""
        self.objective.check_form(form)

    def extra_tokens(self, form: SampleForm) -> int:
        """As of the wrapped objective."""
        return self.objective.extra_tokens(form)

    def longest(self, form: SampleForm) -> int | None:
        """As of the wrapped objective."""
        return self.objective.longest(form)

    def config_values(self, form: SampleForm) -> dict[str, Any]:
        """As of the wrapped objective."""
        return self.objective.config_values(form)

    def references(self) -> tuple[str, ...]:
        """As of the wrapped objective."""
        return self.objective.references()


class Wrapping(Objective):
    """The base of objectives that wrap another one: all is the other's but what a subclass says.

    Args:
        wrapped: the other one.
    """

    def __init__(self, wrapped: Objective) -> None:
        super().__init__(wrapped.config, wrapped.form)
        self.wrapped = wrapped
        # What an objective says of its class is here said of this one.
        vars(self).update({name: getattr(wrapped, name) for name in _OF_THE_CLASS})

    def inputs(self, batch: Mapping[str, Tensor], noise: np.random.Generator) -> dict[str, Tensor]:
        """As of the wrapped objective."""
        return self.wrapped.inputs(batch, noise)

    def example(self, samples: int) -> dict[str, Tensor]:
        """As of the wrapped objective."""
        return self.wrapped.example(samples)

    def targets(self, inputs: Mapping[str, Tensor]) -> int:
        """As of the wrapped objective."""
        return self.wrapped.targets(inputs)

    def sample_targets(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """As of the wrapped objective."""
        return self.wrapped.sample_targets(inputs)

    def spans(self, model: nn.Module, inputs: Mapping[str, Tensor], context: Tensor) -> Tensor:
        """As of the wrapped objective."""
        return self.wrapped.spans(model, inputs, context)

    def logits(self, output: Any) -> Tensor:
        """As of the wrapped objective."""
        return self.wrapped.logits(output)

    def at_targets(self, logits: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As of the wrapped objective."""
        return self.wrapped.at_targets(logits, inputs)

    def loss(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
        """As of the wrapped objective."""
        return self.wrapped.loss(model, inputs)

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """As of the wrapped objective."""
        return self.wrapped.losses(model, inputs)

    def predictions(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As of the wrapped objective."""
        return self.wrapped.predictions(model, inputs)

    def check(self, model: PreTrainedModel) -> None:
        """As of the wrapped objective."""
        self.wrapped.check(model)

    @contextlib.contextmanager
    def learning(self, model: PreTrainedModel) -> Iterator[None]:
        """As of the wrapped objective."""
        with self.wrapped.learning(model):
            yield

    def training_flops(self, model: nn.Module) -> float:
        """As of the wrapped objective."""
        return self.wrapped.training_flops(model)

    def describe(self) -> dict[str, str]:
        """As of the wrapped objective."""
        return self.wrapped.describe()

    def identity(self) -> dict[str, str]:
        """As of the wrapped objective."""
        return self.wrapped.identity()
