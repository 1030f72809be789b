"""How routers use experts: against a count of one token after the other, whatever the batches and the padding."""

import numpy as np
import pytest
import torch

from auxin.analysis import measure
from auxin.analysis.expert_use import ExpertUse
from auxin.errors import PlanError
from auxin.objectives.calibration import Calibration
from mixtures import experts_at, mixture
from oracles.experts import uses
from tiny_models import inputs, tiny


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe", "deepseek_v3", "ernie4_5_moe"])
def test_it_is_what_a_count_of_tokens_says(family):
    model = mixture(family)
    batch = inputs(model, batch=4)
    found = measure(ExpertUse(), model, Calibration.of_batches(model, [batch]))
    assert [layer.scope for layer in found.layers] == list(experts_at(model))
    for layer in found.layers:
        part = "block_sparse_moe" if family == "granitemoe" else "mlp"
        wanted = uses(model, f"{layer.scope}.{part}.experts", batch)
        for use, values in wanted.items():
            assert layer.of(use) == pytest.approx(values, rel=1e-6, abs=1e-9)
    assert found.tables()[0].rows[0][0] == found.layers[0].label
    assert "matter least by reap" in found.findings()[0]
    assert "<svg" in found.picture("experts")


def test_batches_and_padding_change_nothing():
    model = mixture("mixtral")
    batch = inputs(model, batch=4)
    whole = measure(ExpertUse(), model, Calibration.of_batches(model, [batch]))
    parts = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(4)]
    padded = {
        "input_ids": torch.cat([batch["input_ids"], torch.zeros(4, 3, dtype=torch.long)], dim=1),
        "attention_mask": torch.tensor([[1] * 7 + [0] * 3] * 4),
    }
    for other in (parts, [padded]):
        found = measure(ExpertUse(), model, Calibration.of_batches(model, other))
        for one, two in zip(whole.layers, found.layers, strict=True):
            for use in ("frequency", "gate", "reap"):
                assert one.of(use) == pytest.approx(two.of(use), rel=1e-5)


def test_margins_are_those_of_leaving_samples_out():
    """Oracle: the jackknife by measuring five samples without each of them; t of four degrees from a printed table."""
    model = mixture("mixtral")
    batch = inputs(model, batch=5)

    def of(rows):
        data = {name: tensor[rows] for name, tensor in batch.items()}
        return measure(ExpertUse(), model, Calibration.of_batches(model, [data]), cache=False)

    whole, without = of(list(range(5))), [of([row for row in range(5) if row != left]) for left in range(5)]
    for number, layer in enumerate(whole.layers):
        for use in ("frequency", "gate", "reap"):
            values = np.array([found.layers[number].of(use) for found in without])
            margins = 2.776 * np.sqrt(4 / 5 * ((values - values.mean(0)) ** 2).sum(0))
            np.testing.assert_allclose(layer.margins[use], margins, rtol=1e-3, atol=1e-5)
            assert max(margins) > 1e-3
    assert of([0]).layers[0].margins is None
    assert whole.tables()[0].rows[0][-1].startswith("± ")
    assert " ± " in whole.findings()[0]


def test_a_model_without_experts_is_refused():
    model = tiny("llama")
    with pytest.raises(PlanError, match="has no experts among which a router chooses"):
        measure(ExpertUse(), model, Calibration.of_batches(model, [inputs(model)]))
