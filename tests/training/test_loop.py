"""The loop: what it learns, accumulates, measures, resumes and refuses."""

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, MixtralConfig, MixtralForCausalLM

from auxin.accounting.flops import flops_per_token
from auxin.accounting.ledger import Ledger, StageRecord
from auxin.data import CorpusSettings, make_loader, prepare
from auxin.errors import CheckpointError, ConfigError, TrainingError
from auxin.nn import Pattention
from auxin.objectives.causal import Causal
from auxin.objectives.measures import Accuracy, Loss
from auxin.training import latest_checkpoint, load_model, train
from auxin.training import loop as loop_module
from auxin.training.fit import check_fit
from auxin.training.hardware import choose_precision, peak_flops
from corpora import small_corpus, write_documents
from training.tiny import (
    CONTEXT,
    MODELS,
    VOCABULARY,
    Look,
    TinyData,
    bits,
    checkpoint_bits,
    held_out_loss,
    read_metrics,
    tiny_gpt2,
    tiny_llama,
    tiny_settings,
    tiny_tokenformer,
    weights,
)


def tiny_bert(is_decoder: bool = False) -> BertLMHeadModel:
    """Bidirectional, unless it is a decoder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        is_decoder=is_decoder,
    )
    return BertLMHeadModel(config)


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config)


def run(model, folder: Path, data: TinyData | None = None, **changes: object):
    options = {key: changes.pop(key) for key in list(changes) if key in OPTIONS}
    return train(model, data or TinyData(), tiny_settings(**changes), folder, progress=False, **options)


OPTIONS = {"stop_after", "measures", "optimizer_from", "ledger", "hooks", "stage_name", "data_position", "tokenizer"}


@pytest.mark.parametrize("kind", MODELS)
def test_any_causal_language_model_learns(tmp_path, kind):
    model = MODELS[kind]()
    data = TinyData()
    result = run(model, tmp_path, steps=60, learning_rate=1e-2)
    record = result.ledger.stages[-1]
    assert record.value_before == pytest.approx(math.log(VOCABULARY), abs=0.5)
    assert result.value == record.value_after
    assert result.value == pytest.approx(held_out_loss(model, data.validation, 4), abs=1e-6)
    assert result.value < 0.6 * record.value_before
    assert bits(weights(load_model(result.checkpoint))) == bits(weights(model))


def test_trains_on_a_prepared_corpus_and_saves_its_tokenizer(tmp_path):
    settings = small_corpus(write_documents(tmp_path / "text"), context_length=32)
    data = prepare(CorpusSettings(**settings), tmp_path / "data")
    result = train(
        tiny_llama(vocab_size=data.vocab_size), data, tiny_settings(steps=4), tmp_path / "run", progress=False
    )
    assert (result.checkpoint / "tokenizer.json").is_file()
    assert result.ledger.stages[-1].data_fingerprint == data.fingerprint


# One step, by hand.


def gradients_of(model, batch: torch.Tensor) -> list[torch.Tensor]:
    logits = model.train()(input_ids=batch).logits[:, :-1].double()
    torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("micro", [None, 1, 2, 3, 8])
def test_accumulated_gradients_are_those_of_the_mean_over_tokens(tmp_path, micro):
    """3 divides 8 into parts of 3, 3 and 2: the last must weigh less."""
    look, data = Look(), TinyData()
    options = {"steps": 1, "batch_size": 8, "micro_batch_size": micro, "gradient_clip": None, "warmup_steps": 0}
    run(tiny_llama(), tmp_path, data, hooks=[look], decay_fraction=0.0, **options)
    batch = next(iter(make_loader(data.split("train"), 8, seed=0)))["input_ids"]
    for got, expected in zip(look.gradients[0], gradients_of(tiny_llama(), batch), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    line = next(line for line in read_metrics(tmp_path) if "loss" in line)
    expected_norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients_of(tiny_llama(), batch)))
    assert line["gradient_norm"] == pytest.approx(expected_norm, rel=1e-5)


def test_small_batches_accumulate_to_the_large_one(tmp_path):
    whole, parts = tiny_llama(), tiny_llama()
    run(whole, tmp_path / "whole", steps=10, batch_size=8)
    run(parts, tmp_path / "parts", steps=10, batch_size=8, micro_batch_size=3)
    assert not torch.equal(weights(parts), weights(tiny_llama()))
    torch.testing.assert_close(weights(parts), weights(whole), atol=2e-4, rtol=1e-3)


def test_gradients_are_clipped_before_the_update(tmp_path):
    look = Look()
    run(tiny_llama(), tmp_path, steps=5, gradient_clip=0.1, hooks=[look])
    norms = [math.sqrt(sum(float(g.square().sum()) for g in step)) for step in look.gradients]
    assert norms == pytest.approx([0.1] * 5, rel=1e-3)
    assert all(line["gradient_norm"] > 0.2 for line in read_metrics(tmp_path) if "loss" in line)


# Books and metrics.


def test_metrics_and_ledger_agree_with_arithmetic(tmp_path):
    parent = Ledger(stages=[StageRecord(name="before", kind="train", parameters=1, units=10, flops=20.0)])
    settings = {"steps": 12, "log_interval": 4, "evaluation_interval": 6, "evaluation_batches": 1}
    result = run(tiny_llama(), tmp_path, ledger=parent, stage_name="base", **settings)
    flops = flops_per_token(tiny_llama(), CONTEXT).training
    assert (result.steps, result.units, result.flops) == (12, 12 * 4 * CONTEXT, 12 * 4 * CONTEXT * flops)
    assert result.ledger.stages[0] == parent.stages[0]
    record = result.ledger.stages[1]
    assert (record.name, record.kind, record.units, record.flops) == ("base", "train", result.units, result.flops)
    assert record.parameters == sum(p.numel() for p in tiny_llama().parameters())
    assert record.data_fingerprint == "f1"
    assert Ledger.load(result.checkpoint) == result.ledger
    lines = read_metrics(tmp_path, timed=True)
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 12]
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 6, 12]
    for line in lines:
        assert line["units"] == line["step"] * 4 * CONTEXT
        assert line["flops"] == line["units"] * flops
        if "loss" in line:
            assert line["flops_per_second"] == pytest.approx(line["units_per_second"] * flops)
            assert "mfu" not in line, "nobody publishes the peak of this CPU"
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates == pytest.approx([3e-3, 3e-3, 1.5e-3])


def test_evaluations_take_the_same_samples_from_the_start_to_the_end(tmp_path):
    # So small a rate moves no weight: on the same samples the start and the end measure the same.
    model = tiny_llama()
    still = {"steps": 4, "learning_rate": 1e-30, "weight_decay": 0.0, "evaluation_interval": 2}
    result = run(model, tmp_path / "part", evaluation_batches=1, measures=[Loss(), Accuracy()], **still)
    part, whole = held_out_loss(model, TinyData().validation[:4]), held_out_loss(model, TinyData().validation)
    assert abs(part - whole) > 1e-3
    lines = [line for line in read_metrics(tmp_path / "part") if "validation_loss" in line]
    assert [line["validation_loss"] for line in lines] == [part] * 3
    assert [line["held_out_samples"] for line in lines] == [4] * 3
    assert lines[-1]["whole_split_loss"] == result.value == whole
    assert lines[-1]["whole_split_accuracy"] == result.measures["accuracy"]
    assert result.ledger.stages[-1].value_before is None
    # As many batches as there are is the whole split, and needs no second name.
    result = run(model, tmp_path / "whole", evaluation_batches=2, **still)
    lines = [line for line in read_metrics(tmp_path / "whole") if "validation_loss" in line]
    assert [line["validation_loss"] for line in lines] == [whole] * 3
    assert not any(key.startswith("whole_split") or key == "held_out_samples" for line in lines for key in line)
    assert result.ledger.stages[-1].value_before == whole


def test_logged_loss_is_the_mean_since_the_last_line(tmp_path):
    run(tiny_llama(), tmp_path / "one", steps=6, log_interval=1)
    run(tiny_llama(), tmp_path / "three", steps=6, log_interval=3)
    each = [line["loss"] for line in read_metrics(tmp_path / "one") if "loss" in line]
    means = [line["loss"] for line in read_metrics(tmp_path / "three") if "loss" in line]
    assert means == pytest.approx([np.mean(each[:3]), np.mean(each[3:])])


def test_tensorboard_files_hold_the_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tiny_llama(), tmp_path, steps=10, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = read_metrics(tmp_path)
    curve = [(event.step, event.value) for event in events.Scalars("loss/training")]
    assert curve == [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]
    assert [event.step for event in events.Scalars("loss/validation")] == [0, 10]


def test_nothing_is_printed_without_progress_and_little_without_a_terminal(tmp_path, capfd):
    run(tiny_llama(), tmp_path / "quiet", steps=2, warmup_steps=0)
    assert capfd.readouterr() == ("", "")
    train(tiny_llama(), TinyData(), tiny_settings(steps=20), tmp_path / "lines")
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("train: 20 steps done, validation loss ")


# Going on.


@pytest.mark.parametrize("kind", MODELS)
def test_resumed_in_pieces_gives_the_same_bits(tmp_path, kind):
    """gpt2 has dropout; the pieces end on, before and after checkpoints and log lines."""
    options = {"steps": 14, "checkpoint_interval": 4, "log_interval": 3, "evaluation_interval": 5}
    alone = run(MODELS[kind](), tmp_path / "alone", **options)
    for stop in (3, 4, 9, None):
        # A model with other weights: all of it must come from the checkpoint.
        model = MODELS[kind](seed=0 if stop == 3 else 1)
        torch.manual_seed(stop or 0)
        pieces = run(model, tmp_path / "pieces", stop_after=stop, **options)
        assert pieces.steps == (stop or 14)
        assert (pieces.value is None) == (stop is not None)
        assert pieces.ledger.total_units() == pieces.steps * 4 * CONTEXT
    assert checkpoint_bits(alone.checkpoint) == checkpoint_bits(pieces.checkpoint)
    assert read_metrics(tmp_path / "alone") == read_metrics(tmp_path / "pieces")
    assert alone.value == pieces.value


def test_a_finished_run_returns_its_result_without_training(tmp_path, monkeypatch):
    first = run(tiny_llama(), tmp_path, steps=5)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(loop_module, "learning_rate", lambda *_: pytest.fail("a step was taken"))
    model = tiny_llama(1)
    again = run(model, tmp_path, steps=5)
    assert dataclasses.asdict(again) == dataclasses.asdict(first)
    assert bits(weights(model)) == bits(weights(load_model(first.checkpoint)))
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_same_seed_same_bits_other_seed_other_bits(tmp_path):
    models = [tiny_gpt2() for _ in range(3)]
    for number, (model, seed) in enumerate(zip(models, (3, 3, 4), strict=True)):
        torch.manual_seed(number)
        run(model, tmp_path / str(number), steps=4, seed=seed)
    assert bits(weights(models[0])) == bits(weights(models[1])) != bits(weights(models[2]))


def test_the_callers_random_state_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = tiny_gpt2()
    torch.manual_seed(5)
    run(model, tmp_path, steps=3, seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_a_next_stage_takes_over_moments_and_starts_its_schedule_anew(tmp_path):
    """Two stages of constant rate are one: moments, their step counters and the data order go on."""
    options = {"schedule": "constant", "warmup_steps": 0}
    whole = tiny_llama()
    run(whole, tmp_path / "whole", steps=10, **options)
    model = tiny_llama()
    first = run(model, tmp_path / "1", steps=6, **options)
    model = load_model(first.checkpoint)
    second = run(
        model,
        tmp_path / "2",
        steps=4,
        optimizer_from=first.checkpoint,
        data_position=first.data_position,
        ledger=first.ledger,
        **options,
    )
    assert bits(weights(model)) == bits(weights(whole))
    assert [stage.units for stage in second.ledger.stages] == [6 * 4 * CONTEXT, 4 * 4 * CONTEXT]
    # With a warmup of its own, the second stage re-warms.
    run(
        load_model(first.checkpoint),
        tmp_path / "3",
        steps=4,
        warmup_steps=4,
        schedule="constant",
        log_interval=1,
        optimizer_from=first.checkpoint,
    )
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "3") if "loss" in line]
    assert rates == pytest.approx([3e-3 * share for share in (0.25, 0.5, 0.75, 1)])


def test_moments_that_are_missing_are_noted(tmp_path):
    parent = tiny_llama()
    parent.lm_head.weight.requires_grad_(False)
    first = run(parent, tmp_path / "1", steps=2, warmup_steps=0)
    second = run(tiny_llama(), tmp_path / "2", steps=2, warmup_steps=0, optimizer_from=first.checkpoint)
    assert second.ledger.stages[-1].notes == ["1 parameters start with fresh moments: lm_head.weight"]


def test_hooks_are_called_in_order_and_resumed(tmp_path):
    class Count:
        def __init__(self) -> None:
            self.calls: list[str] = []
            self.total = 0

        def attach(self, model, optimizer) -> None:
            assert len(optimizer.param_groups) == 2
            self.calls.append("attach")

        def before_step(self, step: int) -> None:
            self.calls.append(f"before {step}")

        def after_step(self, step: int) -> None:
            self.calls.append(f"after {step}")
            self.total += 1

        def state_dict(self) -> dict:
            return {"total": self.total}

        def load_state_dict(self, state: dict) -> None:
            self.total = state["total"]

    first, second = Count(), Count()
    run(tiny_llama(), tmp_path, steps=5, hooks=[first], stop_after=2)
    assert first.calls == ["attach", "before 0", "after 0", "before 1", "after 1"]
    run(tiny_llama(), tmp_path, steps=5, hooks=[second])
    assert second.calls[:2] == ["attach", "before 2"]
    assert second.total == 5
    with pytest.raises(CheckpointError, match="started with 1 hooks, but is resumed with 0"):
        run(tiny_llama(), tmp_path, steps=5)


def test_a_scale_that_a_hook_changes_is_resumed(tmp_path):
    """TokenFormer's scales are neither parameters nor persistent buffers: they travel in the config."""

    class Anneal:
        def attach(self, model, optimizer) -> None:
            self.model = model

        def before_step(self, step: int) -> None:
            if step < 4:
                self.model.set_tau(qkv=[3.1 + step, 2.0])

        def after_step(self, step: int) -> None: ...

        def state_dict(self) -> dict:
            return {}

        def load_state_dict(self, state: dict) -> None: ...

    alone, pieces = tiny_tokenformer(), tiny_tokenformer()
    run(alone, tmp_path / "alone", steps=8, hooks=[Anneal()])
    run(tiny_tokenformer(), tmp_path / "pieces", steps=8, hooks=[Anneal()], stop_after=6)
    run(pieces, tmp_path / "pieces", steps=8, hooks=[Anneal()])
    assert bits(weights(alone)) == bits(weights(pieces))
    assert pieces.config.qkv_tau == alone.config.qkv_tau == [6.1, 2.0]
    stored = torch.tensor([6.1, 2.0]).tolist()
    scales = [m.initial_tau for m in pieces.modules() if isinstance(m, Pattention) and m.tau.tolist() == stored]
    assert scales == [(6.1, 2.0)] * 6, "query, key and value of both layers, whose plain numbers follow the buffers"


