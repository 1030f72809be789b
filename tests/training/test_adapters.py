"""Training a model that carries a PEFT adapter: resumed like any other, and refused where a checkpoint would lack
something."""

import peft
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import LlamaForCausalLM, PreTrainedModel

from auxin.errors import CheckpointError, ConfigError
from auxin.sums import remove_sums
from auxin.training import latest_checkpoint, train
from training.tiny import TinyData, poisoned, tiny_llama, tiny_settings, weights


def adapted(rank: int = 4, **options: object) -> LlamaForCausalLM:
    model = tiny_llama()
    model.add_adapter(peft.LoraConfig(r=rank, target_modules="all-linear", **options))
    return model


def test_a_resumed_adapter_ends_with_the_same_bits(tmp_path):
    settings = tiny_settings(steps=8, checkpoint_interval=None)
    whole, first, second = adapted(lora_dropout=0.1), adapted(lora_dropout=0.1), adapted(lora_dropout=0.1)
    untouched = weights(whole)
    train(whole, TinyData(), settings, tmp_path / "whole", progress=False)
    train(first, TinyData(), settings, tmp_path / "stopped", stop_after=3, progress=False)
    train(second, TinyData(), settings, tmp_path / "stopped", progress=False)
    assert not torch.equal(weights(whole), untouched)
    assert torch.equal(weights(whole), weights(second))


class Watch:
    """Keeps the adapter as it is before each step that is tried."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor]] = []

    def attach(self, model: PreTrainedModel, optimizer: Optimizer) -> None:
        self.model = model

    def before_step(self, step: int) -> None:
        tensors = self.model.get_adapter_state_dict().values()
        self.seen.append((step, torch.cat([tensor.flatten() for tensor in tensors])))

    def after_step(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        pass


def test_a_rewind_goes_back_to_the_adapter_of_the_checkpoint(tmp_path):
    settings = tiny_settings(steps=12, checkpoint_interval=100, guard={"action": "rewind", "maximum_events": 9})
    model, watch = poisoned(adapted()), Watch()
    result = train(model, TinyData(poisoned_rows=(5, 17)), settings, tmp_path, hooks=[watch], progress=False)
    assert result.data_position > result.steps == 12
    first = watch.seen[0][1]
    starts = [bits for step, bits in watch.seen if step == 0]
    # Other steps lie between the two, which moved it.
    assert len(starts) > 1
    assert not torch.equal(watch.seen[1][1], first)
    assert all(torch.equal(bits, first) for bits in starts)


def test_the_checkpoint_is_an_adapter_that_transformers_loads(tmp_path):
    model = adapted()
    result = train(model, TinyData(), tiny_settings(steps=4), tmp_path, progress=False)
    again = tiny_llama()
    again.load_adapter(result.checkpoint)
    ids = torch.arange(16)[None]
    assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_what_the_checkpoint_would_lack_is_not_trained(tmp_path):
    model = adapted()
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is trained but no part of the adapter 'default'"):
        train(model, TinyData(), tiny_settings(steps=4), tmp_path, progress=False)
    model = adapted()
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"), "other")
    model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match=r"2 active adapters \(default, other\)"):
        train(model, TinyData(), tiny_settings(steps=4), tmp_path, progress=False)


def test_another_adapter_can_not_go_on(tmp_path):
    settings = tiny_settings(steps=4)
    train(adapted(), TinyData(), settings, tmp_path, stop_after=2, progress=False)
    with pytest.raises(CheckpointError, match=r"lora_A\.weight has shape \(4, 64\) there and \(2, 64\) in the adapter"):
        train(adapted(rank=2), TinyData(), settings, tmp_path, progress=False)
    remove_sums(latest_checkpoint(tmp_path))
    (latest_checkpoint(tmp_path) / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the model has an adapter"):
        train(adapted(), TinyData(), settings, tmp_path, progress=False)
