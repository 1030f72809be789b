"""Masked structural growth (MSG, arXiv 2305.02869): new weights are random, and masks let them in step by step.

The growth puts masks around the model's modules (see `auxin.nn.masked`): on what enters the residual (embeddings, the
outputs of attention and feed-forward parts), on the queries, keys and values of new heads, on new feed-forward units
and, with weighted statistics, on the norms; a new layer is c f(x) + (1 - c) x. At strength c = 0 the function is the
old one, whatever the norms, also where they come after the residual sum (BERT), and whatever the new weights. Train
with the hook `MaskRamp`, which raises c linearly to 1, then take the masks off with a second plan (`finish`): at c = 1
they do nothing, and what is left is the plain grown architecture, whose checkpoint loads without auxin.

    auxin plan MODEL masked --set intermediate_size=4096     # then train with MaskRamp(5000)
    auxin plan GROWN masked --set finish=true

The paper grows one dimension at a time, 5000 steps each, in the order feed-forward, layers, width, heads, layers; any
subset can be grown at once here. It starts new weights normal, at the old ones' scale; new gains start at the mean of
the old ones, new biases at zero. New units of experts, which never leave the module of all experts, have no mask: they
are random and read by zeros, so that they are absent at first and learn at once.

Departures: the released code leaves the second moments of new entries at zero, where their first steps would be several
times too long; here they start from the mean of the old ones, as in every padded tensor. It covers BERT alone; the
masks of pre-norm models and grouped-query heads follow the same rules here.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from auxin.edits import Edit, NormalFill, PadParameter, Plan, SetConfig, ZeroFill
from auxin.edits.kinds.edit import ArrangeLayers, RemoveModule, ScaleParameter, SliceParameter, WrapModule
from auxin.edits.kinds.fills import Fill, MeanFill
from auxin.edits.kinds.module_edits import ModuleEdit
from auxin.edits.structure import config_values, structural_edits
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy, norm_epsilon
from auxin.models.tokenformer.slots import ParameterTokensConfig
from auxin.nn.bricks import Brick
from auxin.nn.masked import Masked
from auxin.planning.bench import from_model
from auxin.planning.depth import arranged, can_deepen, chosen_stacks, deepest, depth, refuse_kept_layers
from auxin.planning.fixed_heads import fixed_head_sizes
from auxin.planning.hooks import Hook, HookContext, HookSettings, Ramp
from auxin.planning.method import Method
from auxin.planning.size_edits import size_edits, size_values
from auxin.planning.width import describe_sizes
from auxin.planning.width_conditions import refuse_fixed_widths
from auxin.planning.width_targets import WidthTargets, example_tower, somewhat_wider
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.paths import path_pattern
from auxin.words.roles import Access, ParameterRole, Segment, laid_out
from auxin.words.widths import FEED_FORWARD, Sizes

MASKS = ("masked", "masked_norm", "masked_block")


class MaskedGrowth(WidthTargets):
    """The sizes to grow to, behind masks; or the end of the masks."""

    layers: int | None = Field(default=None, gt=0)
    """Number of layers after the growth; new ones go on top. With encoder and decoder: of each, or of `part`."""
    part: str | None = None
    """Of a model with an encoder and a decoder, the one that gets layers: "encoder" or "decoder". Of a model of several
    towers, the one that grows: "text" or "vision"; with `layers` alone None means all."""
    ramp_steps: int | None = Field(default=None, gt=0)
    """In a recipe: steps of the next train stage over which the masks open linearly; None leaves them closed."""
    new_layers: Literal["random", "copies"] = "random"
    """What new layers hold: weights as the architecture initialises them, or those of the old layers, in order."""
    finish: bool = False
    """Take the masks off, after the ramp; goes with no other setting."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the new weights."""

    @model_validator(mode="after")
    def _finish_alone(self) -> Self:
        if self.finish and (others := sorted(self.model_fields_set - {"finish"})):
            raise ValueError(f"finish takes the masks off and goes with no other setting; leave out {others[0]}")
        return self


