"""VTrans: what stays is what the model computes with the means of its gates, cut; the gates choose far better than
chance."""

import copy
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import auxin
from auxin.accounting import flops_per_token
from auxin.analysis.gates import Gates
from auxin.analysis.unit_masks import maskable
from auxin.analysis.units import Group, units_of, with_sublayers
from auxin.edits import Plan, SliceParameter, apply
from auxin.edits.kinds.file_edits import SetParameter
from auxin.edits.structure import structural_edits
from auxin.errors import ConfigError, PlanError
from auxin.methods.prune import vtrans
from auxin.models.anatomy import anatomy
from auxin.models.sublayers import sublayers
from auxin.objectives.calibration import Calibration
from auxin.planning.folding import folding
from auxin.planning.pruning import Pruning, prunable
from byte_language import BATCH, CONTEXT, byte_model, held_out_loss, library, loss_after, train
from covering import families
from edits.models import everything
from oracles.pruning import pruned
from tiny_models import MODELS, change, inputs, labels, logits, tiny


@pytest.fixture(autouse=True)
def _plans_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the files that belong to them."""
    monkeypatch.chdir(tmp_path)


def texts(model: Any) -> Calibration:
    return Calibration.of_batches(model, [{**inputs(model, batch=4), "labels": labels(model, batch=4)}])


def learned(monkeypatch: pytest.MonkeyPatch) -> list[Gates]:
    """The gates of all plans that are made from now on, far from their start."""
    found: list[Gates] = []

    def learn(gates: Gates, task: Any, settings: Any, goals: Any, weights: Any) -> list[float]:
        generator = torch.Generator().manual_seed(settings.seed)
        with torch.no_grad():
            gates.mu.copy_(0.5 + torch.rand(gates.mu.shape, generator=generator))
            gates.log_variance.copy_(torch.randn(gates.mu.shape, generator=generator))
        found.append(gates)
        return [1.0]

    monkeypatch.setattr(vtrans, "learn", learn)
    return found


def highest(values: Tensor, count: int) -> list[int]:
    return sorted(values.argsort()[:count].tolist())  # log alpha: the lowest


class Multiplied(nn.Module):
    """A mask by hand."""

    def __init__(self, module: nn.Module, before: Tensor | None, after: Tensor | None) -> None:
        super().__init__()
        self.inner, self.before, self.after = module, before, after

    def forward(self, *given: Any, **named: Any) -> Any:
        given = given if self.before is None else (given[0] * self.before, *given[1:])
        result = self.inner(*given, **named)
        return result if self.after is None else result * self.after


def masked_by_hand(model: Any, heads: list[Tensor], units: list[Tensor], residual: Tensor) -> Any:
    """A Llama whose embedding and parts are multiplied by masks, and whose norms go over all of the stream."""
    made = copy.deepcopy(model)
    made.model.embed_tokens = Multiplied(made.model.embed_tokens, None, residual)
    for layer, head, unit in zip(made.model.layers, heads, units, strict=True):
        per = model.config.num_attention_heads // len(head) * model.config.head_dim
        layer.self_attn.o_proj = Multiplied(layer.self_attn.o_proj, head.repeat_interleave(per), residual)
        layer.mlp.down_proj = Multiplied(layer.mlp.down_proj, unit, residual)
    return made


@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_leaves_what_the_model_computes_with_weighted_masks(tied, monkeypatch):
    """Oracle, with grouped queries: masks put around the modules of the whole model by hand."""
    model, gates = tiny("llama", tie_word_embeddings=tied, hidden_size=24, head_dim=6), learned(monkeypatch)
    smaller = copy.deepcopy(model)
    plan = auxin.plan(model, "vtrans", heads=0.5, ffn=0.5, hidden=0.75, data=texts(model))
    apply(plan, smaller)
    mu, log_alpha = (gates[0].by_group(values.detach().double()) for values in (gates[0].mu, gates[0].log_alpha()))

    def mask(group: Group, count: int) -> Tensor:
        kept = highest(log_alpha[group], count)
        return torch.zeros_like(mu[group]).index_copy(0, torch.tensor(kept), mu[group][kept])

    layers = [f"model.layers.{layer}" for layer in range(2)]
    heads = [mask(("key_value", layer), 1) for layer in layers]
    units = [mask(("ffn", layer), smaller.config.intermediate_size) for layer in layers]
    assert smaller.config.hidden_size == 18
    whole = masked_by_hand(model, heads, units, mask(("residual", ""), 18))
    assert change(logits(whole), logits(smaller)) < 1e-6  # means are float32
    assert change(logits(model), logits(smaller)) > 1e-2


PARTS: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "llama": ("LlamaForCausalLM", [("model.layers.{}.", "self_attn.o_proj", "mlp.down_proj")]),
    "gpt2": ("GPT2LMHeadModel", [("transformer.h.{}.", "attn.c_proj", "mlp.c_proj")]),
    "bert": ("BertForMaskedLM", [("bert.encoder.layer.{}.", "attention.output.dense", "output.dense")]),
    "bert for a task": (
        "BertForSequenceClassification",
        [("bert.encoder.layer.{}.", "attention.output.dense", "output.dense")],
    ),
    "roberta": ("RobertaForMaskedLM", [("roberta.encoder.layer.{}.", "attention.output.dense", "output.dense")]),
}
"""The class, the layers, and of a layer the modules whose results its attention and its feed-forward part add."""


@pytest.mark.parametrize("case", PARTS)
def test_a_plan_leaves_what_the_model_computes_with_masks_on_whole_parts_too(case, monkeypatch):
    """Oracle, with biases: of each part the result times its mean, or nothing of it; of feed-forward parts their units,
    too, of which those of a part that goes are no matter."""
    head, ((layers, attention, feed_forward),) = PARTS[case]
    model, gates = tiny(case.split()[0], head=head), learned(monkeypatch)
    smaller = copy.deepcopy(model)
    asked = {"sublayers": 0.75, "ffn": 0.5, "uniform": False}
    labelled = labels(model, batch=4)
    given = {**inputs(model, batch=4), "labels": labelled[:, 0] % 2 if "task" in case else labelled}
    apply(auxin.plan(model, "vtrans", data=Calibration.of_batches(model, [given]), **asked), smaller)
    mu, log_alpha = (gates[0].by_group(values.detach().double()) for values in (gates[0].mu, gates[0].log_alpha()))
    of_parts = {group[1]: values.item() for group, values in log_alpha.items() if group[0] == "sublayer"}
    (gone,) = [path for path, value in of_parts.items() if value == max(of_parts.values())]
    units = {group: values for group, values in log_alpha.items() if group[0] == "ffn"}
    left = {group: values for group, values in units.items() if not gone.startswith(group[1]) or "att" in gone}
    bound = torch.cat(list(left.values())).sort().values[sum(map(len, left.values())) // 2 - 1]
    whole = copy.deepcopy(model)
    for number in range(2):
        for name in (attention, feed_forward):
            path = layers.format(number) + name
            part = next(found for found in of_parts if path.startswith(found))
            mask = mu["sublayer", part] * (part != gone)
            group = ("ffn", layers.format(number)[:-1])
            before = mu[group] * (log_alpha[group] <= bound) if name == feed_forward else None
            whole.set_submodule(path, Multiplied(whole.get_submodule(path), before, mask))
    assert change(logits(whole), logits(smaller)) < 1e-10
    assert change(logits(model), logits(smaller)) > 1e-2
    assert smaller.num_parameters() < 0.9 * model.num_parameters()


@pytest.mark.parametrize("uniform", [True, False])
def test_a_target_takes_from_parts_by_the_ranking_of_units_and_leaves_as_many_as_are_to_stay(uniform):
    """The limit is met, and with one part more it would not be; parts with scores below those of units go first, others
    only behind units, and their units are cut nowhere else."""
    model = tiny("llama", num_hidden_layers=3)
    parts = [one.path for one in sublayers(model)]
    order = [parts[number] for number in (3, 0, 5, 1, 2, 4)]
    for share, first, least, most in ((0.8, -9.0, 1, 2), (0.5, -9.0, 3, 3), (0.8, 9.0, 0, 0)):
        asked = {"target": {"parameters": share}, "uniform": uniform, "sublayers": 0.5}
        found = prunable(model, vtrans.VTrans.parse(asked))
        scores = {
            place: [first + 0.1 * order.index(place[1])]
            if place[0] == "sublayer"
            else [unit / units for unit in range(units)]
            for place, units in found.units.items()
        }
        plan = found.plan("by hand", scores, split="score")
        smaller = copy.deepcopy(model)
        apply(plan, smaller)
        assert smaller.num_parameters() <= share * model.num_parameters()
        said = [line for line in plan.findings if line.startswith("Gone as a whole: ")]
        gone = set(said[0].removeprefix("Gone as a whole: ").rstrip(".").split(", ")) if said else set()
        assert least <= len(gone) <= most
        assert gone == set(order[: len(gone)])
        assert len(sublayers(smaller)) == 6 - len(gone)
        if not uniform:
            cut = {edit.parameter for edit in plan.edits if isinstance(edit, SliceParameter)}
            assert not any(name.startswith(path) for name in cut for path in gone)


def test_parts_are_ranked_by_their_scores_and_those_to_keep_stay():
    model = tiny("llama", num_hidden_layers=3)
    found = prunable(model, vtrans.VTrans.parse({"sublayers": 4}))
    order = ["model.layers.1.mlp", "model.layers.2.self_attn", "model.layers.0.mlp"]
    scores = {place: [float(order.index(place[1])) if place[1] in order else 9.0] for place in found.units}
    plan = found.plan("by hand", scores, split="score")
    assert plan.findings[1] == "Gone as a whole: model.layers.1.mlp, model.layers.2.self_attn."
    assert found.outline("by hand").findings[1].count("model.layers") == 2
    kept = {"sublayers": 4, "ffn": 1.0, "uniform": False, "keep": "model.layers.1"}
    found = prunable(model, vtrans.VTrans.parse(kept))
    gone = found.plan("by hand", {place: scores.get(place, [0.0] * n) for place, n in found.units.items()}).findings[1]
    assert gone == "Gone as a whole: model.layers.0.mlp, model.layers.2.self_attn."


@pytest.mark.parametrize("case", PARTS)
def test_weights_are_trained_with_gates_in_a_copy_and_the_plan_has_them(case, tmp_path, monkeypatch):
    """On labels of tokens and of samples: the result is the model with the plan's weights and the means of gates."""
    head, ((layers, *names),) = PARTS[case]
    model, gates, real = tiny(case.split()[0], head=head), list[Gates](), vtrans.learn
    monkeypatch.setattr(vtrans, "learn", lambda *given: gates.append(given[0]) or real(*given))
    labelled = labels(model, batch=4)
    data = [{**inputs(model, batch=4), "labels": labelled[:, 0] % 2 if "task" in case else labelled}]
    asked = {"sublayers": 0.75, "weight_learning_rate": 0.01, "steps": 3, "folder": tmp_path}
    plan = auxin.plan(model, "vtrans", data=Calibration.of_batches(model, data), **asked)
    trained, smaller = copy.deepcopy(model), copy.deepcopy(model)
    apply(plan, smaller)
    values = load_file(tmp_path / plan.files[0].name)
    trained.load_state_dict(values, strict=False)
    assert len(values) > 5
    assert change(logits(model), logits(trained)) > 1e-3
    mu = gates[0].by_group(gates[0].mu.detach().double())
    left = {one.path for one in sublayers(smaller)}
    for number, name in ((number, name) for number in range(2) for name in names):
        path = layers.format(number) + name
        part = next(group[1] for group in mu if path.startswith(group[1]))
        multiplied = Multiplied(trained.get_submodule(path), None, mu["sublayer", part] * (part in left))
        trained.set_submodule(path, multiplied)
    assert len(left) == 3
    assert change(logits(trained), logits(smaller)) < 1e-10


