"""Results in a folder, under the fingerprint of what they were measured on: what was measured once isn't run again.

With each lies what it took. Whoever takes it from here books that, so that no book says what happened to be known.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import SerializeAsAny

from auxin.accounting.ledger import software_versions
from auxin.analysis.effort import Effort
from auxin.analysis.measurement import CalibrationData, Measurement, Result
from auxin.errors import ConfigError
from auxin.files import cache_folder
from auxin.kept_records import alone, digest, find, keep
from auxin.objectives.calibration import Calibration
from auxin.settings import Settings

FORMAT = 2


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
    """Fingerprint of the model, see `auxin.analysis.fingerprint`."""
    data: str | None
    """Fingerprint of the data; None where only weights are looked at."""
    samples: int | None
    """How many there are in the data."""
    batch_size: int | None
    """Of them that run at once, where the data says it: rounding and FLOPs go by it."""
    device: str
    """The kind of device that the model lies on, "cpu" or "cuda": rounding goes by it."""
    software: dict[str, str]
    """The versions of what computes."""

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all of it."""
        return digest(self.model_dump(mode="json"))


class Record(Settings):
    """A result, what it is the result of, and what it took."""

    subject: Subject
    effort: Effort
    result: SerializeAsAny[Result]


def subject_of(
    measurement: Measurement[Any], model: str, data: CalibrationData | None, device: torch.device
) -> Subject:
    """What `measurement` is about to measure.

    Args:
        measurement: with its settings.
        model: the model's fingerprint.
        data: the samples.
        device: the model's.

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
        batch_size=data.settings.batch_size if isinstance(data, Calibration) else None,
        device=device.type,
        software=software_versions(),
    )


def default_cache() -> Path:
    """The folder of results that are kept, see `auxin.files.cache_folder`."""
    return cache_folder("analysis")


def cached(folder: Path, subject: Subject, result_type: type[Result]) -> Record | None:
    """What was stored for `subject`; None where there is nothing, or where its file is damaged."""
    values = find(_file(folder, subject), subject.model_dump(mode="json"))
    if values is None:
        return None
    try:
        result = result_type.model_validate(values["result"])
        return Record(subject=subject, effort=Effort.model_validate(values["effort"]), result=result)
    except (ValueError, KeyError):
        return None


def store(folder: Path, record: Record) -> None:
    """Keep a result, whole or not at all. A folder that can't be written to is a warning: the result isn't lost."""
    with alone(folder):
        what = f"The result of {record.subject.measurement} was"
        keep(_file(folder, record.subject), record.model_dump(mode="json"), what)


def _file(folder: Path, subject: Subject) -> Path:
    return folder / f"{subject.measurement}-{subject.digest[:32]}.json"