def plan_masked(model: PreTrainedModel, settings: MaskedGrowth) -> Plan:
    """Plan a growth behind masks, or with `finish` their end; weights are not needed.

    Raises:
        PlanError: an unknown architecture, sizes that shrink or don't go together, nothing to grow, or masks that are
            there already.
    """
    if settings.finish:
        return plan_unmask(model)
    if _mask_edits(model):
        raise PlanError(
            "The model has masks of an earlier growth. Train with MaskRamp until they are at 1 and take them off "
            "(masked with finish = true), then grow again."
        )
    body = anatomy(model, part=settings.part)
    sizes = fixed_head_sizes(body, settings)
    deeper = _deeper(model, body, settings)
    # New layers made from nothing are masked as a whole, copies in their parts too.
    copied = {stack: new for stack, (_, new) in deeper.items() if settings.new_layers == "copies"}
    growth = _Growth(model, body, sizes, {stack: depth(model, stack) for stack in body.stacks} | copied)
    refuse_fixed_widths(body, sizes)
    if deeper and body.residual_blocks != "one" and settings.new_layers == "random":
        raise PlanError(
            "new_layers = random: a layer made from nothing would have no alternating updates (altup), which all "
            "others have. Ask for copies."
        )
    if settings.new_layers == "random":
        _refuse_bricks_of_all_layers(model, deeper)
    edits = growth.parameter_edits()
    edits += [
        arranged(model, ArrangeLayers(layers=stack.path, order=_order(settings, old, new)))
        for stack, (old, new) in deeper.items()
    ]
    edits += growth.masks()
    for stack, (old, new) in deeper.items():
        edits += [WrapModule(module=f"{stack.path}.{layer}", brick="masked_block") for layer in range(old, new)]
    if not edits:
        raise PlanError(
            f"There is nothing to grow: the model already has {describe_sizes(body)}. Ask for more of one, or for "
            "layers."
        )
    return Plan(
        method="masked",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="exact",
        seed=settings.seed,
        edits=edits,
        hooks=[MaskRampSettings(steps=settings.ramp_steps).model_dump()] if settings.ramp_steps else [],
        made_for=config_values(model.config),
    )


def plan_unmask(model: PreTrainedModel) -> Plan:
    """Plan the end of the masks: what is left is the plain architecture, the same function when all masks are at 1.

    Raises:
        PlanError: there are no masks, or one is not at 1 yet.
    """
    masks = _mask_edits(model)
    if not masks:
        raise PlanError("The model has no masks that could be taken off. Grow it first.")
    # A skeleton's masks are as they were made; what they will be is not known yet.
    real = not next(model.parameters()).is_meta
    for name, module in _masked_modules(model):
        strengths = module.strengths()
        if real and (strengths != 1).any():
            raise PlanError(
                f"The mask of {name} is at {float(strengths.min()):.4g}; without it the function would jump. Train "
                "with MaskRamp until the ramp's last step, or set it: MaskRamp.set_strength(model, 1.0)."
            )
    return Plan(
        method="masked",
        settings={"finish": True},
        promise="exact",
        edits=[RemoveModule(module=edit.module, leaves="inner") for edit in reversed(masks)],
        made_for=config_values(model.config),
    )


class MaskRampSettings(HookSettings):
    """The masks of masked growth open in the course of the stage."""

    kind: Literal["mask_ramp"] = "mask_ramp"
    """Says that masks open."""
    steps: int = Field(ge=1)
    """Steps from strength 0 to 1, from the start of the stage."""

    def made(self, context: HookContext) -> Hook:
        """See `MaskRamp`."""
        return MaskRamp(self.steps)


class MaskRamp(Ramp):
    """Training hook: raises the strength of all masks linearly from 0 to 1 in `steps` steps.

    The first step sees strength 0, the model as it was grown; after step s (0-based) it is min(1, (s + 1) / steps).
    The masks are saved with the model, and the strength is a function of the step alone, also where the guard left
    updates out.

    Args:
        steps: optimizer steps of the ramp, counted from the start of the training stage (the paper: 5000).
    """

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self._masks: list[Masked] = []

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Find the masks; PlanError when there are none."""
        self._masks = [module for _, module in _masked_modules(model)]
        if not self._masks:
            raise PlanError(f"MaskRamp: the {type(model).__name__} has no masks. Grow it with the method masked first.")

    def move(self, step: int) -> None:
        """Set the strength that `step` sees."""
        for mask in self._masks:
            mask.set_strength(step / self.steps)

    @staticmethod
    def set_strength(model: nn.Module, strength: float) -> None:
        """Set all masks of `model` to `strength`, 0 to 1, without a ramp."""
        for _, mask in _masked_modules(model):
            mask.set_strength(strength)


def _masked_modules(model: nn.Module) -> Iterator[tuple[str, Masked]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Masked))


def _mask_edits(model: PreTrainedModel) -> list[WrapModule]:
    """The edits that put the model's masks there, in order."""
    edits = structural_edits(model.config)
    return [edit for edit in edits if isinstance(edit, WrapModule) and edit.brick in MASKS]


