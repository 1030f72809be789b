"""AltUp with the other methods: on a TokenFormer that grows, with experts, before and after depth and width."""

import copy
import itertools
import warnings

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from auxin.accounting import Ledger
from auxin.edits import Plan, apply, apply_to_checkpoint
from auxin.edits.kinds.edit import ArrangeLayers
from auxin.errors import PlanError
from auxin.methods import methods
from auxin.methods.grow.altup import AltUpSettings, plan_altup
from auxin.methods.grow.masked import MaskRamp
from auxin.nn.altup_layer import AltUpLayer
from auxin.nn.wide_stream import block_distance
from auxin.planning.bench import Bench
from auxin.recipes import Recipe, run_recipe
from auxin.recipes.change import change_checkpoint
from corpora import small_corpus, write_documents
from methods.altup_models import EXACT, alter, altered, outputs, shake, small, streams, train, updates
from tiny_models import change, inputs, logits
from tiny_models import tiny as tiny_model


def grown(model, name, **values):
    """`model` after the method called `name`, in place; returns what the executor measured and said."""
    method = methods()[name]
    values = values or method.examples(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return apply(method.plan(Bench(model), method.settings.parse(values)), model)


TOKENS = {"qkv_tokens": 16, "proj_tokens": 15, "ffn_tokens": 20}


def test_a_tokenformer_grows_tokens_before_and_after():
    """Either order keeps the function at each edit, and both come to the same model at the moment of the edits."""
    start = tiny_model("tokenformer", num_hidden_layers=4)
    first = logits(start)
    ends = []
    for order in itertools.permutations(["altup", "tokenformer"]):
        model = copy.deepcopy(start)
        for name in order:
            receipt = grown(model, name, **({"blocks": 2} if name == "altup" else TOKENS))
            assert receipt.plan.promise == "exact"
            assert change(first, logits(model)) <= EXACT
        assert len(updates(model)) == 4
        ends.append(model)
        # Trained between the two, as in use, the second edit is exact as well.
        model = copy.deepcopy(start)
        grown(model, order[0], **({"blocks": 2} if order[0] == "altup" else TOKENS))
        train(model, steps=3)
        before = logits(model)
        grown(model, order[1], **({"blocks": 2} if order[1] == "altup" else TOKENS))
        assert change(before, logits(model)) <= EXACT
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in ends]
    assert shapes[0] == shapes[1]
    shake(ends[0])
    before = logits(ends[0])
    grown(ends[0], "tokenformer", qkv_tokens=20)
    assert change(before, logits(ends[0])) <= EXACT


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"))


BUILD = {
    "kind": "build",
    "model_type": "tokenformer",
    "config": {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "qkv_tokens": 6,
        "proj_tokens": 6,
        "ffn_tokens": 12,
        "max_position_embeddings": 16,
    },
}


def test_both_orders_in_one_recipe(corpus, tmp_path):
    stages = {
        "altup": {"kind": "change", "name": "wide", "method": "altup", "settings": {"blocks": 2}},
        "tokens": {"kind": "change", "name": "long", "tokens": {"qkv_tokens": 9, "proj_tokens": 9, "ffn_tokens": 16}},
    }

    def steps(name):
        return {"kind": "train", "name": name, "settings": {"steps": 2}}

    branches = []
    for order in (("altup", "tokens"), ("tokens", "altup")):
        one, two = (stages[name] for name in order)
        branches.append(
            {"name": "-".join(order), "title": " then ".join(order), "stages": [one, steps("between"), two]}
        )
    branches[0]["stages"] = [BUILD, steps("base"), *branches[0]["stages"]]
    branches[1]["fork"] = f"{branches[0]['name']}/base"
    recipe = Recipe.parse(
        {
            "name": "r",
            "title": "R",
            "data": small_corpus(corpus),
            "training": {"batch_size": 4, "tensorboard": False, "decay_fraction": 0.0},
            "branches": branches,
        }
    )
    said = []
    results = run_recipe(recipe, tmp_path / "out", "", announce=said.append)
    note = "  Note: model.layers has 3 layers, no multiple of 2 blocks: some blocks are computed once more than others."
    assert said.count(note) == 2
    for branch in results.branches:
        assert [growth.promise for growth in branch.growths] == ["exact", "exact"]
        assert all(abs(growth.change) < 1e-5 for growth in branch.growths)
        folder = tmp_path / "out/branches" / branch.name
        for name in ("wide", "long"):
            (checkpoint,) = folder.glob(f"*-{name}/checkpoint")
            receipt = Ledger.load(checkpoint).stages[-1].receipt
            # Replicated streams change no bit; appended tokens change the rounding of sums.
            assert receipt["max_relative_change"] == 0 or (name == "long" and receipt["max_relative_change"] < 1e-6)
    finals = [results.branches[i].parameters for i in range(2)]
    assert finals[0] == finals[1]


