"""Targets of attention are what loops over hand-written maps count, on every architecture, and the model comes to no
harm."""

import gc
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.utils import logging

from analysis.hand_written import by_hand
from analysis.samples import Samples
from auxin.analysis import Estimate, measure, measure_all
from auxin.analysis.attention_targets import AttentionTargets, Targets
from auxin.analysis.similarity import Similarity
from auxin.edits import Plan, ReplaceModule, apply
from auxin.errors import ConfigError, DataError, PlanError
from covering import whole
from oracles import attention_targets as oracle
from oracles.similarity import recorded_maps
from tiny_models import FAMILIES, MODELS, InDouble, inputs, labels, tiny

SPECIAL = [0, 1, 3]
LENGTHS = (7, 4, 1, 6)
OWN = (
    "gemma2",
    "gpt_oss",
    "falcon",
    "mpt",
    "mpnet",
    "deberta",
    "modernbert",
    "bart",
    "whisper",
    "clip",
    "beit",
    "cohere",
)
"""Beside the usual ones: windows, a learned sink, maps that are given only to who asks, biases of four axes, towers."""
EVERY = [*FAMILIES, *OWN, *(pytest.param(f, marks=whole) for f in MODELS if f not in (*FAMILIES, *OWN, "albert"))]


@pytest.fixture(autouse=True)
def quiet():
    """transformers warns where it can't choose the attention of an architecture."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def found(model: Any, data: Samples, special: list[int] | None = SPECIAL) -> Targets:
    with InDouble():
        return measure(AttentionTargets(special_ids=special), model, data, cache=False)


def padded(model: Any, left: bool = False) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Samples of several lengths, and the same ones by themselves."""
    whole, alone = inputs(model, batch=len(LENGTHS)), []
    mask = torch.zeros(len(LENGTHS), 7, dtype=torch.long)
    for n, length in enumerate(LENGTHS):
        place = slice(7 - length, 7) if left else slice(0, length)
        mask[n, place] = 1
        alone.append({name: rows[n, place] for name, rows in whole.items()})
    rows = whole | {"attention_mask": mask}
    if "decoder_input_ids" in rows:
        kept = torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1] * 5])
        rows["decoder_attention_mask"] = kept
        for n, row in enumerate(alone):
            row["decoder_input_ids"] = whole["decoder_input_ids"][n, : int(kept[n].sum())]
    return rows, alone


def attentions_by_hand(model: Any, row: dict[str, Tensor]) -> list[tuple[Any, list[int], list[list[int]], bool]]:
    """Of one sample every map with the keys' ids, the keys that each query sees, and whether it looks across."""
    with recorded_maps() as maps:
        by_hand(model, row)
    ids = row["input_ids"].tolist() if "input_ids" in row else []
    family = model.config.model_type
    encoder = ("encoder", ids, False)
    kinds = [encoder] * 2
    if family == "t5":
        written = row["decoder_input_ids"].tolist()
        kinds += [("decoder", written, False), ("decoder", ids, True)] * 2
    told = []
    for weights, (place, keys, across) in zip(maps, kinds, strict=True):
        causal = not across and (place == "decoder" or family not in ("bert", "vit", "t5"))
        queries, count = weights.shape[1:]
        seen = [list(range(query + 1 if causal else count)) for query in range(queries)]
        told.append((weights, keys, seen, across))
    return told


def flat(result: Targets) -> dict[str, Any]:
    """Every attention by its module."""
    return {item.module: item for stack in result.stacks for item in stack.attentions}


def check(estimate: Estimate, values: list[float], close: float) -> None:
    assert estimate.mean == pytest.approx(np.mean(values), abs=close)
    assert estimate.deviation == pytest.approx(np.std(values, ddof=1), abs=close)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit", "gpt_neox", "olmo2", "tokenformer"])
