"""Layers of random features in a trained model ("Scalable Neural Network Kernels", Sehanobish, Choromanski, Zhao,
Dubey, Likhosherstov, ICLR 2024, arXiv 2310.13225): inputs and weights of a layer meet in m numbers, so that
outputs x m numbers are trained instead of outputs x inputs. The layers are those of `auxin.nn.feature_layers`, of ReLU
features, as in most of the paper's code; `auxin.nn.universal_features` says why universal ones are of no use at the
widths of transformers.

| `place` | what changes | promise |
|---|---|---|
| `adapters` | what attentions and feed-forward parts add goes through z + v * (Phi(z) Y^T), v of zeros | exact |
| `feed-forward` | in the last blocks the first matrix, its bias and the activation become Phi(x) Y^T | none |
| `pooler` | the same of the pooler's | none |

A second plan (`bundle`) merges the layers in feed-forward parts with the matrices that read them: exact.

The last two are starts of a training ("uptraining" of all weights in the paper), and bad ones without it: Phi(x) Y^T is
an estimate of the arc-cosine kernel, which is no GELU. Of a gated part the gate's matrix and the activation are
replaced; the up matrix stays, and its product keeps the part from being bundled.

Not as in the paper's code: directions are saved with the model, each replaced block is a module of its own (there one
module stands in all of them), and adapters come before the dropout that some architectures have behind a part.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self, get_args

from pydantic import Field, StrictInt, model_validator
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auxin.edits import Edit, MakeParameters, NormalFill, Plan, RemoveModule, ReplaceModule, WrapModule, ZeroFill
from auxin.edits.kinds.fills import DirectionsFill, Fill
from auxin.edits.kinds.module_edits import ResizeModule
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.flow import Flow
from auxin.models.sublayers import Sublayer, refuse_shared, sublayers
from auxin.nn.feature_layers import FeatureAdapter, ReluFeatureConv1D, ReluFeatureLayer, ReluFeatureLinear
from auxin.nn.linear import LAYERS, known_class, linear_class, widths
from auxin.nn.stand_ins import StandIn
from auxin.planning.bench import from_model
from auxin.planning.depth import depth
from auxin.planning.hooks import TrainOnlySettings
from auxin.planning.linear_layers import linear_layers, merged_paths
from auxin.planning.method import Method
from auxin.settings import Settings
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.paths import encloses, path_pattern, shared_parts
from auxin.words.widths import FEED_FORWARD

NAME = "snnk"
Place = Literal["adapters", "feed-forward", "pooler"]
Part = Literal["attention", "feed-forward"]
FEATURES: dict[Place, int] = {"adapters": 8, "feed-forward": 16, "pooler": 512}
"""Those of the paper's scripts."""
STD = 0.02
"""Of an adapter's weight features at first."""
BRICKS: dict[type[nn.Module], str] = {
    nn.Linear: ReluFeatureLinear.brick_name,
    Conv1D: ReluFeatureConv1D.brick_name,
}