def _deeper(model: PreTrainedModel, body: Anatomy, settings: MaskedGrowth) -> dict[LayerStack, tuple[int, int]]:
    """Old and new number of layers of every stack that gets more."""
    found: dict[LayerStack, tuple[int, int]] = {}
    if settings.layers is None:
        return found
    for stack in chosen_stacks(body, settings.part):
        old = depth(model, stack)
        if settings.layers < old:
            raise PlanError(
                f"layers = {settings.layers} is fewer than the {old} of {stack.path}; growth can't shrink. Ask for at "
                f"least {old}."
            )
        if settings.layers > old:
            refuse_kept_layers(stack)
            found[stack] = (old, settings.layers)
    return found


def _refuse_bricks_of_all_layers(model: PreTrainedModel, stacks: Iterable[LayerStack]) -> None:
    """Raise PlanError when an edit put bricks into every layer of one of `stacks`."""
    for edit in structural_edits(model.config):
        for stack in stacks:
            if isinstance(edit, ModuleEdit) and edit.module.startswith(f"{stack.path}.*"):
                raise PlanError(
                    f"new_layers = random: all layers of {stack.path} were edited ({edit.module} {edit}), and a layer "
                    "made from nothing would not be. Ask for copies."
                )


def _order(settings: MaskedGrowth, old: int, new: int) -> list[int | None]:
    copies = settings.new_layers == "copies"
    return [*range(old), *(layer % old if copies else None for layer in range(old, new))]


