"""A stage that learns from a teacher: resumed to the same bits, with the same teacher, of which it keeps and trains
nothing."""

import json
from pathlib import Path

import pytest

from auxin.accounting.flops import forward_flops
from auxin.errors import CheckpointError, ConfigError
from auxin.objectives.objective import Reference
from auxin.training import train
from auxin.training.checkpoint import write_checkpoint_folder
from objectives.tiny_encoders import tiny_bert
from training.tiny import TinyData, checkpoint_bits, read_metrics, tiny_gpt2, tiny_llama, tiny_settings

LAYERS = {"hidden_states": 0.5, "attentions": 1.0, "layers": {0: 1, 1: 3}}


def teacher_in(folder: Path, seed: int = 5, **changes: object) -> str:
    return str(write_checkpoint_folder(folder, tiny_llama(seed, **changes)))


def distilled(
    model, output, teacher: str, stop_after=None, references=None, steps=7, micro_batch_size=None, **objective: object
):
    asked = {"kind": "distillation", "teacher": teacher, **objective}
    settings = tiny_settings(steps=steps, micro_batch_size=micro_batch_size, objective=asked)
    return train(model, TinyData(), settings, output, stop_after=stop_after, references=references, progress=False)


WIDER = {"hidden_size": 48, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("sizes", "objective"),
    [({}, {}), ({}, {"weight": 0.9, **LAYERS}), (WIDER, {"relations": 1.0, "relation_heads": 2})],
    ids=["answers", "layers", "relations"],
)
def test_pieces_end_in_the_bits_of_the_whole(tmp_path, sizes, objective):
    teacher = teacher_in(tmp_path / "teacher", num_hidden_layers=4, **sizes)
    alone = distilled(tiny_gpt2(), tmp_path / "alone", teacher, **objective)
    distilled(tiny_gpt2(), tmp_path / "pieces", teacher, stop_after=3, **objective)
    pieces = distilled(tiny_gpt2(), tmp_path / "pieces", teacher, **objective)
    assert checkpoint_bits(alone.checkpoint) == checkpoint_bits(pieces.checkpoint)
    assert read_metrics(tmp_path / "alone") == read_metrics(tmp_path / "pieces")
    other = distilled(tiny_gpt2(), tmp_path / "other", teacher_in(tmp_path / "t2", seed=6, num_hidden_layers=4))
    assert checkpoint_bits(other.checkpoint) != checkpoint_bits(alone.checkpoint)


def test_hidden_tokens_are_the_same_after_a_stop(tmp_path):
    teacher = str(write_checkpoint_folder(tmp_path / "teacher", tiny_bert(3)))
    changes = {"objective": "masked_language", "hidden_states": 1.0}
    alone = distilled(tiny_bert(dropout=0.1), tmp_path / "alone", teacher, **changes)
    distilled(tiny_bert(dropout=0.1), tmp_path / "pieces", teacher, stop_after=4, **changes)
    pieces = distilled(tiny_bert(dropout=0.1), tmp_path / "pieces", teacher, **changes)
    assert checkpoint_bits(alone.checkpoint) == checkpoint_bits(pieces.checkpoint)


