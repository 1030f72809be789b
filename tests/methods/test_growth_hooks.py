"""Training hooks of token growth."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig

import auxin
from auxin.errors import ConfigError, PlanError
from auxin.methods.grow.tokenformer import OldTokenRates, TauAnneal, TauAnnealSettings
from edits.models import tiny_model, trained, training_step


def grown_model(regime="grouped", **model_values):
    model = tiny_model(**model_values)
    optimizer = trained(model, weight_decay=0.1, lr=1e-2)
    auxin.grow(model, 18, 18, 30, regime=regime, optimizer=optimizer)
    return model, optimizer


def run(model, optimizer, hook, steps, start=0):
    for step in range(start, start + steps):
        hook.before_step(step)
        training_step(model, optimizer, 50 + step)
        hook.after_step(step)


def test_tau_squared_goes_linearly_to_the_size_of_the_group():
    model, optimizer = grown_model("annealed")
    hook = TauAnneal(4)
    hook.attach(model, optimizer)
    seen = [model.config.group_tau("ffn")[0] ** 2]
    for step in range(6):
        run(model, optimizer, hook, 1, step)
        assert model.model.layers[1].mlp.tau.item() == pytest.approx(model.config.ffn_tau[0])
        seen.append(model.config.group_tau("ffn")[0] ** 2)
    assert seen == pytest.approx([20, 22.5, 25, 27.5, 30, 30, 30])
    assert model.config.group_tau("qkv") == pytest.approx([math.sqrt(18)])


def test_a_resumed_anneal_goes_on_where_it_was():
    model, optimizer = grown_model("annealed")
    hook = TauAnneal(5)
    hook.attach(model, optimizer)
    run(model, optimizer, hook, 2)
    resumed = TauAnneal(5)
    resumed.attach(model, optimizer)  # sees scales that are half way already
    resumed.load_state_dict(json.loads(json.dumps(hook.state_dict())))
    run(model, optimizer, resumed, 1, 2)
    assert model.config.group_tau("ffn")[0] ** 2 == pytest.approx(20 + 10 * 3 / 5)


def test_a_model_whose_scores_have_no_norm_has_no_scale_to_anneal():
    model, optimizer = grown_model("annealed", score_function="gelu")
    with pytest.raises(PlanError, match="have no norm"):
        TauAnneal(3).attach(model, optimizer)
    with pytest.raises(PlanError, match="tau_anneal is for a TokenFormer, and this is a llama"):
        TauAnnealSettings(steps=3).check(LlamaConfig())
    # One slot with a norm is enough.
    model, optimizer = grown_model("annealed", score_function="gelu", proj_score_function="l2_norm_gelu")
    hook = TauAnneal(3)
    hook.attach(model, optimizer)
    run(model, optimizer, hook, 3)
    assert model.model.layers[0].attention.proj.tau.item() == pytest.approx(math.sqrt(18))


def old_and_new(model):
    for layer in model.model.layers:
        for module, old in ((layer.mlp, 20), (layer.attention.query, 12), (layer.attention.proj, 12)):
            for parameter in (module.key_tokens, module.value_tokens):
                yield parameter, old


def test_frozen_rows_stay_to_the_last_bit_and_the_others_move():
    model, optimizer = grown_model()
    before = [parameter.detach().clone() for parameter, _ in old_and_new(model)]
    embedding = model.model.embed_tokens.weight.detach().clone()
    hook = OldTokenRates(0.0)
    hook.attach(model, optimizer)
    run(model, optimizer, hook, 3)
    for (parameter, old), then in zip(old_and_new(model), before, strict=True):
        assert torch.equal(parameter[:old], then[:old])
        assert (parameter[old:] != then[old:]).any(dim=1).all()
    assert not torch.equal(model.model.embed_tokens.weight, embedding)


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_old_rows_move_by_the_ratio_of_the_step(ratio):
    models = [grown_model() for _ in range(2)]
    before = [parameter.detach().clone() for parameter, _ in old_and_new(models[0][0])]
    training_step(*models[0], 50)
    hook = OldTokenRates(ratio)
    hook.attach(*models[1])
    run(*models[1], hook, 1)
    pairs = zip(old_and_new(models[0][0]), old_and_new(models[1][0]), before, strict=True)
    for (free, old), (held, _), then in pairs:
        torch.testing.assert_close(held[:old] - then[:old], ratio * (free[:old] - then[:old]), rtol=1e-3, atol=1e-7)
        assert torch.equal(held[old:], free[old:])


def test_counts_say_which_rows_are_old_where_groups_do_not():
    model, optimizer = grown_model("zero_keys")
    with pytest.raises(PlanError, match="Give old_counts"):
        OldTokenRates(0.0).attach(model, optimizer)
    hook = OldTokenRates(0.0, {"ffn": 20})
    hook.attach(model, optimizer)
    mlp, query = model.model.layers[0].mlp, model.model.layers[0].attention.query
    before, free = mlp.key_tokens.detach().clone(), query.key_tokens.detach().clone()
    run(model, optimizer, hook, 2)
    assert torch.equal(mlp.key_tokens[:20], before[:20])
    assert not torch.equal(mlp.key_tokens[20:], before[20:])
    assert not torch.equal(query.key_tokens[:12], free[:12])


def test_after_uneven_growth_the_counts_have_to_be_given():
    model = tiny_model()
    optimizer = trained(model)
    for tokens in ({"ffn_tokens": 30}, {"ffn_tokens": 40}, {"qkv_tokens": 18}):
        auxin.grow(model, **tokens, optimizer=optimizer)
    with pytest.raises(PlanError, match=r"\(qkv 2, proj 1, ffn 3\).*Give old_counts"):
        OldTokenRates(0.0).attach(model, optimizer)
    hook = OldTokenRates(0.0, {"qkv": 12, "proj": 12, "ffn": 40})
    hook.attach(model, optimizer)
    query, mlp = model.model.layers[0].attention.query, model.model.layers[0].mlp
    before, values = query.key_tokens.detach().clone(), mlp.value_tokens.detach().clone()
    run(model, optimizer, hook, 2)
    assert torch.equal(query.key_tokens[:12], before[:12])
    assert (query.key_tokens[12:] != before[12:]).any(dim=1).all()
    assert torch.equal(mlp.value_tokens, values)


def test_wrong_arguments_and_models_are_refused():
    with pytest.raises(ConfigError, match=r"steps must be at least 1, received 0"):
        TauAnneal(0)
    with pytest.raises(ConfigError, match=r"0\.\.1, received 2"):
        OldTokenRates(2)
    model, optimizer = grown_model()
    with pytest.raises(PlanError, match=r"old_counts\['ffn'\] = 31, but the model has 30"):
        OldTokenRates(0, {"ffn": 31}).attach(model, optimizer)
    for hook in (TauAnneal(3), OldTokenRates(0)):
        with pytest.raises(PlanError, match="received a Linear"):
            hook.attach(torch.nn.Linear(2, 2), optimizer)
