"""The training engine on a GPU: its bits, its types, its generators, its memory, its processes."""

import gc

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from auxin.accounting import training_memory
from auxin.models import TokenFormerConfig, TokenFormerForCausalLM
from auxin.objectives.causal import Causal
from auxin.training import train
from auxin.training.gradients import BatchGradients
from auxin.training.hardware import peak_flops
from auxin.training.optimizer import build_optimizer
from auxin.training.ranks import Ranks
from auxin.training.state import RNG_CUDA
from auxin.training.strategies import Copies, Sharded, whole
from on_gpu.devices import on_either, on_gpu
from training.tiny import (
    CONTEXT,
    Look,
    TinyData,
    checkpoint_bits,
    read_metrics,
    tiny_gpt2,
    tiny_llama,
    tiny_settings,
    tiny_tokenformer,
    weights,
)


def run(model, folder, hooks=(), stop_after=None, **options):
    return train(
        model, TinyData(), tiny_settings(**options), folder, hooks=hooks, stop_after=stop_after, progress=False
    )


def losses(folder) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


@pytest.fixture
def deterministic(monkeypatch):
    """A kernel that is not is an error."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@on_either
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_in_pieces_a_training_with_dropout_gives_the_same_bits(tmp_path, deterministic, device, precision):
    """Attention is written out: the fused backward passes are not deterministic."""

    def model(seed: int = 0):
        made = tiny_gpt2(seed, dropout=0.2)
        made.set_attn_implementation("eager")
        return made

    options = {"steps": 10, "checkpoint_interval": 4, "device": device, "precision": precision}
    alone = run(model(), tmp_path / "alone", **options)
    for stop in (3, 6, None):
        # The weights of later pieces come from checkpoints, whatever is given.
        pieces = run(model(seed=0 if stop == 3 else 1), tmp_path / "pieces", stop_after=stop, **options)
    assert checkpoint_bits(alone.checkpoint) == checkpoint_bits(pieces.checkpoint)
    state = load_file(alone.checkpoint / "training" / "state.safetensors")
    assert (RNG_CUDA in state) == (device == "cuda")
    assert {tensor.dtype for name, tensor in state.items() if name.startswith("optimizer.")} == {torch.float32}


@on_either
def test_batches_of_other_processes_give_the_same_bits(tmp_path, deterministic, device):
    found = {}
    for workers in (0, 2):
        model = tiny_tokenformer()
        model.set_attn_implementation("eager")
        options = {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "device": device, "num_workers": workers}
        found[workers] = checkpoint_bits(run(model, tmp_path / str(workers), **options).checkpoint)
    assert found[0] == found[2]


@on_gpu
@pytest.mark.parametrize("order", [("cpu", "cuda"), ("cuda", "cpu")], ids="-then-".join)
def test_a_run_goes_on_on_another_device(tmp_path, order):
    options = {"steps": 10, "precision": "float32", "log_interval": 1}
    run(tiny_tokenformer(), tmp_path / "alone", **options, device="cpu")
    run(tiny_tokenformer(), tmp_path / "moved", **options, device=order[0], stop_after=5)
    run(tiny_tokenformer(seed=1), tmp_path / "moved", **options, device=order[1])
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)


@on_gpu
@pytest.mark.parametrize("make", [tiny_tokenformer, tiny_llama], ids=["tokenformer", "llama"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_model_learns_what_it_learns_otherwise(tmp_path, make, precision):
    torch.compiler.reset()
    gradients = {}
    for compiled in (False, True):
        look = Look()
        options = {"steps": 5, "device": "cuda", "precision": precision, "log_interval": 1}
        run(make(), tmp_path / str(compiled), hooks=[look], compile=compiled, **options)
        gradients[compiled] = torch.cat([tensor.flatten() for tensor in look.gradients[0]])
    tolerance = 1e-4 if precision == "float32" else 5e-2
    difference = (gradients[True] - gradients[False]).norm() / gradients[False].norm()
    assert float(difference) < tolerance
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=tolerance)


@on_either
def test_bfloat16_learns_nearly_what_float32_does_and_leaves_weights_in_float32(tmp_path, device):
    found = {}
    for precision in ("float32", "bfloat16"):
        model = tiny_tokenformer()
        run(model, tmp_path / precision, steps=20, device=device, precision=precision, log_interval=1)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        found[precision] = weights(model)
    assert not torch.equal(found["float32"], found["bfloat16"])
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "float32"), abs=0.03)
    for line in read_metrics(tmp_path / "bfloat16"):
        if "loss" in line:
            assert ("mfu" in line) == (peak_flops(torch.device(device), torch.bfloat16) is not None)
            assert 0 <= line.get("mfu", 0.0) < 1


@on_gpu
def test_what_memory_is_told_is_what_is_asked_of_the_allocator():
    """Weights, gradients, moments and what the backward pass keeps, in float32."""
    config = TokenFormerConfig(
        vocab_size=2048, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=256,
        qkv_tokens=[192, 64], proj_tokens=[192, 64], ffn_tokens=[768, 256],
    )  # fmt: skip
    ids = torch.zeros(8, 256, dtype=torch.long, device="cuda")

    def asked() -> int:
        gc.collect()
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    def stepped() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = TokenFormerForCausalLM(config).cuda().train()
        optimizer = build_optimizer(model, tiny_settings(steps=1))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        return model, optimizer

    stepped()  # cuBLAS keeps workspaces from the first product on
    before = asked()
    model, optimizer = stepped()
    told, state = training_memory(model, 8, 256), asked() - before
    assert state == pytest.approx(told.weights + told.gradients + told.optimizer, rel=0.01)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert asked() - before - state == pytest.approx(told.activations, rel=0.05)
    del loss, optimizer  # until here both have to be there


@pytest.fixture
def one_process():
    """A group of one process, as torchrun's are; NCCL for what lies on a GPU."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@on_either
def test_in_pieces_one_process_learns_what_it_learns_with_a_copy(one_process, device):
    """NCCL takes one process for each GPU: with one it runs the same calls, and sends nothing."""
    settings = tiny_settings(steps=1, batch_size=8, micro_batch_size=4, precision="float32", device=device)
    rows = {"input_ids": torch.arange(8 * CONTEXT).view(8, CONTEXT) % 63}
    found = {}
    for strategy in (Copies(Ranks()), Sharded(Ranks())):
        model = tiny_tokenformer().to(device).train()
        strategy.place(model)
        objective = Causal().bind(model.config, TinyData().form)
        optimizer = build_optimizer(model, settings)
        inputs = {**rows, "labels": rows["input_ids"]}
        loss, norm = BatchGradients(model, objective, settings, strategy).of(inputs, seed=0)
        gradients = torch.cat([whole(parameter.grad).flatten() for parameter in model.parameters()])
        optimizer.step()
        learnt = torch.cat([whole(parameter.detach()).flatten() for parameter in model.parameters()])
        found[strategy.name] = loss, norm, gradients, learnt.cpu()
    assert found["sharded"][:2] == pytest.approx(found["replicated"][:2], rel=1e-5)
    # What AdamW makes of a gradient that is nearly nothing goes by its rounding.
    for one, other, tolerance in zip(found["sharded"][2:], found["replicated"][2:], (1e-5, 1e-3), strict=True):
        assert float((one - other).norm() / other.norm()) < tolerance
    sums = torch.full((3,), 2.0, device=device)
    dist.all_reduce(sums)
    assert sums.tolist() == [2.0] * 3
