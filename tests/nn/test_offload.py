"""Models with bricks whose tensors are elsewhere until they are needed: accelerate's offloading, to CPU and disk."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from auxin.edits import Plan, apply
from auxin.edits.kinds.edit import RemoveModule, ReplaceModule, ResizeModule, SliceParameter
from auxin.edits.structure import structural_edits
from auxin.methods import method
from auxin.nn.bricks import BRICKS
from auxin.planning.bench import Bench
from tiny_models import inputs, tiny

accelerate = pytest.importorskip("accelerate", reason="offloading is accelerate's")

Planner = Callable[[Any], Plan]


def by_hand(*edits: Any) -> Planner:
    return lambda model: Plan(method="by hand", promise="none", edits=list(edits))


def by(name: str, **settings: Any) -> Planner:
    found = method(name)
    return lambda model: found.plan(Bench(model), found.settings.parse(settings))


WIDER = {"hidden_size": 20, "intermediate_size": 16, "layers": 3}
FEED_FORWARD, FEATURES = "bert.encoder.layer.*.{}.dense", {"features": 3}
CASES: dict[str, tuple[str, Planner]] = {
    "nothing": ("llama", by_hand()),
    "tokenformer": ("tokenformer", by("tokenformer", ffn_tokens=20)),
    "altup": ("llama", by("altup")),
    "altup of copies": ("gemma", by("altup", conversion="copies")),
    "altup added up": ("gemma", by("altup", conversion="random", control="sum")),
    "altup dynamic": ("llama", by("altup", coefficients="dynamic")),
    "altup passing by": ("llama", by("altup", conversion="random", selection="same", coefficients="none")),
    "altup of an encoder": ("bert", by("altup")),
    "altup of an encoder's tables": ("bert", by("altup", conversion="copies")),
    "altup of encoder and decoder": ("t5", by("altup", conversion="copies")),
    "sequence-altup": ("llama", by("sequence-altup", layers=[1])),
    "masked": ("llama", by("masked", **WIDER)),
    "masked gemma": ("gemma", by("masked", **WIDER)),
    "masked gpt2": ("gpt2", by("masked", **WIDER)),
    "masked bert": ("bert", by("masked", **WIDER)),
    "graft": ("llama", by("graft", tokens=3)),
    "graft gpt2": ("gpt2", by("graft", tokens=3)),
    "low rank": (
        "llama",
        by_hand(ReplaceModule(module="model.layers.*.mlp.up_proj", brick="low_rank_linear", settings={"rank": 4})),
    ),
    "low rank gpt2": (
        "gpt2",
        by_hand(ReplaceModule(module="transformer.h.*.mlp.c_fc", brick="low_rank_conv1d", settings={"rank": 4})),
    ),
    "block dense": (
        "llama",
        by_hand(
            ReplaceModule(
                module="model.layers.*.mlp.up_proj", brick="block_dense_linear", settings={"blocks": 2, "rank": 6}
            )
        ),
    ),
    "block shuffle gpt2": (
        "gpt2",
        by_hand(ReplaceModule(module="transformer.h.*.mlp.c_fc", brick="block_shuffle_conv1d", settings={"blocks": 2})),
    ),
    "block dense gpt2": (
        "gpt2",
        by_hand(
            ReplaceModule(
                module="transformer.h.*.mlp.c_fc", brick="block_dense_conv1d", settings={"blocks": 2, "rank": 6}
            )
        ),
    ),
    "block shuffle": (
        "llama",
        by_hand(
            ReplaceModule(module="model.layers.*.mlp.up_proj", brick="block_shuffle_linear", settings={"blocks": 2})
        ),
    ),
    "clipped softmax": ("llama", by("clipped-softmax", alpha=0.9, length=16)),
    "gated attention": ("bert", by("gated-attention", gate="mlp", hidden=2)),
    "guided": ("llama", by("structured-ffn", form="block-shuffle", guide="weight", first_layer=True)),
    "factorised embedding": ("llama", by("factorised-embedding", rank=4, frequencies=False)),
    "factorised embedding, tied": ("gpt2", by("factorised-embedding", rank=4, frequencies=False)),
    "factorised embedding, scaled": ("gemma", by("factorised-embedding", rank=4, frequencies=False)),
    "split": (
        "llama",
        by_hand(
            ReplaceModule(
                module="model.layers.*.mlp",
                brick="split_feed_forward",
                settings={"num_experts": 4, "experts_per_token": 2, "shared_experts": 1},
            )
        ),
    ),
    "split gpt2": (
        "gpt2",
        by_hand(
            ReplaceModule(module="transformer.h.*.mlp", brick="split_feed_forward_conv1d", settings={"num_experts": 4})
        ),
    ),
    "merged tokens": (
        "vit",
        by_hand(ReplaceModule(module="vit.layers.*", brick="token_merging_layer", settings={"merged": 2})),
    ),
    "convolution of low rank": (
        "whisper",
        by_hand(ReplaceModule(module="model.encoder.conv1", brick="low_rank_convolution", settings={"rank": 3})),
    ),
    "Linformer": (
        "bert",
        by_hand(
            ReplaceModule(
                module="bert.encoder.layer.*.attention.self",
                brick="linformer_attention",
                settings={"projected_length": 4, "max_length": 64},
            )
        ),
    ),
    "adapters of random features": ("llama", by("snnk", features=3)),
    "layers of random features": ("bert", by("snnk", place="feed-forward", blocks=2, features=3)),
    "layers of random features gpt2": ("gpt2", by("snnk", place="feed-forward", blocks=2, features=3)),
    "random features alone": (
        "bert",
        by_hand(
            ReplaceModule(module=FEED_FORWARD.format("intermediate"), brick="relu_feature_linear", settings=FEATURES),
            ReplaceModule(module=FEED_FORWARD.format("intermediate"), brick="relu_features"),
            ResizeModule(module=FEED_FORWARD.format("output"), inputs=3),
            SliceParameter(parameter=f"{FEED_FORWARD.format('output')}.weight", axis=1, index=[0, 1, 2]),
        ),
    ),
    "hard attention": (
        "llama",
        by_hand(ReplaceModule(module="model.layers.1.self_attn", brick="hard_attention", settings={"keep": 2})),
    ),
    "removed": (
        "llama",
        by_hand(
            RemoveModule(module="model.layers.0.self_attn", leaves="zeros"), RemoveModule(module="model.layers.1.mlp")
        ),
    ),
}


def edited(case: str) -> Any:
    """The edited model, moved from where its bricks do nothing."""
    family, plan = CASES[case]
    model = tiny(family, dtype=torch.float32)
    apply(plan(model), model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**inputs(model)).logits


@pytest.mark.parametrize("case", CASES)
def test_an_offloaded_model_computes_what_it_does_in_memory(case, tmp_path):
    model = edited(case)
    model.save_pretrained(tmp_path / "model")
    whole = type(model).from_pretrained(tmp_path / "model").eval()
    expected = logits(whole)
    assert torch.isfinite(expected).all()
    on_cpu = accelerate.cpu_offload(whole)
    on_disk = type(model).from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    for offloaded in (on_cpu, on_disk):
        assert all(parameter.is_meta for parameter in offloaded.parameters())
        for _ in range(2):  # what was brought is taken away again
            assert torch.equal(logits(offloaded.eval()), expected)
            assert all(parameter.is_meta for parameter in offloaded.parameters())


def test_every_brick_is_among_them():
    found: set[str] = set()
    for case in CASES:
        for edit in structural_edits(edited(case).config):
            found |= {getattr(edit, "brick", None) or getattr(edit, "leaves", "")}
    ours = {name for name, brick in BRICKS.all().items() if brick.__module__.startswith("auxin.")}
    assert ours - found == set()
