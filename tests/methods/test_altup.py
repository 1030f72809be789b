"""AltUp on every architecture: conversions that keep the function, blocks that part, and an ordinary model after it."""

import copy
import itertools
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import XGLMConfig, XGLMForCausalLM
from typer.testing import CliRunner

from auxin import cli
from auxin.accounting import count_parameters
from auxin.edits import Plan, apply
from auxin.edits.structure import edited_skeleton
from auxin.errors import ConfigError, PlanError, PromiseError
from auxin.methods.grow.altup import SELECTIONS, AltUpSettings, active_blocks, plan_altup, twins
from auxin.models.anatomy import anatomy
from auxin.nn.altup_layer import AltUpLayer
from auxin.nn.altup_updates import AltUp
from auxin.nn.extension import extended_class
from auxin.nn.wide_stream import block_distance
from covering import families, whole
from methods.altup_models import EVERY, EXACT, alter, altered, outputs, shake, small, streams, train, untied, updates
from tiny_models import FURTHER, MODELS, VOCABULARY, InDouble, change, inputs, logits, tiny

every_family = pytest.mark.parametrize("family", families(EVERY, "bert", "vit", "gemma"))

CONVERSIONS = [
    *({"conversion": name, "blocks": blocks} for name in SELECTIONS if name != "random" for blocks in (2, 3, 4)),
    {"conversion": "recycled", "blocks": 3, "selection": "same"},
    {"conversion": "recycled", "blocks": 3, "coefficients": "dynamic"},
    {"conversion": "recycled", "blocks": 4, "selection": "same", "coefficients": "dynamic"},
    {"conversion": "recycled", "blocks": 3, "selection": "same", "noise": 0.1},
    {"conversion": "recycled", "blocks": 3, "coefficients": "dynamic", "noise": 0.1},
    {"conversion": "copies", "blocks": 3, "selection": "same"},
    {"conversion": "copies", "blocks": 4, "norm": "all"},
    {"conversion": "copies", "blocks": 3, "coefficients": "dynamic"},
    {"conversion": "copies", "blocks": 3, "noise": 0.1},
    {"conversion": "free", "blocks": 3, "coefficients": "dynamic"},
    {"conversion": "zeros", "blocks": 3, "norm": "all"},
]


def refused(family, values):
    """Why a conversion can't be done."""
    if family == "t5" and values["conversion"] in ("free", "relay", "zeros"):
        return "lm_head is the embedding"
    layer_norm = family in ("olmo", "gpt2", "gpt_neox", "vit", "tokenformer")
    if values.get("norm") == "all" and values["conversion"] == "zeros" and layer_norm:
        return "a LayerNorm over blocks of zeros would see another mean"
    return None


@every_family
def test_every_conversion_keeps_the_function(family):
    model = untied(family)
    before = logits(model)
    for values in CONVERSIONS:
        victim = copy.deepcopy(model)
        if reason := refused(family, values):
            with pytest.raises(PlanError, match=reason):
                alter(victim, **values)
            continue
        receipt = alter(victim, **values)
        assert change(before, logits(victim)) <= EXACT, values
        assert receipt.plan.promise == "exact"
        assert {module.blocks for module in updates(victim).values()} == {values["blocks"]}
        # It is another function as soon as mixing and gains move.
        if values["blocks"] == 3:
            assert change(before, logits(shake(victim))) > 1e-3, values


@pytest.mark.parametrize("family", families((family for family in EVERY if family not in ("bert", "vit")), "gemma"))
@pytest.mark.parametrize("values", [{"blocks": 2}, {"blocks": 3, "noise": 0.1}, {"blocks": 4, "norm": "all"}])
def test_copies_of_a_tied_table_keep_the_function(family, values):
    model = small(family, tie_word_embeddings=True)
    before = logits(model)
    alter(model, conversion="copies", **values)
    assert change(before, logits(model)) <= EXACT
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if family == "gemma":
        with pytest.raises(PlanError, match="copies, or untie"):
            alter(small(family, tie_word_embeddings=True), conversion="free")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_family
