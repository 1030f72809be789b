"""Edits of what a config says: values, or the architecture itself."""

from typing import Any, Literal

from auxin.edits.kinds.fills import Tagged


class SetConfig(Tagged):
    """Set values of the model's config; the structure that follows from it is built from the new config."""

    kind: Literal["set_config"] = "set_config"
    values: dict[str, Any]
    """The new values by name."""

    def __str__(self) -> str:
        return "set " + _in_words(self.values)


class ChangeArchitecture(Tagged):
    """Make a model of another architecture: its class, and the `model_type` of its config, change.

    Values that both configs have by the same name stay, and so do parameters of the same name and shape. What the new
    architecture has beside them is given by other edits (`MakeParameters`).
    """

    kind: Literal["change_architecture"] = "change_architecture"
    model_type: str
    """The new architecture, as configs call it: "mixtral"."""
    values: dict[str, Any] = {}
    """Values of the new config that differ from those of the old one, or that the old one lacks."""

    def __str__(self) -> str:
        return f"becomes {self.model_type}" + (f" ({_in_words(self.values)})" if self.values else "")


def _in_words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in values.items())
