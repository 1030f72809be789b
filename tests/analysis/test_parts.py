"""Parts of layers: of what kind they are, and whose tokens pass through them."""

import pytest
import torch

from analysis.samples import Samples
from auxin.analysis import measure
from auxin.analysis.parts import stack_parts
from tiny_models import InDouble, inputs, tiny


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_attentions_of_towers_are_attentions(family):
    model = tiny(family)
    assert [parts.kinds for parts in stack_parts(model)] == [("attention", "feed-forward")] * 2
    runners = [type(parts.runner).__name__ for parts in stack_parts(model)]
    assert ["Vision" in runners[0], "Text" in runners[1]] == [True, True]


def test_the_mask_of_a_text_is_not_that_of_an_image():
    model = tiny("clip")
    batch = inputs(model) | {"attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    image, text = (parts.kept(batch) for parts in stack_parts(model))
    assert image is None
    assert text is not None
    assert text.sum(dim=1).tolist() == [7, 4]
    for name in ("similarity", "attention-targets", "outliers"):
        assert measure(name, model, Samples(batch), cache=False)


@pytest.mark.parametrize("name", ["similarity", "attention-targets", "outliers"])
@pytest.mark.parametrize("head", ["T5Model", "T5ForConditionalGeneration"])
def test_a_decoder_has_the_mask_of_its_own_inputs_with_a_head_and_without(name, head):
    model = tiny("t5", head=head)
    rows = inputs(model, batch=2)
    masks = {
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "decoder_attention_mask": torch.tensor([[1] * 5, [1] * 2 + [0] * 3]),
    }
    with InDouble():
        together = measure(name, model, Samples(rows | masks), cache=False)
        alone = [
            measure(name, model, Samples({"input_ids": x[None], "decoder_input_ids": y[None]}), cache=False)
            for x, y in (
                (rows["input_ids"][0], rows["decoder_input_ids"][0]),
                (rows["input_ids"][1, :4], rows["decoder_input_ids"][1, :2]),
            )
        ]

    def first(result: object) -> float:
        stack = result.stacks[-1]  # type: ignore[attr-defined]
        if name == "attention-targets":
            return stack.attentions[0].heads[0].entropy.mean
        return stack.layers[0].similarity.mean if name == "similarity" else stack.layers[0].stream.kurtosis.mean

    assert first(together) == pytest.approx(sum(map(first, alone)) / 2, abs=1e-9)