class _Growth:
    """The edits of a growth in width: parameters padded with random numbers, and the masks on them."""

    def __init__(self, model: PreTrainedModel, body: Anatomy, new: Sizes, layers: Mapping[LayerStack, int]) -> None:
        self.model, self.body, self.old, self.new, self.layers = model, body, body.sizes, new, layers
        if body.residual_blocks != "one" and self._residual_grows():
            raise PlanError(
                f"hidden_size = {new.residual}: the residual stream has several blocks (altup), which masks don't "
                "know. Grow behind masks first and take them off, then apply altup; or grow other widths."
            )
        for scope in ("", *(width.scope for width in self.old.scoped)):
            old_group, group = self._groups(scope)
            heads, keys = new.at(scope).query_heads, new.at(scope).key_value_heads
            if group < old_group:
                raise PlanError(
                    f"num_attention_heads = {heads} with num_key_value_heads = {keys}: {group} query heads would share "
                    f"a key-value head instead of {old_group}{f' in {scope}' if scope else ''}, and old ones would "
                    f"lose theirs. The nearest possible: num_attention_heads = {old_group * keys}."
                )

    def parameter_edits(self) -> list[Edit]:
        """The config's values, those of modules with widths of their own, and every parameter's new entries."""
        said, modules = size_edits(self.body, self.new)
        values = size_values(self.body, said, modules)
        edits: list[Edit] = [*([SetConfig(values=values)] if values else []), *modules]
        for role in self.body.roles:
            for axis, segments in enumerate(role.axes):
                edits += self._padded(role, axis, segments)
        return edits + self._scales() if self._residual_grows() else edits

    def _scales(self) -> list[Edit]:
        """Factors that make up for those of the hidden size, which are of the old one no more.

        An embedding that is multiplied by its root (Gemma) is divided by that of the growth; what a tied head reads is
        multiplied by it, and so it is where logits are divided by that root (T5).
        """
        growth = math.sqrt(self.new.residual / self.old.residual)
        edits: list[Edit] = []
        if self.body.embedding_scaled:
            tables = self.body.token_embeddings
            edits += [ScaleParameter(parameter=table, factor=1 / growth) for table in tables]
        if self.body.logits_scaled or (self.body.tied and self.body.embedding_scaled):
            if self.body.final_norm is None:
                raise PlanError(
                    f"hidden_size = {self.new.residual}: the head is the token embedding, and the last norm has no "
                    "gain that could take up the root of the growth. Untie the head first, or leave hidden_size out."
                )
            last = [role for role in self.body.roles if role.pattern.rpartition(".")[0] == self.body.final_norm]
            for role in last:
                offset = self.body.gain_offset if role.kind == "gain" else 0.0
                edits.append(ScaleParameter(parameter=role.pattern, factor=growth, offset=offset))
        return edits

    def masks(self) -> list[Edit]:
        """The masks around modules that write or read new units, around norms, and where embeddings enter."""
        edits: list[Edit] = []
        for module, roles in self._modules().items():
            settings = self._mask_settings(module, roles)
            if settings:
                edits.append(WrapModule(module=module, brick="masked", settings=settings))
        edits += [edit for module, segments in self._norms().items() for edit in self._norm(module, segments)]
        # A norm behind the embeddings masks them already.
        if self._residual_grows() and self.body.embedding_norm is None:
            settings = {"input_size": self.new.residual, "new_inputs": self._spans(self._residual())}
            edits += [
                WrapModule(module=f"{stack.path}.0", brick="masked_block", settings=settings)
                for stack in self.body.stacks
            ]
        return edits

    def _residual_grows(self) -> bool:
        return self.old.residual < self.new.residual

    def _units(self, segment: Segment) -> tuple[int, int]:
        """Units of a segment before and after; its own where its stream never grows."""
        old, new = (sizes.units(segment.stream, segment.scope) for sizes in (self.old, self.new))
        return (segment.count if old is None else old), (segment.count if new is None else new)

    def _groups(self, scope: str) -> tuple[int, int]:
        """Query heads per key-value head before and after."""
        old, new = self.old.at(scope), self.new.at(scope)
        return old.query_heads // old.key_value_heads, new.query_heads // new.key_value_heads

    def _residual(self) -> tuple[Segment, ...]:
        return (Segment("residual", 1, self.old.residual),)

    def _layout(self, segment: Segment) -> list[int | None]:
        """For every new unit of a segment the old one that it is, or None. Units at the end, but for query heads that
        join the groups of old key-value heads."""
        old, new = self._units(segment)
        if segment.stream != "query":
            return [unit if unit < old else None for unit in range(new)]
        old_group, group = self._groups(segment.scope)
        old_keys = self.old.at(segment.scope).key_value_heads
        places = (divmod(head, group) for head in range(new))
        return [key * old_group + slot if key < old_keys and slot < old_group else None for key, slot in places]

    def _padded(self, role: ParameterRole, axis: int, segments: tuple[Segment, ...]) -> list[Edit]:
        """New entries at the end of the axis, then moved to where they belong."""
        layouts = [self._layout(segment) for segment in segments]
        if all(None not in layout for layout in layouts):
            return []
        unit = math.gcd(*(segment.unit for segment in segments))
        index: list[int] = []
        first, fresh = 0, sum(segment.size for segment in segments) // unit
        for segment, layout in zip(segments, layouts, strict=True):
            pieces = segment.unit // unit
            for source in layout:
                start = fresh if source is None else first + source * pieces
                index += range(start, start + pieces)
                fresh += pieces if source is None else 0
            first += segment.count * pieces
        index = _in_place(index, segments, [len(layout) for layout in layouts], unit)
        size = len(index) * unit
        # No mask is between experts' own units, before the layers, where Whisper's second convolution reads one, or
        # around a table that is added to no residual (DeBERTa's, of relative positions).
        unmasked = role.access[axis] == "reads" and (role.kind == "embedding" or self._is_inner(role, segments))
        apart = role.kind == "embedding" and role.along("residual") and role.pattern not in self.body.embeddings
        fill = ZeroFill() if unmasked or apart else _fill(role)
        edits: list[Edit] = [PadParameter(parameter=role.pattern, axis=axis, size=size, fill=fill)]
        if index != list(range(len(index))):
            edits.append(SliceParameter(parameter=role.pattern, axis=axis, index=index, unit=unit))
        return edits

    def _is_inner(self, role: ParameterRole, segments: tuple[Segment, ...]) -> bool:
        """Whether the units that a parameter reads never leave its module, which writes them too (experts)."""
        streams, owner = {segment.stream for segment in segments} & {*FEED_FORWARD}, role.pattern.rpartition(".")[0]
        beside = (other for other in self.body.roles if other.pattern.rpartition(".")[0] == owner)
        return any(other.along(stream, "writes") for other in beside for stream in streams)

    def _spans(self, segments: tuple[Segment, ...]) -> list[list[int]]:
        """The new entries of an axis, as stretches [first, end)."""
        layouts = [self._layout(segment) for segment in segments]
        units = zip(segments, layouts, strict=True)
        is_new = [source is None for segment, layout in units for source in layout for _ in range(segment.unit)]
        places = laid_out(segments, [len(layout) for layout in layouts], [segment.unit for segment in segments])
        spans: list[list[int]] = []
        for place, entry in enumerate(places):
            if is_new[entry] and spans and spans[-1][1] == place:
                spans[-1][1] += 1
            elif is_new[entry]:
                spans.append([place, place + 1])
        return spans

    def _size(self, segments: tuple[Segment, ...]) -> int:
        return sum(len(self._layout(segment)) * segment.unit for segment in segments)

    def _modules(self) -> dict[str, list[ParameterRole]]:
        """The roles of matrices by the outermost module that owns them: what wraps a matrix, or lies beside it in a
        brick, is behind its masks too."""
        modules: dict[str, list[ParameterRole]] = {}
        for role in self.body.roles:
            if role.kind == "matrix":
                owner = role.pattern.rpartition(".")[0]
                while owner.endswith(".inner"):
                    owner = owner.removesuffix(".inner")
                modules.setdefault(owner, []).append(role)
        return {
            module: roles
            for module, roles in modules.items()
            if not any(path_pattern(other, after=r"(\..+)?").fullmatch(module) for other in modules if other != module)
        }

    def _mask_settings(self, module: str, roles: list[ParameterRole]) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        self._refuse_heads_within(module)
        normed = self._output_norms(module)
        for role in roles:
            for segments, access in zip(role.axes, role.access, strict=True):
                streams = {segment.stream for segment in segments}
                spans = self._spans(segments)
                if access == "reads" and streams == {"query"} and segments[0].parts:
                    # The values of a new key-value head are masked; what a new query head reads of an old one is not.
                    limit = self._end_of_old_groups(segments[0])
                    spans = [[first, min(end, limit)] for first, end in spans if first < limit]
                if access == "reads" and streams & {*FEED_FORWARD, "query"} and spans:
                    if not self._is_inner(role, segments):
                        settings |= {"input_size": self._size(segments), "new_inputs": spans}
                elif (
                    access == "writes"
                    and spans
                    and not streams & {*FEED_FORWARD}
                    and not (normed and "residual" in streams)
                ):
                    settings |= {"output_size": self._size(segments), "new_outputs": spans}
        return settings

    def _refuse_heads_within(self, module: str) -> None:
        """PlanError when heads grow in a module that makes them with one matrix and reads them with another (torch's
        MultiheadAttention)."""
        found = next(m for path, m in self.model.named_modules() if path_pattern(module).fullmatch(path))
        below = [role for role in self.body.roles if role.kind == "matrix" and role.pattern.startswith(f"{module}.")]
        grown = [role for role in below if any(self._spans(segments) for segments in role.axes)]
        # A matrix from heads to heads (DeBERTa's head_logits_proj) is masked on both sides.
        ends = {role.pattern: [how for how in get_args(Access) if role.along("query", how)] for role in grown}
        if all([how] in ends.values() for how in get_args(Access)) and not isinstance(found, Brick):
            raise PlanError(
                f"num_attention_heads = {self.new.query_heads}: {module}, a {type(found).__name__}, makes its heads "
                "and reads them in one call, between which there is no place for a mask. Grow feed-forward parts or "
                "layers, or use another method, for example lemon."
            )

    def _end_of_old_groups(self, segment: Segment) -> int:
        """Where the entries of query heads end that read old key-value heads."""
        return self.old.at(segment.scope).key_value_heads * self._groups(segment.scope)[1] * segment.unit

    def _output_norms(self, module: str) -> bool:
        """Whether a masked norm follows the output of `module` before or behind the residual sum."""
        return module in self.body.before_norms or any(
            path_pattern(f"{stack.path}.*.{output}").fullmatch(module) is not None and stack.output_norms
            for stack in self.body.stacks
            for output in stack.outputs
        )

    def _norms(self) -> dict[str, tuple[Segment, ...]]:
        """The norms over streams that grow, with what they run along: the residual, for those without parameters."""
        roles = [role for role in self.body.roles if role.kind in ("gain", "query_gain", "key_gain")]
        # Over the last axis: a gain for each head and dimension (Cohere) is of a norm over dimensions.
        norms = {role.pattern.rpartition(".")[0]: role.axes[-1] for role in roles if role.axes[-1]}
        if not self.body.norm_has_gain and self._residual_grows():
            norms |= {path: self._residual() for path in self._bare_norms() if path not in norms}
        return {path: segments for path, segments in norms.items() if self._spans(segments)}

    def _bare_norms(self) -> list[str]:
        """Norms over the residual without parameters, as patterns over layers. They can be told by their class alone;
        those inside an attention are norms over heads."""
        attentions = [f"{stack.path}.*.{part}.*" for stack in self.body.stacks for part in stack.attentions if part]
        paths: dict[str, None] = {}
        for name, module in self.model.named_modules():
            if any(path_pattern(path).fullmatch(name) for path in attentions):
                continue
            if type(module).__name__.endswith("Norm") and not list(module.parameters()):
                for stack in self.body.stacks:
                    if name.startswith(f"{stack.path}."):
                        rest = name.removeprefix(f"{stack.path}.").partition(".")[2]
                        name = f"{stack.path}.*.{rest}"
                paths[name] = None
        if not any(path.startswith(f"{stack.path}.") for stack in self.body.stacks for path in paths):
            raise PlanError(
                f"The layers of a {self.body.family} compute their norms without a module that a mask could go around, "
                "so that hidden_size can't grow. Grow its layers, or its tokens (method tokenformer)."
            )
        return list(paths)

    def _norm(self, module: str, segments: tuple[Segment, ...]) -> Iterator[Edit]:
        """The mask around a norm, or those around the norms of layers one by one where not all have it."""
        query_or_key = segments[0].stream != "residual"
        places = [path for path, _ in self.model.named_modules() if path_pattern(module).fullmatch(path)]
        norms = [path for path in places if not isinstance(self.model.get_submodule(path), nn.Identity)]
        found = self.model.get_submodule(norms[0])
        if isinstance(found, Brick):
            raise PlanError(
                f"{module} is a brick ({found.brick_name}), and masks compute a norm anew, without what that does "
                "beside. Grow behind masks first and apply it to the result; or grow other widths."
            )
        settings = {
            "kind": "rms" if query_or_key else self.body.norm,
            "eps": norm_epsilon(found),
            "size": self._size(segments),
            "new": self._spans(segments),
        }
        if self.body.gain_offset:
            settings["gain_offset"] = self.body.gain_offset
        stack = self.body.stack_of(module)
        if norms == places or stack is None:
            places = [module]
        else:
            rest = module.removeprefix(f"{stack.path}.*")
            lacking = {path for path in places if path not in norms}
            paths = (f"{stack.path}.{layer}{rest}" for layer in range(self.layers[stack]))
            places = [path for path in paths if path not in lacking]
        for path in places:
            yield WrapModule(module=path, brick="masked_norm", settings=settings)


