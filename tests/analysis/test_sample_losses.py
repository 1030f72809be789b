"""The loss of a sample is what transformers computes for that sample alone."""

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from auxin.analysis.measurement import logits_of, without_loss
from auxin.analysis.sample_losses import sample_losses
from auxin.errors import DataError
from tiny_models import filled, inputs, labels, tiny


def classifier(problem: str | None = None, classes: int = 3) -> Any:
    config = BertConfig(
        vocab_size=19, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=12,
        num_labels=classes, problem_type=problem,
    )  # fmt: skip
    return filled(BertForSequenceClassification(config).eval(), seed=1)


def found(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return sample_losses(model, batch, logits_of(model, model(**without_loss(model, batch))), "this")


def one_by_one(model: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    samples = [{name: value[n : n + 1] for name, value in batch.items()} for n in range(len(batch["labels"]))]
    with torch.no_grad():
        return [model(**sample).loss.item() for sample in samples]


@pytest.mark.parametrize(
    ("problem", "classes", "given"),
    [
        (None, 3, torch.tensor([2, 0, 1, 1])),
        (None, 3, torch.tensor([[2], [0], [1], [1]])),
        ("regression", 1, torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)),
        ("regression", 2, torch.tensor([[0.5, 1.0], [-1.0, 0.0], [2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)),
        (
            "multi_label_classification",
            3,
            torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.float64),
        ),
    ],
)
def test_a_class_a_number_or_several_classes_for_each_sample(problem, classes, given):
    model = classifier(problem, classes)
    batch = {**inputs(model, batch=4), "labels": given}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 4:] = 0
    losses = found(model, batch)
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx(one_by_one(model, batch), rel=1e-12)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_the_mean_over_the_tokens_that_are_asked_for(family):
    model = tiny(family)
    batch = {**inputs(model, batch=3), "labels": labels(model, batch=3)}
    batch["labels"][1, 3:] = -100  # samples with other numbers of labels
    # Some of transformers' losses are float32 whatever the logits are.
    assert found(model, batch).tolist() == pytest.approx(one_by_one(model, batch), rel=1e-6)


def test_padding_counts_for_nothing():
    model = tiny("llama")
    ids = inputs(model, batch=2)["input_ids"]
    padded = torch.cat([ids, torch.full((2, 3), 5)], 1)
    mask = torch.ones_like(padded)
    mask[:, -3:] = 0
    longer = {"input_ids": padded, "labels": padded, "attention_mask": mask}
    assert found(model, longer).tolist() == pytest.approx(found(model, {"input_ids": ids, "labels": ids}).tolist())


def test_samples_without_a_loss_are_refused_by_name():
    model = classifier()
    batch = {**inputs(model, batch=2), "labels": torch.tensor([1, -100])}
    with pytest.raises(DataError, match=r"labels: 1 of 2 samples of a batch have no target.*this looks.*or give them"):
        found(model, batch)
    with pytest.raises(DataError, match=r"labels: this looks at the loss of each sample.*Give a class"):
        found(model, {**batch, "labels": torch.zeros(2, 5, dtype=torch.long)})
