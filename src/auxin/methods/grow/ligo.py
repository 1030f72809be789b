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

The operator is written to a safetensors file; the plan refers to it. From the command line the standard library's
source code, in the model's own tokens, is the data; from Python `plan_ligo` takes any batches.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GenerationMixin, PreTrainedModel

from auxin.data import CorpusSettings, make_loader, prepare
from auxin.edits import Edit, Plan, SetConfig
from auxin.edits.kinds.edit import ArrangeLayers, ProjectParameter
from auxin.edits.resolution import resolve
from auxin.edits.structure import config_values, edited_config, edited_skeleton
from auxin.errors import DataError, PlanError
from auxin.models.anatomy import anatomy
from auxin.nn.bricks import Brick
from auxin.planning.attentions import attention_numbers
from auxin.planning.depth import chosen_stacks, depth
from auxin.planning.fixed_heads import fixed_head_sizes, size_values
from auxin.planning.method import Method
from auxin.planning.width import describe_sizes, refuse_fixed_widths
from auxin.planning.width_targets import WidthTargets
from auxin.words.roles import Anatomy, LayerStack, ParameterRole, Segment, Sizes

Batch = Tensor | Mapping[str, Tensor]
CORPUS_TOKENS = 128
"""Tokens per context of the standard corpus."""
CORPUS_BYTES = 4_000_000
"""How much of the standard corpus is read, more than 100 steps need."""


class LigoGrowth(WidthTargets):
    """The sizes to grow to, and how the operator is learned."""

    layers: int | None = Field(default=None, gt=0)
    """Number of layers after the growth. With encoder and decoder: of each, or of `part`."""
    part: str | None = None
    """Of a model with an encoder and a decoder, the one that gets layers: "encoder" or "decoder"."""
    steps: int = Field(default=100, ge=0)
    """Optimisation steps; 0 leaves the operator at its start and needs no data."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Of AdamW (betas 0.9 and 0.95, no weight decay) on w and S; falls linearly to zero."""
    batch_size: int = Field(default=8, gt=0)
    """Contexts per step, of the standard corpus; data that is given comes in batches already."""
    depth_start: Literal["stack", "interleave"] = "stack"
    """Where w starts: new layer l is old layer l mod L, or floor(l L / L')."""
    width_start: Literal["select", "average"] = "select"
    """Where a row of S starts: one old unit drawn at random, or uniform random weights of all of them with sum 1."""
    noise: float = Field(default=0.03, ge=0)
    """Uniform noise in 0..noise on the start of w and S, whose rows are then divided by their sum."""
    corpus: CorpusSettings | None = None
    """The text to learn from when no data is given; None is the standard library. The model's own tokenizer is used."""
    folder: Path = Path(".")
    """Where the operator's file is written, under a name made of its content."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the operator's start and of the order of the standard corpus."""


