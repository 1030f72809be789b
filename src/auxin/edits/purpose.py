"""Whether a plan is for the model that it is applied to."""

from transformers import PreTrainedConfig

from auxin.edits.kinds.architecture_edits import SetConfig
from auxin.edits.kinds.edit import ArrangeLayers
from auxin.edits.plan import Plan
from auxin.edits.structure import config_from_values, config_values
from auxin.errors import OtherModelError, PlanError, placed
from auxin.models.configs import config_value
from auxin.models.layout import LENGTH_FIELDS

NOT_OF_THE_MODEL = ("architectures", "dtype", "transformers_version")
"""Values of a config in which two models may differ and take the same plan."""


def refuse_other_model(plan: Plan, config: PreTrainedConfig) -> None:
    """OtherModelError when `plan` was made for a model of another architecture, or where what it changes in the config,
    or the number of layers that it arranges, is another in `config`: its indices and factors are those of the other
    one.

    A plan that does not say what it was made for, as one written by hand, is for any model that its edits fit.
    """
    if plan.made_for is None:
        return
    with placed(f"The plan of {plan.method}: made_for: "):
        made_for = config_from_values(plan.made_for)
    if made_for.model_type != config.model_type:
        raise OtherModelError(
            f"The plan of {plan.method} was made for a {made_for.model_type}, and this is a {config.model_type}. Make "
            "one for this model."
        )
    for key in _changed(plan, config):
        try:
            wanted, found = config_value(made_for, key), config_value(config, key)
        except PlanError:  # the edit itself says that there is no such value
            continue
        if wanted != found and not isinstance(wanted, PreTrainedConfig):
            raise OtherModelError(
                f"The plan of {plan.method} was made for {key} = {wanted}, and this model has {found}. Make one for "
                "this model."
            )


def _changed(plan: Plan, config: PreTrainedConfig) -> list[str]:
    """The config's values whose old value the plan goes by."""
    keys = [key for edit in plan.edits if isinstance(edit, SetConfig) for key in edit.values]
    if any(isinstance(edit, ArrangeLayers) for edit in plan.edits):
        keys += [name for name in LENGTH_FIELDS if isinstance(getattr(config, name, None), int)]
    return list(dict.fromkeys(keys))


def made_for_another(plan: Plan, config: PreTrainedConfig) -> str:
    """A sentence that says by what a model of `config` differs from the one that `plan` was made for, whether the plan
    changes it or not; empty where it does not differ, or where the plan does not say."""
    if plan.made_for is None:
        return ""
    made_for, values = plan.made_for, config_values(config)
    if (other := made_for.get("model_type")) != config.model_type:
        return f"The plan was made for a model of type {other!r}; this one is {config.model_type!r}."
    differ = [
        f"{name} = {made_for.get(name)} there and {values.get(name)} here"
        for name in dict.fromkeys([*made_for, *values])
        if name not in NOT_OF_THE_MODEL and made_for.get(name) != values.get(name)
    ]
    return f"The plan was made for another model: {', '.join(differ[:4])}." if differ else ""
