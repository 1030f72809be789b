"""Pattention beside linear -> GELU -> linear of the same shape, and beside the formula written naively.

    python benchmarks/pattention.py                     every shape
    python benchmarks/pattention.py --quick --check     two shapes, a minute; exit code 1 when a bound is broken
    python benchmarks/pattention.py --threads 1         one thread, timed in CPU time: for busy machines

All contenders of a shape take turns in shuffled order within each repetition, and each is compared with the dense layer
of the same repetition and kind (eager with eager, compiled with compiled). Reported are medians with quartiles. Peak
memory counts everything the allocator hands out during one forward and backward pass: what autograd keeps, temporaries,
and gradients. Compiled groups of uneven sizes hold one matrix of the scores' size more than the compiled dense layer
(about as much as the eager one) and are reported without a bound on that. The table also says what fraction of the time
the six GEMMs alone would take. On a GPU time is that of the GPU, which is kept waiting before each repetition so that
what the host takes to queue the work is hidden.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import exact_clock, machine, peak_bytes, quartiles, run_ahead
from torch import Tensor

from auxin.nn.pattention import pattention

SHAPES = [
    (2048, 256, 1024),
    (2048, 512, 2048),
    (2048, 768, 768),
    (2048, 768, 3072),
    (2048, 1024, 4096),
    (2048, 768, 8560),
]
QUICK_SHAPES = [(2048, 256, 1024), (2048, 768, 768)]
# Feed-forward parts and projections of the 124M and the 354M preset, 64 contexts of 1024 tokens; what is most of a
# model's work comes first.
GPU_SHAPES = [(65536, 768, 2304), (65536, 768, 8560), (65536, 768, 576), (65536, 768, 2140)]
DENSE, NAIVE, GEMMS = "linear-gelu-linear", "naive formula", "gemms only"
EAGER_BOUND, COMPILED_BOUND = 1.10, 1.03
# Bytes for each row and group beyond the dense layer: the norm that is kept; compiled code also holds the coefficient
# of the gradient's projection while it overwrites the scores.
EAGER_BYTES, COMPILED_BYTES = 4, 8
UNEVEN = "4 grown groups"
# Allocators round every block up.
ROUNDING_BYTES = 4096


@dataclass
class Contender:
    """One way to compute the layer."""

    name: str
    kind: str
    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    groups: int = 0


def dense(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up)), down)


def gemms(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up), down)


def naive(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = x @ keys.transpose(0, 1)
    normalised = scores / (torch.norm(scores, p=2, dim=-1, keepdim=True) + 1e-6) * math.sqrt(len(keys))
    return F.gelu(normalised) @ values


def grouped(sizes: list[int], device: str) -> Callable[..., Tensor]:
    tau = torch.tensor([math.sqrt(size) for size in sizes], device=device)

    def run(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return pattention(x, keys, values, tau, sizes)

    return run


def contenders(
    shape: tuple[int, int, int], seed: int, device: str, dtype: torch.dtype
) -> tuple[list[Contender], Tensor]:
    rows, width, tokens = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        tensor = torch.randn(*size, generator=generator) * scale
        return tensor.to(device, dtype).requires_grad_()

    x, keys, values = draw(rows, width), draw(tokens, width, scale=0.02), draw(tokens, width, scale=0.02)
    down = values.detach().T.contiguous().requires_grad_()
    quarter = tokens // 4
    splits = {
        "1 group": [tokens],
        "4 equal groups": [quarter] * 4,
        UNEVEN: [tokens // 8, tokens // 8, quarter, tokens - quarter - 2 * (tokens // 8)],
    }
    entries = [(DENSE, dense, (x, keys, down), 0)]
    for name, sizes in splits.items():
        entries.append((f"pattention, {name}", grouped(sizes, device), (x, keys, values), len(sizes)))
    found = []
    for name, function, tensors, groups in entries:
        found.append(Contender(name, "eager", function, tensors, groups))
        found.append(Contender(name, "compiled", torch.compile(function, dynamic=False), tensors, groups))
    found.append(Contender(NAIVE, "eager", naive, (x, keys, values)))
    found.append(Contender(GEMMS, "eager", gemms, (x, keys, down)))
    return found, draw(rows, width).detach()


def run_once(contender: Contender, gradient: Tensor, clock: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the forward pass, and of forward and backward together."""
    for tensor in contender.tensors:
        tensor.grad = None
    run_ahead(gradient.device.type)
    start = clock()
    output = contender.function(*contender.tensors)
    middle = clock()
    output.backward(gradient)
    end = clock()
    return middle - start, end - start


def once(contender: Contender, gradient: Tensor) -> None:
    for tensor in contender.tensors:
        tensor.grad = None
    contender.function(*contender.tensors).backward(gradient)