def plan_ligo(model: PreTrainedModel, settings: LigoGrowth, data: Iterable[Batch] | None = None) -> Plan:
    """Learn a growth operator for `model` and plan the growth; the model stays as it is.

    Args:
        model: with weights, unless `settings.steps` is 0.
        settings: the sizes, and how to learn.
        data: batches: token ids (batch, sequence) of a causal language model, or mappings of the model's inputs with
            `labels` where it is another one. Read from the start again when it ends. None means the standard corpus.

    Raises:
        PlanError: an unknown architecture, grouped-query heads, sizes that shrink or don't go together, nothing to
            grow, data that ends early or has no labels, or no tokenizer for the standard corpus.
    """
    operator = GrowthOperator(model, settings)
    if settings.steps:
        batches = _standard_batches(model, settings) if data is None else data
        learn(operator, batches, settings.steps, settings.learning_rate)
    return operator.plan()


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
        self.settings, self.body = settings, anatomy(model)
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
        # The operator is real even where the model is not: an outline has its shapes.
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

    def loss(self, batch: Batch) -> Tensor:
        """The grown model's loss on a batch."""
        inputs = {name: tensor.to(self.device) for name, tensor in self._inputs(batch).items()}
        buffers = {name: buffer.to(self.device) for name, buffer in self.grown.named_buffers()}
        result = functional_call(self.grown, self.parameters_of_grown() | buffers, kwargs=inputs)
        return cast(Tensor, result.loss)

    @torch.no_grad()
    def plan(self) -> Plan:
        """The plan that applies the operator as it is now; its matrices are written to the settings' folder."""
        matrices: dict[str, Tensor] = {}
        projections: list[tuple[str, int, str]] = []
        for pattern, axis, key in self._projections():
            projections.append((pattern, axis, key))
            if key not in matrices:
                matrices[key] = self._matrix(*self._keys[key]).cpu().contiguous()
        file = self._write(matrices) if matrices else ""
        edits: list[Edit] = [SetConfig(values=self.values)] if self.values else []
        edits += [self._arrangement(stack) for stack in self.depths if self._is_deeper(stack)]
        edits += [
            ProjectParameter(parameter=pattern, axis=axis, file=file, tensor=key) for pattern, axis, key in projections
        ]
        return Plan(
            method="ligo",
            settings=self.settings.model_dump(mode="json", exclude_defaults=True),
            promise="none",
            seed=self.settings.seed,
            edits=edits,
            made_for=config_values(self.source.config),
        )

    def _skeleton(self, values: dict[str, Any]) -> PreTrainedModel:
        """The grown model, with the bricks that its layers and modules have, without data."""
        edits = [
            ArrangeLayers(layers=stack.path, order=list(self._rows(stack)))
            for stack in self.depths
            if self._is_deeper(stack)
        ]
        deeper = resolve(edits, self.source).after if edits else self.source
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
                for segment, base in self._bases(segments, owner):
                    if base not in self.S and self._added(segment):
                        self.S[base] = self._start(
                            self._drawn(segment, generator), segment.count * self._entries(segment), generator
                        )

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

    def _drawn(self, segment: Segment, generator: torch.Generator) -> list[int]:
        """The old entry that every added one of a segment starts as; whole heads where units have several entries."""
        added, entries = self._added(segment), self._entries(segment)
        if self.settings.width_start == "average":
            return [-1] * (added * entries)
        units = torch.randint(segment.count, (added,), generator=generator).tolist()
        return [unit * entries + entry for unit in units for entry in range(entries)]

    def _added(self, segment: Segment) -> int:
        return _units(self.new, segment) - segment.count

    def _entries(self, segment: Segment) -> int:
        """Entries of a unit that belong to one part (query, key or value) of a head."""
        return segment.unit // max(len(segment.parts), 1)

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

    def _bases(self, segments: tuple[Segment, ...], owner: str) -> list[tuple[Segment, str]]:
        """The matrices B that the axis is made of, with the segment each belongs to. All of the residual share one."""
        bases = []
        for segment in segments:
            for part in _parts(segment):
                shared = part == "residual"
                bases.append((segment, "residual" if shared else f"{owner}.{part}".replace(".", "/")))
        return bases

    def _key(self, segments: tuple[Segment, ...], owner: str) -> str:
        """Name of the axis's whole matrix in the file."""
        return "+".join(base.replace("/", ".") for _, base in self._bases(segments, owner))

    def _matrix(self, segments: tuple[Segment, ...], owner: str) -> Tensor:
        """The whole matrix (new, old) of an axis: its segments one after the other, the parts of a head interleaved."""
        bases = iter(self._bases(segments, owner))
        blocks = []
        for segment in segments:
            parts = [self._base(*next(bases)) for _ in _parts(segment)]
            blocks.append(_interleaved(parts, self._entries(segment)))
        return torch.block_diag(*blocks)

    def _base(self, segment: Segment, base: str) -> Tensor:
        """B = [I; S]."""
        size = segment.count * self._entries(segment)
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

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        if "labels" in inputs:
            return inputs
        if not isinstance(self.source, GenerationMixin) or self.source.config.is_encoder_decoder:
            raise PlanError(
                f"The data's batches hold {', '.join(inputs)} and no labels, without which a "
                f"{type(self.source).__name__} has no loss. Give mappings with labels, or set steps = 0."
            )
        return {**inputs, "labels": inputs["input_ids"]}

    def _write(self, matrices: dict[str, Tensor]) -> str:
        content = safetensors_bytes(matrices)
        path = (self.settings.folder / f"ligo-{hashlib.sha256(content).hexdigest()[:16]}.safetensors").resolve()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            raise PlanError(f"The operator can't be written to {path}: {error}. Give another folder.") from error
        return str(path)


