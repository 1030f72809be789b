"""What alternating updates cost: time and memory beside the same model without them, and beside one K times as wide.

    python benchmarks/altup_cost.py --threads 1                 all widths; in CPU time, for busy machines
    python benchmarks/altup_cost.py --threads 1 --widths 768    one width

On a GPU, where nobody has run it yet, `gpu.py` measures some of it.

A Llama of a few layers with a small vocabulary, so that the layers and not the head are what is timed. All contenders
of a width and a kind (eager, compiled) take turns in shuffled order within each repetition, and each is compared with
the plain model of the same repetition. Reported are medians of the ratios with quartiles; decoding is one token at a
time with a static cache. Peak memory counts everything that is allocated during a forward and backward pass, gradients
included. "mixing alone" is the updates of all layers without the layers; "products alone" the products of matrices of a
forward and backward pass, attention's left out, each timed by itself.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import exact_clock, machine, peak_bytes, quartiles, run_ahead
from products import Products
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from auxin.accounting import count_parameters, flops_per_token
from auxin.edits import apply
from auxin.methods.grow.altup import AltUpSettings, plan_altup
from auxin.nn.altup_updates import AltUp

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "altup_cost.json"
TABLE = ROOT / "docs" / "results" / "altup_cost.md"
PLAIN = "plain"
RECORDED = ("layers", "batch", "tokens", "decoded", "repetitions", "dtype", "seed")
"""Options that stand beside the numbers."""
BOUND_WIDTH, BOUND = 768, 1.06
"""Recycled AltUp with K = 2, compiled, costs at most so much of the plain model's training step at this width."""


@dataclass
class Contender:
    """One model, eager or compiled."""

    name: str
    kind: str
    model: Any
    run: Callable[..., Any]
    times: dict[str, list[float]] = field(default_factory=lambda: {"forward": [], "both": [], "decode": []})


