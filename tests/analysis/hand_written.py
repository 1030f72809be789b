"""Forward passes of tiny models written out in NumPy, by their family."""

from typing import Any

from torch import Tensor

from oracles import similarity as oracle
from tiny_models import EPSILON


def by_hand(model: Any, row: dict[str, Tensor]) -> list[oracle.Layers]:
    """The oracle's stacks of layers for one sample, rows of the inputs by name."""
    w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    family, config = model.config.model_type, model.config
    ids = row["input_ids"].tolist() if "input_ids" in row else []
    if family in ("llama", "olmo2"):
        return oracle.llama(w, ids, heads=4, keys=2, eps=EPSILON, after=family == "olmo2")
    if family == "gpt2":
        return oracle.gpt2(w, ids, heads=4, eps=EPSILON)
    if family == "gpt_neox":
        return oracle.gpt_neox(w, ids, heads=4, eps=EPSILON, parallel=config.use_parallel_residual)
    if family == "bert":
        return oracle.bert(w, ids, row["token_type_ids"].tolist(), heads=4, eps=EPSILON)
    if family == "t5":
        return oracle.t5(w, ids, row["decoder_input_ids"].tolist(), heads=4, eps=EPSILON, farthest=10)
    if family == "vit":
        return oracle.vit(w, row["pixel_values"].numpy(), patch=4, heads=4, eps=EPSILON)
    names = ("attention.query", "attention.key", "attention.value", "attention.proj", "mlp")
    layers = [
        {name: tuple(p.detach().numpy() for p in layer.get_submodule(name).parameters()) for name in names}
        for layer in model.model.layers
    ]
    embedding = w["model.embed_tokens.weight"]
    return oracle.tokenformer(embedding, layers, ids, heads=4, rotated=config.rotary_dim, eps=EPSILON)