def test_a_recycled_stream_changes_no_bit(family, dtype):
    model = small(family, dtype=dtype)
    before = outputs(model)
    several = [{"blocks": blocks} for blocks in (2, 3, 4)]
    several += [{"blocks": 3, "selection": "same"}, {"blocks": 3, "coefficients": "dynamic"}]
    for values in several:
        victim = copy.deepcopy(model)
        assert alter(victim, **values).max_relative_change == 0
        assert torch.equal(outputs(victim), before), values
        assert block_distance(streams(victim)) < 1e-6


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 1e-9, 1e-4), (torch.bfloat16, 1e-4, 0.5)])
def test_the_order_of_the_equations_changes_bits(dtype, least, most, monkeypatch):
    model = small("llama", layers=6, dtype=dtype)
    before = logits(model)
    alter(model, blocks=2)

    def as_written(self, old, output):
        p, g = torch.eye(self.blocks) + self.prediction, 1 + self.correction
        predicted = torch.einsum("ij,j...->i...", p.to(old.dtype), old)
        return predicted + g.to(old.dtype).view(-1, 1, 1, 1) * (output - predicted[self.active])

    monkeypatch.setattr(AltUp, "correct", as_written)
    assert least < change(before.float(), logits(model).float()) < most


@pytest.mark.parametrize("gain", [0.9, 1.0])
def test_free_needs_the_gain_of_the_computed_block_and_no_other(gain):
    model = untied("llama")
    before = logits(model)
    shake(altered(model, conversion="free", blocks=3), scale=1.0)
    with torch.no_grad():
        for module in updates(model).values():
            module.correction[module.active] = gain - 1
    moved = change(before, logits(model))
    assert moved <= EXACT if gain == 1 else moved > 1e-3


def test_a_relay_needs_its_rows_and_no_others():
    """Rows p_{j*(l)} and p_{j*(l+1)} of layer l agree, and the gain of the next block is 1; all else is free."""
    model = untied("llama")
    before = logits(model)
    alter(model, conversion="relay", blocks=3)
    mixing = [(module.prediction + torch.eye(3), 1 + module.correction) for module in updates(model).values()]
    for layer, (p, g) in enumerate(mixing):
        now, following = layer % 3, (layer + 1) % 3
        assert torch.equal(p[now], p[following])
        assert g[following] == 1
    shake(model, scale=1.0)
    with torch.no_grad():
        for module in updates(model).values():
            now, following = module.active, (module.active + 1) % 3
            eye = torch.eye(3)
            module.prediction[following] = module.prediction[now] + eye[now] - eye[following]
            module.correction[following] = 0
    assert change(before, logits(model)) <= EXACT


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_the_sum_errs_by_the_last_norms_epsilon(family, blocks):
    field, name = ("rms_norm_eps", "variance_epsilon") if family == "llama" else ("layer_norm_eps", "eps")
    model = small(family, **{field: 1e-6})
    stream = streams(model)
    stream = stream - stream.mean(-1, keepdim=True) if family == "gpt_neox" else stream
    mean_square = stream.square().mean(-1)

    def normed(model):
        found = []
        module = model.get_submodule(anatomy(model, complete=False).stacks[0].end)
        handle = module.register_forward_hook(lambda module, args, out: found.append(out))
        logits(model)
        handle.remove()
        return found[-1]

    before = normed(model)
    receipt = alter(model, collapse="sum", blocks=blocks)
    assert receipt.plan.promise == "approximate"
    norm = model.get_submodule(anatomy(model, complete=False).stacks[0].end)
    assert getattr(norm, name) == 1e-6
    bias = getattr(norm, "bias", None)
    bias = 0 if bias is None else bias.detach()
    ratio = ((normed(model) - bias) / (before - bias)).median(-1).values - 1
    torch.testing.assert_close(ratio, 1e-6 / (2 * mean_square) * (1 - 1 / blocks**2), rtol=1e-4, atol=1e-13)
    setattr(norm, name, blocks**2 * 1e-6)
    torch.testing.assert_close(normed(model), before, rtol=1e-12, atol=1e-12)