_EXPERTS = {
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def mixture(kind, dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "mixtral":
        config = MixtralConfig(**_EXPERTS, num_local_experts=4)
    else:
        config = Qwen3MoeConfig(**_EXPERTS, num_experts=4, moe_intermediate_size=16)
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # grouped products know no float64
    model = (MixtralForCausalLM if kind == "mixtral" else Qwen3MoeForCausalLM)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


every_mixture = pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])


@every_mixture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_experts_a_recycled_stream_changes_no_bit(kind, dtype):
    model = mixture(kind, dtype)
    before = outputs(model)
    for blocks in (2, 3):
        victim = copy.deepcopy(model)
        assert alter(victim, blocks=blocks).max_relative_change == 0
        assert torch.equal(outputs(victim), before)
        assert sum(p.numel() for p in victim.parameters()) == sum(p.numel() for p in model.parameters()) + 4 * (
            blocks**2 + blocks
        )


@every_mixture
@pytest.mark.parametrize("conversion", ["copies", "free", "relay", "zeros"])
def test_with_experts_wide_streams_are_exact(kind, conversion):
    model = mixture(kind, torch.float64)
    before = logits(model)
    alter(model, conversion=conversion, blocks=2)
    assert change(before, logits(model)) <= EXACT


@every_mixture
def test_with_experts_it_trains_generates_saves_and_loads(kind, tmp_path):
    model = altered(mixture(kind), blocks=2)
    before = outputs(model)
    train(model)
    assert block_distance(streams(model)) > 0.01
    assert change(before, outputs(model)) > 0.01
    ids = inputs(model)["input_ids"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(written, model.generate(ids, use_cache=False, **settings))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert len(updates(loaded)) == 4
    found, wanted = loaded.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-5, atol=1e-5)


@every_mixture
def test_with_experts_a_checkpoint_becomes_one_too(kind, tmp_path):
    """Files hold experts one by one, the model in one tensor; what does not change is copied as it lies there."""
    model = mixture(kind)
    model.save_pretrained(tmp_path / "old")
    plan = plan_altup(model, AltUpSettings(blocks=2))
    assert apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "new").max_relative_change <= 1e-6
    loaded, wanted = type(model).from_pretrained(tmp_path / "new").state_dict(), altered(model, blocks=2).state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
    # What does change is taken apart and put together again.
    deeper = Plan(method="m", promise="none", edits=[ArrangeLayers(layers="model.layers", order=[0, 1, 2, 3, 3])])
    apply_to_checkpoint(deeper, tmp_path / "old", tmp_path / "deeper")
    plain = type(model).from_pretrained(tmp_path / "old")
    apply(deeper, plain)
    loaded, wanted = type(model).from_pretrained(tmp_path / "deeper").state_dict(), plain.state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


LATER = [
    ("hypercloning", {"factor": 2}),
    ("lemon", {}),
    ("net2net", {"intermediate_size": 18}),
    ("net2net", {"num_hidden_layers": 6}),
    ("llama-pro", {"group_size": 2}),
    ("graft", {"tokens": 4}),
    ("vocabulary", {}),
    ("masked", {"layers": 6, "new_layers": "copies"}),
    ("masked", {"intermediate_size": 18}),
]


@pytest.mark.parametrize(("name", "values"), LATER)
@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2"])
def test_trained_mixing_lets_methods_after_it_keep_the_function(family, name, values):
    model = shake(altered(small(family), blocks=3))
    before = logits(model)
    receipt = grown(model, name, **values)
    assert receipt.plan.promise == "exact"
    after = logits(model)[..., : before.shape[-1]]
    assert change(before, after) <= EXACT
    layers = [layer for layer in model.modules() if isinstance(layer, AltUpLayer)]
    assert len(layers) == (6 if "layers" in values or "num_hidden_layers" in values or name == "llama-pro" else 4) or (
        name == "lemon"
    )
    train(model, steps=2)
    assert change(before, logits(model)[..., : before.shape[-1]]) > 1e-6


@pytest.mark.parametrize(("name", "values"), LATER)
def test_it_follows_methods_that_keep_the_function(name, values):
    model = small("llama")
    before = logits(model)
    grown(model, name, **values)
    if "new_layers" in values:
        with pytest.raises(PlanError, match="masks of an earlier growth, with which the updates would go"):
            alter(model, blocks=2)
        return
    receipt = alter(model, blocks=2)
    assert change(before, logits(model)[..., : before.shape[-1]]) <= EXACT
    assert receipt.max_relative_change == 0