class RandomFeatureLayers(Settings):
    """Where layers of random features go, and how many features they have; or the bundling of those that are there."""

    place: Place = "adapters"
    """What changes: "adapters" are put on; the first half of "feed-forward" parts, or of the "pooler", is replaced."""
    features: StrictInt | None = Field(default=None, ge=1)
    """Features m of every layer; None: 8 of adapters, 16 of feed-forward parts, 512 of the pooler, as in the paper's
    scripts."""
    threshold: float = Field(default=0.0, le=0, ge=-1000)
    """What features are cut off at from below; below 0 some of what is negative passes (-5 in one of the paper's
    scripts), at -1000 all of it."""
    orthogonal: bool = True
    """Whether directions are orthogonal in blocks, which makes the features vary less."""
    blocks: StrictInt | None = Field(default=None, ge=1)
    """Change the last so many layers of every stack; None: all for adapters, half (one at least) for feed-forward
    parts."""
    after: tuple[Part, ...] = Field(default=get_args(Part), min_length=1)
    """What gets adapters: attentions (cross-attentions among them), feed-forward parts, or both."""
    train_with: list[str] | None = None
    """In a recipe the next train stage trains the adapters and what lies at these paths ("classifier", "bert.pooler"),
    and nothing else; None: all."""
    bundle: bool = False
    """Merge the layers of features in feed-forward parts with the matrices behind them; goes with no other setting."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the directions, and of the adapters' weight features."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.model_fields_set
        if self.bundle and (others := sorted(given - {"bundle", "seed"})):
            raise ValueError(f"bundle merges what is there and goes with no other setting; leave out {others[0]}.")
        of_adapters = [name for name in ("after", "train_with") if name in given]
        if self.place != "adapters" and of_adapters:
            raise ValueError(f"{of_adapters[0]} is about adapters, and place is {self.place}. Leave it out.")
        if self.place == "pooler" and self.blocks is not None:
            raise ValueError("blocks counts layers of stacks, and a pooler is in none. Leave it out.")
        return self

    @property
    def count(self) -> int:
        """m."""
        return FEATURES[self.place] if self.features is None else self.features


def plan_snnk(model: PreTrainedModel, settings: RandomFeatureLayers) -> Plan:
    """Plan layers of random features in `model`, or their bundling; weights are not looked at.

    Raises:
        PlanError: an unknown architecture, there is nothing to change or it was changed already, an activation that is
            no module, or, for bundling, no matrix that reads the features alone.
    """
    if settings.bundle:
        return plan_bundled(model)
    if settings.place == "adapters":
        return _plan_adapters(model, settings)
    if settings.place == "pooler":
        return _plan_layers(model, settings, _poolers(model), "the pooler")
    linears = _feed_forward(model, settings)
    return _plan_layers(model, settings, linears, f"{len(linears)} feed-forward part{'s' * (len(linears) > 1)}")


def _plan_adapters(model: PreTrainedModel, settings: RandomFeatureLayers) -> Plan:
    if there := next((path for path, module in model.named_modules() if isinstance(module, FeatureAdapter)), None):
        raise PlanError(
            f"{there} has an adapter of random features already. Train that one, or take them off first (remove_module "
            "with leaves = inner)."
        )
    chosen = [
        one
        for one in sublayers(model)
        if _in_last(model, one.stack, one.number, settings.blocks) and _part(one) in settings.after
        if not one.stack.maps
    ]
    if not chosen:
        raise PlanError(
            f"No {' or '.join(settings.after)} part of the {model.config.model_type} model is known whose result alone "
            "is added to a stream of tokens, as adapters need it. Name other parts (after), or choose another model."
        )
    refuse_shared(model, (one.output for one in chosen))
    flow, modules = Flow.of(model), {one.output: model.get_submodule(one.output) for one in chosen}
    edits: list[Edit] = []
    fills: dict[str, Fill] = {
        "adapter.weight_features": NormalFill(std=STD),
        "adapter.gate": ZeroFill(),
        "adapter.directions": DirectionsFill(orthogonal=settings.orthogonal),
    }
    for path, name in merged_paths(model, modules, flow.width):
        if (width := flow.width(name)) is None or not any(True for _ in modules[name].parameters()):
            raise PlanError(f"{name} gives nothing on example inputs, or has no parameters. Leave its stack out.")
        told = {"width": width, "features": settings.count, **_threshold(settings)}
        edits.append(WrapModule(module=path, brick=FeatureAdapter.brick_name, settings=told, fills=fills))
    trained = sum(int(flow.width(path) or 0) * (settings.count + 1) for path in modules)
    return _plan(
        model,
        settings,
        edits,
        promise="exact",
        hooks=_hooks(model, [f"{edit.module}.adapter" for edit in edits if isinstance(edit, WrapModule)], settings),
        findings=[f"{len(modules)} adapters with {trained:,} parameters."],
    )


def _plan_layers(
    model: PreTrainedModel, settings: RandomFeatureLayers, linears: dict[str, nn.Module], what: str
) -> Plan:
    """Replace linear layers and the activations behind them."""
    flow, activations = Flow.of(model), dict[str, nn.Module]()
    for path in linears:
        found = _activation(model, flow, path)
        if found is None:
            raise PlanError(
                f"{path}: behind it is no activation that is a module and reads all of what it gives, so that it can't "
                "be replaced together with one. Choose another place (adapters)."
            )
        activations[found] = model.get_submodule(found)
    refuse_shared(model, [*linears, *activations])
    told = {"features": settings.count, **_threshold(settings)}
    told |= {} if settings.orthogonal else {"orthogonal": False}
    edits: list[Edit] = []
    for path, name in merged_paths(model, linears, lambda name: (known_class(linears[name]), *widths(linears[name]))):
        edits.append(ReplaceModule(module=path, brick=BRICKS[known_class(linears[name])], settings=told))
    for path, _ in merged_paths(model, activations, lambda name: type(activations[name]).__qualname__):
        edits.append(RemoveModule(module=path, leaves="identity"))
    before = sum(parameter.numel() for module in linears.values() for parameter in module.parameters())
    after = sum(widths(module)[1] * settings.count for module in linears.values())
    findings = [
        f"The first matrix with bias and activation of {what}: {before:,} parameters become {after:,}. What is "
        "computed is another function, which has to be trained."
    ]
    if any(_reader(model, flow, path) is None for path in activations):
        findings.append("What they give is multiplied, or read by no matrix, so that they can't be bundled.")
    return _plan(model, settings, edits, promise="none", findings=findings)


def plan_bundled(model: PreTrainedModel) -> Plan:
    """Plan the merging of layers of features with the matrices that read them; exact.

    Raises:
        PlanError: there is none that could be.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, ReluFeatureLayer)}
    if not layers:
        raise PlanError("bundle: the model has no layers of random features. Ask for place = feed-forward first.")
    flow, edits = Flow.of(model), list[Edit]()
    readers = {path: _reader(model, flow, path) for path in layers}
    bundled = {
        path: reader for path, reader in readers.items() if reader and reader.split(".")[0] == path.split(".")[0]
    }
    if not bundled:
        path, reader = next(iter(readers.items()))
        why = (
            f"what reads it, {reader}, lies in no common part of the model"
            if reader
            else "no plain linear layer reads it as it is (a gated part multiplies it, an adapter stands between, or a "
            "layer of a class of the architecture's own reads it)"
        )
        raise PlanError(f"bundle: {path} can't be merged: {why}. Leave the layers of random features as they are.")

    def kind(path: str) -> tuple[Any, ...]:
        return bundled[path].split(".")[-1], layers[path].directions.shape

    for path, name in merged_paths(model, {path: layers[path] for path in bundled}, kind):
        common = shared_parts(name.split("."), bundled[name].split("."))
        parts, end = path.split("."), bundled[name].split(".")[common:]
        module, inner = ".".join(parts[:common]), ".".join(parts[common:])
        transposed = known_class(model.get_submodule(bundled[name])) is Conv1D
        told = {"layer": inner, "reader": ".".join(end), "transposed": transposed}
        edits += [
            MakeParameters(module=module, making="bundled_features", settings=told),
            ReplaceModule(module=path, brick="relu_features"),
            ResizeModule(module=".".join([*parts[:common], *end]), inputs=len(layers[name].directions)),
        ]
    left = [path for path in layers if path not in bundled]
    findings = [f"Layers of random features that are merged with what reads them: {len(bundled)}."]
    findings += [f"Not merged, since no matrix in the same part reads them: {', '.join(left)}."] if left else []
    return Plan(
        method=NAME,
        settings={"bundle": True},
        promise="exact",
        edits=edits,
        findings=findings,
        made_for=config_values(model.config),
    )


