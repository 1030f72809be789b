"""LiGO, the learned growth operator (arXiv 2303.00980): a short optimisation finds how the old weights become new ones.

Every matrix of new layer l is a blend of those of all old layers, widened on both sides:
W_l' = B_l (sum_j w_lj W_j) A_l^T; norms and biases are B_l (sum_j w_lj b_j). B = [I; S] keeps the old units in front
and makes each new one a mixture of old ones; w starts as stacking. Ties (the paper's section 3.3): all readers of the
residual have A = B_emb, its writers B = B_emb; the attention's output has A = B_v, the second feed-forward matrix
A = B_fc1. Only w and S are trained, on the language modelling loss, for 100 steps; the old weights stay as they are.
The order, first the blend and then the widening by matrices of the new layer, is that of the released code
(VITA-Group/LiGO); the paper writes the sum over widened layers, B_j W_j A_j^T, which is the same where all layers
share one B. A stack that keeps its length keeps its layers, without w.

Never exact: a reader's A is its writer's B, so that the old function is lost at the growth, and what the optimisation
wins back is a start, not the old model. Grouped-query attention is refused: A_o = B_v asks for as many value heads as
query heads.

A trap of the released code is avoided: its learning rate never leaves the warm-up in the 100 steps that its readme
recommends. Here the rate is a setting, high enough for 100 steps. A row of S starts as one old unit, drawn at random,
plus noise; "average" gives the released start, a random mean of all of them, whose new units are smaller and alike.

The operator is written to a safetensors file; the plan refers to it. It learns from the bench's data: in a recipe the
run's training split, on the command line the standard library's source code in the model's own tokens, in Python any
batches.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from auxin.edits import Edit, PadParameter, Plan, SetConfig, ZeroFill
from auxin.edits.kinds.edit import ArrangeLayers, ProjectParameter
from auxin.edits.plan_files import PlanFile
from auxin.edits.resolution import resolve
from auxin.edits.structure import config_values, edited_config, edited_skeleton, skeleton_of
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.nn.bricks import Brick
from auxin.objectives.calibration import Calibration, CalibrationSettings
from auxin.planning.attentions import attention_numbers
from auxin.planning.bench import Bench
from auxin.planning.depth import arranged, can_deepen, chosen_stacks, deepest, depth, refuse_kept_layers
from auxin.planning.fixed_heads import fixed_head_sizes
from auxin.planning.method import Method
from auxin.planning.size_edits import size_values
from auxin.planning.width import describe_sizes
from auxin.planning.width_conditions import refuse_fixed_widths
from auxin.planning.width_targets import (
    WidthTargets,
    example_tower,
    feed_forward_settings,
    refuse_stages,
    somewhat_wider,
)
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import ParameterRole, Segment, laid_out
from auxin.words.widths import Sizes

BATCH_SIZE = 8
"""Samples per step, unless the data comes in other batches."""


class LigoGrowth(WidthTargets):
    """The sizes to grow to, and how the operator is learned."""

    layers: int | None = Field(default=None, gt=0)
    """Number of layers after the growth. With encoder and decoder: of each, or of `part`."""
    part: str | None = None
    """Of a model with an encoder and a decoder, the one that gets layers: "encoder" or "decoder". Of a model of several
    towers, the one that grows: "text" or "vision"; with `layers` alone None means all."""
    steps: int = Field(default=100, ge=0)
    """Optimisation steps, each on a batch of the data; 0 leaves the operator at its start and needs no data."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Of AdamW (betas 0.9 and 0.95, no weight decay) on w and S; falls linearly to zero."""
    depth_start: Literal["stack", "interleave"] = "stack"
    """Where w starts: new layer l is old layer l mod L, or floor(l L / L')."""
    width_start: Literal["select", "average"] = "select"
    """Where a row of S starts: one old unit drawn at random, or uniform random weights of all of them with sum 1."""
    noise: float = Field(default=0.03, ge=0)
    """Uniform noise in 0..noise on the start of w and S, whose rows are then divided by their sum."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the operator's start and of the order of the standard corpus."""