@every_family
def test_the_numbers_of_parameters(family):
    model = untied(family)
    body, config = anatomy(model, complete=False), model.config
    width = body.sizes.residual
    layers = 8 if family == "t5" else 4
    before = count_parameters(model).total
    for blocks in (2, 3):
        mixing = layers * (blocks**2 + blocks)
        dynamic = layers * (blocks**3 + blocks**2 + width * (blocks + 1))
        assert added(model, before, blocks=blocks) == mixing
        assert added(model, before, blocks=blocks, coefficients="dynamic") == dynamic
        more = added(model, before, blocks=blocks, conversion="copies") - mixing
        norm = {"llama": 1, "qwen2": 1, "qwen3": 1, "olmo2": 1, "gemma": 1, "gpt2": 2, "gpt_neox": 2}
        norm |= {"vit": 2, "tokenformer": 2, "bert": 0, "olmo": 0, "t5": 0}
        table = 2 * VOCABULARY * width
        expected = (blocks - 1) * (table + norm[family] * width)
        if family == "gpt2":  # positions
            expected += (blocks - 1) * config.n_positions * width
        elif family == "t5":
            # One table, tied, two norms, and the keys and values of the cross-attention of each decoder layer.
            cross = 4 * 2 * (blocks - 1) * width * config.num_heads * config.d_kv
            expected = (blocks - 1) * (VOCABULARY * width + 2 * width) + cross
        elif family in ("bert", "vit"):
            embeddings = model.get_submodule(body.stacks[0].entries[0])
            modules = dict(model.named_modules())
            readers = [modules[path] for path in body.stacks[0].readers if path in modules]
            expected = (blocks - 1) * (
                sum(p.numel() for p in embeddings.parameters())
                + sum(reader.weight.numel() for reader in readers)
                + norm[family] * width
            )
        assert more == expected


def added(model, before, **values):
    skeleton = edited_skeleton(model.config, type(model))
    return alter(skeleton, **values).parameters_after - before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"conversion": "relay", "selection": "same"}, "selection: 'relay' is exact only with 'alternating'"),
        ({"conversion": "free", "selection": "alternating"}, "selection: 'free' is exact only with 'same'"),
        ({"conversion": "zeros", "selection": "alternating"}, "selection: 'zeros' is exact only with 'same'"),
        ({"conversion": "zeros", "coefficients": "dynamic"}, "coefficients: 'zeros' needs mixing or gains"),
        ({"conversion": "relay", "coefficients": "dynamic"}, "coefficients: 'relay' needs mixing or gains"),
        ({"conversion": "copies", "collapse": "sum"}, "collapse: only a recycled stream is summed up"),
        ({"conversion": "free", "norm": "all"}, "norm: 'all' would mix the blocks"),
        ({"conversion": "recycled", "norm": "all"}, "norm: 'all' would mix the blocks"),
        ({"conversion": "zeros", "noise": 0.1}, "noise: 'zeros' is exact without"),
        ({"coefficients": "none"}, "coefficients: 'none' is a control"),
        ({"control": "sum"}, "control: 'sum' goes with conversion = random"),
        ({"blocks": 1}, "blocks.*2 or more"),
        ({"noise": float("nan")}, "noise"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        AltUpSettings.parse(values)


def test_a_wide_embedding_enters_all_stacks_that_share_it():
    settings = AltUpSettings(conversion="copies", part="encoder")
    with pytest.raises(PlanError, match="part: a wide embedding enters every stack"):
        plan_altup(tiny("t5"), settings)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("gpt2", {"conversion": "free"}, "lm_head is the embedding .tied.*copies, or untie"),
        ("t5", {"conversion": "relay"}, "lm_head is the embedding .tied"),
        ("llama", {"blocks": 5}, r"blocks = 5 can't alternate over the 4 layer.*at most 4, or for selection = same"),
        ("llama", {"part": "encoder"}, "part = 'encoder' names no layers"),
        ("bert", {"collapse": "sum"}, "collapse = sum: no norm follows.*Ask for the mean"),
    ],
)
def test_what_a_model_does_not_allow_is_refused(family, values, message):
    with pytest.raises(PlanError, match=message):
        plan_altup(small(family), AltUpSettings.parse(values))


@pytest.mark.parametrize("conversion", ["recycled", "copies"])
def test_twice_is_refused(conversion):
    model = altered(small("llama"), conversion=conversion)
    with pytest.raises(PlanError, match=r"model\.layers\.0 has alternating updates already"):
        plan_altup(model, AltUpSettings(blocks=2))


def test_other_architectures_are_refused_or_built_like_llama():
    config = XGLMConfig(vocab_size=11, d_model=8, num_layers=2, ffn_dim=8, attention_heads=2)
    with pytest.raises(PlanError, match=r"'xglm'.*Nor has it the modules of a decoder like Llama"):
        plan_altup(XGLMForCausalLM(config), AltUpSettings())


