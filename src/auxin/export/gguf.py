"""GGUF files, which llama.cpp and what is built on it run, by the `gguf` library (`pip install "auxin[gguf]"`).

The library knows the format: names of tensors and keys, block types, how text is packed. Here stands which tensor of a
model is which (by the library's map of names), what llama.cpp wants arranged otherwise, and what has no place in a
file. transformers' own reader of GGUF judges the result: a file counts as written when that reader's config, its
tokenizer and every one of its weights are the model's.
"""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from auxin.data.tokenizer import has_tokenizer, read_tokenizer
from auxin.edits.runtimes import ways_out
from auxin.edits.structure import refuse_quantized, structural_edits
from auxin.errors import CheckpointError, ConfigError, DataError, reason, shown
from auxin.export.gguf_families import Family, family_of
from auxin.export.gguf_reading import changes, refuse_uncarried
from auxin.export.gguf_vocabulary import Vocabulary, cut_otherwise
from auxin.files import flush, temporary_folder
from auxin.models.loading import load_config, load_model, no_progress_bar, skeleton
from auxin.settings import Settings
from auxin.sums import refuse_damaged_tensors

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
NEEDED = ("gguf", "accelerate")
"""accelerate is what transformers reads such files with."""
_HALF_LARGEST = 65504.0
_LARGEST = {
    "F16": _HALF_LARGEST,
    "BF16": torch.finfo(torch.bfloat16).max,
    "Q8_0": 127 * _HALF_LARGEST,
    "Q4_0": 8 * _HALF_LARGEST,
}
"""Beyond which a type holds no weight; the others hold what float32 does."""


class GgufReport(Settings):
    """What `export_gguf` wrote."""

    path: str
    """The file."""
    type: str
    """The type that was asked for."""
    bytes: int
    """Of the file."""
    tensors: dict[str, int]
    """How many tensors have which type."""
    unblocked: list[str]
    """Tensors whose rows are no multiple of the type's block of 32, by their names in the file; they are F16."""
    largest_change: float
    """Largest change of a weight as transformers reads it, of the largest in its tensor."""
    notes: list[str]
    """What else the reader should know."""


def export_gguf(
    model: PreTrainedModel | str | Path,
    path: str | Path,
    *,
    type: str = "f16",
    tokenizer: PreTrainedTokenizerFast | str | Path | None = None,
    overwrite: bool = False,
) -> GgufReport:
    """Write a model and its tokenizer as one GGUF file.

        export_gguf("small", "small.gguf", type="q8_0")

    Norms, biases and learnt positions are F32 in every type, as llama.cpp has them; q4_0 has embeddings and head in
    Q8_0. Tensors are written one after the other, so that what is needed besides the model is one of them; reading the
    file back takes the model in float32 once more.

    Args:
        model: the folder of a checkpoint, or a model in memory: a Llama, Qwen2, Qwen3 or GPT-2 with its language head.
        path: the file, named *.gguf. It appears when everything has succeeded, and as a whole.
        type: of the matrices. f32 is exact; f16 and bf16 round; q8_0 and q4_0 share a scale among 32 entries of a row.
        tokenizer: one with byte-level BPE, or its folder or tokenizer.json; default: that of the folder.
        overwrite: whether a file of that name is replaced.

    Returns:
        What was written.

    Raises:
        ConfigError: the path, the type or the model's structure is not one that can be written; the message lists why,
            and nothing was written.
        CheckpointError: the folder can't be read, a file of that name is there, or what was read back is another model.
        DataError: there is no tokenizer, or none that a GGUF file has a form for.
        PlanError: the model is quantized.
    """
    target = _target(Path(path), overwrite)
    if type not in TYPES:
        raise ConfigError(
            f"type = {shown(type)}: there is no such type here. Give one of {', '.join(TYPES)}. llama.cpp's "
            "llama-quantize makes others of an f16 file."
        )
    _require_libraries()
    if not isinstance(model, PreTrainedModel | str | Path):
        raise ConfigError(
            f"The model is a {model.__class__.__name__}, and has to be a folder, or a model of transformers with "
            "adapters merged (merge_and_unload)."
        )
    config = model.config if isinstance(model, PreTrainedModel) else load_config(model)
    family = _family(config)
    whole = _loaded(model, config, family)
    words = Vocabulary.of(_tokenizer(model, tokenizer), config)
    with temporary_folder(target) as folder, no_progress_bar():
        # Metadata alone come first: what they can't say is found before a weight is written.
        with _writing(target):
            header = _writer(folder / "header.gguf", family, config, words, type)
            header.write_header_to_file()
            header.write_kv_data_to_file()
            header.close()
        refuse_uncarried(folder, "header.gguf", whole)
        notes = [*words.notes, *cut_otherwise(folder, "header.gguf", words)]
        types = _types(whole, family, type)
        _refuse_unholdable(whole, family, types)
        written = folder / "model.gguf"
        with _writing(target):
            _write_tensors(_writer(written, family, config, words, type), whole, family, types, target)
            flush(written)
        change, lost = changes(folder, "model.gguf", whole, family, types)
        size = written.stat().st_size
        os.replace(written, target)
        flush(target.parent)
    blocked = type in ("q8_0", "q4_0")
    unblocked = [name for name, kind in types.items() if blocked and kind == "F16"]
    return GgufReport(
        path=str(target),
        type=type,
        bytes=size,
        tensors=dict(Counter(types.values())),
        unblocked=unblocked,
        largest_change=change,
        notes=[*notes, *lost],
    )


