"""What methods share that make a model deeper: an order of the old layers, and layers whose output is scaled or zero.

A pre-norm layer computes x + f(norm(x)). With the output modules of f zeroed, weights and biases, it is an identity
block: the function is the same to the last bit, whatever else the layer holds (LLaMA Pro, arXiv 2401.02415). Where a
norm stands between f and the residual (OLMo2) it would make anything of a small output, so that its gain is zeroed
instead. Where the norm comes after the sum (BERT, the original transformer) norm(x + 0) is not x: there is no identity
block. What a brick on the way from an output module to the layer needs beside that, the brick says.

A list of layers is all that an order needs, so that any model will do whose stacks are found (`auxin.models.layout`).
Which modules are the outputs is told by the architecture's anatomy, or found by trying
(`auxin.models.identity_outputs`).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from auxin.edits.kinds.edit import ArrangeLayers, Edit, ScaleParameter
from auxin.edits.plan import Plan
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy as complete_anatomy
from auxin.models.identity_outputs import zeroed_outputs
from auxin.models.layout import depends_on_numbers, found_stacks, held_by_the_first
from auxin.nn.bricks import Brick
from auxin.words.anatomy import Anatomy, LayerStack


def chosen_stacks(anatomy: Anatomy, part: str | None) -> list[LayerStack]:
    """The stacks of layers that a method works on: all, or the one that `part` names.

    Args:
        anatomy: of the model.
        part: a part of the stack's path, for example "encoder" or "decoder", or the tower that it belongs to; None
            means every stack.

    Raises:
        PlanError: no stack has such a part in its path.
    """
    return _named(anatomy.stacks, part)


def stacks_to_deepen(model: PreTrainedModel, part: str | None) -> tuple[Anatomy | None, list[LayerStack]]:
    """The stacks that `part` names, as `chosen_stacks` has them, of any model whose stacks can be found.

    Returns:
        The model's anatomy, None where it is not known, and the stacks; of those that were found no more is known than
        where they are and what counts them.

    Raises:
        PlanError: no stack is found, no stack has such a part in its path, or a model that plans have changed has an
            architecture whose anatomy is not known.
    """
    try:
        known = complete_anatomy(model, part=part)
    except PlanError:
        if getattr(model.config, "quantization_config", None) is not None:
            raise
        return None, _named(found_stacks(model), part)
    return known, chosen_stacks(known, part)


def _named(stacks: Sequence[LayerStack], part: str | None) -> list[LayerStack]:
    chosen = [stack for stack in stacks if part is None or stack.is_in(part)]
    if not chosen:
        paths = ", ".join(stack.path for stack in stacks)
        instead = f"Choose {_parts_in_words(stacks)}." if len(stacks) > 1 else "Leave part out."
        raise PlanError(f"part = {part!r} names no layers of this model, which has {paths}. {instead}")
    return chosen


@contextmanager
def naming_parts(stacks: Sequence[LayerStack], part: str | None) -> Iterator[None]:
    """Within the context, where all of several stacks are changed, the refusal of a size says how to choose one."""
    try:
        yield
    except PlanError as error:
        if part is None and len(stacks) > 1:
            raise PlanError(f"{error} For one stack alone, choose {_parts_in_words(stacks)}.") from error
        raise


def _parts_in_words(stacks: Sequence[LayerStack]) -> str:
    """A word for each stack that names no other one: its tower, or else a part of its path."""
    words = []
    for stack in stacks:
        others = {part for other in stacks if other is not stack for part in other.path.split(".")}
        own = [part for part in stack.path.split(".") if part not in others]
        words.append(stack.tower or (own[0] if own else stack.path))
    return " or ".join(f"part = {word}" for word in words)


def depth(model: PreTrainedModel, stack: LayerStack) -> int:
    """The number of layers in `stack`."""
    layers = model.get_submodule(stack.path)
    assert isinstance(layers, nn.ModuleList | nn.Sequential)
    return len(layers)


def refuse_unknown_layers(layers: Sequence[int], stack: LayerStack, count: int) -> None:
    """PlanError when one of the numbers in a setting `layers` is that of no layer of a stack with `count` layers."""
    if wrong := [number for number in layers if not 0 <= number < count]:
        raise PlanError(
            f"layers = {list(layers)}: {stack.path} has the layers 0 to {count - 1}, and no {wrong[0]}. Name some of "
            "these."
        )


def deepest(model: PreTrainedModel, anatomy: Anatomy) -> int:
    """The number of layers in the longest stack."""
    return max(depth(model, stack) for stack in anatomy.stacks)


def arrange(
    model: PreTrainedModel,
    anatomy: Anatomy | None,
    stack: LayerStack,
    order: Sequence[int],
    scales: Mapping[int, float] | None = None,
    exact: bool = False,
) -> list[Edit]:
    """The edits that give `stack` the layers `order`, some with a scaled output.

    Args:
        model: the model, on any device.
        anatomy: of the model; None where it is not known, so that the outputs of scaled layers are found by trying.
        stack: one of its stacks.
        order: the old layer that each new one is or copies, bottom first.
        scales: factor of the output of a new layer, by its index; 0 makes it an identity block, whose moments start
            fresh. Others stay as they are.
        exact: refuse what would change the function although the order only adds identity blocks: factors that a model
            derives from the number of a layer.

    Raises:
        PlanError: layers whose number stays; an identity block where the norm comes after the sum, or where
            no outputs are found; a first layer that lacks what only the old first one holds; with `exact`, a model
            whose layers depend on their number; more layers than transformers makes a cache for; an order that no
            config can say.
    """
    refuse_kept_layers(stack)
    scales = {} if scales is None else {index: factor for index, factor in scales.items() if factor != 1}
    _check_first_layer(model, stack, order)
    _refuse_short_cache(model, stack, len(order))
    if any(factor == 0 for factor in scales.values()):
        refuse_post_norm(stack)
    if exact:
        _refuse_numbered_layers(model, stack)
    offset = 0.0 if anatomy is None else anatomy.gain_offset
    if scales and not stack.outputs:
        tried = zeroed_outputs(model, stack, {order[index] for index in scales})
        stack, offset = tried.stack, tried.gain_offset
    fresh = sorted(index for index, factor in scales.items() if factor == 0)
    edits: list[Edit] = [arranged(model, ArrangeLayers(layers=stack.path, order=list(order), fresh_moments=fresh))]
    for index in sorted(scales):
        edits += _scaled_output(model, anatomy, stack, order[index], index, scales[index], offset)
    return edits


def arranged(model: PreTrainedModel, edit: ArrangeLayers) -> ArrangeLayers:
    """The same edit; PlanError when no config of `model` can say its order."""
    try:
        edit.config_values(model)
    except PlanError as error:
        raise PlanError(f"{edit.layers}: {str(error).rstrip('.')}.") from error
    return edit


def counts_for_the_cache(model: PreTrainedModel, stack: LayerStack) -> bool:
    """Whether transformers makes the cache of the decoder as long as `stack`, which is the encoder (T5), so that with a
    shorter encoder than decoder the model writes nothing."""
    config = model.config
    counted = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return bool(config.is_encoder_decoder and model.can_generate() and stack.length_field == counted)


def identity_layers(plan: Plan) -> dict[str, list[int]]:
    """The identity blocks that `plan` inserts: their indices in the grown model, by the path of their stack."""
    return {
        edit.layers: list(edit.fresh_moments)
        for edit in plan.edits
        if isinstance(edit, ArrangeLayers) and edit.fresh_moments
    }


def is_exact(order: Sequence[int], identities: Collection[int], layers: int) -> bool:
    """Whether `order` without the new layers `identities` is the old model of `layers` layers."""
    return [old for index, old in enumerate(order) if index not in identities] == list(range(layers))


def identity_order(layers: int, wanted: int) -> tuple[list[int], list[int]]:
    """Copies spread evenly among `layers` old layers, each right after its original, the last one at the top.

    Args:
        layers: how many there are.
        wanted: how many there shall be.

    Returns:
        The old layer of each new one, and the indices of the copies among the new ones.

    Raises:
        PlanError: `wanted` is less than there are.
    """
    _refuse_shrinking(layers, wanted)
    order = [-(-(index + 1) * layers // wanted) - 1 for index in range(wanted)]
    return order, [index for index in range(1, wanted) if order[index] == order[index - 1]]


def identity_blocks(model: PreTrainedModel, anatomy: Anatomy, wanted: int, part: str | None = None) -> list[Edit]:
    """The edits that bring the stacks that `part` names, see `chosen_stacks`, to `wanted` layers by identity blocks,
    spread as `identity_order` says.

    Raises:
        PlanError: `wanted` is less than there are, or the architecture takes no identity blocks.
    """
    edits: list[Edit] = []
    for stack in chosen_stacks(anatomy, part):
        order, new = identity_order(depth(model, stack), wanted)
        if new:
            edits += arrange(model, anatomy, stack, order, dict.fromkeys(new, 0.0), exact=True)
    return edits


def stacked_order(layers: int, wanted: int) -> list[int]:
    """The old layer of each of `wanted` new ones: whole stacks, and then the top layers once more.

    Raises:
        PlanError: `wanted` is less than there are.
    """
    _refuse_shrinking(layers, wanted)
    return [*list(range(layers)) * (wanted // layers), *range(layers - wanted % layers, layers)]


def can_deepen(anatomy: Anatomy) -> bool:
    """Whether the stacks of a model can have more layers."""
    return not any(stack.layers_stay for stack in anatomy.stacks)


def refuse_kept_layers(stack: LayerStack) -> None:
    """Raise PlanError when `stack` can't have more layers than it has."""
    if stack.layers_stay:
        raise PlanError(f"{stack.path}: {stack.layers_stay}")


