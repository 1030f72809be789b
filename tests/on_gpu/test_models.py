"""Models on a GPU: changed there with their optimizer, written, and made to write; what is told of the device."""

import pytest
import torch

import auxin
from auxin.accounting.latency import Conditions, chosen_clock
from auxin.data.tokenizer import train_tokenizer
from auxin.edits.structure import edited_skeleton
from auxin.evaluation import generate_text
from auxin.planning.target import Target, removal
from auxin.recipes.timing import seconds_per_step
from auxin.training.hardware import peak_flops
from auxin.training.optimizer import build_optimizer
from on_gpu.devices import on_either, on_gpu
from training.tiny import TinyData, tiny_llama, tiny_settings, tiny_tokenformer, weights

CHANGES = {
    "tokenformer": (tiny_tokenformer, {"qkv_tokens": 40, "ffn_tokens": 96}),
    "hypercloning": (tiny_llama, {"factor": 2}),
    "stacking": (tiny_llama, {"factor": 2}),
    "altup": (tiny_llama, {"blocks": 2}),
    "magnitude": (tiny_llama, {"ffn": 0.5}),
}
"""Methods, a model for each, and their settings."""


def learn(model, optimizer) -> float:
    """A step of training."""
    ids = (torch.arange(32, device=model.device) % 7).view(2, 16)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@on_either
@pytest.mark.parametrize("method", CHANGES)
def test_a_model_is_changed_where_it_lies_and_learns_on(method, device, tmp_path):
    make, settings = CHANGES[method]
    model = make().to(device)
    optimizer = build_optimizer(model, tiny_settings(steps=1))
    before = learn(model, optimizer)
    receipt = auxin.apply(auxin.plan(model, method, **settings), model, optimizer=optimizer)
    assert receipt.parameters_after != receipt.parameters_before
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device}
    followed = [(p, optimizer.state[p]["exp_avg"]) for p in model.parameters() if p in optimizer.state]
    assert followed
    assert all((moment.shape, moment.device) == (p.shape, p.device) for p, moment in followed)
    assert learn(model, optimizer) < before + 1
    auxin.save(model, tmp_path / "saved")
    loaded = auxin.load(tmp_path / "saved")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert torch.equal(weights(loaded), weights(model).cpu())


@on_either
@pytest.mark.parametrize("kind", ["tokenformer", "altup"])
def test_with_a_static_cache_the_same_is_written(kind, device):
    """On a GPU transformers compiles what decodes with one."""
    torch.compiler.reset()
    make, settings = CHANGES[kind]
    model = make()
    auxin.apply(auxin.plan(model, kind, **settings), model)
    model = model.to(device).eval()
    prompt = torch.tensor([[5, 9, 2, 33]], device=device)
    asked = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    wanted = model.generate(prompt, max_new_tokens=12, **asked)
    assert wanted.shape == (1, 16)
    found = model.generate(
        prompt, max_new_tokens=12, cache_implementation="static", disable_compile=device == "cpu", **asked
    )
    assert torch.equal(found, wanted)


@on_either
def test_writing_draws_from_the_seed_alone(device):
    tokenizer = train_tokenizer(["the cat sat on the mat and the hat"] * 3, 280, 32)
    model = tiny_llama(vocab_size=280).to(device)

    def states() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device == "cuda" else [])]

    before = states()
    first, again, other = (generate_text(model, tokenizer, "the", 12, seed=seed) for seed in (4, 4, 5))
    assert first == again != other
    assert all(map(torch.equal, before, states()))


@on_either
def test_the_time_of_a_step_is_told(device):
    model = edited_skeleton(tiny_tokenformer().config)
    assert 0 < seconds_per_step(model, tiny_settings(steps=1, device=device), TinyData().form, room=5.0) < 60
    assert {parameter.device.type for parameter in model.parameters()} == {device}


@on_either
def test_a_latency_is_measured_there_and_told_of_a_smaller_model(device):
    model = edited_skeleton(tiny_llama(num_hidden_layers=4).config)
    target = Target.parse({"latency": 0.5, "phase": "forward", "sequence_length": 16, "device": device})
    table = target.table(model)
    done = removal(model, auxin.plan(model, "random", ffn=0.5).edits)
    assert table.predicted(done.after, done.modules) > 0
    assert all(seconds > 0 for seconds in table.measured(done.after))
    conditions = Conditions.here("forward", 1, 16, torch.float32, device)
    assert conditions.device == device


@on_gpu
def test_a_product_takes_no_less_time_than_the_peak_in_the_table_allows():
    """And not three times as long: the table, or the clock, would be one of another device."""
    peak = peak_flops(torch.device("cuda"), torch.bfloat16)
    if peak is None:
        pytest.skip(f"no peak of {torch.cuda.get_device_name()} is known")
    size, clock, taken = 8192, chosen_clock("cuda")[1], []
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(100):
        began = clock()
        a @ b
        taken.append(clock() - began)
    share = 2 * size**3 / min(taken) / peak
    assert 1 / 3 < share < 1.02


@on_gpu
def test_doctor_names_the_gpu():
    from auxin.doctor import diagnose

    found = diagnose()
    assert found.used["device"] == "cuda:0"
    assert found.available["CUDA"] == torch.cuda.get_device_name()
