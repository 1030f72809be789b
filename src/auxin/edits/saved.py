"""Folders of edited models: what stands in them beyond what `save_pretrained` writes.

A model whose config holds structural edits is another one than its class builds. Where `auxin` is not imported,
transformers warns of a quantizer that it does not know, and loads the weights into the plain model. So the weights lie
under a name that transformers does not look for; the config tells it to the replay (`auxin.edits.replay`), and where
there is none loading fails: "no file named model.safetensors". A section of the model card says what to do.
"""

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.edits.mark import REPLAY_METHOD
from auxin.edits.model_card import mark_model_card
from auxin.edits.other_files import TRAINER_STATE
from auxin.edits.safetensors_file import SafetensorsWriter
from auxin.edits.structure import structural_edits
from auxin.edits.tensor_names import saved_name, tensor_names
from auxin.files import write_text
from auxin.models.loading import no_progress_bar
from auxin.models.stored_form import StoredForm
from auxin.models.weight_files import EDITED, INDEX_ENDING, PLAIN, first_file

CONFIG = "config.json"


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained`, and what else belongs into the folder of an edited model."""
    with no_progress_bar():
        model.save_pretrained(folder)
    complete(folder, model.config)


def save_configs(model: PreTrainedModel, folder: Path) -> None:
    """What `save_pretrained` writes beside the weights."""
    with no_progress_bar():
        model.save_pretrained(folder, state_dict={})


def save_weights(model: PreTrainedModel, read: Callable[[str], Tensor], folder: Path) -> None:
    """The weights as `save_model` would write them, one tensor in memory at a time, to what `save_configs` has written.

    Args:
        model: the model, of which the shapes are enough.
        read: gives a parameter or persistent buffer by the first of its names.
        folder: where they go.
    """
    form, names, state = StoredForm(model), tensor_names(model), model.state_dict()
    skipped = set(model._keys_to_ignore_on_save or ())
    chosen = {name: saved_name(model, aliases) for name, aliases in names.items() if name not in skipped}
    stored = [part for alias in chosen.values() for part in form.saved(alias, state[alias].to("meta"))]
    with SafetensorsWriter(folder / PLAIN, stored) as writer:
        for name, alias in chosen.items():
            for part, tensor in form.saved(alias, read(name)).items():
                writer.add(part, tensor)
        writer.finish({"format": "pt"})
    complete(folder, model.config)


def complete(folder: Path, config: PreTrainedConfig) -> list[str]:
    """Bring a folder that holds a saved model of `config` into the form that it asks for: where there are structural
    edits the weights get their own name and the model card its section, where there are none both go back.

    In a checkpoint from which transformers' Trainer resumes the weights keep their name, since it looks for that. So
    does an adapter that was saved alone.

    Returns:
        A sentence, where they keep it although there are edits.
    """
    weights = first_file(folder)
    if weights is None or not (folder / CONFIG).is_file():
        mark_model_card(folder, config)
        return []
    has_edits, resumes = bool(structural_edits(config)), (folder / TRAINER_STATE).exists() and _resumes(folder)
    is_edited = has_edits and not resumes
    ending = INDEX_ENDING if weights.name.endswith(INDEX_ENDING) else ""
    name = (EDITED if is_edited else PLAIN) + ending
    if weights.name != name:
        weights.rename(folder / name)
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    stored = values.get("quantization_config") or {}
    ours = stored.get("quant_method") == REPLAY_METHOD
    if ours and stored.get("weights") != (told := name if is_edited else None):
        stored.pop("weights", None)
        stored |= {"weights": told} if told else {}
        write_text(folder / CONFIG, json.dumps(values, indent=2, sort_keys=True) + "\n")
    mark_model_card(folder, config)
    if is_edited or not has_edits:
        return []
    return [
        f"The weights keep the name {name}, since a Trainer that resumes looks for it: where auxin is not imported, "
        "transformers loads another model from this folder. auxin.load and auxin.save make one that it refuses."
    ]


def _resumes(folder: Path) -> bool:
    """Whether a Trainer's state of training is there; beside finished models it leaves its log alone."""
    return any((folder / name).exists() for name in ("optimizer.pt", "scheduler.pt"))