def test_they_are_what_loops_over_hand_written_maps_count(family):
    model = tiny(family)
    if family == "vit":
        rows = inputs(model, batch=4)
        alone = [{"pixel_values": row} for row in rows["pixel_values"]]
    else:
        rows, alone = padded(model, left=family == "llama")
    result = found(model, Samples(rows, batch_size=4))
    samples = [attentions_by_hand(model, row) for row in alone]
    order = flat(result)
    if family == "t5":  # by hand a decoder's layers come whole
        names = [f"encoder.block.{n}.layer.0.SelfAttention" for n in range(2)]
        parts = ("0.SelfAttention", "1.EncDecAttention")
        names += [f"decoder.block.{n}.layer.{part}" for n in range(2) for part in parts]
    else:
        names = list(order)
    # The angles of a TokenFormer's rotation are float32 whatever the model's type.
    close = 1e-6 if family == "tokenformer" else 1e-10
    assert len(names) == len(samples[0])
    for number, name in enumerate(names):
        assert len(order[name].heads) == 4
        for h, head in enumerate(order[name].heads):
            told = [sample[number] for sample in samples]
            shares = [oracle.shares(maps[h], ids, set(SPECIAL), across) for maps, ids, _, across in told]
            assert set(head.shares) == set(shares[0])
            for target, estimate in head.shares.items():
                check(estimate, [share[target] for share in shares], close)
            check(head.entropy, [oracle.entropy(maps[h], seen) for maps, _, seen, _ in told], close)
            check(head.apart, [oracle.apart(maps[h], seen) for maps, _, seen, _ in told], 1e3 * close)
            check(head.silent, [oracle.silent(maps[h]) for maps, *_ in told], 0)
        alike = [oracle.counted(seen, ids, set(SPECIAL), across) for _, ids, seen, across in told]
        for target, estimate in order[name].uniform.items():
            check(estimate, [share[target] for share in alike], 1e-10)


def test_rows_that_a_clipping_silences_are_counted():
    """Of maps that transformers collects of a clipped model."""
    model = tiny("bert")
    edits: Any = [
        ReplaceModule(module="bert.encoder.layer.*.attention.self", brick="clipped_softmax", settings={"gamma": -0.35})
    ]
    apply(Plan(method="by hand", promise="none", edits=edits), model)
    data = Samples.of(model, samples=3, batch_size=3)
    result = found(model, data)
    model.set_attn_implementation("eager")
    with torch.no_grad(), InDouble():
        maps = [layer.numpy() for layer in model(**data.rows, output_attentions=True).attentions]
    shares = []
    for item, layer in zip(flat(result).values(), maps, strict=True):
        for h, head in enumerate(item.heads):
            check(head.silent, [oracle.silent(sample[h]) for sample in layer], 1e-12)
            everything = [list(range(layer.shape[-1]))] * layer.shape[-2]
            check(head.apart, [oracle.apart(sample[h], everything) for sample in layer], 1e-9)
            shares.append(head.silent.mean)
            assert head.shares["nothing"].mean > head.silent.mean
    assert max(shares) > 0
    assert any(
        re.match(r"[\d.]+% of the rows read nothing, most of them in head \d+ of bert.encoder", told)
        for told in result.findings()
    )


@pytest.mark.parametrize("family", EVERY)
def test_every_architecture_gives_the_maps_that_transformers_collects(family):
    """Without padding: the same shares, counted on what `output_attentions` gives, and they sum up to 1."""
    model = tiny(family)
    data = Samples.of(model, samples=3, batch_size=3)
    result = found(model, data, special=None)
    for _, head in ((n, h) for n, h in result.heads()):
        assert sum(share.mean for share in head.shares.values()) == pytest.approx(1, abs=1e-12)
        assert 0 <= head.entropy.mean <= 1 + 1e-12
    model.set_attn_implementation("eager")
    with torch.no_grad(), InDouble():
        output = model(**data.rows, output_attentions=True)
    towers = [getattr(output, f"{tower}_model_output", None) for tower in ("vision", "text")]
    collected = [
        list(maps)
        for place in (output, *towers)
        for name in ("encoder_attentions", "attentions", "decoder_attentions", "cross_attentions")
        if (maps := getattr(place, name, None))
    ]
    assert [len(maps) for maps in collected] == [len(stack.attentions) for stack in result.stacks]
    for stack, maps in zip(result.stacks, collected, strict=True):
        for item, weights in zip(stack.attentions, maps, strict=True):
            assert len(item.heads) == weights.shape[1]
            ids = reads(model, stack.path, stack.kind, data.rows)
            for h, head in enumerate(item.heads):
                across = stack.kind == "cross-attention"
                values = [
                    oracle.shares(weights[n, h].numpy(), ids[n] if ids else [], set(result.special_ids), across)
                    for n in range(3)
                ]
                for target, share in head.shares.items():
                    told = [v.get(target, 1 - sum(v.values())) for v in values]
                    assert share.mean == pytest.approx(np.mean(told), abs=1e-10), (item.module, target)


def reads(model: Any, stack: str, kind: str, rows: dict[str, Tensor]) -> list[list[int]]:
    """The ids of the keys; none where they are pixels or sounds."""
    if "decoder" in stack and kind == "attention" and "decoder_input_ids" in rows:
        return rows["decoder_input_ids"].tolist()
    if "vision" in stack or "input_ids" not in rows:
        return []
    return rows["input_ids"].tolist()