def refuse_post_norm(stack: LayerStack) -> None:
    """Raise PlanError when `stack` can hold no identity block."""
    if stack.norm_position == "after_residual":
        raise PlanError(
            f"{stack.path}: an identity block is impossible in this architecture, whose norms come after the residual "
            "sum: norm(x + 0) is not x, whatever the new layer's weights are. Use a method without that promise, for "
            "example stacking, or one that masks the new layers."
        )


def _refuse_shrinking(layers: int, wanted: int) -> None:
    if wanted < layers:
        raise PlanError(
            f"num_hidden_layers = {wanted} is less than the {layers} that the model has; growth can't shrink. The "
            f"nearest possible: {layers}."
        )


def _refuse_numbered_layers(model: PreTrainedModel, stack: LayerStack) -> None:
    if (said := depends_on_numbers(model, stack.path)) is not None:
        raise PlanError(
            f"{said}: this model divides attention scores by the number of the layer, so that a layer that moves up is "
            "another function and no inserted layer keeps the model's. Use a method without that promise, for example "
            "stacking."
        )


def _refuse_short_cache(model: PreTrainedModel, stack: LayerStack, wanted: int) -> None:
    """Raise PlanError when a decoder that stands alone (BartForCausalLM) would have more layers than its cache, which
    transformers makes as long as the config's num_hidden_layers: the encoder's number in the configs of two stacks."""
    config = model.config
    counted = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if config.is_encoder_decoder or not model.can_generate() or stack.length_field in ("", counted):
        return
    length = getattr(config, counted, None) if hasattr(config, stack.length_field) else None
    if isinstance(length, int) and wanted > length:
        raise PlanError(
            f"{stack.length_field} = {wanted}: transformers makes the cache of a {type(model).__name__} for "
            f"{counted} = {length} layers, and with more it does not run. Set {counted} = {wanted} in its config "
            "first; nothing else reads that."
        )


