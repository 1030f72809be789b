"""Results in a folder, under the fingerprint of what they were measured on: what was measured once isn't run again."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from pydantic import SerializeAsAny
from transformers import PreTrainedModel

from auxin.analysis.measurement import CalibrationData, Measurement, Result
from auxin.edits.structure import config_values
from auxin.errors import ConfigError
from auxin.files import cache_folder, write_text
from auxin.locks import LOCK_FILE, in_turn
from auxin.models.fingerprint import add_weights
from auxin.settings import Settings

FORMAT = 1
_NOT_THE_MODEL = ("transformers_version", "architectures", "dtype", "use_cache", "_name_or_path")
"""Values of a config that say nothing about what the model computes, or that the weights say themselves."""


class Subject(Settings):
    """What is measured: under the same subject there is the same result."""

    format: int = FORMAT
    measurement: str
    """Name of the measurement."""
    version: int
    """Of its definition."""
    settings: dict[str, Any]
    """Its settings, all of them."""
    model: str
    """Fingerprint of the model, see `model_fingerprint`."""
    data: str | None
    """Fingerprint of the data; None where only weights are looked at."""
    samples: int | None
    """How many there are in the data."""

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all of it."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


class Record(Settings):
    """A result, and what it is the result of."""

    subject: Subject
    result: SerializeAsAny[Result]


def subject_of(measurement: Measurement[Any], model: str, data: CalibrationData | None) -> Subject:
    """What `measurement` is about to measure.

    Args:
        measurement: with its settings.
        model: the model's fingerprint.
        data: the samples.

    Raises:
        ConfigError: it needs data, and there are none.
    """
    if measurement.needs == "weights":
        data = None
    elif data is None:
        raise ConfigError(f"{measurement.name} needs samples to run the model on. Give data.")
    return Subject(
        measurement=measurement.name,
        version=measurement.version,
        settings=measurement.model_dump(mode="json"),
        model=model,
        data=None if data is None else data.fingerprint,
        samples=None if data is None else data.samples,
    )


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hex SHA-256 of a model's class, config, parameters and buffers, read one after the other.

    Where its weights lie and how its module tree came about doesn't matter.

    Raises:
        ConfigError: the model has no weights.
    """
    values = {key: value for key, value in config_values(model.config).items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(f"{type(model).__name__}\n{json.dumps(values, sort_keys=True)}\n".encode())
    add_weights(digest, model)
    return digest.hexdigest()


def default_cache() -> Path:
    """The folder of results that are kept, see `auxin.files.cache_folder`."""
    return cache_folder("analysis")


def cached(folder: Path, subject: Subject, result_type: type[Result]) -> Result | None:
    """The result that was stored for `subject`; None where there is none, or where its file is damaged."""
    try:
        values = json.loads(_file(folder, subject).read_text(encoding="utf-8"))
        # The whole subject is compared, so that a file of another name, or of half its content, is no hit.
        if Subject.model_validate(values["subject"]) != subject:
            return None
        return result_type.model_validate(values["result"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(folder: Path, record: Record) -> None:
    """Keep a result, whole or not at all. A folder that can't be written to is a warning: the result isn't lost."""
    path = _file(folder, record.subject)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(folder / LOCK_FILE):
            write_text(path, record.model_dump_json(indent=1) + "\n")
    except OSError as error:
        warnings.warn(
            f"The result of {record.subject.measurement} was not kept in {folder}: {error}. Set AUXIN_CACHE to a "
            "folder that can be written to.",
            stacklevel=2,
        )


def _file(folder: Path, subject: Subject) -> Path:
    return folder / f"{subject.measurement}-{subject.digest[:32]}.json"
