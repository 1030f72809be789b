"""Checkpoints of transformers' Trainer: one that resumes in the folder of the new model goes on with its moments."""

import json
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import auxin
from auxin.edits import ArrangeLayers, Plan, ReplaceModule, apply, apply_to_checkpoint

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
from transformers import Trainer, TrainingArguments

STEPS = 3
"""Of the first run, whose last step leaves the checkpoint."""
EXCHANGE = Plan(method="exchange", promise="none", edits=[ArrangeLayers(layers="model.layers", order=[1, 0])])


def llama(seed=0, **values):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    values = {**sizes, "num_attention_heads": 2, "max_position_embeddings": 16, "tie_word_embeddings": True, **values}
    return LlamaForCausalLM(LlamaConfig(**values))


def rows():
    ids = torch.randint(0, 48, (16, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model, folder, steps=STEPS, *, callbacks=(), optimizers=(None, None), **values):
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-2,
        warmup_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"weight_decay": 0.1, **values},
    )
    parts = {"train_dataset": rows(), "eval_dataset": rows()[:2]}
    return Trainer(model, arguments, callbacks=list(callbacks), optimizers=optimizers, **parts)


@pytest.fixture
def checkpoint(tmp_path):
    trainer(llama(), tmp_path / "run").train()
    return tmp_path / "run" / f"checkpoint-{STEPS}"


class Watch(TrainerCallback):
    """Keeps what the optimizer held when the first step began, by the parameters' names."""

    def __init__(self):
        self.states = None

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.states is None:
            self.states = by_name(model, optimizer)


