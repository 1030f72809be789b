"""Several real processes that each compute a part of every layer, beside one that computes all."""

import json
import math

import pytest
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)

from auxin.accounting import Ledger
from auxin.errors import ConfigError
from auxin.training import latest_checkpoint
from auxin.training.checkpoint import write_checkpoint_folder
from auxin.training.divided_linear import DividedLinear
from training.tiny import FIFTY, NORMED, apart, checkpoint_bits, read_metrics, tiny_llama

TENSOR = {**FIFTY, "strategy": "tensor"}


@pytest.mark.parametrize(
    ("size", "model", "changes"),
    [
        (2, "tokenformer", {"micro_batch_size": 4}),
        # Neither 13, 5 nor 27 tokens come out even, and groups lie across the processes.
        (3, "normed", {}),
        # The fourth process has 1 of 13 tokens, and none of the 5 of the output projection.
        (4, "normed", {"weight_decay": 0.5, "gradient_clip": 0.05}),
        (2, "frozen", {"batch_size": 1}),
    ],
)
def test_processes_learn_what_one_learns(trained, size, model, changes):
    """Fifty steps in double precision: losses, norms, held-out losses, weights and moments."""
    settings = {**FIFTY, **changes}
    alone = trained(1, model, settings=settings)
    together = trained(size, model, settings={**settings, "strategy": "tensor"})
    losses, tensors = apart(alone, together)
    assert losses < 1e-10
    assert tensors < 1e-10


def test_single_precision_stays_near(trained):
    """To 1e-5, as rounding lets it."""
    alone = trained(1, "tokenformer", dtype="float32", settings=FIFTY)
    assert apart(alone, trained(2, "tokenformer", dtype="float32", settings=TENSOR))[0] < 1e-5


def test_all_draw_what_copies_draw(trained):
    """Dropout of each part of a batch, wherever it is computed."""
    settings = {**FIFTY, "micro_batch_size": 4}
    copies = trained(2, "dropped", settings={**settings, "strategy": "replicated"})
    losses, tensors = apart(copies, trained(2, "dropped", settings={**settings, "strategy": "tensor"}))
    assert losses < 1e-10
    assert tensors < 1e-10
    assert apart(copies, trained(1, "normed", settings=settings))[0] > 1e-3, "nothing was dropped"


def test_what_each_has_whole_stays_alike_to_the_bit(run, tmp_path):
    """Of three processes, in single precision."""
    answer = run(tmp_path / "run", 3, model="normed", dtype="float32", settings=TENSOR, digest=True)
    assert answer["codes"] == [0, 0, 0], answer["messages"]
    digests = {(tmp_path / f"run.{rank}.digest").read_text() for rank in range(3)}
    assert len(digests) == 1
    assert digests.pop().split()[0] == "4", "embedding, head and the last norm"


@pytest.mark.parametrize(("size", "later"), [(3, "tensor"), (1, "tensor"), (2, "sharded"), (2, "replicated")])
def test_goes_on_with_another_number_of_processes_or_strategy(trained, run, tmp_path, size, later):
    """Stopped at step 30 of two processes; the books say who trained."""
    folder = tmp_path / "run"
    for answer in (
        run(folder, 2, model="normed", settings=TENSOR, stop_after=30),
        run(folder, size, model="normed", settings={**FIFTY, "strategy": later}),
    ):
        assert not any(answer["codes"]), answer["messages"]
    assert apart(trained(1, "normed", settings=FIFTY), folder)[0] < 1e-10
    words = f"{size} processes ({later})" if size > 1 else "1 process"
    notes = Ledger.load(latest_checkpoint(folder)).stages[-1].notes
    assert (notes[0], notes[-1]) == ("trained by 2 processes (tensor)", f"trained by {words} from step 30")


def test_stopped_and_gone_on_with_ends_in_the_same_bits(trained, run, tmp_path):
    """Of equally many processes."""
    folder = tmp_path / "run"
    for stop in (23, None):
        answer = run(folder, 2, model="normed", settings=TENSOR, stop_after=stop)
        assert answer["codes"] == [0, 0], answer["messages"]
    whole = trained(2, "normed", settings=TENSOR)
    assert checkpoint_bits(latest_checkpoint(whole)) == checkpoint_bits(latest_checkpoint(folder))
    assert read_metrics(whole)[-1] == read_metrics(folder)[-1]


def test_a_bad_step_is_taken_back_by_all(trained):
    """Rewinding goes back to a checkpoint in every process; they end where one ends."""
    guard = {"action": "rewind", "maximum_events": 50}
    request = {"poisoned": [5], "settings": {**FIFTY, "checkpoint_interval": 2, "guard": guard}}
    alone = trained(1, "poisoned_tokens", **request)
    assert any(line.get("event") == "rewind" for line in read_metrics(alone))
    request["settings"] = {**request["settings"], "strategy": "tensor"}
    together = trained(2, "poisoned_tokens", **request)
    last = [read_metrics(folder)[-1]["validation_loss"] for folder in (alone, together)]
    assert math.isclose(*last, abs_tol=1e-10)