def _target(path: Path, overwrite: bool) -> Path:
    """The file to write."""
    if path.suffix != ".gguf":
        raise ConfigError(
            f"{shown(str(path), quoted=False)} is not named as a GGUF file. Give a path that ends in .gguf."
        )
    path = path.resolve()
    if path.is_dir():
        raise ConfigError(f"{path} is a folder. Give the path of a file.")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists already. Remove it, give another path, or ask for overwrite.")
    return path


def _require_libraries() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f'A GGUF file needs {" and ".join(missing)}: pip install "auxin[gguf]".')


def _family(config: PreTrainedConfig) -> Family:
    """The family of `config`; ConfigError where its models have no form in a GGUF file."""
    if edits := structural_edits(config):
        raise ConfigError(
            f"The model has no GGUF form: its config holds {len(edits)} structural edit(s), and a GGUF file has one "
            f"size for all layers and no layers of another kind. A form without them, by kind of edit: "
            f"{'; '.join(ways_out(edits))}."
        )
    return family_of(config)


def _loaded(model: PreTrainedModel | str | Path, config: PreTrainedConfig, family: Family) -> PreTrainedModel:
    """The model with its weights, when every one of them has a name in a GGUF file."""
    expected = skeleton(config)
    refuse_quantized(expected)
    if not isinstance(model, PreTrainedModel):
        refuse_damaged_tensors(Path(model))
    else:
        refuse_quantized(model)
    found = model if isinstance(model, PreTrainedModel) else load_model(model)
    name = found.__class__.__name__
    if name != family.model_class:
        raise ConfigError(
            f"The model is a {name}; a GGUF file of this family holds a {family.model_class}. Load it as one, with "
            "adapters merged."
        )
    _refuse_changed(found, skeleton(config, found.__class__))
    return found


def _refuse_changed(model: PreTrainedModel, made: PreTrainedModel) -> None:
    """ConfigError where `model` has other tensors than `made`, which its config makes, or no values in them. Whether
    the head is tied is said by the file, and not by its config."""
    expected = {key: value.shape for key, value in made.named_parameters(remove_duplicate=False)}
    every = dict(model.named_parameters(remove_duplicate=False))
    once = dict(model.named_parameters())
    for key in {**expected, **every}:
        what = f"has the shape {tuple(every[key].shape)}" if key in every else "is not there"
        if key in every and key not in once and key != "lm_head.weight":
            what = "is another tensor, which a file can say of the head alone"
        elif key in every and every[key].shape == expected.get(key):
            continue
        has = f"the shape {tuple(expected[key])} for it" if key in expected else "no such tensor"
        raise ConfigError(
            f"The model was changed behind its config: {key} {what}, and the config has {has}. Merge adapters, "
            "take off what was added, or write the sizes into the config."
        )
    if any(value.is_meta for value in once.values()):
        raise ConfigError("The model has no weights: it lies on the meta device. Load it with its weights.")