def by_name(model, optimizer):
    return {
        name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def optimizer_of(folder, model):
    """What a Trainer makes for `model`, with the state in `folder`."""
    optimizer = trainer(model, folder / "unused").create_optimizer()
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return optimizer


def plan_for(name, folder):
    if name == "exchange":
        return EXCHANGE
    return auxin.plan(folder, name, **({"factor": 2} if name == "hypercloning" else {"group_size": 2}))


def assert_same_states(now, then):
    assert now.keys() == then.keys()
    for name, states in then.items():
        assert now[name].keys() == states.keys()
        for key in states:
            assert torch.equal(now[name][key], states[key]), f"{key} of {name}"


@pytest.mark.parametrize("name", ["hypercloning", "exchange", "llama-pro"])
def test_a_trainer_resumes_with_the_carried_moments(name, checkpoint, tmp_path):
    plan = plan_for(name, checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        receipt = apply_to_checkpoint(plan, checkpoint, tmp_path / "new")
    assert receipt.notes == []

    model = auxin.load(checkpoint)
    optimizer = optimizer_of(checkpoint, model)
    old = by_name(model, optimizer)
    apply(plan, model, optimizer)
    wanted = by_name(model, optimizer)
    assert sum(bool(states["exp_avg_sq"].any()) for states in wanted.values()) > 15, "the reference holds moments"

    watch = Watch()
    resumed = trainer(auxin.load(tmp_path / "new"), tmp_path / "again", STEPS + 2, callbacks=[watch])
    resumed.train(resume_from_checkpoint=str(tmp_path / "new"))
    assert resumed.state.global_step == STEPS + 2
    assert_same_states(watch.states, wanted)
    rates = [entry["learning_rate"] for entry in resumed.state.log_history if "learning_rate" in entry]
    assert len(rates) == STEPS + 2
    if name == "exchange":
        for key in ("exp_avg", "exp_avg_sq"):
            now, then = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
            assert torch.equal(watch.states[now][key], old[then][key])
            assert not torch.equal(old[now][key], old[then][key])


def test_a_resumed_run_is_the_run_that_was_changed_in_memory(checkpoint, tmp_path):
    """Step for step: weights after two more steps, with the data, the schedule and the generators of before."""
    plan = plan_for("hypercloning", checkpoint)

    class Grow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == STEPS:
                apply(plan, model, optimizer)

    # The same schedule as the run of the fixture, which was made for as many steps as it did.
    values = {"lr_scheduler_type": "constant_with_warmup"}
    whole = trainer(llama(), tmp_path / "whole", STEPS + 2, callbacks=[Grow()], save_strategy="no", **values)
    whole.train()
    trainer(llama(), tmp_path / "first", **values).train()
    apply_to_checkpoint(plan, tmp_path / "first" / f"checkpoint-{STEPS}", tmp_path / "new")
    resumed = trainer(auxin.load(tmp_path / "new"), tmp_path / "second", STEPS + 2, **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "new"))
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_optimizer_made_by_hand_is_followed(tmp_path):
    model = llama(tie_word_embeddings=False)
    hand = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer(model, tmp_path / "run", optimizers=(hand, None)).train()
    source = tmp_path / "run" / f"checkpoint-{STEPS}"
    assert apply_to_checkpoint(EXCHANGE, source, tmp_path / "new").notes == []
    new = auxin.load(tmp_path / "new")
    optimizer = torch.optim.SGD(new.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(torch.load(tmp_path / "new" / "optimizer.pt", weights_only=True))
    states, old = by_name(new, optimizer), by_name(model, hand)
    for suffix in ("mlp.up_proj.weight", "input_layernorm.weight"):
        moved = states[f"model.layers.0.{suffix}"]["momentum_buffer"]
        assert torch.equal(moved, old[f"model.layers.1.{suffix}"]["momentum_buffer"])


def test_what_starts_with_fresh_moments_is_named(checkpoint, tmp_path):
    path = "model.layers.1.mlp.down_proj"
    for start, fresh in (("orthogonal", ["input_factor", "output_factor"]), ("weight", [])):
        settings = {"blocks": 2, "rank": 4, "start": start}
        put = ReplaceModule(module=path, brick="block_dense_linear", settings=settings)
        plan = Plan(method="x", promise="none", edits=[put])
        receipt = apply_to_checkpoint(plan, checkpoint, tmp_path / start)
        assert sorted(receipt.fresh_moments) == [f"{path}.{name}" for name in fresh]


def test_copies_of_a_layer_have_moments_of_their_own(checkpoint, tmp_path):
    plan = Plan(method="twice", promise="none", edits=[ArrangeLayers(layers="model.layers", order=[0, 0, 1])])
    apply_to_checkpoint(plan, checkpoint, tmp_path / "new")
    state = torch.load(tmp_path / "new" / "optimizer.pt", weights_only=True)["state"]
    places = [tensor.untyped_storage().data_ptr() for each in state.values() for tensor in each.values()]
    assert len(places) == len(set(places)) > 60


def custom(change):
    """A change of the file's content."""

    def written(folder):
        path = folder / "optimizer.pt"
        content = torch.load(path, weights_only=True)
        torch.save(change(content) or content, path)

    return written


def one_less(content):
    content["param_groups"][0]["params"].pop()


def three_groups(content):
    first = content["param_groups"][0]
    content["param_groups"].insert(0, {**first, "params": [first["params"].pop(0)]})


def other_order(content):
    numbers = content["param_groups"][0]["params"]
    numbers[0], numbers[1] = numbers[1], numbers[0]


def eight_bits(content):
    for state in content["state"].values():
        state["state1"] = state.pop("exp_avg").to(torch.uint8)


def decaying_norms(content):
    content["param_groups"][1]["weight_decay"] = 0.1


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_less, r"groups hold 14 and 5 parameters, and those that a Trainer makes for this model 15 and 5"),
        (three_groups, r"groups hold 1 and 14 and 5 parameters"),
        (other_order, r"'exp_avg' at the place of model\.embed_tokens\.weight has shape \[16, 16\]"),
        (eight_bits, r"keeps a state 'state1' for .* not known how it follows"),
        (decaying_norms, r"which are which is not known"),
        (lambda content: {"state": {}}, "no state_dict of an optimizer"),
        (lambda content: {**content, "extra": Harmful()}, "can't be read with weights_only=True"),
    ],
)
def test_a_state_that_can_not_be_followed_stays_behind_with_a_word(change, message, checkpoint, tmp_path, capsys):
    custom(change)(checkpoint)
    plan = plan_for("hypercloning", checkpoint)
    with pytest.warns(UserWarning, match=rf"optimizer\.pt was left out\. (.|\n)*{message}"):
        receipt = apply_to_checkpoint(plan, checkpoint, tmp_path / "new")
    assert "begins its schedule anew" in receipt.notes[0]
    assert "this must not run" not in capsys.readouterr().out
    assert not (tmp_path / "new" / "optimizer.pt").exists()
    watch = Watch()
    resumed = trainer(auxin.load(tmp_path / "new"), tmp_path / "again", STEPS + 1, callbacks=[watch])
    resumed.train(resume_from_checkpoint=str(tmp_path / "new"))
    assert watch.states == {}
    assert resumed.state.global_step == STEPS + 1


def test_an_optimizer_that_begins_with_a_state_can_not_miss_one(tmp_path):
    trainer(llama(), tmp_path / "run", optim="adagrad").train()
    source = tmp_path / "run" / f"checkpoint-{STEPS}"
    assert apply_to_checkpoint(EXCHANGE, source, tmp_path / "new").notes == []
    deeper = Plan(
        method="deeper",
        promise="none",
        edits=[ArrangeLayers(layers="model.layers", order=[0, 1, 0], fresh_moments=[2])],
    )
    with pytest.warns(UserWarning, match=r"state 'sum' of every parameter from the beginning; model\.layers\.2\."):
        apply_to_checkpoint(deeper, source, tmp_path / "newer")