def llama(width: int, layers: int) -> LlamaForCausalLM:
    """A Llama of the usual proportions: heads of 64, a gated feed-forward part of 8/3 of the width."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=math.ceil(width * 8 / 3 / 64) * 64,
            vocab_size=256,
            max_position_embeddings=2048,
        )
    )


def altup(width: int, layers: int, **settings: Any) -> LlamaForCausalLM:
    """The same with alternating updates, away from the identity."""
    model = llama(width, layers)
    apply(plan_altup(model, AltUpSettings.parse(settings)), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".altup." in name:
                parameter.normal_(0, 0.02)
    return model


MODELS: dict[str, Callable[[int, int], LlamaForCausalLM]] = {
    PLAIN: llama,
    "recycled, K = 2": partial(altup, blocks=2),
    "recycled, K = 4": partial(altup, blocks=4),
    "wide, K = 2": partial(altup, blocks=2, conversion="random"),
    "dynamic, K = 2": partial(altup, blocks=2, coefficients="dynamic"),
    "dense, 2 times as wide": lambda width, layers: llama(2 * width, layers),
}
"""The contenders, by width and layers."""


def train_step(entry: Contender, ids: Tensor, clock: Callable[[], Any]) -> None:
    """Time one forward and backward pass."""
    entry.model.zero_grad()
    run_ahead(ids.device.type)
    start = clock()
    loss = entry.run(input_ids=ids, labels=ids, use_cache=False).loss
    middle = clock()
    loss.backward()
    end = clock()
    entry.times["forward"].append(middle - start)
    entry.times["both"].append(end - start)


def train_once(run: Callable[..., Any], ids: Tensor) -> None:
    """One forward and backward pass."""
    run(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@torch.no_grad()
def decode(entry: Contender, prompt: Tensor, tokens: int, clock: Callable[[], Any]) -> None:
    """Time decoding, per token; nothing where there are none to decode."""
    if not tokens:
        return
    model = entry.model
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + tokens)
    model(input_ids=prompt, past_key_values=cache, use_cache=True)
    token = prompt[:, -1:]
    start = clock()
    for step in range(tokens):
        position = torch.tensor([[prompt.shape[1] + step]], device=prompt.device)
        entry.run(input_ids=token, past_key_values=cache, use_cache=True, position_ids=position)
    entry.times["decode"].append((clock() - start) / tokens)


def mixing_alone(width: int, blocks: int, kind: str, options: argparse.Namespace, clock: Callable[[], Any]) -> float:
    """Seconds of the updates of all layers, forward and backward."""
    updates = nn.ModuleList(AltUp(blocks, layer % blocks) for layer in range(options.layers))
    for parameter in updates.parameters():
        nn.init.normal_(parameter, 0, 0.02)
    dtype = getattr(torch, options.dtype)
    updates.to(options.device, dtype)
    size = (options.batch, options.tokens, width)
    streams = torch.randn(blocks, *size).to(options.device, dtype).requires_grad_()
    output = torch.randn(*size).to(options.device, dtype).requires_grad_()

    def one(update: AltUp, streams: Tensor, output: Tensor) -> Tensor:
        return update.correct(streams, output)

    run = one if kind == "eager" else torch.compile(one, dynamic=False)
    gradient = torch.randn_like(streams)
    seconds = []
    for _ in range(7):
        run_ahead(options.device)
        start = clock()
        for update in updates:
            run(update, streams, output).backward(gradient)
        seconds.append(clock() - start)
    return statistics.median(seconds[2:])


def measure(width: int, kind: str, options: argparse.Namespace, clock: Callable[[], Any]) -> list[dict[str, Any]]:
    """The rows of one width and kind."""
    torch.compiler.reset()
    # One code object serves all contenders, for training and for decoding.
    torch._dynamo.config.recompile_limit = 64
    entries = []
    for name in options.contenders:
        model = MODELS[name](width, options.layers).to(options.device, getattr(torch, options.dtype))
        run = model if kind == "eager" else torch.compile(model, dynamic=False)
        entries.append(Contender(name, kind, model, run))
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(256, (options.batch, options.tokens), generator=generator).to(options.device)
    prompt = torch.randint(256, (1, 64), generator=generator).to(options.device)
    order, shuffle = list(entries), random.Random(options.seed)
    for repetition in range(options.repetitions + 1):
        shuffle.shuffle(order)
        for entry in order:
            entry.model.train()
            train_step(entry, ids, clock)
            entry.model.eval()
            decode(entry, prompt, options.decoded, clock)
        if repetition == 0:  # compiling and warming up
            for entry in entries:
                for values in entry.times.values():
                    values.clear()
    rows = []
    for entry in entries:
        row: dict[str, Any] = {"width": width, "kind": kind, "name": entry.name}
        for part, values in entry.times.items():
            if not values:
                continue
            low, middle, high = quartiles([a / b for a, b in zip(values, entries[0].times[part], strict=True)])
            row[part] = {"seconds": statistics.median(values), "ratio": middle, "quartiles": [low, high]}
        entry.model.train()
        entry.model.zero_grad()
        row["peak_bytes"] = peak_bytes(partial(train_once, entry.run, ids), options.device)
        products = Products.of(partial(train_once, entry.model, ids))
        row["products_alone"] = products.seconds(options.device) / row["both"]["seconds"]
        row["parameters"] = count_parameters(entry.model).total
        row["flops"] = flops_per_token(entry.model, options.tokens).forward
        if entry.name.startswith("recycled"):
            blocks = int(entry.name[-1])
            alone = mixing_alone(width, blocks, kind, options, clock)
            row["mixing_alone"] = alone / statistics.median(entries[0].times["both"])
        rows.append(row)
        print(describe(row), flush=True)
    return rows


def describe(row: dict[str, Any]) -> str:
    """One line of progress."""
    parts = [f"{part} {row[part]['ratio']:.3f}" for part in ("forward", "both", "decode") if part in row]
    return f"{row['width']:5} {row['kind']:9} {row['name']:24} {'  '.join(parts)}  {row['peak_bytes'] / 2**20:.0f} MiB"


def over_bound(rows: list[dict[str, Any]]) -> list[str]:
    """What breaks the bound, in words."""
    return [
        f"{row['name']}, compiled, width {row['width']}: {row['both']['ratio']:.3f} of the plain model, bound {BOUND}"
        for row in rows
        if (row["width"], row["kind"], row["name"]) == (BOUND_WIDTH, "compiled", "recycled, K = 2")
        and row["both"]["ratio"] > BOUND
    ]


def table(record: dict[str, Any]) -> str:
    """The page with the results."""
    where = record["machine"]
    lines = [
        "# What alternating updates cost",
        "",
        f"Command: `{record['command']}`. Machine: {where['cpu']}, {where['threads']} thread(s), {record['clock']} "
        f"time, {record['dtype']}, Python {where['python']}, torch {where['torch']}, seed {record['seed']}. Llamas of "
        f"{record['layers']} layers, {record['batch']} sequence(s) of {record['tokens']} tokens, "
        f"{record['repetitions']} repetitions; "
        "ratios are medians over the repetitions, each to the plain model of the same kind and repetition.",
        "",
        "| width | kind | model | parameters | FLOPs per token | forward | forward and backward | quartiles | mixing "
        "alone | products alone | decoding a token | peak memory, MiB |",
        "|--:|---|---|--:|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    for row in record["results"]:
        low, high = row["both"]["quartiles"]
        alone = f"{row['mixing_alone']:.3f}" if "mixing_alone" in row else ""
        seconds = {part: row[part]["seconds"] * 1e3 for part in ("forward", "both", "decode") if part in row}
        decoding = f"{row['decode']['ratio']:.3f} ({seconds['decode']:.1f} ms)" if "decode" in row else ""
        cells = [
            str(row["width"]), row["kind"], row["name"],
            f"{row['parameters'] / 1e6:.2f}M", f"{row['flops'] / 1e6:.2f}M",
            f"{row['forward']['ratio']:.3f} ({seconds['forward']:.0f} ms)",
            f"{row['both']['ratio']:.3f} ({seconds['both']:.0f} ms)", f"{low:.3f} - {high:.3f}", alone,
            f"{row['products_alone']:.2f}", decoding, f"{row['peak_bytes'] / 2**20:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *([f"- {message}" for message in record["broken"]] or ["The bound holds."]), ""]
    return "\n".join(lines)


def write(options: argparse.Namespace, clock: str, rows: list[dict[str, Any]]) -> None:
    """The rows so far, as JSON and as a page."""
    record = {
        "command": " ".join(["python", "benchmarks/altup_cost.py", *sys.argv[1:]]),
        "machine": machine(options.device),
        "load_average": os.getloadavg()[0],
        "clock": clock,
        **{key: getattr(options, key) for key in RECORDED},
        "broken": over_bound(rows),
        "results": rows,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    options.table.write_text(table(record), encoding="utf-8")
    print(f"written to {options.results} and {options.table}", flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, of the command line where none are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 768, 1024])
    parser.add_argument("--kinds", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--contenders", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--decoded", type=int, default=8, help="tokens; 0 leaves decoding out")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads; with 1, CPU time is measured instead of wall time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the bound is broken")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    return parser.parse_args(arguments)


def main() -> int:
    """Measure, print, write."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    name, clock = exact_clock(options.device)
    rows: list[dict[str, Any]] = []
    for width in options.widths:
        for kind in options.kinds:
            rows += measure(width, kind, options, clock)
            write(options, name, sorted(rows, key=lambda row: row["width"]))
    return 1 if over_bound(rows) and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
