"""A train stage that trains a LoRA and merges it: what it trains and leaves, its bits after a break, its price."""

import json

import pytest
import torch

from auxin.accounting import Ledger
from auxin.errors import ConfigError
from auxin.models.loading import load_model
from auxin.recipes import Recipe, price_recipe
from auxin.recipes.folder import OUTCOME_FILE
from auxin.recipes.runner import opened_run, run_branch
from corpora import small_corpus, write_documents

LLAMA = {
    "kind": "build",
    "model_type": "llama",
    "config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}
TOKENFORMER = {
    "kind": "build",
    "model_type": "tokenformer",
    "config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "qkv_tokens": 4,
        "proj_tokens": 4,
        "ffn_tokens": 8,
    },
}
TAUGHT = {"kind": "distillation", "teacher": "cut/base", "weight": 0.5}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"))


def recipe(
    corpus, lora: dict, build: dict = LLAMA, cut: dict | None = None, mend: dict | None = None, hooks=()
) -> Recipe:
    cut = cut or {"method": "magnitude", "settings": {"heads": 0.5, "ffn": 0.5}}
    stages = [
        build,
        {"kind": "train", "name": "base", "settings": {"steps": 20}},
        {"kind": "change", **cut},
        {
            "kind": "train",
            "name": "mend",
            "lora": lora,
            "hooks": list(hooks),
            "settings": {"steps": 12, "checkpoint_interval": 5, **(mend or {})},
        },
        {"kind": "train", "name": "on", "settings": {"steps": 2}},
    ]
    return Recipe.parse(
        {
            "name": "lora",
            "title": "Mended by a LoRA",
            "data": small_corpus(corpus),
            "training": {"batch_size": 4, "learning_rate": 1e-2, "tensorboard": False, "device": "cpu"},
            "branches": [{"name": "cut", "title": "cut", "stages": stages}],
        }
    )


def run_to_the_end(chosen: Recipe, folder):
    with opened_run(chosen, folder, lambda line: None) as run:
        run_branch(run, chosen.branches[0])
    return run


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    chosen = recipe(corpus, {"rank": 2, "dropout": 0.1}, mend={"objective": TAUGHT})
    folder = tmp_path_factory.mktemp("finished")
    return chosen, run_to_the_end(chosen, folder), folder


def weights(checkpoint) -> dict[str, torch.Tensor]:
    return load_model(checkpoint).state_dict()