def _in_place(index: list[int], segments: tuple[Segment, ...], units: list[int], unit: int) -> list[int]:
    """The old piece, of `unit` entries, of every new one as the axis is laid out, from those of its segments one after
    the other; pieces that are no old ones are new."""
    if not any(segment.dealt for segment in segments):
        return index
    pieces = [segment.unit // unit for segment in segments]
    before = laid_out(segments, [segment.count for segment in segments], pieces)
    where = dict(zip(before, range(len(before)), strict=True))
    return [where.get(index[piece], index[piece]) for piece in laid_out(segments, units, pieces)]


def _fill(role: ParameterRole) -> Fill:
    """New weights are random at the scale of the old ones; new gains and factors are as the old ones on average, biases
    zero."""
    if role.kind in ("gain", "query_gain", "key_gain", "scale"):
        return MeanFill()
    return ZeroFill() if role.kind in ("bias", "offset") else NormalFill()


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    """A quarter wider in every dimension, and one layer deeper where that goes."""
    body, chosen = example_tower(model, -1)
    values: dict[str, Any] = {**chosen}
    if can_deepen(body):
        values["layers"] = 1 + deepest(model, body)
    if isinstance(model.config, ParameterTokensConfig) and not body.norm_has_gain:
        return values
    return values | somewhat_wider(body)


METHOD = Method(
    name="masked",
    title="Masked structural growth: random new weights, let in by masks in the course of training",
    paper="arXiv 2305.02869",
    intent="grow",
    settings=MaskedGrowth,
    plan=from_model(plan_masked),
    examples=_examples,
    promise="exact, at mask strength 0; finish is exact at strength 1",
)