def _plan(model: PreTrainedModel, settings: RandomFeatureLayers, edits: list[Edit], **values: Any) -> Plan:
    return Plan(
        method=NAME,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        seed=settings.seed,
        edits=edits,
        made_for=config_values(model.config),
        **values,
    )


def _hooks(model: PreTrainedModel, adapters: list[str], settings: RandomFeatureLayers) -> list[dict[str, Any]]:
    """What keeps the next stage from training anything else."""
    if settings.train_with is None:
        return []
    names = [name for name, _ in model.named_parameters()]
    for path in settings.train_with:
        pattern = path_pattern(path, after=r"(\..*)?")
        if not any(pattern.fullmatch(name) for name in names):
            raise PlanError(
                f"train_with: {path!r} is no part of the model with parameters, such as {names[-1]}. Name one."
            )
    return [TrainOnlySettings(paths=[*adapters, *settings.train_with]).model_dump()]


def _threshold(settings: RandomFeatureLayers) -> dict[str, float]:
    return {"threshold": settings.threshold} if settings.threshold else {}


def _in_last(model: PreTrainedModel, stack: LayerStack, number: int, blocks: int | None) -> bool:
    """Whether layer `number` of a stack is one of its last so many; None: of all.

    Raises:
        PlanError: it has fewer.
    """
    length = depth(model, stack)
    if blocks is not None and blocks > length:
        raise PlanError(f"blocks = {blocks} is more than the {length} layers of {stack.path}. Give {length} or less.")
    return blocks is None or number >= length - blocks