def test_adapters_come_off_first():
    model = small("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    before = logits(model)
    with pytest.raises(PlanError, match=r"carries PEFT adapters\. Merge or remove them"):
        alter(adapted, blocks=2)
    with pytest.raises(PlanError, match="carries PEFT adapters"):
        alter(model, blocks=2)
    assert torch.equal(logits(model), before)
    alter(adapted.merge_and_unload(), blocks=2)


def test_embeddings_of_another_width_are_refused():
    model = altered(untied("llama"), conversion="free", blocks=2)
    for width in (15, 16, 64):
        with pytest.raises(ConfigError, match=f"{width} wide and should be 2 x 16 = 32"):
            model(inputs_embeds=torch.zeros(1, 3, width, dtype=torch.float64))
    ids = inputs(model)["input_ids"]
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embedded).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("conversion", ["recycled", "copies"])
def test_twins_stay_equal_for_ever_and_all_others_part(family, conversion):
    settings = AltUpSettings(conversion=conversion, selection="same", blocks=4)
    assert twins(settings, 4) == [1, 2, 3]
    model = altered(small(family), conversion=conversion, selection="same", blocks=4)
    train(model)
    blocks = streams(model)
    for block in blocks[2:]:
        torch.testing.assert_close(block, blocks[1], rtol=1e-9, atol=1e-9)
    assert block_distance(blocks[:2]) > 0.01


PARTING = [
    {"blocks": 2},
    {"blocks": 3},
    {"blocks": 3, "coefficients": "dynamic"},
    {"blocks": 3, "selection": "same", "noise": 0.05},
    {"blocks": 3, "conversion": "copies"},
    {"blocks": 3, "conversion": "copies", "selection": "same", "noise": 0.05},
    {"blocks": 3, "conversion": "free"},
    {"blocks": 3, "conversion": "relay"},
    {"blocks": 3, "conversion": "zeros"},
]
PARTED = [
    pytest.param(family, values, marks=whole if family == "vit" else ())
    for family in ("llama", "t5", "vit")
    for values in PARTING
    if not refused(family, {"conversion": "recycled", **values})
]


@pytest.mark.parametrize(("family", "values"), PARTED)
def test_blocks_part_and_all_that_is_new_learns(family, values):
    model = untied(family)
    assert twins(AltUpSettings.parse(values), 4) == []
    alter(model, **values)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model)
    blocks = streams(model)
    # Dynamic coefficients start from m(x) of size 0.02 / sqrt(d), and so take longer.
    least = 1e-4 if values.get("coefficients") == "dynamic" else 0.01
    assert block_distance(blocks) > least
    for one, other in itertools.combinations(blocks, 2):
        assert block_distance(torch.stack([one, other])) > 1e-4
    width = anatomy(model, complete=False).sizes.residual
    for name, parameter in model.named_parameters():
        if parameter.shape[-1] == values["blocks"] * width:
            for part, old in zip(parameter.split(width, -1), before[name].split(width, -1), strict=True):
                assert not torch.equal(part, old), name
        assert not torch.equal(parameter, before[name]), name


def test_frozen_mixing_and_gains_never_part_recycled_blocks():
    model = altered(small("llama"), blocks=2)
    for module in updates(model).values():
        module.requires_grad_(False)
    before = logits(model)
    train(model)
    assert change(before, logits(model)) > 0.01
    assert block_distance(streams(model)) == 0.0


def test_the_blocks_that_are_computed_are_written_down():
    model = altered(small("llama"), blocks=3)
    assert [module.active for module in updates(model).values()] == [0, 1, 2, 0]
    assert active_blocks(AltUpSettings(blocks=3), 4) == [0, 1, 2, 0]
    assert active_blocks(AltUpSettings(blocks=3, selection="same"), 4) == [0, 0, 0, 0]
    layers = model.model.layers
    assert all(type(layer) is extended_class(AltUpLayer, type(tiny("llama").model.layers[0])) for layer in layers)


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"blocks": 3, "selection": "same"}, "The blocks 1, 2 of model.layers start equal and are never computed"),
        ({"blocks": 3}, "model.layers has 4 layers, no multiple of 3 blocks"),
        ({"blocks": 2, "collapse": "sum"}, "The sum of 2 blocks is 2 times the old stream"),
    ],
)
def test_notes_are_said(values, note):
    model = small("llama")
    plan = plan_altup(model, AltUpSettings.parse(values))
    assert f"Note: {note}" in str(plan)
    assert Plan.parse(plan.model_dump(mode="json")).notes == plan.notes
    with pytest.warns(UserWarning, match=note) as said:
        apply(plan, model)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(plan_altup(other := small("llama"), AltUpSettings()), other)
        # Whoever makes warnings errors keeps the model.
        before = logits(victim := small("llama"))
        with pytest.raises(UserWarning, match=note):
            apply(plan, victim)
        assert not updates(victim)
        assert torch.equal(logits(victim), before)