def test_checkpoints_are_kept_and_pruned(tmp_path):
    run(tiny_llama(), tmp_path, steps=10, checkpoint_interval=2, keep_checkpoints=3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000008", "step-00000010"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000010"


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": TinyData(fingerprint="f2")}, "data fingerprint 'f1', but is resumed with 'f2'. Resume with 'f1'"),
        ({"learning_rate": 1.0}, "settings.learning_rate 0.003, but is resumed with 1.0"),
        ({"steps": 12}, "settings.steps 10, but is resumed with 12"),
        ({"model": tiny_llama(intermediate_size=96)}, "model config.intermediate_size 64, but is resumed with 96"),
        ({"stage_name": "other"}, "stage_name 'train', but is resumed with 'other'"),
        ({"data_position": 3}, "data_position 0, but is resumed with 3"),
    ],
)
def test_a_run_is_not_resumed_as_another(tmp_path, change, message):
    run(tiny_llama(), tmp_path, steps=10, stop_after=3)
    arguments = {"model": tiny_llama(), "data": TinyData(), "steps": 10, **change}
    with pytest.raises(CheckpointError, match=message):
        run(arguments.pop("model"), tmp_path, arguments.pop("data"), **arguments)


def test_settings_that_change_no_result_may_change(tmp_path):
    alone = run(tiny_llama(), tmp_path / "alone", steps=6)
    run(tiny_llama(), tmp_path / "pieces", steps=6, stop_after=3)
    pieces = run(tiny_llama(), tmp_path / "pieces", steps=6, log_interval=1, keep_checkpoints=1, checkpoint_interval=2)
    assert checkpoint_bits(alone.checkpoint) == checkpoint_bits(pieces.checkpoint)
    assert "resumed with settings.log_interval 1 instead of 5" in pieces.ledger.stages[-1].notes


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (lambda: tiny_llama().bfloat16(), TinyData(), r"weights are torch.bfloat16.*dtype=torch.float32"),
        (lambda: tiny_llama().requires_grad_(False), TinyData(), "no trainable parameter"),
        (lambda: tiny_llama(vocab_size=50), TinyData(), "64 tokens, but the model's vocab_size is 50"),
        (lambda: tiny_llama(max_position_embeddings=8), TinyData(), "context_length is 16, but.* is 8"),
        (lambda: tiny_bert(), TinyData(), "BertLMHeadModel is not causal.*is_decoder: true"),
    ],
)
def test_models_and_data_that_do_not_fit(tmp_path, model, data, message):
    with pytest.raises(ConfigError, match=message):
        run(model(), tmp_path, data, steps=5)
    assert not (tmp_path / "latest").exists()