def test_masks_around_altered_layers_come_off():
    model = shake(altered(small("llama"), blocks=2))
    grown(model, "masked", layers=6, new_layers="copies")
    MaskRamp.set_strength(model, 1.0)
    before = logits(model)
    grown(model, "masked", finish=True)
    assert change(before, logits(model)) <= EXACT
    assert len(updates(model)) == 6


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2", "t5", "vit", "tokenformer"])
def test_an_identity_block_mixes_nothing_and_its_gains_are_free(family):
    model = shake(altered(small(family), blocks=3))
    before, old = logits(model), [module.correction.clone() for module in updates(model).values()]
    grown(model, "llama-pro", group_size=2)
    assert change(before, logits(model)) <= EXACT
    # The copy computes on the block that its original does; others keep theirs, whatever their number is now.
    first = [module for name, module in updates(model).items() if "decoder" not in name]
    assert [module.active for module in first] == [0, 1, 1, 2, 0, 0]
    assert [bool(module.prediction.any()) for module in first] == [True, True, False, True, True, False]
    assert torch.equal(first[2].correction, old[1])
    with torch.no_grad():
        for module in updates(model).values():
            if not module.prediction.any():
                module.correction.add_(torch.tensor([0.3, -0.4, 0.5]))
    assert change(before, logits(model)) <= EXACT
    # Mixing there would change the function.
    with torch.no_grad():
        first[2].prediction[0, 1] = 0.5
    assert change(before, logits(model)) > 1e-3


def test_without_training_depth_is_exact_too():
    model = altered(small("llama"), blocks=2)
    before = logits(model)
    grown(model, "llama-pro", group_size=2)
    assert change(before, logits(model)) <= EXACT


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
@pytest.mark.parametrize("name", ["stacking", "solar", "bert2bert"])
def test_methods_without_a_promise_keep_the_updates(family, name, tmp_path):
    model = shake(altered(small(family), blocks=2))
    grown(model, name)
    assert all(isinstance(layer, AltUpLayer) for layer in blocks_of(model))
    train(model, steps=2)
    model.save_pretrained(tmp_path)
    assert len(updates(type(model).from_pretrained(tmp_path))) == len(updates(model))


def blocks_of(model):
    paths = {name.rpartition(".")[0] for name in updates(model)}
    return [layer for path in paths for layer in model.get_submodule(path)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "tokenformer"])
@pytest.mark.parametrize(
    ("conversion", "name", "values", "message"),
    [
        ("copies", "hypercloning", {"factor": 2}, "embedding and head hold several blocks"),
        ("copies", "bert2bert", {"hidden_size": 64}, "embedding and head hold several blocks"),
        ("copies", "masked", {"hidden_size": 64}, "which masks don't know"),
        ("recycled", "masked", {"hidden_size": 64}, "which masks don't know"),
        ("recycled", "masked", {"layers": 6, "new_layers": "random"}, "Ask for copies"),
        ("recycled", "altup", {"blocks": 2}, "has alternating updates already"),
        ("recycled", "ligo", {}, "bricks of earlier edits"),
    ],
)
def test_what_can_not_follow_is_refused_by_the_method(family, conversion, name, values, message):
    model = altered(small(family), conversion=conversion)
    with pytest.raises(PlanError, match=message) as refusal:
        grown(model, name, **values)
    assert not str(refusal.value).startswith("Edit")


@pytest.mark.parametrize(
    ("name", "values"),
    [("hypercloning", {"factor": 2}), *((name, {"hidden_size": 64}) for name in ("lemon", "bert2bert", "masked"))],
)
def test_dynamic_coefficients_take_no_other_width(name, values):
    model = altered(small("llama"), coefficients="dynamic")
    with pytest.raises(PlanError, match=r"coefficients = dynamic.*Widen first|which masks don't know"):
        grown(model, name, **values)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(("name", "values"), [("llama-pro", {"group_size": 2}), ("net2net", {"num_hidden_layers": 6})])
def test_dynamic_coefficients_of_an_identity_block_mix_nothing(family, name, values):
    model = altered(small(family), coefficients="dynamic", blocks=3)
    with torch.no_grad():
        for layer in updates(model).values():
            for weight in (layer.prediction.weight, layer.correction.weight):
                weight.copy_(torch.randn_like(weight) / 2)
    before = logits(model)
    grown(model, name, **values)
    assert change(before, logits(model)) <= EXACT
    added = [layer for layer in updates(model).values() if not layer.prediction.weight.any()]
    assert len(added) == (4 if family == "t5" else 2)
    assert all(layer.correction.weight.any() for layer in added)
    # Mixing there would change the function.
    with torch.no_grad():
        added[0].prediction.weight.fill_(0.5)
    assert change(before, logits(model)) > 1e-3


def test_dynamic_coefficients_are_stacked_with_their_layers():
    model = altered(small("llama"), coefficients="dynamic")
    grown(model, "stacking")
    assert len(updates(model)) == 8


def test_a_plan_of_a_wide_stream_is_applied_to_a_checkpoint_with_books(tmp_path):
    model = small("t5", dtype=torch.float32)
    model.save_pretrained(tmp_path / "old")
    plan = plan_altup(model, AltUpSettings(conversion="copies", blocks=2))
    receipt = change_checkpoint(plan, tmp_path / "old", tmp_path / "new")
    assert receipt.max_relative_change < 1e-5
    assert Ledger.load(tmp_path / "new").stages[-1].plan["method"] == "altup"
