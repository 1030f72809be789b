"""Tiny models with weights far from zero, and their state to the last bit."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auxin.models.tokenformer import TokenFormerConfig, TokenFormerForCausalLM

VOCABULARY = 96


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **values: Any) -> TokenFormerForCausalLM:
    """A TokenFormer whose weights are as large as a trained one's, so that a change of the function shows."""
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "qkv_tokens": 12,
        "proj_tokens": 12,
        "ffn_tokens": 20,
        "max_position_embeddings": 32,
        "score_function": "l2_norm_gelu",  # with a norm every token has a part in what the others weigh
    }
    model = TokenFormerForCausalLM(TokenFormerConfig(**{**defaults, **values}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def token_ids(seed: int = 1, batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def trained(model: TokenFormerForCausalLM, steps: int = 3, **settings: Any) -> torch.optim.Optimizer:
    """An AdamW with moments of a few real steps."""
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, **settings})
    for step in range(steps):
        training_step(model, optimizer, step)
    return optimizer


def training_step(model: TokenFormerForCausalLM, optimizer: torch.optim.Optimizer, step: int) -> None:
    ids = token_ids(100 + step)
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def everything(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """All that an edit could change, identities included: tensors with their gradients, flags, plain attributes,
    config, optimizer."""
    state: dict[str, Any] = {"config": copy.deepcopy(model.config.to_dict())}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        gradient = None if parameter.grad is None else parameter.grad.clone()
        state[name] = (parameter.detach().clone(), id(parameter), parameter.requires_grad, gradient)
        if optimizer is not None:
            kept = optimizer.state.get(parameter, {})
            state[f"{name}/optimizer"] = {key: copy.deepcopy(value) for key, value in kept.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = {key: value for key, value in vars(module).items() if isinstance(value, PLAIN)}
        buffers = {key: None if value is None else value.clone() for key, value in module._buffers.items()}
        state[f"{name}/module"] = (id(module), attributes, buffers)
    if optimizer is not None:
        state["groups"] = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    return state


PLAIN = (bool, int, float, str, tuple)
"""Types of the attributes of modules that `everything` compares."""


def assert_same(now: Any, then: Any, path: str = "") -> None:
    """Equal to the last bit."""
    if isinstance(then, Tensor):
        assert now.dtype == then.dtype, path
        assert torch.equal(now, then), path
    elif isinstance(then, dict):
        assert now.keys() == then.keys(), path
        for key in then:
            assert_same(now[key], then[key], f"{path}/{key}")
    elif isinstance(then, list | tuple):
        for number, (one, other) in enumerate(zip(now, then, strict=True)):
            assert_same(one, other, f"{path}/{number}")
    else:
        assert now == then, path