def measure(shape: tuple[int, int, int], options: argparse.Namespace, clock: Callable[[], Any]) -> list[dict[str, Any]]:
    torch.compiler.reset()
    entries, gradient = contenders(shape, options.seed, options.device, getattr(torch, options.dtype))
    for entry in entries:
        for _ in range(2):
            run_once(entry, gradient, clock)
    times: dict[int, list[tuple[float, float]]] = {index: [] for index in range(len(entries))}
    order, shuffle = list(times), random.Random(options.seed)
    for _ in range(options.repetitions):
        shuffle.shuffle(order)
        for index in order:
            times[index].append(run_once(entries[index], gradient, clock))
    references = {entry.kind: index for index, entry in enumerate(entries) if entry.name == DENSE}
    memory = [peak_bytes(partial(once, entry, gradient), options.device) for entry in entries]
    gemm_times = next(times[index] for index, entry in enumerate(entries) if entry.name == GEMMS)
    results = []
    for index, entry in enumerate(entries):
        reference = references[entry.kind]
        pairs = list(zip(times[index], times[reference], strict=True))
        row: dict[str, Any] = {"shape": dict(zip(("rows", "width", "tokens"), shape, strict=True))}
        row |= {"name": entry.name, "kind": entry.kind, "groups": entry.groups}
        for part, label in enumerate(("forward", "forward_backward")):
            low, middle, high = quartiles([own[part] / other[part] for own, other in pairs])
            seconds = [own[part] for own in times[index]]
            row[label] = {
                "median_seconds": statistics.median(seconds),
                "least_seconds": min(seconds),
                "ratio_to_dense": middle,
                "ratio_quartiles": [low, high],
            }
        row["peak_bytes"] = memory[index]
        row["peak_bytes_beyond_dense"] = memory[index] - memory[reference]
        each = EAGER_BYTES if entry.kind == "eager" else COMPILED_BYTES
        row["allowed_bytes_beyond_dense"] = each * shape[0] * entry.groups + ROUNDING_BYTES
        fractions = [gemm[1] / own[1] for gemm, own in zip(gemm_times, times[index], strict=True)]
        row["gemm_fraction"] = statistics.median(fractions)
        results.append(row)
    return results


def broken_bounds(row: dict[str, Any]) -> list[str]:
    if not row["groups"]:
        return []
    bound = EAGER_BOUND if row["kind"] == "eager" else COMPILED_BOUND
    what = f"{tuple(row['shape'].values())} {row['name']}, {row['kind']}"
    broken = []
    if row["forward_backward"]["ratio_to_dense"] > bound:
        broken.append(
            f"{what}: {row['forward_backward']['ratio_to_dense']:.3f} times the dense layer, bound {bound:.2f}"
        )
    over = row["peak_bytes_beyond_dense"] > row["allowed_bytes_beyond_dense"]
    if over and not (row["kind"] == "compiled" and UNEVEN in row["name"]):
        broken.append(f"{what}: {row['peak_bytes_beyond_dense']} bytes beyond the dense layer's peak")
    return broken


def print_table(results: list[dict[str, Any]]) -> None:
    print(
        f"{'rows x width x tokens':22}{'layer':28}{'kind':10}{'fwd ms':>9}{'ratio':>7}{'fwd+bwd ms':>12}{'ratio':>7}"
        f"{'quartiles':>15}{'peak MiB':>10}{'beyond dense':>14}{'GEMMs':>7}"
    )
    for row in results:
        forward, both = row["forward"], row["forward_backward"]
        low, high = both["ratio_quartiles"]
        print(
            f"{' x '.join(map(str, row['shape'].values())):22}{row['name']:28}{row['kind']:10}"
            f"{forward['median_seconds'] * 1e3:9.2f}{forward['ratio_to_dense']:7.3f}"
            f"{both['median_seconds'] * 1e3:12.2f}{both['ratio_to_dense']:7.3f}{f'{low:.3f}-{high:.3f}':>15}"
            f"{row['peak_bytes'] / 2**20:10.2f}{row['peak_bytes_beyond_dense']:+14d}{row['gemm_fraction']:7.2f}"
        )
    sys.stdout.flush()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, few repetitions")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bound on time or memory is broken")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, help="CPU threads; with 1, CPU time is measured instead of wall time")
    parser.add_argument("--repetitions", type=int, help="default: 21, with --quick 9")
    parser.add_argument("--shape", action="append", help="ROWSxWIDTHxTOKENS instead of the built-in shapes; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/pattention-<device>.json")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    options.repetitions = options.repetitions or (9 if options.quick else 21)
    folder = Path(__file__).resolve().parent / "results"
    options.output = options.output or folder / f"pattention-{options.device}{'-quick' if options.quick else ''}.json"
    return options


def chosen_shapes(options: argparse.Namespace) -> list[tuple[int, int, int]]:
    if options.shape:
        return [(rows, width, tokens) for rows, width, tokens in (map(int, text.split("x")) for text in options.shape)]
    if options.quick:
        return QUICK_SHAPES
    return GPU_SHAPES if options.device == "cuda" else SHAPES


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    clock_name, clock = exact_clock(options.device)
    load = os.getloadavg()[0]
    results = []
    for shape in chosen_shapes(options):
        rows = measure(shape, options, clock)
        print_table(rows)
        results += rows
    broken = [message for row in results for message in broken_bounds(row)]
    record = {
        "command": ["python", "benchmarks/pattention.py", *(sys.argv[1:] if arguments is None else arguments)],
        "machine": machine(options.device),
        "load_average_at_start": load,
        "clock": clock_name,
        "dtype": options.dtype,
        "seed": options.seed,
        "repetitions": options.repetitions,
        "bounds": {"eager": EAGER_BOUND, "compiled": COMPILED_BOUND},
        "broken": broken,
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.output}")
    for message in broken:
        print(f"bound broken: {message}")
    return 1 if broken and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
