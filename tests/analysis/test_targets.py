"""Labels are read as classes at places where they are such, and samples without any have no loss to be scored by."""

import pytest
import torch

from analysis.samples import Samples
from auxin.analysis import measure, measurement
from auxin.analysis.removal import Removal
from auxin.errors import DataError
from tiny_models import inputs, tiny

IDS = torch.randint(0, 19, (4, 7), generator=torch.Generator().manual_seed(0))
FIRST_ALONE = torch.where(torch.arange(7) == 0, IDS, -100)
HALF = torch.where(torch.arange(4)[:, None] < 2, -100, IDS)


@pytest.mark.parametrize(
    ("ids", "labels", "count"),
    [(IDS, torch.full_like(IDS, -100), 4), (IDS, FIRST_ALONE, 4), (IDS[:, :1], IDS[:, :1], 4), (IDS, HALF, 2)],
)
@pytest.mark.parametrize("how", ["taylor", "fisher", "perplexity"])
def test_samples_without_targets_are_refused_by_what_looks_at_the_loss(ids, labels, count, how):
    model = tiny("llama")
    data = Samples({"input_ids": ids, "labels": labels}, batch_size=4)
    wanted = Removal(distances=["perplexity"]) if how == "perplexity" else measurement("importance", score=how)
    with pytest.raises(DataError, match=rf"labels: {count} of 4 samples of a batch have no target.*{how} looks.*Leave"):
        measure(wanted, model, data, cache=False)


def test_what_does_not_look_at_the_loss_does_without_targets():
    model = tiny("llama")
    data = Samples({"input_ids": IDS, "labels": HALF}, batch_size=2)
    measure(measurement("importance", score="activation"), model, data, cache=False)
    found = measure(Removal(distances=["js"]), model, data, cache=False)
    assert found.loss is None, "a mean over half of the samples is no loss of these data"


@pytest.mark.parametrize("length", [2, 4, 7])
def test_labels_of_a_recording_are_never_read_as_labels_of_its_frames(length):
    model = tiny("wav2vec2")
    given = inputs(model, batch=3)
    assert model(**given).logits.shape[1] == 7, "as many frames as the longest labels here"
    whole = measure(Removal(distances=["js"]), model, Samples(given), cache=False)
    labels = torch.randint(1, 5, (3, length), generator=torch.Generator().manual_seed(1))
    found = measure(Removal(distances=["js"]), model, Samples({**given, "labels": labels}), cache=False)
    assert found.loss is None
    assert found.effects == whole.effects


def test_a_class_for_each_sample_may_stand_in_a_column():
    model = tiny("llama_for_texts", num_labels=3)
    flat = torch.tensor([0, 1, 2])
    wanted = Removal(distances=["perplexity"])
    given = inputs(model, batch=3)
    one, other = (
        measure(wanted, model, Samples({**given, "labels": labels}), cache=False) for labels in (flat, flat[:, None])
    )
    assert one == other
    assert one.loss is not None
