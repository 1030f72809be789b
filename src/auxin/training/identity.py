"""What a run is: what must be the same when it is resumed."""

import json
from typing import Any, Self

from transformers import PreTrainedConfig

from auxin.errors import CheckpointError, ConfigError
from auxin.settings import Settings
from auxin.training.settings import TrainingSettings

MAY_CHANGE = frozenset(
    {
        "micro_batch_size",
        "device",
        "compile",
        "activation_checkpointing",
        "strategy",
        "processes_per_copy",
        "gather_once",
        "num_workers",
        "evaluation_interval",
        "evaluation_batches",
        "checkpoint_interval",
        "keep_checkpoints",
        "log_interval",
        "tensorboard",
        "guard",
    }
)
"""Settings that leave what is computed as it is, but for rounding; a run may be resumed with other values of them."""

_ORIGIN_KEYS = ("transformers_version", "_name_or_path", "dtype", "architectures")


class RunIdentity(Settings):
    """Settings, data and model of a stage, as they were at its start."""

    stage_name: str
    settings: dict[str, Any]
    data_fingerprint: str
    data_position: int
    """Batch of the data order at which the stage starts."""
    model_config_values: dict[str, Any]
    objective: dict[str, str] = {}
    """What of the objective is not in the settings: fingerprints of the models that it goes by."""

    @classmethod
    def of(
        cls,
        stage_name: str,
        settings: TrainingSettings,
        fingerprint: str,
        position: int,
        config: PreTrainedConfig,
        objective: dict[str, str],
    ) -> Self:
        """The identity of a stage about to start."""
        values = {key: value for key, value in config.to_dict().items() if key not in _ORIGIN_KEYS}
        return cls(
            stage_name=stage_name,
            settings=settings.model_dump(mode="json"),
            data_fingerprint=fingerprint,
            data_position=position,
            # Through JSON, as the stored one went: tuples become lists, integer keys strings.
            model_config_values=json.loads(json.dumps(values, default=str)),
            objective=objective,
        )

    def check(self, saved: Self, output_dir: str) -> list[str]:
        """Compare with the identity saved in a run's folder.

        Returns:
            Notes on settings that differ and may.

        Raises:
            CheckpointError: something differs that must not.
        """
        notes = []
        for field, (old, new) in self._differences(saved).items():
            if field.removeprefix("settings.") in MAY_CHANGE:
                notes.append(f"resumed with {field} {new!r} instead of {old!r}")
                continue
            raise CheckpointError(
                f"{output_dir} was started with {field} {old!r}, but is resumed with {new!r}. Resume with {old!r}, or "
                "train into another folder (from this run's checkpoint, if you like)."
            )
        return notes

    def check_alike(self, led: Self) -> None:
        """Compare with the identity that process 0 has of the same stage.

        Raises:
            ConfigError: something differs.
        """
        for field, (theirs, own) in self._differences(led).items():
            raise ConfigError(
                f"{field} is {own!r} in this process, and {theirs!r} in process 0. Give all the same files and "
                "settings."
            )

    def _differences(self, other: Self) -> dict[str, tuple[Any, Any]]:
        """What differs, by name: the other's value, and the own one."""
        pairs: dict[str, tuple[Any, Any]] = {
            "stage_name": (other.stage_name, self.stage_name),
            "data fingerprint": (other.data_fingerprint, self.data_fingerprint),
            "data_position": (other.data_position, self.data_position),
        }
        for prefix, old, new in (
            ("settings", other.settings, self.settings),
            ("objective", other.objective, self.objective),
            ("model config", other.model_config_values, self.model_config_values),
        ):
            for key in sorted(old.keys() | new.keys()):
                pairs[f"{prefix}.{key}"] = (old.get(key), new.get(key))
        return {field: (old, new) for field, (old, new) in pairs.items() if old != new}
