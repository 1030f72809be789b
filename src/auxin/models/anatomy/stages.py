"""Networks of stages: SegFormer, whose stages see ever fewer and wider tokens, and ResNets, whose blocks are
convolutions.

Every stage is a stack with a residual stream of its own, whose width the config says in a list; no value of it says how
many heads and units a layer has. Modules take these from the shapes of their linear layers and convolutions when they
run, so that each layer can have other ones (`ConfigFields.of_layers`).

The feed-forward units of a SegFormer pass through a convolution of each one by itself between the two matrices. Those
of a block of a ResNet are the channels that its last convolution reads; in a bottleneck those between the first two
convolutions stay. Running means and variances go with the channels whose they are.
"""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from auxin.models.anatomy.found import ANATOMIES
from auxin.models.anatomy.parts import attention_roles, base_prefix, has_parameters
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.roles import Access, Axes, Kind, ParameterRole, Segment, linear, norm
from auxin.words.widths import ConfigFields, Sizes, Stream, Width

Axis = tuple[Segment, ...]

_OF_LAYERS = ConfigFields("", "", None, None, None, None, of_layers=True)
_RESIDUAL_STAYS = (
    "each stage has a residual stream of its own, which the next one reads by a convolution, and none of them can "
    "change here. Prune heads or feed-forward units."
)

_LAYERS_STAY = (
    "the config has the numbers of layers of all stages in one list (depths), which nothing here changes. Leave the "
    "layers as they are."
)


