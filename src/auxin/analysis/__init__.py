"""Measurements on a model that methods share: streamed over calibration batches, cached, with their spread."""

from auxin.analysis.cache import Record, default_cache
from auxin.analysis.effort import Effort
from auxin.analysis.fingerprint import model_fingerprint
from auxin.analysis.measurement import (
    Batch,
    CalibrationData,
    Measurement,
    Observer,
    Result,
    Table,
    Tap,
    kept_tokens,
    measurement,
    measurements,
    token_means,
)
from auxin.analysis.run import measure, measure_all
from auxin.analysis.spread import Estimate, Estimates, Spread

__all__ = [
    "Batch",
    "CalibrationData",
    "Effort",
    "Estimate",
    "Estimates",
    "Measurement",
    "Observer",
    "Record",
    "Result",
    "Spread",
    "Table",
    "Tap",
    "default_cache",
    "kept_tokens",
    "measure",
    "measure_all",
    "measurement",
    "measurements",
    "model_fingerprint",
    "token_means",
]