def test_training_weights_leaves_the_model_as_it_was_and_repeats_itself(monkeypatch):
    """To the bit, also where learning fails; and random numbers."""
    model = tiny("llama", dtype=torch.float32).train()
    asked: dict[str, Any] = {"ffn": 0.5, "weight_learning_rate": 0.01, "steps": 3, "data": texts(model)}
    before, state = copy.deepcopy(everything(model)), torch.random.get_rng_state()
    plans = [auxin.plan(model, "vtrans", seed=seed, **asked) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert plans[0].files == plans[1].files != plans[2].files

    def fail(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(vtrans, "learn", fail)
    with pytest.raises(KeyboardInterrupt):
        auxin.plan(model, "vtrans", **asked)
    assert str(everything(model)) == str(before)


def test_weights_that_are_frozen_stay_and_where_all_are_none_is_trained():
    model = tiny("llama", dtype=torch.bfloat16)
    model.requires_grad_(False)
    asked: dict[str, Any] = {"ffn": 0.5, "steps": 2, "weight_learning_rate": 0.1, "data": texts(model)}
    with pytest.raises(PlanError, match=r"weight_learning_rate: no weight of the LlamaForCausalLM asks for gradients"):
        auxin.plan(model, "vtrans", **asked)
    model.model.norm.weight.requires_grad_(True)
    plan = auxin.plan(model, "vtrans", **asked)
    assert [edit.parameter for edit in plan.edits if isinstance(edit, SetParameter)] == ["model.norm.weight"]
    apply(plan, model)
    assert model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="distillation teaches weights that are trained"):
        auxin.plan(model, "vtrans", ffn=0.5, distillation=1.0, data=texts(model))


def test_a_part_that_adds_nothing_goes_first():
    """Effect: its gate has nothing to hold it, and becomes noise."""
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.bias.zero_()
    plan = auxin.plan(model, "vtrans", sublayers=0.75, steps=60, learning_rate=0.3, data=texts(model))
    assert "Gone as a whole: model.layers.0.mlp." in plan.findings


def test_hard_masks_leave_weights_as_they_are(monkeypatch):
    model, gates = tiny("llama", hidden_size=24, head_dim=6), learned(monkeypatch)
    smaller = copy.deepcopy(model)
    plan = auxin.plan(model, "vtrans", heads=0.5, ffn=0.5, hidden=0.75, masks="hard", data=texts(model))
    assert not plan.files
    apply(plan, smaller)
    log_alpha = gates[0].by_group(gates[0].log_alpha().detach())
    layers = [f"model.layers.{layer}" for layer in range(2)]
    state, values = pruned(
        model.state_dict(),
        model.config,
        [highest(log_alpha["key_value", layer], 1) for layer in layers],
        [highest(log_alpha["ffn", layer], smaller.config.intermediate_size) for layer in layers],
        highest(log_alpha["residual", ""], 18),
    )
    config = copy.deepcopy(model.config)
    config.update(values)
    by_hand = LlamaForCausalLM(config).double().eval()
    by_hand.load_state_dict(state)
    assert change(logits(by_hand), logits(smaller)) < 1e-10


@pytest.mark.parametrize(
    ("asked", "goals"),
    [
        ({"heads": 0.5, "ffn": 8}, {"heads": [0.5, 0.5], "ffn": [8 / 12, 8 / 12]}),
        ({"heads": 0.5, "ffn": 0.75, "uniform": False}, {"heads": [0.5], "ffn": [0.75]}),
        ({"target": {"parameters": 0.7}}, {"all": [0.7]}),
        ({"target": {"parameters": 2000}}, {"all": [2000]}),
    ],
)
def test_gates_are_told_what_is_wanted(asked, goals, monkeypatch):
    """In every layer, where layers keep as many; and that half of the units leave half of what is asked of them."""
    model, told = tiny("qwen3", intermediate_size=12, dtype=torch.float32), list[Any]()
    monkeypatch.setattr(vtrans, "learn", lambda gates, task, settings, goals, _: told.append((gates, goals)) or [1.0])
    auxin.plan(model, "vtrans", data=texts(model), **asked)
    ((gates, found),) = told
    wanted = [share if share <= 1 else share / model.num_parameters() for shares in goals.values() for share in shares]
    assert [goal.share for goal in found] == pytest.approx(wanted)
    shares = {group: torch.full((count,), 0.5) for group, count in gates.counts.items()}
    assert all(goal.left(dict.fromkeys(shares, torch.ones(1))).item() == pytest.approx(1) for goal in found)
    if "target" not in asked:
        assert all(goal.left(shares).item() == 0.5 for goal in found)
    else:
        inside = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
        assert found[0].left(shares).item() == pytest.approx(1 - inside / 2 / model.num_parameters())


UNKNOWN = {
    "nanochat": "model.norm, behind the embeddings, has no gain",
    "marian": "the head is tied to the token embedding",
    "m2m_100": "model.encoder.embed_positions writes to the residual stream",
    "whisper": "model.encoder.conv2 writes to the residual stream",
    "whisper headless": "encoder.conv2 writes to the residual stream",
    "wav2vec2 stable": "wav2vec2.encoder.pos_conv_embed writes to the residual stream",
    "hubert headless": "encoder.pos_conv_embed writes to the residual stream",
}
"""Where the residual's factors do not go into the weights, and why."""
SEVERAL_TOWERS = ("clip", "siglip")


@pytest.mark.parametrize(
    "family",
    families(
        [family for family in MODELS if family not in SEVERAL_TOWERS],
        "bert",  # norms behind sums, and of the embeddings
        "gemma2",  # a tied head, gains stored less one, norms behind outputs
        "bart",  # the last norm before the head in a layer
        "xlm-roberta",  # a table that has the head's name
        "vit",
        "gpt_oss",
        *list(UNKNOWN)[:4],
    ),
)
def test_weights_take_up_factors_exactly_or_that_is_refused(family, tmp_path):
    """Of heads, feed-forward units, whole parts and the residual, on every architecture."""
    model = tiny(family)
    units = units_of(model)
    stacks = anatomy(model).stacks
    layers = [f"{s.path}.{number}" for s in stacks for number, _ in enumerate(model.get_submodule(s.path))]
    body = anatomy(model, scopes=layers)
    groups = [[group] for group in maskable(units, ["heads", "ffn"])]
    parts = [] if family == "albert" else sublayers(model)
    units = with_sublayers(model, units, parts)
    groups = [
        [group for one in groups for group in one],
        [("sublayer", part.path) for part in parts],
        *([[("residual", "")]] if ("residual", "") in units.counts else []),
    ]
    for of_kind in filter(None, groups):
        gates = Gates(units, of_kind, dict.fromkeys(of_kind, 1.0), 0, torch.device("cpu"))
        with torch.no_grad():
            gates.mu.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
        means = gates.by_group(gates.mu.detach())
        factors = {vtrans._place(group): values.tolist() for group, values in means.items()}
        counts = {place: len(values) for place, values in factors.items() if place[0] != "sublayer"}
        of_parts = [part for part in parts if ("sublayer", part.path) in factors]
        if of_kind == [("residual", "")] and family in UNKNOWN:
            with pytest.raises(PlanError, match=f'^hidden: .*{UNKNOWN[family]}.*masks = "hard"'):
                folding(model, body, counts)
            continue
        with gates.on(noisy=False):
            masked = logits(model)
        edits, files = folding(model, body, counts, of_parts).filled(factors, tmp_path).edits({})
        made = copy.deepcopy(model)
        apply(Plan(method="by hand", promise="none", edits=edits, files=files).beside(tmp_path), made)
        assert change(masked, logits(made)) < 1e-6 < change(logits(model), masked)


@pytest.mark.parametrize("uniform", [True, False])
def test_a_target_takes_from_all_streams_by_one_ranking(uniform):
    """No tensor is larger at a smaller size; the limit is met, and one unit more would not go in."""
    model = tiny("qwen3", num_attention_heads=10, num_key_value_heads=5, intermediate_size=24)
    generator = torch.Generator().manual_seed(2)
    before: dict[str, int] = {}
    for share in (0.8, 0.5):
        found = prunable(
            model,
            Pruning.parse({"target": {"flops": share, "sequence_length": 9}, "uniform": uniform, "normalised": False}),
        )
        scores = {
            place: torch.rand(units, generator=generator.manual_seed(len(place[1]))).sub(0.5).tolist()
            for place, units in found.units.items()
        }
        smaller = copy.deepcopy(model)
        apply(found.plan("by hand", scores, split="score"), smaller)
        reached = flops_per_token(smaller, 9).forward / flops_per_token(model, 9).forward
        unit = 2 * 3 * model.config.hidden_size * (2 if uniform else 1) / flops_per_token(model, 9).forward
        assert share - unit < reached <= share
        sizes = {name: parameter.numel() for name, parameter in smaller.named_parameters()}
        assert all(sizes[name] <= size for name, size in before.items())
        before = sizes
    # Where one kind has lower scores throughout, it goes first.
    low, high = (
        {place: [1.0 if place[0] == s else -1.0] * n for place, n in found.units.items()} for s in ("query", "ffn")
    )
    for scores, streams in ((low, {"ffn"}), (high, {"query"})):
        asked = {"target": {"flops": 0.9, "sequence_length": 9}, "uniform": uniform, "normalised": False}
        gentle = prunable(model, Pruning.parse(asked))
        smaller = copy.deepcopy(model)
        apply(gentle.plan("by hand", scores, split="score"), smaller)
        went = {
            "ffn" if "mlp" in name else "query"
            for name, parameter in smaller.named_parameters()
            if parameter.numel() < model.get_parameter(name).numel()
        }
        assert went == streams


def test_plans_repeat_themselves_by_their_seed_and_leave_model_and_random_numbers(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    asked = {"ffn": 0.5, "steps": 3, "data": texts(model)}
    plans = [auxin.plan(model, "vtrans", seed=seed, **asked) for seed in (7, 7, 8)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert plans[0].edits == plans[1].edits
    assert plans[0].files == plans[1].files != plans[2].files
    assert plans[0].seed == 7
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    plans[0].to_yaml(tmp_path / "plan.yaml")
    twin = copy.deepcopy(model)
    apply(plans[0], model)
    apply(Plan.from_yaml(tmp_path / "plan.yaml"), twin)
    assert torch.equal(logits(model), logits(twin))
    assert not structural_edits(model.config)
    assert plans[0].findings[1].startswith("By the threshold (log alpha < 0) ")
    assert plans[0].cost is not None
    assert plans[0].cost.samples == 12


def test_where_heads_can_t_go_alone_units_go_and_heads_have_no_gates(monkeypatch):
    model, gates = tiny("gpt2", dtype=torch.float32), learned(monkeypatch)
    plan = auxin.plan(model, "vtrans", target={"parameters": 0.9}, data=texts(model))
    assert "hidden size = heads x dimension" in plan.notes[0]
    assert {kind for kind, _ in gates[0].counts} == {"ffn"}
    together = auxin.plan(model, "vtrans", target={"parameters": 0.7}, streams=["heads", "hidden"], data=texts(model))
    before = model.num_parameters()
    apply(together, model)
    assert model.num_parameters() <= 0.7 * before
    assert model.config.n_embd == 4 * model.config.n_head < 16


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("albert", {"sublayers": 0.5}, "share their parameters.* no part of one, can go alone"),
        ("llama", {"sublayers": 1.0}, "all of 4 sublayers would stay"),
        ("llama", {"sublayers": 5}, "the model has only 4 attentions and feed-forward parts. Give at most that"),
        ("mixtral", {"experts": 0.5}, "experts: vtrans has gates for heads, feed-forward units and the residual"),
        ("albert", {"hidden": 0.5, "heads": 0.5}, "hidden: The layers of .* share their parameters"),
        ("nanochat", {"hidden": 0.5, "heads": 0.5}, "hidden: model.norm, behind the embeddings, has no gain"),
        ("llama", {"target": {"parameters": 0.01}}, "smallest that vtrans can reach"),
        ("llama", {"ffn": 1.0}, "nothing to prune"),
        ("clip", {"ffn": 0.5, "part": "text"}, "has several towers"),
    ],
)
def test_what_can_t_be_is_refused_before_anything_is_learned(family, values, message, monkeypatch):
    model, gates = tiny(family, dtype=torch.float32), learned(monkeypatch)
    data = texts(tiny("llama"))
    with pytest.raises(PlanError, match=message):
        auxin.plan(model, "vtrans", data=data, **values)
    assert not gates


def test_without_factors_the_residual_goes_where_weights_can_t_take_them_up():
    model = tiny("nanochat", dtype=torch.float32)
    hidden = model.config.hidden_size
    apply(auxin.plan(model, "vtrans", hidden=0.5, heads=0.5, masks="hard", steps=2, data=texts(model)), model)
    assert model.config.hidden_size == hidden // 2


@pytest.fixture(scope="module")
def trained() -> Any:
    """A small language model of bytes, batches of what it was trained on, and other bytes."""
    learnt = library("argparse", "ast", "datetime", "difflib", "doctest")
    model = byte_model(seed=0, hidden_size=48, intermediate_size=96, num_hidden_layers=2)
    train(model, learnt, 300)
    starts = torch.randint(len(learnt) - CONTEXT, (150, BATCH, 1), generator=torch.Generator().manual_seed(5))
    return model.eval(), Calibration.of_batches(model, list(learnt[starts + torch.arange(CONTEXT)])), library("pdb")


def test_gates_choose_far_better_than_chance_and_their_means_help(trained):
    """Effect: at half of the layers' parameters, by one ranking over the layers."""
    model, data, held_out = trained
    table = model.model.embed_tokens.weight.numel()
    target = {"parameters": round((table + model.num_parameters()) / 2)}
    dense = held_out_loss(model, held_out)

    def lost(name: str, **values: Any) -> float:
        plan = auxin.plan(model, name, target=target, uniform=False, **values)
        return loss_after(plan, model, held_out) - dense

    weighted, hard = (lost("vtrans", steps=150, masks=masks, data=data) for masks in ("weighted", "hard"))
    trained = lost("vtrans", steps=150, weight_learning_rate=1e-3, data=data)
    magnitude, drawn = lost("magnitude"), statistics.median(lost("random", seed=seed) for seed in range(3))
    found = {"weighted": weighted, "trained": trained, "hard": hard, "magnitude": magnitude, "random": drawn}
    print(dense, found)
    assert 0 < weighted < hard
    assert trained < weighted
    assert weighted < 0.5 * drawn
