"""Models one layer of which, or one stack, is narrower than its config says: by hand, from the names of a family."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from auxin.edits import ConfigureModule, Edit, Plan, SliceParameter

FFN: dict[str, tuple[str, str, str, tuple[str, ...], tuple[str, int]]] = {
    "llama": (
        "model.layers",
        "{}.mlp",
        "intermediate_size",
        ("{}.mlp.gate_proj.weight", "{}.mlp.gate_proj.bias", "{}.mlp.up_proj.weight", "{}.mlp.up_proj.bias"),
        ("{}.mlp.down_proj.weight", 1),
    ),
    "gpt2": ("transformer.h", "{}", "n_inner", ("{}.mlp.c_fc.bias",), ("{}.mlp.c_proj.weight", 0)),
    "gpt_neox": (
        "gpt_neox.layers",
        "{}.mlp",
        "intermediate_size",
        ("{}.mlp.dense_h_to_4h.weight", "{}.mlp.dense_h_to_4h.bias"),
        ("{}.mlp.dense_4h_to_h.weight", 1),
    ),
    "t5": (
        "decoder.block",
        "{}.layer.2.DenseReluDense",
        "d_ff",
        ("{}.layer.2.DenseReluDense.wi.weight",),
        ("{}.layer.2.DenseReluDense.wo.weight", 1),
    ),
    "bert": (
        "bert.encoder.layer",
        "{}",
        "intermediate_size",
        ("{}.intermediate.dense.weight", "{}.intermediate.dense.bias"),
        ("{}.output.dense.weight", 1),
    ),
    "vit": (
        "vit.layers",
        "{}.mlp",
        "intermediate_size",
        ("{}.mlp.fc1.weight", "{}.mlp.fc1.bias"),
        ("{}.mlp.fc2.weight", 1),
    ),
}
"""By family: the stack, what takes the width from its config, that value's name, what writes the feed-forward units
along axis 0, and what reads them with its axis; `{}` is the layer."""
KEPT = [0, 2, 3, 5, 7, 11]
"""Of the 12 feed-forward units of tiny models."""


def layer(family: str, number: int | str = 1) -> str:
    """Path of a layer; "*" for all of the stack."""
    return f"{FFN[family][0]}.{number}"


def narrow_edits(family: str, number: int | str = 1, kept: list[int] = KEPT, **values: Any) -> list[Edit]:
    """The edits that leave of a layer's feed-forward units those in `kept`, and configure it (with `values` too)."""
    _, module, field, writers, (reader, axis) = FFN[family]
    path = layer(family, number)
    edits: list[Edit] = [ConfigureModule(module=module.format(path), values={field: len(kept), **values})]
    edits += [SliceParameter(parameter=name.format(path), axis=0, index=kept) for name in writers]
    if family == "gpt2":  # whose matrices are (in, out)
        edits.append(SliceParameter(parameter=f"{path}.mlp.c_fc.weight", axis=1, index=kept))
    return [*edits, SliceParameter(parameter=reader.format(path), axis=axis, index=kept)]


def narrow_plan(family: str, number: int | str = 1, promise: Any = "none", **values: Any) -> Plan:
    return Plan(method="cut", promise=promise, edits=narrow_edits(family, number, **values))


def silence(model: PreTrainedModel, family: str, number: int = 1, kept: list[int] = KEPT) -> None:
    """Set to zero what reads the units that are not in `kept`, so that taking them away changes nothing."""
    name, axis = FFN[family][4]
    weight = model.get_parameter(name.format(layer(family, number)))
    gone = [unit for unit in range(weight.shape[axis]) if unit not in kept]
    with torch.no_grad():
        weight.index_fill_(axis, torch.tensor(gone), 0)


def state(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """All that an edit could change, identities included."""
    found: dict[str, Any] = {"config": copy.deepcopy(model.config.to_dict())}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[name] = (parameter.detach().clone(), id(parameter), parameter.requires_grad)
    for name, module in model.named_modules(remove_duplicate=False):
        plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        found[f"{name}/module"] = (id(module), plain, id(vars(module).get("config")))
    if optimizer is not None:
        found["groups"] = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
        found["moments"] = {
            id(p): {key: value.clone() for key, value in values.items()} for p, values in optimizer.state.items()
        }
    return found