@settings(max_examples=20)
@given(
    family=st.sampled_from(("llama", "t5", "bert")),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 9),
)
def test_the_size_of_the_batches_changes_nothing(family, sizes, seed):
    model = tiny(family)
    one, other = (found(model, Samples.of(model, 7, size, seed)).model_dump_json() for size in sizes)
    pattern = re.compile(r"-?\d+\.\d+(?:e-?\d+)?|null")
    for a, b in zip(pattern.findall(one), pattern.findall(other), strict=True):
        assert a == b or float(a) == pytest.approx(float(b), abs=1e-10)


@settings(max_examples=20)
@given(head=st.integers(0, 3), layer=st.integers(0, 1), seed=st.integers(0, 9), special=st.sets(st.integers(0, 18)))
def test_a_head_without_queries_attends_to_all_alike(head, layer, seed, special):
    """Its scores are zeros, so that its shares are those of counting, and its entropy is that of uniform attention."""
    model = tiny("llama", seed=seed)
    attention = model.model.layers[layer].self_attn
    with torch.no_grad():
        attention.q_proj.weight[4 * head : 4 * head + 4] = 0
        attention.q_proj.bias[4 * head : 4 * head + 4] = 0
    rows, alone = padded(model)
    (stack,) = found(model, Samples(rows), sorted(special)).stacks
    item = stack.attentions[layer]
    counted = [
        oracle.counted([list(range(q + 1)) for q in range(length)], row["input_ids"].tolist(), special, False)
        for length, row in zip(LENGTHS, alone, strict=True)
    ]
    for target, share in item.heads[head].shares.items():
        assert share.mean == pytest.approx(np.mean([one[target] for one in counted]), abs=1e-12)
        assert share.mean == pytest.approx(item.uniform[target].mean, abs=1e-12)
    assert item.heads[head].entropy.mean == pytest.approx(1, abs=1e-12)
    others = [item.heads[n] for n in range(4) if n != head]
    assert all(other.entropy.mean < 1 - 1e-6 for other in others)


def test_what_a_learned_sink_takes_goes_to_nothing():
    model = tiny("gpt_oss")
    data = Samples.of(model, samples=3)
    result = found(model, data)
    assert result.stacks[0].targets[-1] == "nothing"
    for attention, part in zip(result.stacks[0].attentions, model.model.layers, strict=True):
        before = [head.shares["nothing"].mean for head in attention.heads]
        with torch.no_grad():
            part.self_attn.sinks.fill_(60.0)
        assert all(0 < share < 1 for share in before)
    for _, head in found(model, data).heads():
        assert head.shares["nothing"].mean > 0.99
    assert "nothing" in result.tables()[0].header


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_rounding_is_no_sink(family, dtype):
    """A model of float64 computes its softmax in float32, and rows of bfloat16 sum up to 1 or something like it."""
    model = tiny(family, dtype=dtype)
    result = measure(AttentionTargets(), model, Samples.of(model), cache=False)
    for _, head in result.heads():
        assert "nothing" not in head.shares
        assert sum(share.mean for share in head.shares.values()) == pytest.approx(1, abs=4e-3)


def test_special_ids_are_those_of_the_config_or_the_given_ones():
    model = tiny("llama", bos_token_id=2, eos_token_id=[4, 5], pad_token_id=6)
    data = Samples.of(model)
    assert found(model, data, special=None).special_ids == [2, 4, 5, 6]
    assert found(model, data, special=[7, 3, 7]).special_ids == [3, 7]
    none = found(model, data, special=[])
    assert all(head.shares["special"].mean == 0 for _, head in none.heads())
    assert none.findings()[0] == "No token of the samples is special; special_ids = []."
    every = found(model, data, special=list(range(19)))
    assert all(head.shares["special"].mean == pytest.approx(1) for _, head in every.heads())
    with pytest.raises(ConfigError, match="special_ids: 19 is no token of the model, whose vocab_size is 19"):
        found(model, data, special=[19])
    with pytest.raises(ConfigError, match="special_ids"):
        AttentionTargets.parse({"special_ids": [-1]}, source="attention-targets")


def test_a_decoder_whose_inputs_are_made_of_labels_knows_what_it_reads():
    model = tiny("t5")
    given = {"input_ids": inputs(model)["input_ids"], "labels": labels(model)}
    made = {"input_ids": given["input_ids"], "decoder_input_ids": model._shift_right(given["labels"])}
    assert found(model, Samples(given)) == found(model, Samples(made))