def plan_ligo(bench: Bench, settings: LigoGrowth) -> Plan:
    """Learn a growth operator for the bench's model and plan the growth; the model stays as it is.

    Args:
        bench: the model, with weights, and the data to learn from, unless `settings.steps` is 0. The data is read from
            the start again when it ends. The operator's file goes to the bench's folder, under a name made of its
            content.
        settings: the sizes, and how to learn.

    Raises:
        PlanError: an unknown architecture, grouped-query heads, sizes that shrink or don't go together, nothing to
            grow, no weights, no data, or a loss that is not finite.
    """
    operator = GrowthOperator(bench.model, bench.seeded(settings))
    if settings.steps:
        if bench.data is None:
            raise PlanError(
                f"steps = {settings.steps}: the operator is learned from data, and there is none. Give the bench a "
                "Calibration, or set steps = 0 to leave the operator at its start."
            )
        learn(operator, bench.data, settings.steps, settings.learning_rate)
    return operator.plan(bench.folder)


class GrowthOperator(nn.Module):
    """The operator between a model's parameters and those of a larger one: depth weights `w` and width matrices' `S`.

    Args:
        model: the source; its parameters are read when they are needed and never changed.
        settings: the sizes, and the operator's start.

    Raises:
        PlanError: as `plan_ligo`.
    """

    def __init__(self, model: PreTrainedModel, settings: LigoGrowth) -> None:
        super().__init__()
        self.settings, self.body = settings, anatomy(model, part=settings.part)
        refuse_stages(self.body)
        self._check(model)
        self.new = fixed_head_sizes(self.body, settings)
        refuse_fixed_widths(self.body, self.new)
        self._check_heads()
        self.depths = _depths(model, self.body, settings)
        values = size_values(self.body, self.new)
        if not values and not any(self._is_deeper(stack) for stack in self.depths):
            raise PlanError(
                f"There is nothing to grow: the model already has {describe_sizes(self.body)}. Ask for more of one, or "
                "for layers."
            )
        self.values = values
        # In lists: neither the source nor the grown structure is a part of the operator.
        self._source = [model]
        self._grown_skeleton = [self._skeleton(values).eval()]
        first = next(model.parameters())
        # The operator is real even where the model is not: an outline begins with its start.
        self.device = torch.device("cpu") if first.is_meta else first.device
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        self._source_shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        generator = torch.Generator().manual_seed(settings.seed)
        self.w = nn.ParameterDict()
        self.S = nn.ParameterDict()
        self._add_parameters(generator)

    @property
    def source(self) -> PreTrainedModel:
        """The model that grows."""
        return self._source[0]

    @property
    def grown(self) -> PreTrainedModel:
        """The structure of the grown model, on the meta device."""
        return self._grown_skeleton[0]

    def parameters_of_grown(self) -> dict[str, Tensor]:
        """The parameters of the grown model by name, tied ones once; differentiable in w and S."""
        old = {name: parameter.detach() for name, parameter in self.source.named_parameters()}
        matrices: dict[str, Tensor] = {}
        return {name: self._grown(name, old, matrices) for name, _ in self.grown.named_parameters()}

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The grown model's loss on a batch: its inputs by name and `labels`."""
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
        buffers = {name: buffer.to(self.device) for name, buffer in self.grown.named_buffers()}
        result = functional_call(self.grown, self.parameters_of_grown() | buffers, kwargs=inputs)
        return cast(Tensor, result.loss)

    @torch.no_grad()
    def plan(self, folder: Path | None) -> Plan:
        """The plan that applies the operator as it is now.

        Args:
            folder: for the file of its matrices; None: nothing is written, and zeros stand where the matrices would be
                applied, so that the plan has the shapes and no more.
        """
        projections, files = list(self._projections()), list[PlanFile]()
        edits: list[Edit] = [SetConfig(values=self.values)] if self.values else []
        edits += [self._arrangement(stack) for stack in self.depths if self._is_deeper(stack)]
        if folder is None:
            edits += [
                PadParameter(parameter=pattern, axis=axis, size=self._length(self._keys[key][0]), fill=ZeroFill())
                for pattern, axis, key in projections
            ]
        elif projections:
            keys = dict.fromkeys(key for _, _, key in projections)
            matrices = {key: self._matrix(*self._keys[key]).cpu().contiguous() for key in keys}
            files = [PlanFile.write(folder, "ligo.safetensors", safetensors_bytes(matrices))]
            edits += [
                ProjectParameter(
                    parameter=pattern, axis=axis, file=files[0].name, tensor=key, shape=_size(matrices[key])
                )
                for pattern, axis, key in projections
            ]
        return Plan(
            method="ligo",
            settings=self.settings.model_dump(mode="json", exclude_defaults=True),
            promise="none",
            seed=self.settings.seed,
            edits=edits,
            files=files,
            made_for=config_values(self.source.config),
        ).beside(folder)

    def _skeleton(self, values: dict[str, Any]) -> PreTrainedModel:
        """The grown model, with the bricks that its layers and modules have, without data."""
        edits = [
            arranged(self.source, ArrangeLayers(layers=stack.path, order=list(self._rows(stack))))
            for stack in self.depths
            if self._is_deeper(stack)
        ]
        deeper = resolve(edits, self.source).after if edits else skeleton_of(self.source)
        return edited_skeleton(edited_config(deeper.config, values), type(self.source))

    def _check(self, model: PreTrainedModel) -> None:
        if self.body.residual_blocks != "one":
            raise PlanError(
                "The model has bricks of earlier edits that divide its residual stream into blocks (altup), of which "
                "each layer computes one; a blend of layers would be none of them. Use a model without."
            )
        for path, module in model.named_modules():
            if isinstance(module, Brick) and module.temporary is not None:
                raise PlanError(
                    f"{path} has {module.temporary}, which the operator can't map. Before it learns, "
                    f"{module.plain_form}."
                )
        fields, scoped = self.body.fields, self.body.sizes.scoped
        if any(width.scope not in fields.names(width.stream) for width in scoped):
            raise PlanError(
                f"The layers have different widths ({describe_sizes(self.body)}), and the operator blends all of a "
                "stack. Bring them to one width first, for example by net2net, or use another method."
            )
        if self.settings.steps and next(model.parameters()).is_meta:
            raise PlanError("Learning the operator needs the model's weights. Load them, or set steps = 0.")

    def _check_heads(self) -> None:
        old, new = self.body.sizes, self.new
        if self.body.grouped and new.query_heads != old.query_heads:
            raise PlanError(
                f"num_attention_heads = {new.query_heads}: {old.query_heads} query heads share {old.key_value_heads} "
                "key-value heads, and LiGO's tie between the attention's output and the values (A_o = B_v) asks for as "
                f"many of one as of the other. The nearest possible: num_attention_heads = {old.query_heads}"
                + ("" if self.body.fields.head_dim else f" with hidden_size = {old.residual}")
                + ", or another method, for example hypercloning."
            )

    def _is_deeper(self, stack: LayerStack) -> bool:
        old, new = self.depths[stack]
        return old != new

    def _add_parameters(self, generator: torch.Generator) -> None:
        """w for every kind of module of a stack that gets deeper, S for every stream that gets wider, where it is."""
        self._keys: dict[str, tuple[tuple[Segment, ...], str]] = {}
        self._attention = attention_numbers(self.body)
        for name, _ in self.grown.named_parameters():
            stack, _, suffix = self._place(name)
            if stack is not None and self._blends(stack, suffix):
                kind = self._kind(stack, suffix)
                if kind not in self.w:
                    self.w[kind] = self._start(self._rows(stack), self.depths[stack][0], generator)
            for segments in self._role(name).axes:
                if not self._widened(segments):
                    continue
                owner = self._owner(name)
                self._keys[self._key(segments, owner)] = (segments, owner)
                for segment, entries, base in self._bases(segments, owner):
                    if base not in self.S and self._added(segment):
                        drawn = self._drawn(segment, entries, generator)
                        self.S[base] = self._start(drawn, segment.count * entries, generator)

    def _start(self, rows: list[int], columns: int, generator: torch.Generator) -> nn.Parameter:
        """A row per entry of `rows`: the unit vector that it names, with noise; random where it is -1. Sums are 1."""
        start = torch.rand(len(rows), columns, generator=generator, dtype=torch.float64) * self.settings.noise
        for row, unit in zip(start, rows, strict=True):
            if unit >= 0:
                row[unit] += 1
        if min(rows) < 0:
            start = torch.rand(start.shape, generator=generator, dtype=torch.float64)
        start /= start.sum(dim=1, keepdim=True)
        return nn.Parameter(start.to(device=self.device, dtype=self.dtype))

    def _rows(self, stack: LayerStack) -> list[int]:
        """The old layer that every new one starts as."""
        old, new = self.depths[stack]
        stacked = self.settings.depth_start == "stack"
        return [layer % old if stacked else layer * old // new for layer in range(new)]

    def _drawn(self, segment: Segment, entries: int, generator: torch.Generator) -> list[int]:
        """The old entry that every added one of a segment starts as, `entries` of each unit; whole heads."""
        added = self._added(segment)
        if self.settings.width_start == "average":
            return [-1] * (added * entries)
        units = torch.randint(segment.count, (added,), generator=generator).tolist()
        return [unit * entries + entry for unit in units for entry in range(entries)]

    def _added(self, segment: Segment) -> int:
        return _units(self.new, segment) - segment.count

    def _length(self, segments: tuple[Segment, ...]) -> int:
        """Of the axis after the growth."""
        return sum(segment.unit * _units(self.new, segment) for segment in segments)

    def _widened(self, segments: tuple[Segment, ...]) -> bool:
        return any(self._added(segment) for segment in segments)

    def _place(self, name: str) -> tuple[LayerStack | None, int, str]:
        """The stack that a parameter lies in, its layer, and its name in the layer; for others None, 0 and the name."""
        for stack in self.depths:
            if name.startswith(f"{stack.path}."):
                layer, _, suffix = name.removeprefix(f"{stack.path}.").partition(".")
                return stack, int(layer), suffix
        return None, 0, name

    def _original(self, name: str) -> str:
        """The old parameter that one of the grown model starts as."""
        stack, layer, suffix = self._place(name)
        if stack is None or not self._is_deeper(stack):
            return name
        return f"{stack.path}.{self._rows(stack)[layer]}.{suffix}"

    def _role(self, name: str) -> ParameterRole:
        """The role of a parameter of the grown model."""
        return self.body.role(self._original(name))

    def _owner(self, name: str) -> str:
        """What matrices of heads and feed-forward units belong to: the layer, and in it the attention by its number."""
        stack, layer, _ = self._place(name)
        number = self._attention.get(self._role(name).pattern, 0)
        return f"{stack.path}.{layer}.{number}" if stack is not None else "model"

    def _bases(self, segments: tuple[Segment, ...], owner: str) -> list[tuple[Segment, int, str]]:
        """The matrices B that the axis is made of, with the segment each belongs to and the entries that a unit of it
        has there. All of the residual share one."""
        bases = []
        for segment in segments:
            for part, entries in _parts(segment).items():
                shared = part == "residual"
                bases.append((segment, entries, "residual" if shared else f"{owner}.{part}".replace(".", "/")))
        return bases

    def _key(self, segments: tuple[Segment, ...], owner: str) -> str:
        """Name of the axis's whole matrix in the file."""
        names = []
        for segment, _, base in self._bases(segments, owner):
            unit = f".{segment.unit}" if segment.unit > 1 and not segment.parts else ""
            names.append(base.replace("/", ".") + unit)
        return ("dealt:" if any(segment.dealt for segment in segments) else "") + "+".join(names)

    def _matrix(self, segments: tuple[Segment, ...], owner: str) -> Tensor:
        """The whole matrix (new, old) of an axis: its segments one after the other, the parts of a head interleaved."""
        bases = iter(self._bases(segments, owner))
        blocks = []
        for segment in segments:
            sizes = list(_parts(segment).values())
            block = _interleaved([self._base(*next(bases)) for _ in sizes], sizes)
            blocks.append(block if segment.parts else torch.kron(block, torch.eye(segment.unit).to(block)))
        whole, units = torch.block_diag(*blocks), [segment.unit for segment in segments]
        new = laid_out(segments, [_units(self.new, segment) for segment in segments], units)
        return whole[new][:, laid_out(segments, [segment.count for segment in segments], units)]

    def _base(self, segment: Segment, entries: int, base: str) -> Tensor:
        """B = [I; S]."""
        size = segment.count * entries
        identity = torch.eye(size, device=self.device, dtype=self.dtype)
        return torch.cat([identity, self.S[base]]) if base in self.S else identity

    def _kind(self, stack: LayerStack, suffix: str) -> str:
        return f"{stack.path}.{suffix}".rpartition(".")[0].replace(".", "/")

    def _blends(self, stack: LayerStack, suffix: str) -> bool:
        """Whether a layer's parameter is a blend: the stack gets deeper and all layers have it alike (not T5's
        positions)."""
        names = [f"{stack.path}.{layer}.{suffix}" for layer in range(self.depths[stack][0])]
        if not self._is_deeper(stack) or not all(name in self._source_shapes for name in names):
            return False
        return len({(self._source_shapes[name], self.body.role(name).axes) for name in names}) == 1

    def _grown(self, name: str, old: dict[str, Tensor], matrices: dict[str, Tensor]) -> Tensor:
        """One parameter of the grown model."""
        stack, layer, suffix = self._place(name)
        if stack is not None and self._blends(stack, suffix):
            weights = self.w[self._kind(stack, suffix)][layer]
            layers = [old[f"{stack.path}.{source}.{suffix}"] for source in range(self.depths[stack][0])]
            value = sum(
                (weight * tensor for weight, tensor in zip(weights, layers, strict=True)), torch.zeros_like(layers[0])
            )
        else:
            value = old[self._original(name)]
        dtype = value.dtype
        for axis, segments in enumerate(self._role(name).axes):
            if self._widened(segments):
                key = self._key(segments, self._owner(name))
                if key not in matrices:
                    matrices[key] = self._matrix(segments, self._owner(name))
                value = torch.tensordot(matrices[key], value.to(matrices[key].dtype), ([1], [axis])).movedim(0, axis)
        return value.to(dtype)

    def _projections(self) -> Iterator[tuple[str, int, str]]:
        """Pattern, axis and matrix of every projection; those of the residual serve all layers at once."""
        seen: set[tuple[str, int]] = set()
        for name, _ in self.grown.named_parameters():
            role, (stack, _, suffix) = self._role(name), self._place(name)
            serves_all = stack is None or role.pattern == f"{stack.path}.*.{suffix}"
            for axis, segments in enumerate(role.axes):
                if self._widened(segments):
                    shared = serves_all and all(segment.stream == "residual" for segment in segments)
                    pattern = role.pattern if shared else name
                    if (pattern, axis) not in seen:
                        seen.add((pattern, axis))
                        yield pattern, axis, self._key(segments, self._owner(name))

    def _arrangement(self, stack: LayerStack) -> ArrangeLayers:
        prefix = f"{stack.path}.0."
        suffixes = [name.removeprefix(prefix) for name in self._source_shapes if name.startswith(prefix)]
        blend = {
            suffix: self.w[self._kind(stack, suffix)].double().tolist()
            for suffix in suffixes
            if self._blends(stack, suffix)
        }
        return ArrangeLayers(layers=stack.path, order=list(self._rows(stack)), blend=blend)


def _size(matrix: Tensor) -> tuple[int, int]:
    rows, columns = matrix.shape
    return rows, columns


def learn(operator: GrowthOperator, data: Calibration, steps: int, learning_rate: float) -> list[float]:
    """Train w and S of `operator`, and nothing else, on the grown model's loss.

    Args:
        operator: changed in place.
        data: a batch for each step; read again from the start when it ends.
        steps: of AdamW.
        learning_rate: at the first step; falls linearly to zero.

    Returns:
        The loss of every step, before its update.

    Raises:
        PlanError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(operator.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    batches = _endless(data)
    for step in range(steps):
        loss = operator.loss(next(batches))
        if not torch.isfinite(loss):
            raise PlanError(
                f"The operator's loss is {loss.item()} at step {step}. Lower learning_rate ({learning_rate:g}), or "
                "look at the model's weights."
            )
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        optimizer.step()
    return losses


def _endless(data: Calibration) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from data.batches()


def _depths(model: PreTrainedModel, body: Anatomy, settings: LigoGrowth) -> dict[LayerStack, tuple[int, int]]:
    """Old and new number of layers of every stack."""
    depths = {stack: (depth(model, stack), depth(model, stack)) for stack in body.stacks}
    for stack in chosen_stacks(body, settings.part) if settings.layers is not None else []:
        old, new = depths[stack][0], settings.layers
        assert new is not None
        if new < old:
            raise PlanError(
                f"layers = {new} is fewer than the {old} of {stack.path}; growth can't shrink. Ask for at least {old}."
            )
        if new > old:
            refuse_kept_layers(stack)
        depths[stack] = (old, new)
    return depths


def _units(sizes: Sizes, segment: Segment) -> int:
    """Units of a segment's stream in a model of these sizes."""
    units = sizes.units(segment.stream)
    return segment.count if units is None else units


def _parts(segment: Segment) -> dict[str, int]:
    """What a unit of the segment is made of, with the entries of each; heads without dimensions (T5's position biases)
    are their own kind, and units of no parts are mapped whole."""
    if segment.parts:
        return dict(zip(segment.parts, segment.sizes_of_parts, strict=True))
    return {"heads" if segment.stream in ("query", "key_value") else segment.stream: 1}


def _interleaved(parts: list[Tensor], sizes: list[int]) -> Tensor:
    """The matrix of units that hold `sizes` entries of the parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    rows, columns = (size // sizes[0] for size in parts[0].shape)
    whole = parts[0].new_zeros(rows, sum(sizes), columns, sum(sizes))
    first = 0
    for part, size in zip(parts, sizes, strict=True):
        whole[:, first : first + size, :, first : first + size] = part.view(rows, size, columns, size)
        first += size
    return whole.reshape(rows * sum(sizes), columns * sum(sizes))


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    """A quarter wider and one layer deeper, at the operator's start: a tiny model has no data."""
    body, chosen = example_tower(model, -1)
    values: dict[str, Any] = {**chosen, "steps": 0}
    if can_deepen(body):
        values["layers"] = 1 + deepest(model, body)
    # Heads that share keys and values can't grow here, nor with them the hidden size where it follows from them.
    return values | (feed_forward_settings(body, 1.25) if body.grouped else somewhat_wider(body))


def _outline(bench: Bench, settings: LigoGrowth) -> Plan:
    """The sizes that the operator makes, which don't depend on what it learns."""
    start = bench.seeded(settings).model_copy(update={"steps": 0})
    return GrowthOperator(bench.model, start).plan(None)


def _calibration(settings: LigoGrowth) -> CalibrationSettings | None:
    """A batch for each step."""
    return CalibrationSettings(samples=settings.steps * BATCH_SIZE, batch_size=BATCH_SIZE) if settings.steps else None


METHOD = Method(
    name="ligo",
    title="A learned linear operator makes the larger model's weights of the smaller one's",
    paper="arXiv 2303.00980",
    intent="grow",
    settings=LigoGrowth,
    plan=plan_ligo,
    examples=_examples,
    needs_weights=True,
    calibration=_calibration,
    outline=_outline,
    promise="none",
)