def _part(sublayer: Sublayer) -> Part:
    return "feed-forward" if sublayer.kind == "feed-forward" else "attention"


def _feed_forward(model: PreTrainedModel, settings: RandomFeatureLayers) -> dict[str, nn.Module]:
    """By path, the linear layers that feed-forward parts begin with, in the last blocks."""
    changed = [path for path, module in model.named_modules() if isinstance(module, ReluFeatureLayer)]
    flow, found = Flow.of(model), dict[str, nn.Module]()
    layers = linear_layers(model, (), "made of random features")
    for body, layer in _last_layers(model, settings.blocks):
        if there := next((path for path in changed if encloses(layer, path)), None):
            raise PlanError(
                f"{there} is a layer of random features already. Train and bundle these (bundle = true), or begin with "
                "the model as it was and more blocks."
            )
        first = [path for path in layers if encloses(layer, path) and _writes_units(body, path)]
        acting = [path for path in first if _activation(model, flow, path) is not None]
        if not acting:
            raise PlanError(_nothing_in(layer, first))
        found |= {path: layers[path] for path in acting}
    return found


def _last_layers(model: PreTrainedModel, blocks: int | None) -> Iterator[tuple[Anatomy, str]]:
    """The paths of the last so many layers of every stack, None: of half of them, each with what knows its parts."""
    body = anatomy(model)
    for one in [anatomy(model, part=tower) for tower in body.towers] or [body]:
        for stack in one.stacks:
            count = depth(model, stack)
            last = max(count // 2, 1) if blocks is None else blocks
            yield from ((one, f"{stack.path}.{n}") for n in range(count) if _in_last(model, stack, n, last))


def _nothing_in(layer: str, first: Sequence[str]) -> str:
    if not first:
        return (
            f"{layer} has no feed-forward part that begins with a linear layer. Experts that are one tensor, "
            "TokenFormers and convolutions stay as they are; ask for adapters."
        )
    return (
        f"{layer}: behind {first[0]} is no activation that is a module and reads all of what it gives (a fused matrix "
        "of gate and up, or a function), so that the two can't be replaced together. Ask for adapters."
    )


def _writes_units(body: Anatomy, path: str) -> bool:
    """Whether the matrix of the layer at `path` writes feed-forward units."""
    role = next((role for role in body.roles if role.matches(f"{path}.weight")), None)
    return role is not None and role.kind == "matrix" and any(role.along(one, "writes") for one in FEED_FORWARD)


def _poolers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """By path, the linear layers of poolers."""
    modules = dict(model.named_modules())
    if any(isinstance(module, ReluFeatureLayer) and "pooler" in path.split(".") for path, module in modules.items()):
        raise PlanError(
            "The pooler is a layer of random features already. Train it, or begin with the model as it was."
        )
    found = {
        path: module
        for path, module in modules.items()
        if "pooler" in path.split(".") and linear_class(module) is not None
    }
    if not found:
        raise PlanError(
            f"{type(model).__name__} has no pooler that is made of a linear layer. Load a class that has one, such as "
            "one for the classification of sequences, or ask for adapters or feed-forward."
        )
    return found


def _activation(model: PreTrainedModel, flow: Flow, path: str) -> str | None:
    """The module that applies a function to what the linear layer at `path` gives; None where there is none."""
    for other in flow.readers(path):
        module = model.get_submodule(other)
        plain = not any(True for _ in module.parameters()) and not isinstance(
            module, nn.Dropout | nn.Identity | StandIn
        )
        if plain and flow.given[other].shape == flow.given[path].shape:
            return other
    return None


def _reader(model: PreTrainedModel, flow: Flow, path: str) -> str | None:
    """The linear layer that reads what the module at `path` gives, of a class that can be given another width."""
    linear = [other for other in flow.readers(path) if type(model.get_submodule(other)) in LAYERS]
    whole = [other for other in linear if not isinstance(model.get_submodule(other.rpartition(".")[0]), FeatureAdapter)]
    return whole[0] if len(whole) == 1 else None


def _example(model: PreTrainedModel) -> dict[str, Any]:
    sublayers(model)
    return {"features": 4}


METHOD = Method(
    name=NAME,
    title="Adapters, feed-forward parts and poolers of random features, in which inputs and weights meet",
    paper="arXiv 2310.13225",
    intent="adapt",
    settings=RandomFeatureLayers,
    plan=from_model(plan_snnk),
    examples=_example,
    promise="exact for adapters and bundling; else none",
)