def learn(operator: GrowthOperator, data: Iterable[Batch], steps: int, learning_rate: float) -> list[float]:
    """Train w and S of `operator`, and nothing else, on the grown model's loss.

    Args:
        operator: changed in place.
        data: batches, see `plan_ligo`; read again from the start when it ends.
        steps: of AdamW.
        learning_rate: at the first step; falls linearly to zero.

    Returns:
        The loss of every step, before its update.

    Raises:
        PlanError: the data holds no batch, can't be read again, or the loss is not finite.
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


def _endless(data: Iterable[Batch]) -> Iterator[Batch]:
    read = 0
    while True:
        before = read
        for batch in data:
            read += 1
            yield batch
        if read == before:
            raise PlanError(
                f"The data ended after {read} batches and can't be read again. Give more, a list, or fewer steps."
            )


def _standard_batches(model: PreTrainedModel, settings: LigoGrowth) -> Iterable[Batch]:
    """Contexts of a corpus in the model's own tokens."""
    if not isinstance(model, GenerationMixin) or model.config.is_encoder_decoder:
        raise PlanError(
            f"The standard corpus serves causal language models, not a {type(model).__name__}. Call plan_ligo from "
            "Python with batches that have labels, or set steps = 0 to leave the operator at its start."
        )
    values: dict[str, Any] = {"context_length": CORPUS_TOKENS, "max_bytes": CORPUS_BYTES}
    corpus = settings.corpus or CorpusSettings(**values)
    limit = getattr(model.config, "max_position_embeddings", None) or corpus.context_length
    changes: dict[str, Any] = {"context_length": min(corpus.context_length, limit)}
    if corpus.tokenizer is None:
        changes["tokenizer"] = Path(model.config._name_or_path)
    try:
        with tempfile.TemporaryDirectory() as folder:
            packed = prepare(corpus.model_copy(update=changes), Path(folder) / "corpus")
            tokens = packed.train[:]
    except DataError as error:
        raise PlanError(
            f"The operator has no data to learn from: {error} Save the model with its tokenizer, call plan_ligo from "
            "Python with batches, or set steps = 0 to leave the operator at its start."
        ) from error
    if packed.vocab_size > model.config.vocab_size:
        raise PlanError(
            f"The tokenizer has {packed.vocab_size} entries, the model {model.config.vocab_size}: it belongs to "
            "another model. Name the right one in corpus, or set steps = 0."
        )
    return (batch["input_ids"] for batch in make_loader(tokens.copy(), settings.batch_size, settings.seed))


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
        depths[stack] = (old, new)
    return depths


def _units(sizes: Sizes, segment: Segment) -> int:
    """Units of a segment's stream in a model of these sizes."""
    return {
        "residual": sizes.residual,
        "query": sizes.query_heads,
        "key_value": sizes.key_value_heads,
        "ffn": sizes.ffn or 0,
    }.get(segment.stream, segment.count)


def _parts(segment: Segment) -> tuple[str, ...]:
    """What a unit of the segment is made of; heads without dimensions (T5's position biases) are their own kind."""
    return segment.parts or ("heads" if segment.stream in ("query", "key_value") else segment.stream,)


def _interleaved(parts: list[Tensor], entries: int) -> Tensor:
    """The matrix of units that hold `entries` entries of each part, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    rows, columns = (size // entries for size in parts[0].shape)
    whole = parts[0].new_zeros(rows, len(parts), entries, columns, len(parts), entries)
    for place, part in enumerate(parts):
        whole[:, place, :, :, place, :] = part.view(rows, entries, columns, entries)
    return whole.reshape(rows * len(parts) * entries, columns * len(parts) * entries)


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    """A quarter wider and one layer deeper, at the operator's start: a tiny model has no tokenizer and no data."""
    body = anatomy(model)
    values: dict[str, Any] = {"steps": 0, "folder": tempfile.gettempdir()}
    values["layers"] = 1 + max(depth(model, stack) for stack in body.stacks)
    if not body.grouped:
        heads = body.sizes.query_heads + 1
        values["num_attention_heads"] = heads
        if body.fields.head_dim is not None:
            values["hidden_size"] = (body.sizes.residual // heads + 1) * heads
    if body.sizes.ffn:
        values["intermediate_size"] = body.sizes.ffn * 5 // 4
    return values


def outline(model: PreTrainedModel, settings: LigoGrowth) -> Plan:
    """The plan with the operator at its start, without data; the model may be on the meta device."""
    return plan_ligo(model, settings.model_copy(update={"steps": 0, "folder": Path(tempfile.gettempdir())}))


METHOD = Method(
    name="ligo",
    title="A learned linear operator makes the larger model's weights of the smaller one's",
    paper="arXiv 2303.00980",
    intent="grow",
    settings=LigoGrowth,
    plan=plan_ligo,
    examples=_examples,
    needs_weights=True,
    outline=outline,
    tokens=lambda settings: settings.steps * settings.batch_size * CORPUS_TOKENS,
    promise="none",
)
