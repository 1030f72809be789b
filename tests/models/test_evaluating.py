"""What runs a model leaves it as it is: also what transformers writes into configs and modules on the way."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import auxin
from auxin.analysis import measure, model_fingerprint
from auxin.analysis.importance import Importance
from auxin.methods.grow.stacking import METHOD as STACKING
from auxin.models.evaluating import evaluating, left_as_it_is
from auxin.objectives.calibration import Calibration
from auxin.planning.bench import Bench
from auxin.planning.method import make_plan

SMALL: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def classifier() -> tuple[Any, Calibration]:
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)).eval()
    rows = {"input_ids": torch.randint(1, 19, (4, 6)), "labels": torch.tensor([0, 1, 2, 0])}
    return model, Calibration.of_batches(model, [rows])


def test_the_kind_of_labels_that_was_seen_is_not_written_down(tmp_path):
    model, data = classifier()
    batch = next(data.batches())
    before = model_fingerprint(model)
    with evaluating(model):
        model(**batch)
        assert model.config.problem_type == "single_label_classification"
    assert model.config.problem_type is None
    passes = []
    watched = replace(data, read=lambda: passes.append(1) or data.read())
    for _ in range(2):
        measure(Importance(score="taylor"), model, watched, cache=tmp_path)
        assert model.config.problem_type is None
    assert len(passes) == 1, "the second time it is known"
    assert model_fingerprint(model) == before


def test_a_plan_function_that_runs_the_model_leaves_it_too():
    model, data = classifier()

    def plan(bench, settings):
        for batch in bench.data.batches():
            bench.model(**batch).loss.backward()
        return STACKING.plan(bench, settings)

    looking = replace(STACKING, plan=plan, needs_weights=True, outline=STACKING.plan)
    made = make_plan(looking, Bench(model, data), STACKING.settings(factor=2))
    assert model.config.problem_type is None
    assert (made.made_for or {}).get("problem_type") is None
    auxin.apply(made, model)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 8,
            "short_factor": [1.0, 1.0],
            "long_factor": [3.0, 4.0],
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_embeddings_that_go_by_the_length_are_what_they_were(rope):
    config = LlamaConfig(**SMALL, max_position_embeddings=8 if rope["rope_type"] == "dynamic" else 64)
    config.rope_parameters = rope
    model = LlamaForCausalLM(config).eval()
    short, long = (torch.randint(1, 19, (2, length)) for length in (10, 40))
    for texts in (long, short[:, :4]):  # once whole, as it is after it was used
        with torch.no_grad():
            model(texts)
        before = model_fingerprint(model)
        measure("similarity", model, Calibration.of_batches(model, [torch.cat([long, short], dim=1)]), cache=False)
        assert model_fingerprint(model) == before
        for other in (long, short[:, :4]):
            with evaluating(model):
                model(other)
            assert model_fingerprint(model) == before


def test_what_is_set_within_is_put_back_after_an_error_too():
    model, _ = classifier()
    rotary = model.model.rotary_emb

    def run() -> None:
        with left_as_it_is(model):
            model.config.problem_type = "regression"
            model.config.hello = 3
            del model.config.pad_token_id
            rotary.attention_scaling = 2.0
            rotary.extra = 1
            rotary.register_buffer("more", torch.ones(1), persistent=False)
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert (model.config.problem_type, model.config.pad_token_id, rotary.attention_scaling) == (None, 0, 1.0)
    assert not any(hasattr(of, name) for of in (model.config, rotary) for name in ("hello", "extra", "more"))
