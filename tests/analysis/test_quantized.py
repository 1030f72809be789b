"""W8A8 is what passes by hand give with every listed tensor on its grid; the model stays; an outlier is found."""

import copy
import re
from collections import Counter
from types import MethodType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import auxin
from analysis.samples import Samples
from auxin.analysis import measure
from auxin.analysis.quantized import QuantizationLoss, QuantizedMeasurement
from auxin.analysis.quantized_run import Follower
from auxin.analysis.quantized_sites import Site
from auxin.analysis.quantized_weights import Weights
from auxin.edits import apply
from auxin.errors import ConfigError, DataError, PlanError
from auxin.methods import method
from auxin.models.anatomy import anatomy
from auxin.models.eager import asked_for_maps, eager_attention
from auxin.models.sublayers import sublayers
from auxin.objectives.calibration import Calibration
from auxin.planning.bench import Bench
from covering import whole
from oracles import quantization as oracle
from outputs import output
from tiny_models import EPSILON, FAMILIES, MODELS, InDouble, inputs, labels, tiny

FEW = [*FAMILIES, "mixtral", "gemma2", "gpt_oss", "falcon", "bloom", "opt", "deberta-v2", "whisper", "wav2vec2", "clip"]
EVERY = [*FEW, *(pytest.param(family, marks=whole) for family in MODELS if family not in FEW)]


def told(model: Any, samples: int = 2) -> dict[Site, list[Tensor]]:
    """Every tensor of a run, in the order in which they arise."""
    found: dict[Site, list[Tensor]] = {}

    def note(site: Site, x: Tensor) -> Tensor:
        found.setdefault(site, []).append(x.clone())
        return x

    Follower(model, Weights(model)).run(inputs(model, batch=samples), note)
    return found


def found(model: Any, data: Samples, **values: Any) -> QuantizationLoss:
    with InDouble():
        return measure(QuantizedMeasurement(**{"alone": "nothing", **values}), model, data, cache=False)


def labelled(model: Any, samples: int, batch_size: int = 2) -> Samples:
    rows = {**inputs(model, batch=samples), "labels": labels(model, batch=samples)}
    return Samples(rows, batch_size, f"labelled {samples}")


def by_hand(model: Any, w: dict[str, np.ndarray], row: dict[str, Tensor], store: oracle.Store) -> np.ndarray:
    ids = row["input_ids"].tolist()
    if model.config.model_type == "llama":
        return oracle.llama(w, w["lm_head.weight"], ids, heads=4, keys=2, eps=EPSILON, store=store)
    head = model.cls.predictions.decoder.weight.detach().numpy()
    return oracle.bert(w, head, ids, row["token_type_ids"].tolist(), heads=4, eps=EPSILON, store=store)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("ranges", ["min-max", "percentile"])
def test_it_is_what_passes_by_hand_give(family, ranges):
    model, calibrated, percentile = tiny(family), 3, 99.0
    data = labelled(model, 6)
    rows = [{name: x[n] for name, x in data.rows.items()} for n in range(6)]
    w = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    seen: dict[str, list[tuple[float, float]]] = {}

    def look(name: str, x: np.ndarray) -> np.ndarray:
        own = oracle.percentiles(x, percentile if ranges == "percentile" else 100.0)
        seen.setdefault(name, []).append(own)
        return x

    for row in rows[:calibrated]:
        by_hand(model, w, row, look)
    grids = {name: oracle.running(own) for name, own in seen.items()}
    # All weights of linear layers, embeddings and norms: no biases, and not the output head.
    rounded = {
        name: oracle.weight(x) if name.endswith("weight") and "lm_head" not in name and "decoder" not in name else x
        for name, x in w.items()
    }

    def store(name: str, x: np.ndarray) -> np.ndarray:
        return oracle.activation(x, *grids[name])

    values = {"activation_ranges": ranges} | ({"percentile": percentile} if ranges == "percentile" else {})
    result = found(model, data, calibration_samples=calibrated, calibration_batch=1, **values)
    assert {one.name: (one.low, one.high) for one in result.tensors} == {
        name: pytest.approx(grid, rel=1e-6) for name, grid in grids.items()
    }
    wanted = {
        "w8a8": (rounded, store),
        "w8": (rounded, lambda name, x: x),
        "a8": (w, store),
    }
    for scheme, (weights, stored) in wanted.items():
        losses, errors = [], []
        for row in rows[calibrated:]:
            logits = torch.tensor(by_hand(model, weights, row, stored))
            plain = torch.tensor(by_hand(model, w, row, lambda name, x: x))
            shift = 1 if family == "llama" else 0
            losses.append(functional.cross_entropy(logits[: len(logits) - shift], row["labels"][shift:]).item())
            errors.append(((logits - plain).norm() / plain.norm()).item())
        own = result.of(scheme)
        assert own.loss is not None
        assert own.loss.mean == pytest.approx(np.mean(losses), rel=1e-5)
        assert own.error.mean == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_every_tensor_that_integers_hold_is_told(family):
    """Counted against what the architecture consists of: a W8A8 that leaves out a kind of them is none."""
    model = tiny(family)
    sites = told(model)
    counts = Counter(site.family for site in sites)
    body, parts = anatomy(model), sublayers(model)
    parallel = [stack.path for stack in body.stacks if stack.parallel]
    added = {part.layer if part.stack.path in parallel else part.path for part in parts}
    heads = sum("attention" in part.kind for part in parts)
    assert counts["sum"] >= len(added) > 0 or not parts
    assert counts["scores"] >= counts["context"] >= heads or family.startswith("siglip")
    assert counts["probabilities"] == counts["context"]
    matrices = {name for name, kind in Weights(model).quantized().items() if kind == "matrix"}
    linear = {site.name for site in sites if site.family == "linear"}
    missing = {name for name in matrices if name.removesuffix(".weight") not in linear}
    assert not missing or all("relative" in name or "parametrizations" in name for name in missing)
    norms = {path for path, module in model.named_modules() if _is_norm(module)}
    # DeBERTa's norm of relative positions reads weights alone.
    assert norms - {"deberta.encoder.LayerNorm"} == {site.name for site in sites if site.family == "norm"}
    assert counts["embedding"] >= 1 or family.startswith(("resnet", "segformer", "hubert"))


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not list(module.children()) and "Weight" not in type(module).__name__


