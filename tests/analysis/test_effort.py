"""What measurements take is the same whoever asks first: with nothing known, with some of it, with all of it."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from analysis.test_run import Gradients, Logits, Loudness, Silent
from auxin.accounting import ExecutedFlops, flops_per_token
from auxin.analysis import Batch, measure, measure_all, measurement, measurements
from auxin.analysis.effort import Effort
from auxin.analysis.similarity import Similarity
from auxin.objectives.calibration import Calibration
from auxin.planning.bench import Meter
from tiny_models import FAMILIES, inputs, labels, tiny


class Products(Loudness):
    """Looks at weights, and multiplies some."""

    name: ClassVar[str] = "products"
    needs: ClassVar[Any] = "weights"

    def observe(self, model: Any) -> Silent:
        observer, weight = Silent(model), model.lm_head.weight
        observer.spread.add((weight @ weight.T)[:, :1])
        return observer


class SpectralObserver:
    """Multiplies what it reads, which is its own work and not the pass's."""

    def __init__(self, inner: Any) -> None:
        self.inner, (tap,) = inner, inner.taps
        self.taps = [replace(tap, read=self.read)]

    def before(self, batch: Batch) -> None:
        pass

    def read(self, hidden: Tensor) -> None:
        self.inner.read(hidden @ hidden.transpose(1, 2))

    def after(self, batch: Batch, output: Any) -> None:
        pass

    def result(self) -> Any:
        return self.inner.result()


class Spectral(Loudness):
    """Works in its tap."""

    name: ClassVar[str] = "spectral"

    def observe(self, model: Any) -> Any:
        return SpectralObserver(super().observe(model))


def rows(model: Any) -> list[dict[str, Tensor]]:
    whole = {**inputs(model, batch=4), "labels": labels(model, batch=4)}
    return [{name: row[start : start + 2] for name, row in whole.items()} for start in (0, 2)]


def counted(wanted: Any, model: Any, folder: Any) -> tuple[int, int, int]:
    """Samples, units and FLOPs that the books get."""
    meter = Meter()
    data = replace(Calibration.of_batches(model, rows(model)), watch=meter.drawn)
    with meter.running():
        measure_all(wanted, model, data, cache=folder)
    return meter.samples, meter.units, int(meter.flops)


@pytest.mark.parametrize("known", [(), (0,), (1,), (2,), (3,), (0, 1), (1, 2), (0, 1, 2, 3)], ids=str)
def test_books_do_not_say_what_was_known(known, tmp_path):
    model = tiny("llama")
    wanted = [Spectral(), Logits(), Gradients(), Products()]
    cold = counted(wanted, model, False)
    assert cold[:2] == (4, 4 * 7)
    if known:
        before = [wanted[number] for number in known]
        measure_all(before, model, Calibration.of_batches(model, rows(model)), cache=tmp_path)
        # Also alone, when it was kept from a pass that it shared.
        assert counted(before[:1], model, tmp_path) == counted(before[:1], model, False)
    assert counted(wanted, model, tmp_path) == cold
    assert counted(wanted, model, tmp_path) == cold, "all of it is known"


def test_flops_are_those_of_the_model_as_far_as_it_is_run(tmp_path):
    model = tiny("llama")
    data = Calibration.of_batches(model, rows(model))
    tokens, width, vocabulary = 4 * 7, model.config.hidden_size, model.config.vocab_size
    spectral, logits, products = (
        record.effort for record in measure_all([Spectral(), Logits(), Products()], model, data, cache=tmp_path)
    )
    whole = int(tokens * flops_per_token(model, 7).forward)
    assert logits == Effort(samples=4, units=tokens, passing=whole, own=0)
    head = 2 * tokens * width * vocabulary
    assert spectral == Effort(samples=4, units=tokens, passing=whole - head, own=2 * 4 * 7 * 7 * width)
    assert products == Effort(own=2 * vocabulary * vocabulary * width)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "vit"])
def test_a_shared_pass_is_told_apart_on_every_architecture(family):
    model = tiny(family)
    data = Calibration.of_batches(model, rows(model))
    alone = [measure_all([item], model, data, cache=False)[0].effort for item in (Similarity(), Logits())]
    assert [record.effort for record in measure_all([Similarity(), Logits()], model, data, cache=False)] == alone


@pytest.mark.parametrize("name", measurements())
def test_every_measurement_costs_the_same_when_it_is_known(name, tmp_path):
    model = tiny({"expert-use": "mixtral", "token-trajectory": "vit"}.get(name, "llama"), dtype=torch.float32)
    wanted = measurement(name, **{"quantized": {"calibration_samples": 2}}.get(name, {}))
    cold = counted([wanted], model, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert counted([wanted], model, tmp_path) == cold
    assert cold[2] > 0


def test_random_numbers_go_on_as_if_nothing_was_run(tmp_path):
    class Drawing(Logits):
        name: ClassVar[str] = "drawing"

        def observe(self, model: Any) -> Any:
            observer = super().observe(model)
            observer.before = lambda batch: torch.rand(3)
            return observer

    model = tiny("llama")
    data = Calibration.of_batches(model, rows(model))
    torch.manual_seed(5)
    expected = torch.rand(1)
    for _ in range(2):
        torch.manual_seed(5)
        measure(Drawing(), model, data, cache=tmp_path)
        assert torch.equal(torch.rand(1), expected)


def test_batches_of_another_size_are_measured_anew(tmp_path):
    """Rounding and FLOPs go by them, and so what a plan costs would go by who measured before."""
    model = tiny("llama")
    whole = {**inputs(model, batch=4), "labels": labels(model, batch=4)}
    for size in (2, 4):
        batches = [{name: row[start : start + size] for name, row in whole.items()} for start in range(0, 4, size)]
        measure(Similarity(), model, Calibration.of_batches(model, batches), cache=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_counters_that_run_are_told_and_no_others():
    from auxin.accounting.executed import count_known

    with ExecutedFlops() as outer, ExecutedFlops() as inner:
        count_known(5)
    count_known(7)
    assert (outer.total, inner.total) == (5, 5)