def test_parts_of_a_batch_learn_what_the_batch_learns(tmp_path):
    teacher = teacher_in(tmp_path / "teacher", num_hidden_layers=4)
    losses = []
    for micro in (None, 1, 3):
        settings = tiny_settings(
            steps=3,
            log_interval=1,
            micro_batch_size=micro,
            objective={"kind": "distillation", "teacher": teacher, **LAYERS},
        )
        train(tiny_llama(), TinyData(), settings, tmp_path / str(micro), progress=False)
        losses.append([line["loss"] for line in read_metrics(tmp_path / str(micro)) if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_another_teacher_is_refused_when_a_stage_is_resumed(tmp_path):
    teacher = teacher_in(tmp_path / "teacher")
    distilled(tiny_llama(), tmp_path / "run", teacher, stop_after=3)
    teacher_in(tmp_path / "teacher", seed=6)
    with pytest.raises(CheckpointError, match=r"was started with objective\.teacher '[0-9a-f]{64}'"):
        distilled(tiny_llama(), tmp_path / "run", teacher)
    teacher_in(tmp_path / "teacher", seed=5)
    assert distilled(tiny_llama(), tmp_path / "run", teacher).steps == 7


def test_a_map_is_fitted_to_a_part_of_a_batch_whose_size_stays(tmp_path):
    teacher = teacher_in(tmp_path / "teacher")
    distilled(tiny_llama(), tmp_path / "plain", teacher, stop_after=3, hidden_states=1.0)
    distilled(tiny_llama(), tmp_path / "plain", teacher, micro_batch_size=2, hidden_states=1.0)
    mapped = {"hidden_states": 1.0, "projected": True}
    distilled(tiny_llama(), tmp_path / "run", teacher, stop_after=3, **mapped)
    with pytest.raises(CheckpointError, match="samples per forward pass '4', but is resumed with '2'"):
        distilled(tiny_llama(), tmp_path / "run", teacher, micro_batch_size=2, **mapped)
    assert distilled(tiny_llama(), tmp_path / "run", teacher, **mapped).steps == 7


def test_nothing_of_the_teacher_is_kept_and_its_work_is_booked(tmp_path):
    plain = train(tiny_llama(), TinyData(), tiny_settings(steps=2), tmp_path / "plain", progress=False)
    result = distilled(tiny_llama(), tmp_path / "run", teacher_in(tmp_path / "t", num_hidden_layers=4), steps=2)
    ours, theirs = (checkpoint_bits(folder) for folder in (result.checkpoint, plain.checkpoint))
    assert ours.keys() == theirs.keys()
    example = TinyData().split("train").rows([0])
    asked = forward_flops(tiny_llama(num_hidden_layers=4), {**example, "use_cache": False})
    assert result.flops == pytest.approx(plain.flops + 2 * 4 * asked)
    record = result.ledger.stages[-1]
    assert record.parameters == plain.ledger.stages[-1].parameters
    # Held-out losses are those of the text, as without a teacher.
    assert record.value_before == plain.ledger.stages[-1].value_before


def test_a_model_in_memory_can_teach(tmp_path):
    teacher = tiny_llama(5)
    references = {"anything": Reference(teacher, "by hand")}
    result = distilled(tiny_llama(), tmp_path / "run", "anything", references=references, hidden_states=1.0)
    state = json.loads((result.checkpoint / "training" / "state.json").read_text())
    assert state["identity"]["objective"] == {"teacher": "by hand"}
    same = distilled(tiny_llama(), tmp_path / "same", teacher_in(tmp_path / "teacher"), hidden_states=1.0)
    assert checkpoint_bits(result.checkpoint) == checkpoint_bits(same.checkpoint)


def test_a_student_comes_nearer_to_its_teachers_answers(tmp_path):
    """Without the text's own loss, all that is learnt is the teacher's."""
    data, teacher = TinyData(), tiny_llama(5)
    train(teacher, data, tiny_settings(steps=150, learning_rate=1e-2), tmp_path / "teacher", progress=False)
    references = {"t": Reference(teacher, "t")}
    result = distilled(
        tiny_llama(num_hidden_layers=1), tmp_path / "run", "t", references=references, weight=1.0, steps=150
    )
    lines = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert lines[-1] < 0.5 * lines[0]
    assert result.value < 0.8 * result.ledger.stages[-1].value_before


def test_what_can_not_be_compared_is_refused_before_the_folder_is_made(tmp_path):
    teacher = teacher_in(tmp_path / "teacher", hidden_size=48)
    with pytest.raises(ConfigError, match="hidden_states: layer 0"):
        distilled(tiny_llama(), tmp_path / "run", teacher, hidden_states=1.0)
    assert not (tmp_path / "run").exists()
