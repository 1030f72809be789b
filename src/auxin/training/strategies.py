"""How a model that several processes train lies in them: a copy in each (`Copies`), in pieces (`Sharded`), or a copy in
the pieces of each machine (`Hybrid`).

Either way a step is the one that a single process would take with the same batch, but for the order of sums: the batch
is cut into the same parts, each part weighs as many targets as it has, and gradients are added up before they are
clipped.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from auxin.errors import ConfigError, PlanError
from auxin.models.adapters import has_adapter
from auxin.models.layers import layer_paths
from auxin.objectives.objective import Objective
from auxin.training.batch_norms import batch_norms
from auxin.training.ranks import Ranks, processes_here
from auxin.training.settings import TrainingSettings

T = TypeVar("T")
BUCKET = 2**23
"""Values of gradients that are added up at a time."""


class Copies:
    """Every process has the whole model and the whole optimizer, and takes the same steps.

    Args:
        ranks: the processes; one alone keeps everything to itself.
    """

    name: str = "replicated"
    in_step = False
    """Whether a forward pass of the model is one of all processes together."""
    gathers = False
    """Whether a layer is whole only while it computes."""
    skeleton: PreTrainedModel | None = None
    """Where the model lies in pieces: its shapes, as it was before."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.sharers = ranks
        """The processes among which the parts of a batch are divided."""
        self.shares_passes = False
        """Whether these divide the samples of each pass, since the model looks at all of them together."""

    def place(self, model: PreTrainedModel) -> None:
        """Bring `model`, whole and on its device, into the form that it is trained in."""

    def begin_pass(self, model: nn.Module, is_last: bool) -> None:
        """A forward and backward pass follows, the last one of a step or not."""

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients that the processes have. A parameter that has one in none of them keeps none."""
        if not self.ranks.several:
            return
        device = parameters[0].device
        used = torch.tensor([parameter.grad is not None for parameter in parameters], device=device).float()
        self.ranks.add_up(used)
        wanted = [parameter for parameter, flag in zip(parameters, used.tolist(), strict=True) if flag]
        for bucket in _buckets(wanted):
            flat = torch.cat([_gradient(parameter).flatten() for parameter in bucket])
            self.ranks.add_up(flat)
            pieces = flat.split([parameter.numel() for parameter in bucket])
            for parameter, piece in zip(bucket, pieces, strict=True):
                # AdamW's fused kernel goes through a parameter and its gradient in the order of memory.
                gradient = piece.view_as(parameter)
                dense = parameter.is_contiguous()
                parameter.grad = gradient if dense else torch.empty_like(parameter).copy_(gradient)

    def total(self, loss: Tensor) -> None:
        """Replace `loss`, of the parts that this process has computed, by that of the whole batch."""
        self.ranks.add_up(loss)

    def measured(self, model: PreTrainedModel, find: Callable[[], T]) -> T:
        """What `find` finds of the model, which all of them call."""
        return find()


class Sharded(Copies):
    """Every process has a piece of each parameter, gradient and moment, by torch's FSDP2; a layer is whole only while
    it computes.

    Args:
        ranks: the processes.
        gather_once: whether a layer that is whole stays so until the last pass of a step is through with it.
    """

    name = "sharded"
    in_step = gathers = True

    def __init__(self, ranks: Ranks, gather_once: bool = False) -> None:
        super().__init__(ranks)
        self.gather_once = gather_once

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the mesh of processes: copies, where there are several, and pieces of each."""
        return (self.ranks.size,)

    def place(self, model: PreTrainedModel) -> None:
        """Cut the parameters into pieces, layer by layer."""
        self.skeleton = shapes_alone(model)
        mesh = init_device_mesh(model.device.type, self.shape, mesh_dim_names=("copies", "pieces")[-len(self.shape) :])
        cut_by_layers(model, mesh, stays_whole=self.gather_once)
        for module in _sharded(model):
            # Parts of a batch weigh what they weigh; a mean over processes would divide by how many there are.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum that divides
            # Behind FSDP2's own, which makes its parameters whole.
            cast(nn.Module, module).register_forward_pre_hook(self._watch)
        # Else each would send what it has a gradient of. Older versions of torch can't.
        send_unused = getattr(model, "set_reduce_scatter_unused_params", None)
        if send_unused is not None:
            send_unused(True)
        self._trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self._used: set[str] = set()
        self._watched: set[str] = set()

    def _watch(self, module: nn.Module, inputs: object) -> None:
        """Note from now on which of the parameters that are whole within `module` get a gradient."""
        if not torch.is_grad_enabled():
            return
        for name, parameter in module.named_parameters(prefix=self._names[module]):
            if parameter.requires_grad and name not in self._watched and not isinstance(parameter, DTensor):
                self._watched.add(name)
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._used.add(name))

    def begin_pass(self, model: nn.Module, is_last: bool) -> None:
        """Gradients go round after the last pass of a step alone; until then layers may stay whole."""
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(is_last)
        model.set_reshard_after_backward(is_last or not self.gather_once)

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """The last backward pass has done it; a parameter that has a gradient in none of them gets back that it has
        none."""
        used = torch.tensor([name in self._used for name, _ in self._trained]).float()
        self._used.clear()
        self.ranks.add_up(used)
        for (_, parameter), flag in zip(self._trained, used.tolist(), strict=True):
            if not flag:
                parameter.grad = None

    def measured(self, model: PreTrainedModel, find: Callable[[], T]) -> T:
        found = find()
        reshard(model)
        return found


