"""Run as a program: loads checkpoints in this new process and compares their logits, bit by bit, with those saved.

    python reload.py CASES.json

CASES.json: {"plain": [CASE, ...], "replayed": [CASE, ...]}, a CASE being {"folder": ..., "model_class": ...}. Plain
ones are loaded before auxin is imported, the others after it. A folder holds probe.safetensors with the inputs by name
and the logits as "expected". Prints one JSON list: null, or what went wrong.
"""

import json
import sys
from pathlib import Path
from typing import Any

from outputs import output


def check(folder: Path, model_class: str) -> str | None:
    """What is wrong with the checkpoint; None if nothing."""
    import torch
    import transformers
    from safetensors.torch import load_file

    try:
        owner = transformers if hasattr(transformers, model_class) else sys.modules["auxin.models"]
        model: Any = getattr(owner, model_class).from_pretrained(folder, dtype="auto")
        inputs = load_file(folder / "probe.safetensors")
        expected = inputs.pop("expected")
        for parameter in model.parameters():
            # The last bit of a product depends on where in memory its factors start, and a file puts them anywhere.
            parameter.data = parameter.data.clone()
        with torch.no_grad():
            logits = output(model.eval()(**inputs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if logits.shape != expected.shape:
        return f"logits have shape {list(logits.shape)}, not {list(expected.shape)}"
    if not torch.equal(logits, expected):
        return f"logits differ by {(logits - expected).abs().max():.3g}"
    return None


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    import torch

    torch.set_num_threads(1)

    def checked(kind: str) -> list[str | None]:
        return [check(Path(case["folder"]), case["model_class"]) for case in task[kind]]

    found = checked("plain")
    assert "auxin" not in sys.modules
    import auxin  # noqa: F401 - nothing else of it is called

    print(json.dumps([*found, *checked("replayed")]))
