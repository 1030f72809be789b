"""The books of a run: what each stage cost and what it bought, its ancestors included."""

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
import transformers
from pydantic import Field, model_validator

from auxin.errors import CheckpointError
from auxin.files import write_text
from auxin.settings import Settings

LEDGER_FILE = "ledger.json"

StageKind = Literal["build", "train", "change", "evaluate", "convert"]


class StageRecord(Settings):
    """One stage: what was done, what it cost, what came out."""

    name: str
    kind: StageKind
    parameters: int
    """Parameters of the model at the end of the stage, tied ones once."""
    units: int = 0
    """Units of data seen in this stage; tokens are those of the text, also where an objective hides some."""
    unit: str = "token"
    """What `units` counts, in the singular: token, example, image, ..."""
    samples: int = 0
    """Samples of data that a growth's method looked at or learned from; what is in them is in `units`."""
    flops: float = 0.0
    """Training FLOPs (forward and backward) of this stage; of a growth, those that planning it took."""
    seconds: float = 0.0
    """Wall time of this stage, planning and evaluations included; of a resumed stage, the sum over its pieces."""
    measure: str | None = None
    """What was measured on the held-out split: "loss", "accuracy", ...; None: nothing."""
    value_before: float | None = None
    """It at the start; None where it was not measured."""
    value_after: float | None = None
    """It at the end."""
    measures: Mapping[str, float | None] = {}
    """All that was measured at the end, by kind; None where JSON has no number for it."""
    plan: dict[str, Any] | None = None
    """The plan that a growth applied."""
    receipt: dict[str, Any] | None = None
    """What the executor measured while it applied the plan."""
    data_fingerprint: str | None = None
    seed: int | None = None
    versions: dict[str, str] = Field(default_factory=lambda: software_versions())
    started_at: str = Field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    notes: list[str] = []
    """What a reader must know: skipped batches, rewinds, interruptions."""

    @model_validator(mode="before")
    @classmethod
    def _no_former_words(cls, values: Any) -> Any:
        """Refuse records of before changes of all kinds had one word."""
        if isinstance(values, dict) and values.get("kind") == "grow":
            raise ValueError(
                "the stage kind 'grow' is called 'change' now: this was written by an earlier version. Do it again "
                "with this one, or go on with the earlier one"
            )
        return values


class Ledger(Settings):
    """The stages of one model from its beginning; a child's ledger starts as a copy of its parent's."""

    stages: list[StageRecord] = []

    def total_units(self, unit: str = "token") -> int:
        """Data of all stages that is counted in `unit`, ancestors included."""
        return sum(stage.units for stage in self.stages if stage.unit == unit)

    def units_seen(self, data_fingerprint: str) -> int:
        """Data of the train stages, ancestors included, that learnt from the data of that fingerprint."""
        trained = (stage for stage in self.stages if stage.kind == "train")
        return sum(stage.units for stage in trained if stage.data_fingerprint == data_fingerprint)

    @property
    def total_flops(self) -> float:
        """Training FLOPs of all stages, ancestors included."""
        return sum(stage.flops for stage in self.stages)

    @property
    def total_seconds(self) -> float:
        """Wall time of all stages, ancestors included."""
        return sum(stage.seconds for stage in self.stages)

    def append(self, stage: StageRecord) -> Self:
        """Return a new ledger with `stage` at its end."""
        return type(self)(stages=[*self.stages, stage])

    def save(self, directory: str | Path) -> Path:
        """Write `ledger.json` into `directory` so that a reader sees the old file or the new one, never half of one."""
        path = Path(directory) / LEDGER_FILE
        write_text(path, self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a ledger from its file or from the folder that holds it.

        Raises:
            CheckpointError: there is none, or it is not JSON.
        """
        path = Path(path)
        path = path / LEDGER_FILE if path.is_dir() else path
        try:
            return cls.parse(json.loads(path.read_text(encoding="utf-8")), source=str(path))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} does not exist: this folder carries no ledger.") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not valid JSON ({error}). Restore it from a backup.") from error


def books_in(folder: str | Path) -> Ledger:
    """The books in a checkpoint's folder; empty ones where it has none.

    Raises:
        CheckpointError: they can't be read.
    """
    return Ledger.load(folder) if (Path(folder) / LEDGER_FILE).exists() else Ledger()


def software_versions() -> dict[str, str]:
    """The versions on which a number depends."""
    return {
        "auxin": importlib.metadata.version("auxin"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