class Hybrid(Sharded):
    """As `Sharded`, within groups of processes that follow one another, such as those of a machine: each group has a
    whole copy between them. Layers are gathered within a group; of gradients each piece is added up with its copies.

    Args:
        ranks: the processes.
        group: processes of a group; they divide the processes.
        gather_once: as of `Sharded`.
    """

    def __init__(self, ranks: Ranks, group: int, gather_once: bool = False) -> None:
        super().__init__(ranks, gather_once)
        self.group = group
        self.name = f"hybrid, {group} a copy"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ranks.size // self.group, self.group


def choose_strategy(
    settings: TrainingSettings,
    ranks: Ranks,
    device: torch.device,
    model: PreTrainedModel,
    objective: Objective,
    hooks: Sequence[object],
) -> Copies:
    """The strategy that `settings` ask for, to train `model` on `device`.

    Raises:
        ConfigError: several processes can't train this as one would.
    """
    if not ranks.several:
        return Copies(ranks)
    _check(settings, ranks, model, objective)
    against = against_pieces(settings, model, hooks)
    if settings.strategy in ("sharded", "hybrid"):
        refuse_to_cut(settings, against)
    sharded = settings.strategy == "sharded" or (settings.strategy == "auto" and device.type == "cuda")
    if settings.strategy == "hybrid":
        found: Copies = Hybrid(ranks, _group(settings, ranks), settings.gather_once)
    else:
        found = Sharded(ranks, settings.gather_once) if sharded and against is None else Copies(ranks)
    found.shares_passes = bool(batch_norms(model))
    return found


def _group(settings: TrainingSettings, ranks: Ranks) -> int:
    """Processes that have a copy between them: what the settings say, else those of this machine."""
    group = settings.processes_per_copy or processes_here()
    if group is None:
        raise ConfigError(
            "strategy: 'hybrid' keeps a copy on each machine, and how many processes a machine has is not known: "
            "LOCAL_WORLD_SIZE is not set. Start by torchrun, or set processes_per_copy."
        )
    if ranks.size % group:
        raise ConfigError(
            f"processes_per_copy: copies of {group} processes don't divide {ranks.size}. Set a divisor of "
            f"{ranks.size}; unset, it is the number of processes of a machine."
        )
    return group


def against_pieces(settings: TrainingSettings, model: PreTrainedModel, hooks: Sequence[object]) -> str | None:
    """Why the parameters of `model` have to stay whole, in a sentence that goes on; None: they need not. Of hooks their
    settings are enough."""
    if hooks:
        names = ", ".join(getattr(hook, "kind", type(hook).__name__) for hook in hooks)
        return f"what takes part in this stage reads or changes whole ones ({names})."
    if has_adapter(model):
        return "an adapter is merged into whole ones."
    if settings.compile:
        return "compiling them was never tried."
    for name, parameter in model.named_parameters():
        if not parameter.ndim or not parameter.is_contiguous():
            kind = "not contiguous in memory" if parameter.ndim else "a single number"
            return f"{name}, which is {kind}, can't be cut."
    return None


def refuse_to_cut(settings: TrainingSettings, against: str | None) -> None:
    """ConfigError where `against_pieces` has found something."""
    if against is not None:
        raise ConfigError(
            f"strategy: {settings.strategy!r} cuts parameters into pieces, and {against} Set strategy: replicated."
        )


