"""What is asked of a search for the way in which a model becomes smaller."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedConfig

from auxin.data import CorpusSettings
from auxin.methods import method as find_method
from auxin.models.loading import load_config
from auxin.objectives.calibration import STANDARD_BYTES, STANDARD_LENGTH, objective_for
from auxin.planning.target import Target
from auxin.recipes import Recipe
from auxin.settings import Settings
from auxin.training import TrainingSettings
from auxin.training.settings import BUDGETS

QUESTIONS = "question_answering"
"""What both the data and what is learnt from it are called."""
MASKED = "ForMaskedLM"
"""How the classes of models end that learn hidden tokens."""


class ShrinkSettings(Settings):
    """A model, how small it shall be, and what may be spent on finding out how."""

    model: Path
    """The checkpoint's folder."""
    target: Target
    """How small the model shall be."""
    methods: list[str] | None = Field(default=None, min_length=1)
    """The methods to try, each alone and with others; any that have a target. None: those that need no more than a few
    passes over the samples."""
    trials: int = Field(default=32, ge=1, le=10_000)
    """Ways to try, each method alone among them; those that a method refuses count, too."""
    minutes: float | None = Field(default=None, gt=0)
    """No trial but the first begins after so many minutes of trials; None: no limit. With a limit, another machine may
    find another way."""
    samples: int = Field(default=32, ge=1)
    """Samples of the training split that each method looks at."""
    choosing_samples: int = Field(default=64, ge=2)
    """Samples of the training split, none of those that methods look at, on which the ways are compared."""
    data: dict[str, Any] = {}
    """Fields of the data, as in recipes. Default: the standard library's source in contexts of 128 tokens, in those of
    the model's tokenizer. Its held-out split is looked at by nothing but the last measurement."""
    budget: int | None = Field(default=None, ge=1)
    """Tokens of the training split on which the chosen model is mended, learning from the one before; units of the data
    where those are not tokens. None: it is not."""
    training: dict[str, Any] = {}
    """Fields of TrainingSettings for mending, but its budget; its objective is what the losses are of."""
    teacher_weight: float = Field(default=0.5, ge=0, le=1)
    """In mending, the weight of the answers of the model before; the rest is that of the text."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the search, the samples, what methods draw, and the order of the data."""

    @classmethod
    def open_fields(cls) -> dict[str, type[Settings]]:
        """Settings of the training and of the data are not the search's own."""
        return {"training": TrainingSettings, "data": CorpusSettings}

    @field_validator("methods")
    @classmethod
    def _known(cls, names: list[str] | None) -> list[str] | None:
        for name in names or []:
            method = find_method(name)
            if "target" not in method.settings.model_fields:
                raise ValueError(f"{name} has no target to be given. Leave it out")
            if method.other_tokens:
                raise ValueError(
                    f"{name} changes the tokenizer, and losses of other tokens are not compared. Leave it out, and "
                    "apply it before or after"
                )
        if names is not None and len(set(names)) < len(names):
            raise ValueError(f"methods must differ; given: {', '.join(names)}")
        return names

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        for name in BUDGETS:
            if self.training.get(name) is not None:
                raise ValueError(f"training.{name}: how long the model is mended is said by budget. Give that instead")
        return self

    def recipe(self, branches: list[dict[str, Any]] | None = None, main: str | None = None) -> Recipe:
        """The recipe of the data, the objective and the mending, with `branches` beside the whole model's.

        Raises:
            ConfigError: a field of the data or of the training is unknown or wrong.
            CheckpointError: the model can't be read.
        """
        config = load_config(self.model)
        training = {"batch_size": 8, "learning_rate": 1e-4, "tensorboard": False, **self.training}
        if "objective" not in training:
            training["objective"] = self._objective(config)
        data = self.data
        if self._is_text:
            data = {"context_length": STANDARD_LENGTH, "tokenizer": str(self.model), **data}
            if not {"source", "paths", "name"} & set(data):
                data.setdefault("max_bytes", STANDARD_BYTES)
        whole = {
            "name": "whole",
            "title": "the whole model",
            "stages": [{"kind": "build", "checkpoint": str(self.model)}, {"kind": "evaluate"}],
        }
        return Recipe.parse(
            {
                "name": "shrink",
                "title": f"{self.model.resolve().name}, smaller",
                "description": f"Chosen by a search for the best way to {self.target}.",
                "seed": self.seed,
                "data": data,
                "training": training,
                "branches": [whole, *(branches or [])],
                "main_branch": main,
            }
        )

    @property
    def _is_text(self) -> bool:
        return self.data.get("kind", "text") == "text"

    def _objective(self, config: PreTrainedConfig) -> str:
        """What models of `config` learn from data of this kind."""
        if not self._is_text:
            return QUESTIONS if self.data.get("kind") == QUESTIONS else "classification"
        masked = (config.architectures or [""])[0].endswith(MASKED)
        return "masked_language" if masked else objective_for(config).kind