def segformer(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a SegFormer, with a head of whatever task or without one."""
    config: Any = model.config
    prefix = base_prefix(model)
    stages = range(config.num_encoder_blocks)
    of_stage = [
        Sizes(hidden, heads, heads, hidden // heads, int(hidden * ratio))
        for hidden, heads, ratio in zip(config.hidden_sizes, config.num_attention_heads, config.mlp_ratios, strict=True)
    ]
    paths = [f"{prefix}stages.{number}.blocks" for number in stages]
    axes = [_scoped(Axes.of(sizes, 0), path) for sizes, path in zip(of_stage, paths, strict=True)]
    roles: list[ParameterRole] = []
    for number, (path, own) in enumerate(zip(paths, axes, strict=True)):
        stage, before = f"{prefix}stages.{number}", axes[number - 1].residual if number else ()
        roles += [
            *convolution(f"{stage}.patch_embeddings.proj", own.residual, before, "matrix" if number else "embedding"),
            *norm(f"{stage}.patch_embeddings.layer_norm", own.residual),
            *attention_roles(f"{path}.*.attention", own, ("q_proj", "k_proj", "v_proj", "o_proj")),
            *convolution(f"{path}.*.attention.sequence_reduction.sequence_reduction", own.residual, own.residual),
            *norm(f"{path}.*.attention.sequence_reduction.layer_norm", own.residual),
            *linear(f"{path}.*.mlp.fc1", own.ffn, own.residual),
            *convolution(f"{path}.*.mlp.dwconv.dwconv", own.ffn, (), "scale"),
            *linear(f"{path}.*.mlp.fc2", own.residual, own.ffn),
            *norm(f"{path}.*.layernorm_before", own.residual),
            *norm(f"{path}.*.layernorm_after", own.residual),
            *norm(f"{stage}.layer_norm", own.residual),
            *linear(f"decode_head.linear_projections.{number}.proj", (), own.residual, "head"),
        ]
    stacks = tuple(
        LayerStack(
            path,
            "",
            ("attention.o_proj", "mlp.fc2"),
            entries=(f"{prefix}stages.{number}.patch_embeddings",),
            end=f"{prefix}stages.{number}.layer_norm",
            readers=_readers(model, f"decode_head.linear_projections.{number}.proj", *_last("classifier", path, paths)),
            feed_forward=("mlp",),
            layers_stay=_LAYERS_STAY,
            attentions=("attention",),
        )
        for number, path in enumerate(paths)
    )
    return _of_stages(
        model,
        of_stage,
        stacks,
        [*roles, *_decode_head(), *linear("classifier", (), axes[-1].residual, "head")],
        head="classifier" if hasattr(model, "classifier") else None,
        embedding=f"{prefix}stages.0.patch_embeddings.proj.weight",
    )


def resnet(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a ResNet of basic blocks or bottlenecks, with a classifier or without one."""
    config: Any = model.config
    prefix = base_prefix(model)
    convolutions = 3 if config.layer_type == "bottleneck" else 2
    of_stage = [
        Sizes(hidden, 1, 1, hidden, hidden // 4 if convolutions == 3 else hidden) for hidden in config.hidden_sizes
    ]
    paths = [f"{prefix}encoder.stages.{number}.layers" for number, _ in enumerate(of_stage)]
    axes = [_scoped(Axes.of(sizes, 0), path) for sizes, path in zip(of_stage, paths, strict=True)]
    first = f"{prefix}embedder.embedder"
    roles = [*convolution(f"{first}.convolution", (), (), "embedding"), *batch_norm(f"{first}.normalization", ())]
    for path, own in zip(paths, axes, strict=True):
        last = convolutions - 1
        for place in range(convolutions):
            # A stage's first block reads what the stage before wrote.
            reads: Axis = own.ffn if place == last else ()
            writes = own.residual if place == last else own.ffn if place == last - 1 else ()
            roles += convolution(f"{path}.*.layer.{place}.convolution", writes, reads)
            roles += batch_norm(f"{path}.*.layer.{place}.normalization", writes)
        roles += convolution(f"{path}.*.shortcut.convolution", own.residual, ())
        roles += batch_norm(f"{path}.*.shortcut.normalization", own.residual)
    stacks = tuple(
        LayerStack(
            path,
            "",
            # Of a first block what is added has another shape than what enters, so that no block can go as a part.
            (),
            layers_stay=_LAYERS_STAY,
            maps=True,
            end=path.removesuffix(".layers"),
            readers=_readers(model, *_last("classifier.1", path, paths)),
        )
        for path in paths
    )
    return _of_stages(
        model,
        of_stage,
        stacks,
        [*roles, *linear("classifier.1", (), axes[-1].residual, "head")],
        head="classifier.1" if hasattr(model, "classifier") else None,
        embedding=f"{first}.convolution.weight",
    )


def convolution(module: str, output: Axis, read: Axis, kind: Kind = "matrix") -> list[ParameterRole]:
    """The roles of a convolution's weight (out, in, height, width) and bias (out,)."""
    weight, bias = linear(module, output, read, kind)
    return [replace(weight, axes=(*weight.axes, (), ()), access=(*weight.access, None, None)), bias]


def batch_norm(module: str, channels: Axis) -> list[ParameterRole]:
    """The roles of a batch norm's gain and offset, and of its running mean and variance."""
    writes: tuple[Access | None] = ("writes" if channels else None,)
    mean = ParameterRole(f"{module}.running_mean", (channels,), writes, "offset")
    # New channels of a variance are as the old ones on average, as factors are.
    return [*norm(module, channels), mean, ParameterRole(f"{module}.running_var", (channels,), writes, "scale")]


def _scoped(axes: Axes, stack: str) -> Axes:
    """The axes of one stage."""
    return Axes(*(tuple(replace(segment, scope=stack) for segment in axis) for axis in vars(axes).values()))


def _last(reader: str, path: str, paths: list[str]) -> tuple[str, ...]:
    """`reader`, which reads the last of the stages at `paths`, if that is the one at `path`."""
    return (reader,) if path == paths[-1] else ()


def _readers(model: PreTrainedModel, *modules: str) -> tuple[str, ...]:
    """Those of the linear layers at `modules` that the model has."""
    return tuple(module for module in modules if has_parameters(model, module))


def _decode_head() -> list[ParameterRole]:
    """What follows the linear layers that read the stages; its width is that of the decoder alone."""
    return [
        *convolution("decode_head.linear_fuse", (), (), "head"),
        *batch_norm("decode_head.batch_norm", ()),
        *convolution("decode_head.classifier", (), (), "head"),
    ]


def _of_stages(
    model: PreTrainedModel,
    stages: list[Sizes],
    stacks: tuple[LayerStack, ...],
    roles: list[ParameterRole],
    head: str | None,
    embedding: str,
) -> Anatomy:
    streams: tuple[Stream, ...] = ("residual", "query", "key_value", "ffn")
    widths = [
        Width(stream, stack.path, units)
        for stack, sizes in zip(stacks, stages, strict=True)
        for stream in streams
        if (units := sizes.units(stream)) is not None
    ]
    return Anatomy(
        family=model.config.model_type,
        sizes=stages[0].with_widths(widths),
        fields=_OF_LAYERS,
        stacks=stacks,
        roles=tuple(roles),
        norm="layer",
        norm_has_gain=True,
        tied=False,
        final_norm=None,
        head=head,
        embeddings=(embedding,),
        has_stages=True,
        fixed_widths=(("residual", _RESIDUAL_STAYS),),
    )


ANATOMIES.add("segformer", segformer)
ANATOMIES.add("resnet", resnet)