def _check(settings: TrainingSettings, ranks: Ranks, model: PreTrainedModel, objective: Objective) -> None:
    """Refuse what would be something else if a batch were cut into parts for several processes."""
    if settings.batch_size < ranks.size:
        raise ConfigError(
            f"batch_size: {settings.batch_size} samples can't be shared by {ranks.size} processes. Raise it, or start "
            "fewer processes."
        )
    config = model.config.get_text_config()
    reason = ""
    if not objective.adds_up:
        reason = "what is learnt is of the samples of a forward pass together"
    elif getattr(config, "output_router_logits", False):
        reason = "the balance of the experts is one of the samples of a forward pass together"
    parts = math.ceil(settings.batch_size / settings.samples_per_forward)
    if norms := batch_norms(model):
        _check_norms(settings, ranks, next(iter(norms)), reason)
    elif reason and parts < ranks.size:
        raise ConfigError(
            f"micro_batch_size: {reason}, and a batch of {settings.batch_size} is {parts} of them for {ranks.size} "
            f"processes. Set micro_batch_size to {settings.batch_size // ranks.size} or less; one process learns the "
            "same with it."
        )


def _check_norms(settings: TrainingSettings, ranks: Ranks, path: str, reason: str) -> None:
    """Refuse passes whose samples can't be divided; `path` is that of a batch norm."""
    if settings.compile:
        raise ConfigError(
            f"compile: {path} is a batch norm, which asks the other processes in the middle of a pass; compiling that "
            "was never tried. Set compile: false."
        )
    if reason:
        raise ConfigError(
            f"{path} is a batch norm, which looks at the samples of all processes, and {reason}. Train this model by "
            "one process."
        )
    last = settings.batch_size % settings.samples_per_forward or settings.samples_per_forward
    if last < ranks.size:
        raise ConfigError(
            f"micro_batch_size: {path} is a batch norm, so that {ranks.size} processes share the samples of each "
            f"forward pass, and one of a batch of {settings.batch_size} has {last}. Leave it out."
        )


def samples_per_pass(settings: TrainingSettings, processes: int) -> int:
    """Samples of a forward pass: those of the settings, fewer where there would be fewer passes than processes."""
    size = settings.samples_per_forward
    enough = math.ceil(settings.batch_size / size) >= processes
    return size if enough else math.ceil(settings.batch_size / processes)


def plain_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of `model` as it was before its parameters were cut, which gives it one of its own."""
    found = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    return cast(type[PreTrainedModel], found)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that lies in pieces, gathered in every process; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy `value`, whole, into a tensor of its shape: where that lies in pieces, into the own one."""
    with torch.no_grad():
        if not isinstance(tensor, DTensor):
            tensor.copy_(value)
            return
        local = tensor.to_local()
        if local.numel():
            (chunk,) = tensor.__create_chunk_list__()
            place = zip(chunk.offsets, chunk.sizes, strict=True)
            local.copy_(value[tuple(slice(begin, begin + length) for begin, length in place)])


def reshard(model: nn.Module) -> None:
    """Let all of a model lie in pieces: after a forward pass without a backward one its outermost part is whole."""
    for module in _sharded(model):
        module.reshard()


def cut_by_layers(model: PreTrainedModel, mesh: DeviceMesh | None = None, stays_whole: bool = False) -> None:
    """Lay a model in pieces by torch's FSDP2, each layer and the rest; one without known layers is one piece.

    Args:
        model: also on the meta device.
        mesh: the processes; None: all.
        stays_whole: whether a layer stays whole between a forward pass and the backward one.
    """
    try:
        paths = layer_paths(model)
    except PlanError:
        paths = ()
    for path in paths:
        fully_shard(model.get_submodule(path), mesh=mesh, reshard_after_forward=not stays_whole)
    fully_shard(model, mesh=mesh)


def shapes_alone(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` on the meta device that shares its config."""
    parameters = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    buffers = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, {**parameters, **buffers, id(model.config): model.config})


def apart(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """`parameters` that lie in pieces, and those that do not: torch's functions of many tensors take one kind."""
    kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        kinds[not isinstance(parameter, DTensor)].append(parameter)
    return [kind for kind in kinds if kind]


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """`parameters` in turn, of one type and up to BUCKET values together; a larger one by itself."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (parameter.dtype != bucket[0].dtype or size + parameter.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket
