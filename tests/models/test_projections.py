"""Where queries, keys and values arise: what is found there is what the attention computes with."""

import peft
import pytest
import torch
from torch import Tensor

import auxin
from auxin.errors import PlanError
from auxin.models.layers import layer_paths
from auxin.models.projections import Attention, self_attention
from covering import families
from tiny_models import FAMILIES, FURTHER, inputs, tiny


def vectors_of(model, attention: Attention) -> dict[str, Tensor]:
    """What the projections give in a run."""
    found: dict[str, Tensor] = {}
    handles = []
    for part, projection in attention.parts.items():

        def keep(module, arguments, output, part=part, projection=projection):
            found[part] = projection.of(output).detach()

        handles.append(model.get_submodule(projection.module).register_forward_hook(keep))
    with torch.no_grad():
        model(**inputs(model))
    for handle in handles:
        handle.remove()
    return found


def by_head(vectors: Tensor, heads: int) -> Tensor:
    return vectors.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "distilbert", "gpt_bigcode", "opt", "whisper"])
def test_queries_and_keys_make_the_models_own_map(family):
    """Of families that add nothing to the scores of their heads."""
    model = tiny(family).eval()
    model.set_attn_implementation("eager")
    attention = self_attention(model, layer_paths(model)[-1])
    found = vectors_of(model, attention)
    with torch.no_grad():
        output = model(**inputs(model), output_attentions=True)
    told = (getattr(output, "decoder_attentions", None) or output.attentions)[-1]
    query, key = (by_head(found[part], attention.parts[part].heads) for part in ("query", "key"))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if attention.causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    assert torch.allclose(scores.softmax(-1), told, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "split"),
    [
        ("gpt_neox", lambda out: out.unflatten(-1, (4, 3, 8)).unbind(-2)),
        ("bloom", lambda out: out.unflatten(-1, (4, 3, 4)).unbind(-2)),
        ("falcon", lambda out: out.unflatten(-1, (2, 6, 4)).split([4, 1, 1], -2)),
        ("mpt", lambda out: out.chunk(3, -1)),
        ("phi3", lambda out: out.split([32, 16, 16], -1)),
    ],
)
def test_fused_matrices_are_taken_apart_as_the_modeling_does(family, split):
    model = tiny(family).eval()
    attention = self_attention(model, layer_paths(model)[0])
    (module,) = {projection.module for projection in attention.parts.values()}
    fused: list[Tensor] = []
    model.get_submodule(module).register_forward_hook(lambda m, a, output: fused.append(output.detach()))
    found = vectors_of(model, attention)
    for part, expected in zip(("query", "key", "value"), split(fused[0]), strict=True):
        assert torch.equal(found[part], expected.flatten(2))


def first_place_after(model, path: str, by: float) -> Tensor:
    """What a layer leaves at the first place when what enters at the next one is moved, which any window sees."""
    made: list[Tensor] = []

    def move(module, arguments, named):
        hidden = (arguments[0] if arguments else named["hidden_states"]).clone()
        hidden[:, 1] += by * torch.arange(1, hidden.shape[-1] + 1)
        return ((hidden, *arguments[1:]), named) if arguments else (arguments, {**named, "hidden_states": hidden})

    def note(module, arguments, output):
        made.append((output[0] if isinstance(output, tuple) else output)[:, 0].detach())

    layer = model.get_submodule(path)
    handles = [layer.register_forward_pre_hook(move, with_kwargs=True), layer.register_forward_hook(note)]
    with torch.no_grad():
        model(**inputs(model))
    for handle in handles:
        handle.remove()
    return made[0]  # ALBERT runs its one layer several times


@pytest.mark.parametrize(
    "family", families([*FAMILIES, *FURTHER], "bert", "vit", "bloom", "mpt", "clip_text_model", "siglip_text_model")
)
def test_an_attention_is_causal_where_no_place_depends_on_a_later_one(family):
    model = tiny(family).eval()
    if family.startswith("deepseek"):
        pytest.skip("its attention is refused")
    for path in layer_paths(model):
        still, moved = (first_place_after(model, path, by) for by in (0.0, 0.1))
        assert self_attention(model, path).causal == torch.allclose(still, moved, atol=1e-10)


def test_a_wrapper_gives_what_it_adds():
    model = tiny("llama")
    grafted = auxin.apply(auxin.plan(model, "graft", tokens=4), model)
    assert grafted is not None
    path = layer_paths(model)[0]
    modules = {part: projection.module for part, projection in self_attention(model, path).parts.items()}
    assert modules == {part: f"{path}.self_attn.{part[0]}_proj" for part in ("query", "key", "value")}


def test_an_adapter_hides_nothing_and_is_listened_to():
    model = tiny("llama").float()
    path = layer_paths(model)[0]
    bare = self_attention(model, path)
    before = vectors_of(model, bare)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    assert self_attention(model, path) == bare
    after = vectors_of(model, bare)
    assert not torch.allclose(after["query"], before["query"])
    assert torch.equal(after["key"], before["key"])


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_is_refused(family):
    model = tiny(family)
    with pytest.raises(PlanError, match=r"layers.0: keys are put together of several vectors .* 6 of their 10"):
        self_attention(model, layer_paths(model)[0])