def test_it_leaves_a_plain_model_that_is_mended_within_the_rank(finished):
    chosen, run, _ = finished
    before, after = (weights(run.checkpoint("cut", name)) for name in ("change", "mend"))
    checkpoint = run.checkpoint("cut", "mend")
    assert not list(checkpoint.glob("adapter*"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("_proj.weight")}
    for name in moved:
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert values[1] > 1e-5 > values[2:].max()
    record = Ledger.load(checkpoint).stages[-1]
    assert record.value_after < record.value_before
    assert record.parameters == sum(parameter.numel() for parameter in load_model(checkpoint).parameters())
    again = run.measured(checkpoint, chosen.measures)["loss"]
    assert again == pytest.approx(record.value_after, abs=1e-5)
    matrices = sum(2 * sum(after[name].shape) for name in moved)
    assert f"a LoRA of {matrices:,} parameters was trained" in record.notes[-1]
    # The next stage trains all of it, without moments of before.
    assert all(not torch.equal(after[name], value) for name, value in weights(run.checkpoint("cut", "on")).items())


def test_broken_off_before_it_was_merged_it_ends_with_the_same_bits(finished, tmp_path):
    chosen, run, _ = finished
    mend = chosen.branches[0].stages[3]
    folder = tmp_path / "again"
    with opened_run(chosen, folder, lambda line: None) as again:
        run_branch(again, chosen.branches[0])
        stage = again.stage_directory(chosen.branches[0], mend)
        (stage / OUTCOME_FILE).unlink()
        for name in ("config.json", "model.safetensors"):
            (stage / "checkpoint" / name).unlink()
    with opened_run(chosen, folder, lambda line: None) as again:
        run_branch(again, chosen.branches[0])
        there, here = weights(again.checkpoint("cut", "mend")), weights(run.checkpoint("cut", "mend"))
    assert all(torch.equal(value, here[name]) for name, value in there.items())


def test_the_price_is_that_of_the_books_and_spares_moments(finished, corpus):
    chosen, run, _ = finished
    price, full = price_recipe(chosen, form=run.data.form), price_recipe(without_lora(chosen), form=run.data.form)
    asked, all_of_it = price.stages[3], full.stages[3]
    record = Ledger.load(run.checkpoint("cut", "mend")).stages[-1]
    assert record.flops == pytest.approx(asked.flops)
    assert all_of_it.flops < asked.flops < 1.5 * all_of_it.flops
    assert asked.memory_bytes < all_of_it.memory_bytes


def without_lora(chosen: Recipe) -> Recipe:
    values = json.loads(chosen.model_dump_json())
    values["branches"][0]["stages"][3]["lora"] = None
    return Recipe.parse(values)


def test_a_tokenformer_has_it_at_its_tokens(corpus, tmp_path):
    grown = {"tokens": {"qkv_tokens": 8, "proj_tokens": 8, "ffn_tokens": 16}}
    chosen = recipe(corpus, {"rank": 2, "parameters": ["key_tokens", "value_tokens"]}, TOKENFORMER, grown)
    run = run_to_the_end(chosen, tmp_path)
    before, after = (weights(run.checkpoint("cut", name)) for name in ("change", "mend"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(("key_tokens", "value_tokens"))}


def test_a_model_without_an_attention_has_it_too(corpus, tmp_path):
    """What no config says is there again when the merged model is loaded."""
    cut = {"method": "finercut", "settings": {"removed": 1}, "calibration": {"samples": 4}}
    run = run_to_the_end(recipe(corpus, {"rank": 2}, cut=cut), tmp_path)
    before, after = (load_model(run.checkpoint("cut", name)) for name in ("change", "mend"))
    assert [name for name, _ in after.named_modules()] == [name for name, _ in before.named_modules()]
    assert Ledger.load(run.checkpoint("cut", "mend")).stages[-1].value_after == pytest.approx(
        run.measured(run.checkpoint("cut", "mend"), run.recipe.measures)["loss"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("lora", "build", "said"),
    [
        ({"modules": ["q_porj"]}, LLAMA, r"cut/mend: lora: llama can't have it: .*q_porj"),
        ({}, TOKENFORMER, r"cut/mend: lora: tokenformer can't have it: .*key_tokens and value_tokens"),
        ({"rank": 0}, LLAMA, r"rank.*0"),
        ({"rank": 49}, LLAMA, r"cut/mend: lora.rank: 49 is more than any .* is (\d+)\. Give less"),
    ],
)
def test_what_can_not_be_is_refused_before_the_run(corpus, lora, build, said):
    cut = None if build is LLAMA else {"tokens": {"qkv_tokens": 8, "proj_tokens": 8, "ffn_tokens": 16}}
    with pytest.raises(ConfigError, match=said):
        price_recipe(recipe(corpus, lora, build, cut))


@pytest.mark.parametrize(
    ("cut", "hooks", "kind"),
    [
        ({"method": "masked", "settings": {"intermediate_size": 48, "ramp_steps": 4}}, [], "mask_ramp"),
        (None, [{"kind": "old_rates", "ratio": 0.1}], "old_rates"),
    ],
)
def test_hooks_beside_it_are_refused(corpus, cut, hooks, kind):
    with pytest.raises(ConfigError, match=rf"cut/mend: lora: the stage has the hook '{kind}'"):
        price_recipe(recipe(corpus, {}, cut=cut, hooks=hooks))