@pytest.mark.parametrize("make", [*MODELS.values(), lambda: tiny_bert(is_decoder=True), tiny_mixtral])
def test_causal_models_pass_the_probe_which_leaves_no_trace(make):
    model = make().train()
    before = torch.random.get_rng_state(), bits(weights(model))
    check_fit(model, Causal().bind(model.config, TinyData().form))
    assert (torch.equal(torch.random.get_rng_state(), before[0]), bits(weights(model))) == (True, before[1])
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_folder_one_run(tmp_path):
    class Intrude:
        def attach(self, model, optimizer) -> None: ...

        def before_step(self, step: int) -> None:
            with pytest.raises(TrainingError, match=r"is in use: process .* works in it"):
                run(tiny_llama(), tmp_path, steps=3)

        def after_step(self, step: int) -> None: ...

        def state_dict(self) -> dict:
            return {}

        def load_state_dict(self, state: dict) -> None: ...

    assert run(tiny_llama(), tmp_path, steps=3, hooks=[Intrude()]).steps == 3


# Devices.


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_cuda_is_not_invented(tmp_path):
    with pytest.raises(ConfigError, match="no CUDA device"):
        run(tiny_llama(), tmp_path, steps=5, device="cuda")


def test_precision_and_peak_on_the_cpu():
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == torch.float32
    assert choose_precision("bfloat16", cpu) == torch.bfloat16
    assert peak_flops(cpu, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Some GPU", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None


def test_bfloat16_autocast_leaves_weights_and_moments_in_float32(tmp_path):
    model, exact = tiny_llama(), tiny_llama()
    result = run(model, tmp_path / "bf16", steps=20, precision="bfloat16")
    run(exact, tmp_path / "f32", steps=20, precision="float32")
    assert {p.dtype for p in load_model(result.checkpoint).parameters()} == {torch.float32}
    assert not torch.equal(weights(model), weights(exact))
    losses = [[line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("bf16", "f32")]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "context", [lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad, torch.inference_mode]
)
def test_the_callers_contexts_change_nothing(tmp_path, context, precision):
    alone, inside = tiny_llama(), tiny_llama()
    run(alone, tmp_path / "alone", steps=5, precision=precision)
    with context():
        run(inside, tmp_path / "inside", steps=5, precision=precision)
    assert torch.equal(weights(alone), weights(inside))


def test_a_training_that_diverged_is_told_and_its_books_can_be_read(tmp_path):
    """The last step's weights are measured, and no step comes after it that the guard could watch."""
    with pytest.raises(TrainingError, match=r"loss on the held-out data is nan: the training has diverged\. .* lower"):
        run(tiny_llama(), tmp_path, steps=1, learning_rate=1e38, warmup_steps=0, decay_fraction=0.0)
    assert Ledger.load(latest_checkpoint(tmp_path)).stages[-1].measures == {}


def test_a_model_that_was_made_in_inference_mode_is_refused(tmp_path):
    with torch.inference_mode():
        model = tiny_llama()
    with pytest.raises(ConfigError, match=r"\(model\.embed_tokens\.weight, .* within torch\.inference_mode.*deepcopy"):
        run(model, tmp_path / "run", steps=5)
    assert not (tmp_path / "run").exists()
    run(copy.deepcopy(model), tmp_path / "run", steps=5)


def test_compiled_models_train_alike(tmp_path, monkeypatch):
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_model(model, backend="eager"))
    plain, compiled = tiny_tokenformer(), tiny_tokenformer()
    run(plain, tmp_path / "plain", steps=3)
    run(compiled, tmp_path / "compiled", steps=3, compile=True)
    torch.testing.assert_close(weights(plain), weights(compiled), atol=1e-5, rtol=1e-4)
