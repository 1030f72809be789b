"""Whether a model can be trained at all, and on what it is to learn."""

import torch
from transformers import PreTrainedModel

from auxin.errors import ConfigError
from auxin.objectives.objective import Objective
from auxin.training.adapters import check_adapter, has_adapter


def check_fit(model: PreTrainedModel, objective: Objective) -> None:
    """Refuse models that would fail later, or worse, not fail.

    Args:
        model: the model.
        objective: what it shall learn, bound to its config and the data.

    Raises:
        ConfigError: what does not fit, and how to make it fit.
    """
    wrong = {str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)}
    if wrong:
        raise ConfigError(
            f"The model's weights are {', '.join(sorted(wrong))}; updates would be lost to rounding. Load it with "
            "dtype=torch.float32; precision='bfloat16' computes in bfloat16 all the same."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("The model has no trainable parameter: requires_grad is False everywhere.")
    if has_adapter(model):
        check_adapter(model)
    objective.check(model)
