"""One pass for all measurements, none for what is known; models and caches come to no harm."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import auxin.analysis
from analysis.samples import Samples
from auxin.analysis import (
    Batch,
    Estimate,
    Measurement,
    Result,
    Spread,
    Table,
    Tap,
    measure,
    measure_all,
    measurement,
    measurements,
    model_fingerprint,
)
from auxin.analysis.similarity import Similarity
from auxin.errors import ConfigError, DataError, PlanError
from auxin.models.loading import load_model, skeleton
from auxin.planning.bench import Bench
from plugins import install
from tiny_models import FAMILIES, inputs, labels, tiny


class Numbers(Result):
    """Any numbers."""

    estimates: list[Estimate]

    def tables(self) -> list[Table]:
        return [Table("numbers", ["number"], [[str(estimate)] for estimate in self.estimates])]


class Loudness(Measurement[Numbers]):
    """The largest entry of what leaves a module, by sample; one module, as a method would add it."""

    name: ClassVar[str] = "loudness"
    title: ClassVar[str] = "the largest entry"
    needs: ClassVar[Any] = "layers"
    result_type: ClassVar[type[Result]] = Numbers

    module: str = "model.layers.0"
    """Where."""

    def observe(self, model: Any) -> "LoudnessObserver":
        return LoudnessObserver(model.get_submodule(self.module))


class LoudnessObserver:
    def __init__(self, module: torch.nn.Module) -> None:
        self.taps: Sequence[Tap] = [Tap(module, "output", self.read)]
        self.spread = Spread()
        self.heard = 0

    def before(self, batch: Batch) -> None:
        pass

    def read(self, hidden: Tensor) -> None:
        self.heard += 1
        self.spread.add(hidden.abs().amax(dim=(1, 2)))

    def after(self, batch: Batch, output: Any) -> None:
        pass

    def result(self) -> Numbers:
        return Numbers(estimates=self.spread.estimates())


class Silent(LoudnessObserver):
    """Without taps."""

    def __init__(self, model: Any) -> None:
        self.model, self.taps, self.spread = model, [], Spread()


class GradientObserver(Silent):
    """|activation x gradient| of the feed-forward's units in the first layer: first-order importance."""

    def after(self, batch: Batch, output: Any) -> None:
        assert output is None
        kept: list[Tensor] = []

        def keep(module: torch.nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
            kept.append(arguments[0].detach().requires_grad_())
            return (kept[0],)

        handle = self.model.model.layers[0].mlp.down_proj.register_forward_pre_hook(keep)
        with torch.enable_grad():
            loss = self.model(**batch).loss
        handle.remove()
        (gradient,) = torch.autograd.grad(loss, kept[0])
        self.spread.add((kept[0] * gradient).sum(dim=1).abs())


class Gradients(Loudness):
    """Runs the model itself."""

    name: ClassVar[str] = "gradients"
    needs: ClassVar[Any] = "batches"

    def observe(self, model: Any) -> GradientObserver:
        return GradientObserver(model)


class LogitsObserver(Silent):
    def after(self, batch: Batch, output: Any) -> None:
        self.spread.add(output.logits.amax(dim=(1, 2)))


class Logits(Loudness):
    """Needs the head."""

    name: ClassVar[str] = "logits"
    needs: ClassVar[Any] = "logits"

    def observe(self, model: Any) -> LogitsObserver:
        return LogitsObserver(model)


class Weights(Loudness):
    """Needs no data."""

    name: ClassVar[str] = "weights"
    needs: ClassVar[Any] = "weights"

    def observe(self, model: Any) -> Silent:
        observer = Silent(model)
        observer.spread.add(torch.stack([p.abs().max() for p in model.parameters()])[:, None])
        return observer


class Calls:
    """How often the first layer and the head of a Llama run; told by their classes, since hooks keep off the cache."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[torch.nn.Module] = Counter()
        self.first, self.lm_head = model.model.layers[0], model.lm_head
        for cls in (type(self.first), type(self.lm_head)):
            monkeypatch.setattr(cls, "__call__", self.counted(cls.__call__))

    def counted(self, call: Any) -> Any:
        def called(module: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
            self.counts[module] += 1
            return call(module, *arguments, **named)

        return called

    @property
    def layers(self) -> int:
        return self.counts[self.first]

    @property
    def head(self) -> int:
        return self.counts[self.lm_head]


def test_a_second_one_that_asks_runs_nothing(tmp_path, monkeypatch):
    model = tiny("llama")
    calls, data = Calls(model, monkeypatch), Samples.of(model)
    first = measure(Similarity(), model, data, cache=tmp_path)
    assert (calls.layers, data.passes) == (3, 1)
    assert measure("similarity", model, data, cache=tmp_path) == first
    assert (calls.layers, data.passes) == (3, 1)
    again = tiny("llama")
    assert measure("similarity", again, Samples.of(again), cache=str(tmp_path)) == first, "found by content"
    measure(Similarity(), model, data, cache=False)
    assert (calls.layers, data.passes) == (6, 2)


def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("AUXIN_CACHE", str(tmp_path))
    model = tiny("llama")
    calls = Calls(model, monkeypatch)
    first = measure(Similarity(), model, Samples.of(model))
    assert measure(Similarity(), model, Samples.of(model)) == first
    assert calls.layers == 3
    (file,) = (tmp_path / "analysis").glob("*.json")
    assert file.name.startswith("similarity-")
    assert json.loads(file.read_text())["subject"]["samples"] == 5
    monkeypatch.delenv("AUXIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert auxin.analysis.default_cache() == tmp_path / "xdg" / "auxin" / "analysis"


@pytest.mark.parametrize("change", ["weight", "config", "data", "settings", "version"])
def test_another_subject_is_measured_anew(tmp_path, monkeypatch, change):
    model = tiny("llama")
    data, wanted = Samples.of(model), Loudness()
    measure(wanted, model, data, cache=tmp_path)
    if change == "weight":
        with torch.no_grad():
            model.lm_head.weight[-1, -1] += 1e-6
    elif change == "config":
        model.config.rms_norm_eps = 1e-3
    elif change == "data":
        data.fingerprint = "others"
    elif change == "settings":
        wanted = Loudness(module="model.layers.1")
    else:
        monkeypatch.setattr(Loudness, "version", 2)
    measure(wanted, model, data, cache=tmp_path)
    assert data.passes == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"subject": {}, "result": {}}',
        b"null",
        "half",
        "of another",
        "a number",
        "no sum",
    ],
    ids=repr,
)
def test_a_damaged_file_is_measured_anew_and_mended(tmp_path, content):
    model = tiny("llama")
    data = Samples.of(model)
    first = measure(Similarity(), model, data, cache=tmp_path)
    (path,) = tmp_path.glob("*.json")
    whole = path.read_bytes()
    if content == "half":
        content = whole[: len(whole) // 2]
    elif content == "of another":
        content = whole.replace(b'"samples": 5', b'"samples": 6')
    elif content == "a number":
        values = json.loads(whole)
        values["result"]["stacks"][0]["layers"][0]["similarity"]["mean"] += 0.25
        content = json.dumps(values).encode()
    elif content == "no sum":
        values = json.loads(whole)
        del values["sha256"]
        content = json.dumps(values).encode()
    assert content != whole
    path.write_bytes(content)
    assert measure(Similarity(), model, data, cache=tmp_path) == first
    assert data.passes == 2
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".tmp"] == []


def test_a_cache_that_cannot_be_written_costs_no_result(tmp_path):
    (tmp_path / "file").write_text("no folder")
    model = tiny("llama")
    with pytest.warns(UserWarning, match=r"was not kept in .*Set AUXIN_CACHE"):
        result = measure(Similarity(), model, Samples.of(model), cache=tmp_path / "file" / "folder")
    assert result == measure(Similarity(), model, Samples.of(model), cache=False)


def test_several_share_one_pass_and_the_known_one_takes_no_part(tmp_path, monkeypatch):
    model = tiny("llama", num_hidden_layers=3)
    data = Samples(inputs(model, batch=5) | {"labels": labels(model, batch=5)})
    wanted = [Similarity(), Loudness(), Loudness(module="model.layers.2"), Logits(), Gradients(), Weights()]
    alone = [measure(item, model, data, cache=False) for item in wanted]
    calls, data.passes = Calls(model, monkeypatch), 0
    records = measure_all(wanted, model, data, cache=tmp_path)
    assert [record.result for record in records] == alone
    assert [record.subject.measurement for record in records] == [item.name for item in wanted]
    # Three batches, and three of which Gradients runs the model itself.
    assert (data.passes, calls.layers, calls.head) == (1, 6, 6)
    more = measure_all([*wanted, Loudness(module="model.layers.1")], model, data, cache=tmp_path)
    assert [record.result for record in more[:-1]] == alone
    assert (data.passes, calls.layers, calls.head) == (2, 9, 6), "no logits were needed for the new one"


def test_one_that_runs_the_model_itself_is_not_heard_by_the_others():
    model = tiny("llama")
    data = Samples(inputs(model, batch=4) | {"labels": labels(model, batch=4)})
    observers = []

    class Heard(Loudness):
        name: ClassVar[str] = "heard"

        def observe(self, model: Any) -> LoudnessObserver:
            observers.append(super().observe(model))
            return observers[0]

    measure_all([Heard(), Gradients()], model, data, cache=False)
    assert observers[0].heard == 2


def test_gradients_of_one_module_are_those_of_a_mask(tmp_path):
    """A measurement that needs gradients fits in: the derivative by a mask on each unit, by finite differences."""
    model = tiny("llama")
    rows = inputs(model, batch=3) | {"labels": labels(model, batch=3)}
    result = measure(Gradients(), model, Samples(rows, batch_size=1), cache=tmp_path)

    def loss(sample: int, unit: int, factor: float) -> float:
        def masked(module: torch.nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
            inner = arguments[0].clone()
            inner[..., unit] *= factor
            return (inner,)

        handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(masked)
        with torch.no_grad():
            value = model(**{name: row[sample : sample + 1] for name, row in rows.items()}).loss.item()
        handle.remove()
        return value

    for unit in (0, 7):
        slopes = [abs(loss(n, unit, 1 + 1e-2) - loss(n, unit, 1 - 1e-2)) / 2e-2 for n in range(3)]
        assert result.estimates[unit].mean == pytest.approx(sum(slopes) / 3, rel=1e-2, abs=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_need_no_data_and_others_say_that_they_do():
    model = tiny("llama")
    largest = max(p.abs().max().item() for p in model.parameters())
    assert measure(Weights(), model).estimates[0].mean <= largest
    with pytest.raises(ConfigError, match="similarity needs samples"):
        measure(Similarity(), model)


def test_the_model_stays_as_it_is():
    model = tiny("llama", attention_dropout=0.5)
    expected = measure(Similarity(), model, Samples.of(model), cache=False)
    model.train()
    model.model.layers[1].eval()
    before = model_fingerprint(model)
    flags = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]

    def state() -> list[Any]:
        return [
            model_fingerprint(model),
            [module.training for module in model.modules()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        ]

    assert measure(Similarity(), model, Samples.of(model), cache=False) == expected, "in evaluation mode"
    assert state() == [before, flags, hooks]
    with pytest.raises(IndexError):
        measure(Similarity(), model, Samples({"input_ids": torch.tensor([[3, 4], [5, 19]])}), cache=False)
    assert state() == [before, flags, hooks]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_data_that_break_their_word_are_refused(tmp_path):
    model = tiny("llama")
    fewer, none = Samples.of(model), Samples.of(model)
    fewer.samples, none.samples = 6, 0
    fewer.batches = lambda: iter([inputs(model, batch=4)])
    uneven = Samples({"input_ids": torch.ones(4, 3, dtype=torch.long), "labels": torch.ones(3, 3, dtype=torch.long)}, 4)
    for data, words in (
        (fewer, "hold 6 samples, but gave 4"),
        (uneven, r"\{'input_ids': 4, 'labels': 3\}"),
        (none, "hold 0 samples, but gave 0"),
    ):
        with pytest.raises(DataError, match=words):
            measure(Similarity(), model, data, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_weights_is_refused():
    model = tiny("llama")
    data = Samples.of(model)
    with pytest.raises(ConfigError, match=r"model\.embed_tokens\.weight: the model is a skeleton"):
        measure(Similarity(), skeleton(model.config, type(model)), data, cache=False)
    unknown = tiny("llama")
    unknown.config.model_type = "lama"
    with pytest.raises(PlanError, match=r"Unknown architecture 'lama'.*llama"):
        measure(Similarity(), unknown, data, cache=False)
    assert data.passes == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fingerprint_is_of_what_the_model_computes(tmp_path, family):
    model = tiny(family, dtype=torch.float32)
    fingerprint = model_fingerprint(model)
    assert model_fingerprint(tiny(family, dtype=torch.float32)) == fingerprint
    assert model_fingerprint(tiny(family, seed=1, dtype=torch.float32)) != fingerprint
    model.save_pretrained(tmp_path)
    assert model_fingerprint(load_model(tmp_path)) == fingerprint, "where it comes from doesn't matter"
    assert model_fingerprint(model.to(torch.bfloat16)) != fingerprint


def test_a_fingerprint_is_of_an_edited_model_too(tmp_path):
    from auxin.edits import apply
    from auxin.methods import method

    model = tiny("llama", dtype=torch.float32)
    plain = model_fingerprint(model)
    chosen = method("graft")
    apply(chosen.plan(Bench(model), chosen.settings.parse({"tokens": 4})), model)
    assert model_fingerprint(model) != plain
    model.save_pretrained(tmp_path)
    assert model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == model_fingerprint(model)


def test_it_is_quiet_unless_asked_and_on_a_terminal(capfd, monkeypatch):
    model = tiny("llama")
    for progress in (False, True):
        measure(Similarity(), model, Samples.of(model), cache=False, progress=progress)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    measure(Similarity(), model, Samples.of(model), cache=False)
    assert capfd.readouterr() == ("", "")
    measure(Similarity(), model, Samples.of(model), cache=False, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "samples" in err


@pytest.mark.parametrize("name", measurements())
def test_every_measurement_says_what_it_is(name):
    found = measurements()[name]
    assert found.name == name
    assert found.title
    assert not found.title.endswith(".")
    assert issubclass(found.result_type, Result)
    for field, info in found.model_fields.items():
        assert info.description, f"{field} has no docstring"
    folder = Path(auxin.analysis.__file__).parent
    modules = {path.stem for path in folder.glob("*.py") if "\nMEASUREMENT = " in path.read_text()}
    assert {sys.modules[item.__module__].__name__.rpartition(".")[2] for item in measurements().values()} == modules


def test_names_and_settings_that_are_wrong_are_said():
    with pytest.raises(ConfigError, match=r"Unknown measurement 'similarty'\. Did you mean 'similarity'"):
        measurement("similarty")
    with pytest.raises(ConfigError, match="similarity: layers: unknown field"):
        measurement("similarity", layers=3)


def test_another_package_can_have_one(tmp_path, monkeypatch):
    code = """
from typing import Any, ClassVar
from auxin.analysis import Measurement, Result

class Nothing(Measurement[Result]):
    name: ClassVar[str] = "nothing"
    title: ClassVar[str] = "nothing at all"
    needs: ClassVar[Any] = "weights"
    result_type: ClassVar[type[Result]] = Result

    def observe(self, model):
        return self

    def result(self):
        return Result()
"""
    before = list(measurements())
    install(tmp_path, monkeypatch, "others", code, "measurements", "Nothing")
    assert list(measurements()) == sorted([*before, "nothing"])
    assert isinstance(measure("nothing", tiny("llama"), cache=False), Result)