@pytest.mark.parametrize(
    ("changes", "forward", "backward"),
    [
        # A number of each row and group of query, key and value, and their outputs; output projection; feed-forward.
        (NORMED, [6 * 32, 3 * 1024, 32, 1024, 3 * 32, 1024], [3 * 32, 1024, 32, 1024, 6 * 32, 1024]),
        ({"score_function": "gelu"}, [3 * 1024, 1024, 1024], [1024, 1024, 1024]),
    ],
)
def test_processes_meet_as_often_as_derived(run, tmp_path, changes, forward, backward):
    """Two layers of 32 rows, 32 wide: the numbers that each reduction adds up, in order."""
    answer = run(tmp_path / "run", 2, "reductions", changes=changes)
    assert answer["codes"] == [0, 0], answer["messages"]
    assert json.loads((tmp_path / "run.json").read_text()) == [2 * forward, 2 * backward]


def test_the_gradients_of_divided_heads_and_units_are_those_of_whole_ones(run, tmp_path):
    """In double precision, by transformers' plans: with biases, an embedding that is the head, norms of heads, fused
    projections, and a vocabulary that does not divide."""
    families = ["llama", "llama, biases, one embedding", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "olmo2"]
    answer = run(tmp_path / "run", 2, "gradients", families=families)
    assert answer["codes"] == [0, 0], answer["messages"]
    for name, (divided, loss, gradients) in json.loads((tmp_path / "run.json").read_text()).items():
        assert divided >= (8 if name == "phi3" else 14), name
        assert abs(loss) < 1e-12, name
        assert gradients < 1e-12, name


@pytest.mark.parametrize("model", ["qwen3", "biased"])
def test_a_model_of_transformers_learns_what_one_process_teaches_it(trained, run, tmp_path, model):
    """Stopped, gone on with by two and by one: moments of columns, of rows and of what is whole."""
    alone = trained(1, model, settings=FIFTY)
    together = trained(2, model, settings=TENSOR)
    for size, stop in ((2, 15), (2, 30), (1, None)):
        answer = run(tmp_path / "run", size, model=model, settings=TENSOR, stop_after=stop)
        assert not any(answer["codes"]), answer["messages"]
    for folder in (together, tmp_path / "run"):
        losses, tensors = apart(alone, folder)
        assert losses < 1e-10
        assert tensors < 1e-10


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"model": "softmax"}, "score_function 'softmax' weighs each token by its share among all"),
        ({"model": "tied"}, "this model (gpt2) has neither. Set strategy: sharded."),
        ({"model": "dropping"}, "attention_dropout: 0.1 is drawn for all heads or units at once"),
        ({"model": "experts", "dtype": "float32"}, "which transformers' plan divides as '"),
        ({"model": "qwen3", "size": 4}, "k_proj has 2 heads, which 4 processes can't divide"),
        ({"model": "normed", "struck": [0, -5, "SIGTERM"]}, "reads or changes whole ones (Struck)"),
    ],
)
def test_what_can_not_be_divided_is_refused_before_anything_is_written(run, tmp_path, request_, message):
    """By all of them, in the same words."""
    answer = run(tmp_path / "run", **{"size": 2, "settings": TENSOR, **request_})
    assert set(answer["codes"]) == {2}
    assert all(message in told for told in answer["messages"])
    assert not (tmp_path / "run").exists()


def test_heads_that_are_compared_with_a_teacher_s_are_not_divided(run, tmp_path):
    """In a process that has some of them, there is nothing to compare."""
    teacher = write_checkpoint_folder(tmp_path / "teacher", tiny_llama())
    objective = {"kind": "distillation", "teacher": str(teacher), "relations": 1.0}
    answer = run(tmp_path / "run", 2, model="qwen3", dtype="float32", settings={**TENSOR, "objective": objective})
    assert answer["codes"] == [2, 2], answer["messages"]
    assert all("divides the heads of attentions, and what is learnt compares them" in t for t in answer["messages"])
    objective = {**objective, "relations": 0.0}
    steps = {**TENSOR, "steps": 5, "warmup_steps": 0}
    answer = run(tmp_path / "run", 2, model="qwen3", dtype="float32", settings={**steps, "objective": objective})
    assert answer["codes"] == [0, 0], answer["messages"]


def test_a_parameter_beside_divided_heads_that_the_plan_does_not_name_is_refused():
    """Each process would train it by its own heads alone."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    assert DividedLinear(model, 2)
    model.tp_plan = {path: style for path, style in model.tp_plan.items() if not path.endswith("k_norm")}
    with pytest.raises(ConfigError, match=r"can't train model\.layers\.0\.self_attn\.k_norm\.weight"):
        DividedLinear(model, 2)


def test_what_is_drawn_for_divided_heads_or_units_is_refused():
    """All processes draw alike, so that each would drop the same of its own."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    decoder = T5GemmaModuleConfig(**sizes, cross_attention_hidden_size=32)
    config = T5GemmaConfig(encoder=T5GemmaModuleConfig(**sizes), decoder=decoder, vocab_size=64)
    config.dropout_rate = 0.0
    model = T5GemmaForConditionalGeneration(config)
    assert DividedLinear(model, 2)
    layer = model.model.encoder.layers[0]
    layer.dropout.p = 0.1  # of what all have whole
    assert DividedLinear(model, 2)
    layer.mlp.dropout.p = 0.2
    with pytest.raises(ConfigError, match=r"^model\.encoder\.layers\.0\.mlp\.dropout: 0\.2 is drawn for all heads or"):
        DividedLinear(model, 2)
    layer.mlp.dropout.p, layer.self_attn.attention_dropout = 0.0, 0.3
    with pytest.raises(ConfigError, match=r"^model\.encoder\.layers\.0\.self_attn\.attention_dropout: 0\.3 is drawn"):
        DividedLinear(model, 2)