def _check_first_layer(model: PreTrainedModel, stack: LayerStack, order: Sequence[int]) -> None:
    """T5's first layer holds the position bias that all layers use; ModernBERT's has no norm before its attention."""
    layers = model.get_submodule(stack.path)
    assert isinstance(layers, nn.ModuleList)
    names = [{name for name, _ in layer.named_parameters()} for layer in layers]
    if missing := sorted(filter(held_by_the_first, names[0] - names[order[0]])):
        raise PlanError(
            f"{stack.path}: layer {order[0]} can't come first, since it lacks {missing[0]}, which layer 0 holds for "
            "all of them. Begin with layer 0."
        )
    # What some other layer lacks, too, is of a kind that the config gives to layers (dense ones among experts).
    if surplus := sorted(names[order[0]].intersection(*names[1:]) - names[0]):
        raise PlanError(
            f"{stack.path}: layer {order[0]} can't come first, where this architecture has no {surplus[0]}. Begin with "
            "layer 0."
        )


def _scaled_output(
    model: PreTrainedModel,
    anatomy: Anatomy | None,
    stack: LayerStack,
    old: int,
    new: int,
    factor: float,
    gain_offset: float,
) -> list[Edit]:
    """Scale what the new layer `new`, made of the layer `old`, adds to the residual."""
    path = f"{stack.path}.{old}"
    after_output = stack.norm_position == "after_output"
    outputs = stack.output_norms if after_output else stack.outputs
    edits: list[Edit] = []
    for name, value in _factors(model.get_submodule(path), path, outputs, factor, anatomy).items():
        if anatomy is None:
            is_gain = after_output and name.endswith("weight")
        else:
            is_gain = after_output and anatomy.role(f"{path}.{name}").kind == "gain"
        offset = gain_offset if is_gain else 0.0
        edits.append(ScaleParameter(parameter=f"{stack.path}.{new}.{name}", factor=value, offset=offset))
    return edits


def _factors(
    module: nn.Module, path: str, outputs: Collection[str], factor: float, anatomy: Anatomy | None
) -> dict[str, float]:
    """Factors by which the results of modules become `factor` times as large, by the names of parameters in `module`.

    Args:
        module: the layer, or a module in it.
        path: where it is.
        outputs: what gives the results that are scaled, relative to it: modules, of which an empty string is this one,
            or single parameters.
        factor: the factor.
        anatomy: of the model; None where it is not known.

    Raises:
        PlanError: a brick on the way knows no factors for that.
    """
    if isinstance(module, Brick) and module.wrapped is not None:
        factors = _factors(module.wrapped, f"{path}.inner", outputs, factor, anatomy)
    else:
        factors = {}
        if "" in outputs:
            own = (name for name, _ in module.named_parameters(recurse=False))
            factors |= {name: factor for name in own if anatomy is None or not anatomy.role(f"{path}.{name}").added}
        factors |= {output: factor for output in outputs if module._parameters.get(output) is not None}
        for part in dict.fromkeys(output.partition(".")[0] for output in outputs if output):
            # Where a module was taken away with what is inside, the stand-in says what that means.
            if (child := module._modules.get(part)) is not None:
                inside = [output.partition(".")[2] for output in outputs if output.partition(".")[0] == part]
                below = _factors(child, f"{path}.{part}", inside, factor, anatomy)
                factors |= {f"{part}.{name}": value for name, value in below.items()}
    if not isinstance(module, Brick):
        return factors
    try:
        return module.scaled(factor, factors)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
