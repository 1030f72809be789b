"""Deeper models built by hand: a Hugging Face config with another number of layers, and the state dict renamed.

Knows nothing of the package: where layers and their outputs are is written down here a second time, from the modeling
files of transformers.
"""

import copy
import re
from typing import Any

LAYERS = {
    "llama": {"model.layers": "num_hidden_layers"},
    "qwen2": {"model.layers": "num_hidden_layers"},
    "qwen3": {"model.layers": "num_hidden_layers"},
    "olmo": {"model.layers": "num_hidden_layers"},
    "olmo2": {"model.layers": "num_hidden_layers"},
    "gpt2": {"transformer.h": "n_layer"},
    "gpt_neox": {"gpt_neox.layers": "num_hidden_layers"},
    "t5": {"encoder.block": "num_layers", "decoder.block": "num_decoder_layers"},
    "bert": {"bert.encoder.layer": "num_hidden_layers"},
    "vit": {"vit.layers": "num_hidden_layers"},
    "tokenformer": {"model.layers": "num_hidden_layers"},
}
"""Where the layers are and which config value counts them, by model type."""

_LLAMA_OUTPUTS = r"(self_attn\.o_proj|mlp\.down_proj)\.(weight|bias)"
OUTPUTS = {
    "llama": _LLAMA_OUTPUTS,
    "qwen2": _LLAMA_OUTPUTS,
    "qwen3": _LLAMA_OUTPUTS,
    "olmo": _LLAMA_OUTPUTS,
    # x + norm(f(x)): the gain is the last factor before the sum.
    "olmo2": r"post_(attention|feedforward)_layernorm\.weight",
    "gpt2": r"(attn|mlp)\.c_proj\.(weight|bias)",
    "gpt_neox": r"(attention\.dense|mlp\.dense_4h_to_h)\.(weight|bias)",
    "t5": r"layer\.\d\.(SelfAttention\.o|EncDecAttention\.o|DenseReluDense\.wo)\.weight",
    "bert": r"(attention\.output|output)\.dense\.(weight|bias)",
    "vit": r"(attention\.o_proj|mlp\.fc2)\.(weight|bias)",
    "tokenformer": r"(attention\.proj|mlp)\.value_tokens",
}
"""The parameters, relative to a layer, in which what it adds to the residual is linear."""


def number_of_layers(model: Any, path: str) -> int:
    return getattr(model.config, LAYERS[model.config.model_type][path])


def rearranged(
    model: Any, order: list[int], scales: dict[int, float] | None = None, paths: list[str] | None = None
) -> Any:
    """A new model whose layer i is `model`'s layer order[i], its output times scales[i]; the rest is the same.

    `paths`: the stacks that change; default: all.
    """
    family = model.config.model_type
    stacks = {path: field for path, field in LAYERS[family].items() if paths is None or path in paths}
    values = copy.deepcopy(model.config.to_dict())
    for field in stacks.values():
        values[field] = len(order)
    for key, value in values.items():
        if key == "layer_types" and value:
            values[key] = [value[old] for old in order]
    made = type(model)(type(model.config).from_dict(values)).to(model.dtype).eval()
    state, old_state = {}, model.state_dict()
    for name in made.state_dict():
        source, factor = name, 1.0
        for path in stacks:
            if match := re.fullmatch(rf"{re.escape(path)}\.(\d+)\.(.*)", name):
                index, rest = int(match[1]), match[2]
                source = f"{path}.{order[index]}.{rest}"
                if scales and index in scales and re.fullmatch(OUTPUTS[family], rest):
                    factor = scales[index]
        state[name] = old_state[source] * factor
    made.load_state_dict(state)
    return made


def is_output(model: Any, name: str, new: list[int]) -> bool | None:
    """Whether the parameter `name` is an output of one of the layers `new`; None outside of these layers."""
    for path in LAYERS[model.config.model_type]:
        if match := re.fullmatch(rf"{re.escape(path)}\.(\d+)\.(.*)", name):
            if int(match[1]) not in new:
                return None
            return re.fullmatch(OUTPUTS[model.config.model_type], match[2]) is not None
    return None


def expansion(layers: int, groups: int, copies: int) -> tuple[list[int], list[int]]:
    """LLaMA Pro's order of old layers and the new ones' places: after each of `groups` groups, its top `copies`."""
    order: list[int] = []
    new: list[int] = []
    size = layers // groups
    for layer in range(layers):
        order.append(layer)
        if (layer + 1) % size == 0:
            for copied in range(layer - copies + 1, layer + 1):
                new.append(len(order))
                order.append(copied)
    return order, new