def test_a_broken_promise_is_noticed():
    """Zero blocks under alternating updates can't be exact: the executor's probe says so."""
    model = untied("llama")
    plan = plan_altup(model, AltUpSettings(conversion="zeros"))
    edits = []
    for edit in plan.edits:
        if getattr(edit, "brick", "") == "altup_layer":
            edits += [
                edit.model_copy(update={"module": f"model.layers.{i}", "settings": {**edit.settings, "active": i % 2}})
                for i in range(4)
            ]
        else:
            edits.append(edit)
    before = logits(model)
    with pytest.raises(PromiseError):
        apply(plan.model_copy(update={"edits": edits}), model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "family", families((family for family in EVERY if family not in ("t5", "bert", "vit")), "gemma")
)
def test_it_is_causal_and_its_cache_keeps_its_size(family):
    plain = small(family)
    ids = inputs(plain)["input_ids"]
    model = shake(altered(copy.deepcopy(plain), blocks=3))
    full = logits(model)
    with torch.no_grad(), InDouble():
        other = ids.clone()
        other[:, 4:] = (other[:, 4:] + 1) % VOCABULARY
        assert torch.equal(model(input_ids=other).logits[:, :4], full[:, :4])
        first = model(input_ids=ids[:, :4], use_cache=True)
        cache, cached = first.past_key_values, [first.logits]
        for position in range(4, ids.shape[1]):
            out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cached.append(out.logits)
        reference = plain(input_ids=ids, use_cache=True).past_key_values
    assert change(full, torch.cat(cached, dim=1)) <= EXACT
    for one, two in zip(cache.layers, reference.layers, strict=True):
        assert one.keys.shape == two.keys.shape
        assert one.values.shape == two.values.shape


@pytest.mark.parametrize("family", families(family for family in EVERY if family not in ("bert", "vit")))
def test_with_wide_embeddings_it_generates_with_and_without_a_cache(family):
    model = shake(altered(small(family), conversion="copies", blocks=3))
    ids = inputs(model)["input_ids"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(written, model.generate(ids, use_cache=False, **settings))
    assert torch.equal(written[:, :7], ids) or family == "t5"


def test_hidden_states_are_streams():
    model = altered(small("llama"), blocks=3)
    states = model(**inputs(model), output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 7, 16), *[(3, 2, 7, 16)] * 3, (2, 7, 16)]


CONTROLS = [{"coefficients": "none", "selection": "same"}, {"control": "sum"}]


@pytest.mark.parametrize("values", CONTROLS)
@every_family
def test_controls_widen_the_table_and_nothing_between(family, values):
    model = untied(family)
    body, before = anatomy(model, complete=False), count_parameters(model).total
    if "control" in values and family == "gpt2":
        with pytest.raises(PlanError, match=r"control = sum: .* are added up before the first layer already"):
            alter(model, conversion="random", **values)
        return
    receipt = alter(model, conversion="random", blocks=2, **values)
    assert receipt.plan.promise == "none"
    assert receipt.parameters_after > before
    assert not any(".altup." in name for name, _ in model.named_parameters())
    if values.get("control") is None:
        # The second block comes out as it went in.
        seen = []
        first = next(iter(model.get_submodule(body.stacks[-1].path)))
        handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        last = streams(model)
        handle.remove()
        assert torch.equal(last[1], seen[0][..., body.sizes.residual :])
        assert not torch.equal(last[0], seen[0][..., : body.sizes.residual])
    train(model, steps=2)


def test_the_command_line_says_notes(tmp_path):
    model = small("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "old")
    plan_altup(model, AltUpSettings(blocks=3)).to_yaml(tmp_path / "plan.yaml")
    arguments = ["apply", str(tmp_path / "old"), str(tmp_path / "plan.yaml"), "-o", str(tmp_path / "new")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "Note: model.layers has 4 layers, no multiple of 3 blocks" in result.output


def test_everything_tested_is_known():
    assert set(EVERY) == set(MODELS) - set(FURTHER)
    assert isinstance(small("llama").model.layers, nn.ModuleList)