def test_the_model_stays_as_it_is():
    for family in ("llama", "clip", "falcon", "mpnet"):
        model = tiny(family)
        if family == "clip":
            model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})

        def state(model: Any = model) -> list[Any]:
            configs = [module.config for module in model.modules() if hasattr(module, "config")]
            return [
                [config._attn_implementation for config in configs],
                [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
                [module.training for module in model.modules()],
            ]

        model.train()
        before = state()
        data = Samples.of(model)
        found(model, data)
        assert state() == before, family
        if "input_ids" in data.rows:
            wrong = Samples({**data.rows, "input_ids": torch.full_like(data.rows["input_ids"], 10**6)})
            with pytest.raises(IndexError):
                found(model, wrong)
            assert state() == before, family


def test_it_shares_a_pass_and_is_kept(tmp_path):
    model = tiny("llama")
    data = Samples.of(model)
    alone = [measure(item, model, data, cache=False) for item in (Similarity(), AttentionTargets())]
    data.passes = 0
    records = measure_all(["similarity", "attention-targets"], model, data, cache=tmp_path)
    assert [record.result for record in records] == alone
    assert measure("attention-targets", model, data, cache=tmp_path) == alone[1]
    assert data.passes == 1
    measure(AttentionTargets(special_ids=[5]), model, data, cache=tmp_path)
    assert data.passes == 2


def test_one_map_is_there_at_a_time():
    model, length, alive = tiny("llama", num_hidden_layers=3), 13, []

    def is_map(item: object) -> bool:
        return type(item) is Tensor and item.dim() == 4 and item.shape[1:] == (4, length, length)

    def count(module: torch.nn.Module, arguments: Any) -> None:
        alive.append(sum(is_map(item) for item in gc.get_objects()))

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(count)
    measure(AttentionTargets(), model, Samples(inputs(model, batch=3, length=length)), cache=False)
    assert len(alive) == 6
    assert max(alive) <= 1


def test_models_without_maps_are_refused():
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, arguments, output: (output[0], None))
    before = model.config._attn_implementation
    with pytest.raises(PlanError, match=r"No attention of model\.layers gives its map, also with eager attention"):
        found(model, Samples.of(model))
    assert model.config._attn_implementation == before
    shared = tiny("albert")
    with pytest.raises(PlanError, match="is run several times in one pass"):
        found(shared, Samples.of(shared))


def test_masks_that_do_not_fit_are_refused():
    model = tiny("bert")
    rows = inputs(model)
    with pytest.raises(DataError, match=r"attention_mask has shape \(2, 1, 7, 7\)"):
        found(model, Samples({**rows, "attention_mask": torch.ones(2, 1, 7, 7)}))


def test_a_person_can_read_it():
    for family in ("t5", "gpt_oss"):
        model = tiny(family, dtype=torch.float32)
        result = measure(AttentionTargets(), model, Samples.of(model), cache=False)
        assert Targets.model_validate_json(result.model_dump_json()) == result
        for table, stack in zip(result.tables(), result.stacks, strict=True):
            assert table.title.startswith(f"{stack.path}, {stack.kind}")
            widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
            assert sum(widths) + 2 * (len(widths) - 1) <= 80
            entropies = [head.entropy.mean for head in stack.attentions[1].heads]
            assert table.rows[1][-2] == f"{np.mean(entropies):.2f} {max(entropies):.2f}"
            margins = [share.margin for head in stack.attentions[1].heads for share in head.shares.values()]
            assert table.rows[1][-1] == f"± {max(margins):.2g}"
        best = max(result.heads(), key=lambda named: named[1].share("current"))
        assert f". Most: {best[0]} ({best[1].share('current'):.4f})," in result.findings()[-1]
        root = ElementTree.fromstring(result.picture("A model"))
        texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]
        assert {"A model", f"current ({result.stacks[0].path})", f"entropy ({result.stacks[0].path})"} <= set(texts)
        assert ("entropy (decoder.block, cross-attention)" in texts) == (family == "t5")
        told = [element.text for element in root.iter() if element.tag.endswith("}title")][1:]
        cells = [
            f"{number}, {h}: {head.shares[target].mean:.4g}"
            for stack in result.stacks
            for target in stack.targets
            if any(head.shares[target].mean for item in stack.attentions for head in item.heads)
            for number, item in enumerate(stack.attentions)
            for h, head in enumerate(item.heads)
        ]
        assert set(cells) <= set(told)
        assert len(told) == len(cells) + len(list(result.heads()))
