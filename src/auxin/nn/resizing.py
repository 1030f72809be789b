"""Plain layers with another number of features or channels: linear layers, convolutions, norms over these.

Where an architecture's modules take their widths from the shapes of their layers when they run, as SegFormer's
attention and the blocks of a ResNet do, these layers are all that has to change for one block to have a width of its
own.
"""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from auxin.errors import PlanError

WHAT = "a linear layer, a convolution in one group or with one for each channel, or a norm over its last axis or over "
WHAT += "channels"


def size_of(module: nn.Module) -> tuple[int, int | None]:
    """How many features or channels `module` gives, and how many it reads; None where it gives what it reads.

    Raises:
        PlanError: it is none of the layers of this module; the message follows the module's path.
    """
    if type(module) is nn.Linear:
        return module.out_features, module.in_features
    if type(module) is Conv1D:
        return module.nf, module.nx
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        channels: Any = module
        if channels.groups == 1:
            return channels.out_channels, channels.in_channels
        if channels.groups == channels.out_channels == channels.in_channels:
            return channels.out_channels, None
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return module.num_features, None  # type: ignore[return-value] # torch's attributes have no types
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return module.normalized_shape[0], None
    raise PlanError(f"is {type(module).__name__}, and what is given another size is {WHAT}. Name one.")


def resized(module: nn.Module, outputs: int, inputs: int | None) -> nn.Module:
    """A layer like `module` of another size, its parameters not filled: on the device of the context.

    Args:
        module: a layer that `size_of` knows.
        outputs: features or channels that it gives.
        inputs: those that it reads; None for one that gives what it reads.
    """
    old: Any = module
    bias = getattr(old, "bias", None) is not None
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(inputs or outputs, outputs, bias)
    elif isinstance(old, Conv1D):
        new = Conv1D(outputs, inputs or outputs)
    elif isinstance(old, nn.LayerNorm):
        new = nn.LayerNorm(outputs, old.eps, old.elementwise_affine, bias)
    elif hasattr(old, "num_features"):
        new = type(old)(outputs, old.eps, old.momentum, old.affine, old.track_running_stats)
    else:
        groups = outputs if inputs is None else 1
        shape = old.kernel_size, old.stride, old.padding, old.dilation, groups, bias, old.padding_mode
        new = type(old)(inputs or outputs, outputs, *shape)
    types = {name: tensor.dtype for name, tensor in module.named_parameters()}
    for name, tensor in new.named_parameters():
        tensor.data = tensor.data.to(types[name])
        tensor.requires_grad_(module.get_parameter(name).requires_grad)
    return new.train(module.training)