def test_what_says_nothing_of_the_model_goes_along_byte_by_byte(checkpoint, tmp_path):
    others = ("scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json")
    (checkpoint / "scaler.pt").write_bytes(b"scale")
    (checkpoint / "rng_state_1.pth").write_bytes(b"generators")
    apply_to_checkpoint(plan_for("hypercloning", checkpoint), checkpoint, tmp_path / "new")
    for name in (*others, "scaler.pt", "rng_state_1.pth"):
        assert (tmp_path / "new" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_the_best_checkpoint_of_the_old_model_is_forgotten(checkpoint, tmp_path):
    path = checkpoint / "trainer_state.json"
    state = {**json.loads(path.read_text()), "best_model_checkpoint": str(checkpoint), "best_metric": 0.5}
    path.write_text(json.dumps({**state, "best_global_step": STEPS}))
    with pytest.warns(UserWarning, match=r"names no best checkpoint any more: that of the old folder \(.*, 0\.5\)"):
        apply_to_checkpoint(EXCHANGE, checkpoint, tmp_path / "new")
    new = json.loads((tmp_path / "new" / "trainer_state.json").read_text())
    assert [new[key] for key in ("best_model_checkpoint", "best_metric", "best_global_step")] == [None, None, None]
    assert new["global_step"] == STEPS
    values = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": STEPS}
    resumed = trainer(auxin.load(tmp_path / "new"), tmp_path / "again", STEPS + 1, **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "new"))
    assert resumed.state.best_model_checkpoint == str(tmp_path / "again" / f"checkpoint-{STEPS + 1}")


STALE = {
    "pytorch_model.bin": "weights",
    "pytorch_model-00001-of-00002.bin": "weights",
    "pytorch_model.bin.index.json": "weights",
    "tf_model.h5": "weights",
    "flax_model.msgpack": "weights",
    "model.ckpt.index": "weights",
    "consolidated.00.pth": "weights",
    "consolidated.safetensors": "weights",
    "model.fp16.safetensors": "weights",
    "model-q4.gguf": "weights",
    "onnx/model.onnx": "weights",
    "onnx/model.onnx_data": "weights",
    "original/consolidated.00.pth": "weights",
    "openvino_model.xml": "weights",
    "openvino_model.bin": "weights",
    "optimizer.bin": "optimizer",
    "optimizer_0/part.distcp": "optimizer",
    "pytorch_model_fsdp_0/part.distcp": "optimizer",
    "global_step3/mp_rank_00_model_states.pt": "optimizer",
    "latest": "optimizer",
    "style/adapter_config.json": "adapter",
    "style/adapter_model.safetensors": "adapter",
    "checkpoint-2/model.safetensors": "checkpoint",
}
KEPT = (
    "tokenizer.json",
    "spiece.model",
    "README.md",
    "onnx/notes.txt",
    "notes/table.bin",
    "runs/events.out",
    "LICENSE",
)


def test_every_file_of_the_old_model_stays_behind_and_is_named(tmp_path):
    source, output = tmp_path / "old", tmp_path / "new"
    llama().save_pretrained(source)
    for name in (*STALE, *KEPT):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"global_step3" if name == "latest" else b"old")
    with pytest.warns(UserWarning, match="was left out"):
        receipt = apply_to_checkpoint(plan_for("hypercloning", source), source, output)
    assert not [name for name in STALE if (output / name).exists()]
    assert not [name for name in KEPT if (output / name).read_bytes() != b"old"]
    for name, what in STALE.items():
        whole = what in ("adapter", "checkpoint") or "/part." in name or name.startswith("global_step")
        place = name.partition("/")[0] if whole else name
        assert any(note.startswith(f"{place} was left out: it ") and what in note for note in receipt.notes), name


def test_a_file_called_latest_that_names_no_pieces_goes_along(tmp_path):
    llama().save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "latest").write_text("news")
    assert apply_to_checkpoint(EXCHANGE, tmp_path / "old", tmp_path / "new").notes == []
    assert (tmp_path / "new" / "latest").read_text() == "news"


def test_a_folder_with_an_adapter_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "adapter_config.json").write_text("{}")
    with pytest.raises(auxin.errors.CheckpointError, match=r"holds an adapter .* Merge it into the weights"):
        apply_to_checkpoint(EXCHANGE, tmp_path / "old", tmp_path / "new")