def _tokenizer(
    model: PreTrainedModel | str | Path, given: PreTrainedTokenizerFast | str | Path | None
) -> PreTrainedTokenizerFast:
    if isinstance(given, PreTrainedTokenizerFast):
        return given
    if isinstance(given, str | Path):
        return read_tokenizer(Path(given))
    if given is not None:
        raise DataError(
            f"The tokenizer is a {given.__class__.__name__}, and has to be a PreTrainedTokenizerFast, a folder or a "
            "tokenizer.json."
        )
    if isinstance(model, PreTrainedModel) or not has_tokenizer(Path(model)):
        raise DataError("A GGUF file holds its tokenizer, and the model comes with none. Give one: tokenizer=...")
    return read_tokenizer(Path(model))


def _writer(path: Path, family: Family, config: PreTrainedConfig, words: Vocabulary, type: str) -> Any:
    """The library's writer with all metadata, and no tensor yet. The file gets no `general.name`: transformers makes
    another architecture of a Llama that is called mistral."""
    import gguf

    writer = gguf.GGUFWriter(path, family.architecture)
    family.describe(writer, config)
    words.describe(writer, path.parent)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(type, f"MOSTLY_{type.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _types(model: PreTrainedModel, family: Family, type: str) -> dict[str, str]:
    """The type of each tensor, by its name in the file."""
    import gguf

    types = {}
    for name, _, value in family.tensors(model):
        kind = type.upper()
        if value.dim() < 2 or name.startswith("position_embd"):
            kind = "F32"
        elif kind == "Q4_0" and name in ("token_embd.weight", "output.weight"):
            kind = "Q8_0"
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        types[name] = kind if value.shape[-1] % block == 0 else "F16"
    return types


def _refuse_unholdable(model: PreTrainedModel, family: Family, types: dict[str, str]) -> None:
    """ConfigError where a weight is no number, or is beyond what its type holds."""
    for name, key, value in family.tensors(model):
        largest, limit = value.float().abs().max().item(), _LARGEST.get(types[name], torch.finfo(torch.float32).max)
        if not largest <= limit:  # so that NaN is refused
            holds = f"{types[name]} holds {limit:.4g} at most"
            wider = "Give f32." if types[name] == "BF16" else "Give bf16 or f32."
            mend = wider if math.isfinite(largest) else "Mend the model first."
            raise ConfigError(f"{key} has entries of {largest:.4g}, and {holds}. {mend}")


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """What the system says of a full or broken disk names `target`, which the library's message does not."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{target} can't be written whole: {reason(error)}. Nothing is kept of it. Make room, or give another path."
        ) from error


def _write_tensors(writer: Any, model: PreTrainedModel, family: Family, types: dict[str, str], target: Path) -> None:
    import gguf

    needed = 0
    for name, _, value in family.tensors(model):
        kind, shape = gguf.GGMLQuantizationType[types[name]], tuple(value.shape)
        dtype = np.dtype({"F32": "float32", "F16": "float16"}.get(types[name], "uint8"))
        stored = gguf.quant_shape_to_byte_shape(shape, kind) if dtype == np.uint8 else shape
        size = math.prod(stored) * dtype.itemsize
        writer.add_tensor_info(name, stored, dtype, size, kind)
        needed += size
    if needed > (free := disk_usage(target.parent).free):
        raise CheckpointError(
            f"{target} needs {needed:,} bytes, and its disk has room for {free:,}. Make room, or give another path."
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, key, value in family.tensors(model):
            array = family.arranged(key, value.to("cpu", torch.float32), model.config).contiguous().numpy()
            writer.write_tensor_data(gguf.quants.quantize(array, gguf.GGMLQuantizationType[types[name]]))
    finally:
        writer.close()
