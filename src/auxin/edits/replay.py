"""Loading edited models: transformers calls us before it reads the weights, and the structural edits are done again.

transformers has one public way to rewrite a model between building it and loading its weights, which it made for
quantizers. A config whose `quantization_config` names the method "auxin" is handed to the class below. An edited model
is quantized in nothing else: once it is loaded, it is a plain model to Trainer, PEFT and whoever asks.

Without us transformers only warns of a quantizer that it does not know, and would load the weights into another model.
The folders that Auxin writes therefore keep the weights under a name that transformers does not look for, and the
config tells it to us (`auxin.edits.saved`).

Whoever imports `auxin` imports this module; the edits themselves are imported with the first edited model.
"""

from typing import TYPE_CHECKING, Any, cast

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from auxin.edits.mark import REPLAY_METHOD
from auxin.errors import CheckpointError
from auxin.models.weight_files import EDITED_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@register_quantization_config(REPLAY_METHOD)
class EditsConfig(QuantizationConfigMixin):
    """The structural edits of a model, as they stand in config.json, and the file of its weights where that has a name
    of its own."""

    def __init__(
        self,
        edits: list[dict[str, Any]] | None = None,
        quant_method: str = REPLAY_METHOD,
        weights: str | None = None,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment] # its enumeration knows the built-in ones only
        self.edits = edits or []
        self.weights = weights


@register_quantizer(REPLAY_METHOD)
class EditsReplay(HfQuantizer):
    """Does the edits of a checkpoint again on the model that its weights are about to be loaded into."""

    def update_attn_implementation(self, config: "PreTrainedConfig") -> "PreTrainedConfig":
        """Tell transformers where the weights lie: this is called before it looks for them."""
        weights = self.quantization_config.to_dict()["weights"]
        if weights is not None:
            if weights not in EDITED_NAMES:  # no file elsewhere
                raise CheckpointError(f"quantization_config.weights: {weights!r} is none of {', '.join(EDITED_NAMES)}.")
            config.transformers_weights = weights
        return config

    update_tp_plan = update_attn_implementation
    """What earlier transformers call in that place."""

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        from auxin.edits.structure import rebuild, structural_edits, written

        cast(EditsConfig, self.quantization_config).edits = written(rebuild(model, structural_edits(model.config)))
        return model

    def postprocess_model(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        """Fill what no checkpoint holds, and take back the marks of a quantized model, which this is not."""
        from auxin.edits.structure import fill_brick_buffers

        fill_brick_buffers(model)
        self._unmark(model)
        return model

    def _unmark(self, model: "PreTrainedModel") -> None:
        # A model in memory has no files: where it is saved again it has others.
        vars(model.config).pop("transformers_weights", None)
        stored = {key: value for key, value in self.quantization_config.to_dict().items() if key != "weights"}
        if stored["edits"]:
            model.config.quantization_config = stored
        else:
            del model.config.quantization_config
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)

    def is_serializable(self) -> bool:
        """The edited model is saved like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """All its weights are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """As `is_trainable`."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Bricks compile."""
        return True