@pytest.mark.parametrize("family", ["bert", "opt", "gpt2", "bloom"])
def test_where_the_paper_lists_all_tensors_there_are_no_others(family):
    assert not [site for site in told(tiny(family)) if site.family == "input"]


@pytest.mark.parametrize("family", EVERY)
def test_looking_on_changes_nothing(family):
    model = tiny(family)
    follower = Follower(model, Weights(model))
    layers = [module for stack in anatomy(model).stacks for module in model.get_submodule(stack.path).modules()]
    with torch.no_grad(), eager_attention(model), asked_for_maps(layers[1:]):
        plain = output(model(**inputs(model)))
    assert torch.equal(output(follower.run(inputs(model), lambda site, x: x)), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_stays_as_it_is(family):
    model = tiny(family, dtype=torch.float32).train()
    before = [(name, tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()]
    hooks = _hooks(model)
    wanted = QuantizedMeasurement(calibration_samples=1, schemes=["w8a8", "w4"], alone="nothing")
    measure(wanted, model, Samples.of(model), cache=False)

    def break_off(site: Site, x: Tensor) -> Tensor:
        raise ZeroDivisionError

    weights = Weights(model)
    follower = Follower(model, weights)
    with pytest.raises(ZeroDivisionError), weights.rounded(8):
        follower.run(inputs(model), break_off)
    after = model.state_dict(keep_vars=True)
    assert list(after) == [name for name, _, _ in before]
    assert all(after[name] is tensor and torch.equal(tensor, bits) for name, tensor, bits in before)
    assert _hooks(model) == hooks
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


def _hooks(model: nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("family", ["bert", "llama", "mixtral", "vit", "t5"])
def test_ranges_are_static(family):
    """What a sample becomes doesn't depend on the others beside it."""
    model = tiny(family)
    one, many = (
        found(model, labelled(model, 8, size), calibration_samples=3, schemes=["w8a8", "w4"]).model_dump_json()
        for size in (1, 5)
    )
    pattern = re.compile(r"-?\d+\.\d+(?:e-?\d+)?|null")
    for a, b in zip(pattern.findall(one), pattern.findall(many), strict=True):
        assert a == b or float(a) == pytest.approx(float(b), rel=1e-7, abs=1e-9)


class Planted:
    """A Llama, one layer of which writes 20,000 into a dimension of the last token, where nobody reads it; the labels
    are what it says."""

    def __init__(self, samples: int = 10) -> None:
        self.model = tiny("llama")
        rows = inputs(self.model, batch=samples, length=20)
        self.model.model.layers[0].mlp.register_forward_hook(self._write)
        with torch.no_grad():
            best = self.model(**rows).logits.argmax(-1)
        said = torch.cat([torch.full_like(best[:, :1], -100), best[:, :-1]], dim=1)
        self.data = Samples({**rows, "labels": said}, batch_size=samples)

    @staticmethod
    def _write(module: nn.Module, arguments: Any, given: Tensor) -> Tensor:
        size = torch.zeros_like(given)
        size[:, -1, 3] = 20_000.0
        return given + size


def test_an_outlier_ruins_per_tensor_grids_and_percentiles_mend_it():
    planted = Planted()
    wide, clipped = (
        found(planted.model, planted.data, calibration_samples=4, alone=alone, **ranges)
        for ranges, alone in (({}, "tensors"), ({"activation_ranges": "percentile", "percentile": 99.5}, "families"))
    )
    assert wide.float_accuracy is not None
    assert wide.float_accuracy.mean == 1.0
    changes = {name: result.of("w8a8").change for name, result in (("wide", wide), ("clipped", clipped))}
    assert all(change is not None for change in changes.values())
    assert changes["wide"].mean > 3 * changes["clipped"].mean + 0.5
    assert wide.of("w8").change.mean < 0.2 * changes["wide"].mean
    # The stream that holds it is to blame, and is named.
    worst = max(wide.alone, key=lambda one: one.change.mean)
    held = next(tensor for tensor in wide.tensors if tensor.name == worst.what)
    assert held.family == "sum"
    assert held.high > 19_000
    assert f"Most harm alone, by the change of the loss: {worst.what} (" in " ".join(wide.findings())
    assert {one.what for one in clipped.alone} >= {"sum", "linear", "norm", "scores", "probabilities", "context"}


def test_four_bits_have_a_grid_for_each_output_or_group():
    for family, name, transposed in (
        ("llama", "model.layers.0.mlp.up_proj", False),
        ("gpt2", "transformer.h.0.mlp.c_fc", True),
    ):
        model = tiny(family)
        weights, before = Weights(model), model.get_submodule(name).weight.detach().numpy()
        rows = before.T if transposed else before
        for group in (None, 8):
            with weights.rounded(4, group):
                made = model.get_submodule(name).weight.detach().numpy()
                assert model.get_input_embeddings().weight.equal(tiny(family).get_input_embeddings().weight)
            parts = rows if group is None else rows.reshape(-1, group)
            expected = np.stack([oracle.weight(part, 4) for part in parts]).reshape(rows.shape)
            np.testing.assert_allclose(made.T if transposed else made, expected, atol=1e-12)


def test_the_matrix_of_each_expert_has_its_own_grid_and_routers_none():
    model = tiny("mixtral")
    weights = Weights(model)
    before = model.model.layers[0].mlp.experts.down_proj.detach().numpy()
    assert not [name for name in weights.quantized() if "gate.weight" in name or "lm_head" in name]
    with weights.rounded(8):
        made = model.model.layers[0].mlp.experts.down_proj.detach().numpy()
    np.testing.assert_allclose(made, np.stack([oracle.weight(expert) for expert in before]), atol=1e-12)


def test_a_tied_head_stays_where_the_embedding_does_not():
    model = tiny("llama", tie_word_embeddings=True)
    head = model.lm_head.weight
    with Weights(model).rounded(8):
        assert model.lm_head.weight is head
        assert not torch.equal(model.model.embed_tokens.weight, head)
    assert model.model.embed_tokens.weight is head


def test_without_labels_it_is_about_the_output_alone(tmp_path):
    model = tiny("bert", head="BertModel", dtype=torch.float32)
    data = Samples.of(model)
    result = measure(QuantizedMeasurement(calibration_samples=2), model, data, cache=tmp_path)
    assert result.float_loss is None
    assert result.of("w8a8").change is None
    assert result.tables()[0].header == ["quantized", "output error"]
    assert QuantizationLoss.model_validate_json(result.model_dump_json()) == result
    data.passes = 0
    assert measure(QuantizedMeasurement(calibration_samples=2), model, data, cache=tmp_path) == result
    assert data.passes == 0


@pytest.mark.parametrize("alone", ["families", "tensors"])
def test_a_person_can_read_it(alone):
    model = tiny("bert", dtype=torch.float32)
    result = found(model, labelled(model, 5), calibration_samples=2, alone=alone)
    for table in result.tables():
        widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
        assert sum(widths) + 2 * (len(widths) - 1) <= 80
    assert result.tables()[0].header == ["quantized", "loss", "change", "accuracy", "output error"]
    assert [row[0] for row in result.tables()[0].rows] == ["nothing", "w8a8", "w8", "a8"]
    assert re.match(r"W8A8 changes the loss by [+-]\d\.\d{4} ± [\d.e-]+ and the output by", result.findings()[0])
    root = ElementTree.fromstring(result.picture("A model"))
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]
    worst = sorted(result.alone, key=lambda one: -one.error.mean)[:12]
    shown = (one.what if len(one.what) <= 32 else f"…{one.what[-31:]}" for one in worst)
    assert {"A model", "w8a8", "w8", "a8", *shown} <= set(texts)
    told = [element.text for element in root.iter() if element.tag.endswith("}title")]
    assert f"output error: {result.of('w8').error.mean:.6g} ± {result.of('w8').error.margin:.2g}" in told
    assert result.findings()[-1].startswith("Quantized: 22 weights; of activations 1 embedding, 6 norm, 13 linear")


def test_what_cannot_be_measured_is_refused():
    model = tiny("llama")
    with pytest.raises(DataError, match=r"calibration_samples is 5, and the data have no more samples"):
        found(model, Samples.of(model), calibration_samples=5)
    for wrong in ({"schemes": []}, {"schemes": ["w2"]}, {"percentile": 50}, {"group": 1}, {"alone": "some"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            QuantizedMeasurement.parse(wrong, source="quantized")
    for idle, words in (
        ({"percentile": 99}, "percentile is of activation_ranges = percentile, and they are min-max"),
        ({"group": 8}, "group is of w4, and schemes are w8a8, w8, a8"),
        ({"schemes": ["w8", "w8"]}, "schemes names w8 more than once"),
        ({"calibration_samples": True}, "calibration_samples: must be a number .received true"),
    ):
        with pytest.raises(ConfigError, match=words):
            QuantizedMeasurement.parse(idle)
    blocks = tiny("llama")
    apply(method("altup").plan(Bench(blocks), method("altup").settings.parse({"blocks": 2})), blocks)
    with pytest.raises(PlanError, match="several blocks"):
        found(blocks, Samples.of(blocks))
    bert = tiny("bert")
    with torch.no_grad():
        bert.bert.encoder.layer[0].intermediate.dense.bias[0] = float("inf")
    with pytest.raises(DataError, match=r"layer\.0\.intermediate\.dense holds entries that are not finite"):
        found(bert, Samples.of(bert), calibration_samples=2)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("values", [{}, {"weight_ranges": "mse"}, {"schemes": ["w4"]}])
def test_weights_that_no_grid_covers_are_named_also_where_no_text_reads_them(number, values):
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[-1, 0] = number
    with pytest.raises(PlanError, match=r"model\.embed_tokens\.weight holds entries that are not finite"):
        found(model, Samples.of(model), calibration_samples=2, **values)


def test_attention_in_one_kernel_is_refused():
    model = tiny("llama")

    def fused(self: Any, hidden_states: Tensor, **named: Any) -> tuple[Tensor, None]:
        q = self.q_proj(hidden_states)[:, None]
        return self.o_proj(functional.scaled_dot_product_attention(q, q, q)[:, 0]), None

    model.model.layers[1].self_attn.forward = MethodType(fused, model.model.layers[1].self_attn)
    with pytest.raises(PlanError, match=r"layers\.1\.self_attn computes attention in one kernel"):
        found(model, Samples.of(model), calibration_samples=2)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_clipped_probabilities_get_a_grid_and_gates_compute_in_floating_point(family):
    """Beside the model without them: the grids of gated ones are the same, and those of clipped ones are of P'."""
    model = tiny(family, dtype=torch.float32)
    batches = [torch.randint(4, 18, (2, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    if family == "bert":
        batches = [{"input_ids": ids, "labels": ids} for ids in batches]
    data = Calibration.of_batches(model, batches)

    def found(changed):
        result = measure(QuantizedMeasurement(calibration_samples=4), changed, data, cache=False)
        return Counter(one.family for one in result.tensors), {one.name: one for one in result.tensors}

    plain, _ = found(model)
    gated = copy.deepcopy(model)
    auxin.apply(auxin.plan(gated, "gated-attention"), gated)
    # A gate's product with what heads give is new.
    assert found(gated)[0] - Counter(input=99) == plain - Counter(input=99)
    clipped = copy.deepcopy(model)
    auxin.apply(auxin.plan(clipped, "clipped-softmax", alpha=0.6, length=12), clipped)
    families, tensors = found(clipped)
    layers = model.config.num_hidden_layers
    assert families["probabilities"] == layers
    assert families == plain, "the product of which the probabilities come has no entries"
    # 12 tokens read alike have 1 / 12 each, and at most 1.05 * 1 - 0.05 of P is P'; what is small is none at all.
    reached = [one.high for one in tensors.values() if one.family == "probabilities"]
    assert all(0 < high <= 1 for high in reached)
    before = [one.high for one in found(model)[1].values() if one.family == "probabilities"]
    assert all(one <= other for one, other in zip(reached, before, strict=True)), "P' is P at most"
    # A causal model's first token reads itself with 1, clipped or not.
    assert family == "llama" or all(one < other for one, other in zip(reached, before, strict=True))
