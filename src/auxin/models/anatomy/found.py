"""Finding the anatomy of a model: by its architecture, for its widths by scope, with the bricks that it holds."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from transformers import PreTrainedModel

from auxin.errors import PlanError, unknown_name
from auxin.models.anatomy.towers import Towers
from auxin.models.configs import config_value
from auxin.models.edited_anatomy import with_bricks
from auxin.models.scopes import in_scopes
from auxin.nn.stand_ins import StandIn
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.registry import Registry

ANATOMIES: Registry[Callable[[PreTrainedModel], Anatomy] | Towers] = Registry(
    "anatomy", "auxin.models.anatomy", error=PlanError, plural="anatomies"
)
"""What describes the models of a `model_type`, by that, or how they are made of towers that have one each; roles that a
model lacks are dropped by `anatomy`. Entry points of the group "auxin.anatomies" name modules of other packages that
add some."""


def anatomy(
    model: PreTrainedModel, complete: bool = True, scopes: Iterable[str] = (), part: str | None = None
) -> Anatomy:
    """The anatomy of `model`, which may be a skeleton on the meta device.

    Widths are those of its tensors: layers and stacks whose widths differ from what the config says have them by scope.

    Args:
        model: the model, with a head of whatever task or without one.
        complete: whether every parameter must have a role. Without, as for methods that treat layers as black boxes,
            any decoder whose modules have Llama's names will do; widths are those of the config then.
        scopes: stacks and layers whose widths shall be told apart although they may be alike; see `in_scopes`.
        part: of a model of several towers the one whose anatomy is wanted: "text", or a part of its path. None, or a
            part that names none: that of all of them, which has no widths, unless there is only one.

    Raises:
        PlanError: the architecture is not known (nor, where that will do, built like Llama), the model has a parameter
            that its architecture's anatomy lacks or knows in another shape, or `scopes` names what is no stack and no
            layer.
    """
    family = model.config.model_type
    describe = ANATOMIES.get(family)
    if describe is None and not complete and _is_built_like_llama(model):
        describe = ANATOMIES.find("llama")
    if describe is None:
        raise PlanError(
            unknown_name("architecture", family, ANATOMIES.all()) + (_ANY_MODEL if complete else _NOT_LIKE_LLAMA)
        )
    found = describe.anatomy(model, part, _described) if isinstance(describe, Towers) else describe(model)
    found = replace(found, stacks=tuple(_as_built(stack, model) for stack in found.stacks))
    if not complete:
        return found
    found = _by_embedding(with_bricks(in_scopes(model, found, scopes), model), model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # A buffer that training changes runs along streams, too (DeepSeek's e_score_correction_bias).
    names = [*shapes, *(name for name, _ in model.named_buffers())]
    used = [role for role in found.roles if any(role.matches(name) for name in names)]
    epsilon = config_value(model.config, found.fields.epsilon) if found.fields.epsilon else 0.0
    found = replace(found, roles=tuple(used), epsilon=epsilon)
    for name, shape in shapes.items():
        _check_shape(found, name, shape)
    return found


def _as_built(stack: LayerStack, model: PreTrainedModel) -> LayerStack:
    """The stack with those outputs alone that one of its layers has: descriptions serve several architectures."""
    modules = (name for name, module in model.named_modules() if not isinstance(module, StandIn))
    names = [*modules, *(name for name, _ in model.named_parameters())]
    within = (
        name.removeprefix(f"{stack.path}.").partition(".")[2] for name in names if name.startswith(f"{stack.path}.")
    )
    # Wrappers are between the parts of a name.
    plain = {f".{name}".replace(".inner", "").removeprefix(".") for name in within}
    return replace(
        stack,
        outputs=tuple(name for name in stack.outputs if name in plain),
        output_norms=tuple(name for name in stack.output_norms if name in plain),
    )


def _described(tower: PreTrainedModel) -> Anatomy:
    """What a tower's architecture says of it, as of a model by itself."""
    describe = ANATOMIES.find(tower.config.model_type)
    if isinstance(describe, Towers):
        raise PlanError(f"A tower of the model is a {type(tower).__name__}, which has several itself.")
    return describe(tower)


def _by_embedding(found: Anatomy, model: PreTrainedModel) -> Anatomy:
    """The anatomy in which the parameter of an embedding that is a head too has the role of the embedding under its
    first name, which in some models is that of the head (XLM-RoBERTa)."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    others = {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first[id(parameter)] != name
    }
    told = {name: role for name in others if (role := next((r for r in found.roles if r.matches(name)), None))}
    renamed = {name: others[name] for name, role in told.items() if role.kind == "embedding"}
    return replace(
        found,
        roles=(
            # Once, however many of its names have roles: BART's encoder and decoder share one.
            *{shown: replace(told[name], pattern=shown) for name, shown in renamed.items()}.values(),
            *(role for role in found.roles if role.pattern not in renamed.values()),
        ),
        embeddings=tuple(renamed.get(name, name) for name in found.embeddings),
    )


def _check_shape(found: Anatomy, name: str, shape: tuple[int, ...]) -> None:
    """PlanError when a parameter has no role, or one of another shape."""
    axes = found.role(name).axes
    # What holds several blocks of the residual is as many times as long; bricks that make it so fix the width.
    open_ended = ("residual",) if "residual" in dict(found.fixed_widths) else ()
    known = [[segment for segment in segments if segment.stream not in open_ended] for segments in axes]
    along = [sum(segment.size for segment in segments) if segments else None for segments in known]
    if len(along) != len(shape) or any(size not in (None, have) for size, have in zip(along, shape, strict=True)):
        wanted = ["any size" if size is None else size for size in along]
        raise PlanError(
            f"{name} has shape {list(shape)}, and the anatomy of {found.family} says {wanted}. The model is not what "
            "its architecture builds by its config; only methods that treat layers as black boxes can change it."
        )


_ANY_MODEL = (
    " Methods that leave the widths alone take others too: stacking, solar and llama-pro add layers, graft adds tokens "
    "beside linear layers."
)
_LIKE_LLAMA = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")
_NOT_LIKE_LLAMA = (
    f" Nor has it the modules of a decoder like Llama ({', '.join(_LIKE_LLAMA)}), so that no residual stream is known "
    "in it."
)


def _is_built_like_llama(model: PreTrainedModel) -> bool:
    try:
        return all(model.get_submodule(path) is not None for path in _LIKE_LLAMA)
    except AttributeError:
        return False
