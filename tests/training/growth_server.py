"""Changes the size of models in several forked processes together on request: ranks_server.py with other scenarios."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import auxin
from auxin.edits import Plan
from auxin.edits.carry import carry
from auxin.edits.resolution import ResolvedPlan
from auxin.training import apply_in_pieces, growth
from auxin.training.optimizer import build_optimizer, optimizer_tensors
from auxin.training.ranks import Ranks
from auxin.training.strategies import Sharded, fill, whole
from tiny_models import tiny
from training.ranks_server import SCENARIOS, answer
from training.tiny import bits, tiny_settings


def with_moments(model: PreTrainedModel) -> AdamW:
    """An optimizer in the middle of a training."""
    optimizer = build_optimizer(model, tiny_settings(steps=1))
    drawn = torch.Generator().manual_seed(7)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            first, second = (torch.rand(parameter.shape, generator=drawn, dtype=parameter.dtype) for _ in range(2))
            step = torch.tensor(3.0)
            optimizer.state[parameter] = {"step": step, "exp_avg": first - 0.5, "exp_avg_sq": second}
    return optimizer


def found_in(model: PreTrainedModel, optimizer: AdamW) -> dict[str, Tensor]:
    """Weights, buffers and states, whole, by name."""
    found = {name: whole(tensor.detach()) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return found | {name: whole(tensor) for name, tensor in optimizer_tensors(model, optimizer).items()}


def grouped(model: PreTrainedModel, optimizer: AdamW) -> list[list[str]]:
    """Which parameters each group of an optimizer has."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def in_pieces(model: PreTrainedModel, ranks: Ranks) -> tuple[PreTrainedModel, AdamW]:
    """The model and its optimizer, cut."""
    tensors = optimizer_tensors(model, with_moments(model))
    Sharded(ranks).place(model)
    optimizer = with_moments(model)
    for name, piece in optimizer_tensors(model, optimizer).items():
        if name.startswith("optimizer.step"):
            continue
        _, moment, parameter = name.split(".", 2)
        place = dict(model.named_parameters())[parameter]
        piece = torch.zeros_like(place, requires_grad=False)
        fill(piece, tensors[name])
        optimizer.state[place][moment] = piece
    return model, optimizer


def base(request: dict) -> PreTrainedModel:
    """The model; one whose embedding alone is trained, and that has settings beside its config, where that is asked."""
    model = tiny(request["family"], seed=0)
    if request.get("frozen"):
        model.set_attn_implementation("eager")
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        model.train()
        next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0].eval()
    return model


def modes(model: PreTrainedModel) -> tuple[str, list[tuple[str, bool]]]:
    """What is set on a model beside its config."""
    return model.config._attn_implementation, [(name, module.training) for name, module in model.named_modules()]


def do_grow(ranks: Ranks, folder: Path, request: dict) -> None:
    """Plans applied to a whole model, and to one in pieces; what differs, by plan, goes to a file."""
    differences: dict[str, list[str]] = {}
    for file in request["plans"]:
        plan = Plan.from_yaml(file)
        expected = base(request)
        optimizer = with_moments(expected)
        receipt = auxin.apply(plan, expected, optimizer=optimizer)
        model, own = in_pieces(base(request), ranks)
        made, found = apply_in_pieces(plan, model, own)
        wanted, got = found_in(expected, optimizer), found_in(made, own)
        wrong = sorted(wanted.keys() ^ got.keys())
        wrong += [name for name in wanted.keys() & got.keys() if not same_bits(wanted[name], got[name])]
        wrong += ["groups"] if grouped(expected, optimizer) != grouped(made, own) else []
        trained = [{name for name, p in each.named_parameters() if p.requires_grad} for each in (expected, made)]
        wrong += ["trainable"] if trained[0] != trained[1] else []
        wrong += ["modes"] if modes(expected) != modes(made) else []
        wrong += ["config"] if expected.config.to_dict() != made.config.to_dict() else []
        same = ("parameters_after", "continuation", "fresh_moments", "replayed")
        wrong += [name for name in same if getattr(receipt, name) != getattr(found, name)]
        if wrong:
            differences[file] = wrong
    ranks.told(lambda: Path(f"{folder}.json").write_text(json.dumps(differences)))


def do_bounded(ranks: Ranks, folder: Path, request: dict) -> None:
    """The most that a process holds while a model in pieces becomes another, by torch's tracker, and what it holds
    before and after; in bytes. The runs on the probe are not in it."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 1024}
    whole_model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4))
    plan = auxin.plan(whole_model, request["method"], **request["settings"])
    model, optimizer = in_pieces(whole_model, ranks)
    del whole_model
    before = {id(tensor): tensor.nbytes for tensor in local(model, optimizer)}
    peaks: list[int] = []

    def tracked(resolved: ResolvedPlan, seed: int, store: growth._Pieces) -> list[str]:
        tracker = MemTracker()
        tracker.track_external(model, optimizer, store.made)
        with tracker:
            fresh = carry(resolved, seed, store)
        peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
        return fresh

    growth.carry = tracked
    made, _ = apply_in_pieces(plan, model, optimizer)
    after = sum(tensor.nbytes for tensor in local(made, optimizer))
    largest = [max(p.numel() * p.element_size() for p in each.parameters()) for each in (model, made)]
    ranks.told(lambda: Path(f"{folder}.json").write_text(json.dumps([*peaks, sum(before.values()), after, *largest])))


def local(model: PreTrainedModel, optimizer: AdamW) -> list[Tensor]:
    """What lies in this process of a model and its optimizer."""
    tensors = [*model.parameters(), *optimizer_tensors(model, optimizer).values()]
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


SCENARIOS |= {"grow": do_grow, "bounded": do_bounded}

if __name__ == "__main__":
    answer()
