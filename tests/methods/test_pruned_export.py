"""A pruned model is exported by `torch.export` as it is, and the graph computes what the model does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxin
from outputs import output
from tiny_models import inputs, labels, tiny


class OneOutput(nn.Module):
    """A model whose result is its logits, as a tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **given: Any) -> Tensor:
        return output(self.model(**given))


@pytest.mark.parametrize(
    ("family", "method", "settings"),
    [
        ("llama", "finercut", {"removed": 3}),  # stand-ins, and the first layer's attention among what may go
        ("llama", "optin", {"heads": 0.5, "ffn": 0.5}),  # sizes that the config says
        ("llama", "fluctuation", {"heads": 0.5, "ffn": 0.5, "uniform": False}),  # layers that differ, new biases
        ("llama", "vtrans", {"target": {"parameters": 0.7}, "sublayers": 4, "uniform": False, "steps": 2}),  # both
        ("bert", "finercut", {"removed": 3}),  # parts whose norm stays
    ],
)
def test_the_graph_computes_what_the_model_does(family, method, settings, tmp_path):
    model = tiny(family, dtype=torch.float32, num_hidden_layers=3).eval()
    data = [{**inputs(model), "labels": labels(model)}]
    before = model.num_parameters()
    auxin.apply(auxin.plan(model, method, data=data, folder=tmp_path, **settings), model)
    assert model.num_parameters() < before
    given, caches = inputs(model, seed=5), {} if family == "bert" else {"use_cache": False}
    with torch.no_grad():
        graph = torch.export.export(OneOutput(model), (), {**inputs(model), **caches}, strict=False).module()
        assert torch.equal(graph(**given, **caches), output(model(**given, **caches)))
    entries = {name.removeprefix("model."): tuple(p.shape) for name, p in graph.named_parameters()}
    assert entries == {name: tuple(p.shape) for name, p in model.named_parameters()}, "nothing of what went is in it"
