"""What it gains to pad the parameter tokens of a TokenFormer's layer to a multiple of 64.

    python benchmarks/padded_tokens.py            writes docs/results/padded_tokens.md
    python benchmarks/padded_tokens.py --quick    one size, two rounds; prints

One layer, 768 wide with 12 heads, of the paper's growth stages: 2140, 4850 and 8620 tokens in each of query, key,
value and output projection, four times as many in the feed-forward part, with the paper's norms. A forward and a
backward pass over one context of 256 tokens, as it is and padded (`auxin.grow(regime="padding")`), in turns whose order
changes; CPU time of one thread counts, so that a busy machine matters less. Weights are random and times do not depend
on them.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measuring import asked_quick, made_by, made_by_line, publish, quartiles

import auxin
from auxin.models.tokenformer import TokenFormerConfig, TokenFormerForCausalLM, preset_config

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "padded_tokens.json"
PAGE = ROOT / "docs" / "results" / "padded_tokens.md"
COMMAND = "python benchmarks/padded_tokens.py"
PRESETS = ("354m", "757m", "1.4b")
ROUNDS, QUICK_ROUNDS = 7, 2
VOCABULARY, CONTEXT, SEED = 64, 256, 0


def layer(preset: str) -> TokenFormerForCausalLM:
    """A model of one layer of that size, with next to no vocabulary."""
    torch.manual_seed(SEED)
    values = {**preset_config(preset).to_dict(), "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    return TokenFormerForCausalLM(TokenFormerConfig.from_dict(values))


def seconds(model: TokenFormerForCausalLM, ids: torch.Tensor) -> float:
    """Of a forward and a backward pass."""
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    model(input_ids=ids, labels=ids).loss.backward()
    return time.process_time() - began


def measure(preset: str, rounds: int) -> dict[str, Any]:
    """The row of one size."""
    plain, padded = layer(preset), layer(preset)
    receipt = auxin.grow(padded, regime="padding")
    ids = torch.randint(VOCABULARY, (1, CONTEXT), generator=torch.Generator().manual_seed(SEED))
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for place in (0, 1) if number % 2 else (1, 0):
            spent = seconds((plain, padded)[place], ids)
            if number:  # the first round warms up
                taken[place].append(spent)
    low, middle, high = quartiles([one / other for one, other in zip(*taken, strict=True)])
    return {
        "tokens": [model.config.group_sizes("qkv") + model.config.group_sizes("ffn") for model in (plain, padded)],
        "tokens_per_second": [CONTEXT / statistics.median(times) for times in taken],
        "speed": middle,
        "speed_quartiles": [low, high],
        "parameters": padded.num_parameters() / plain.num_parameters(),
        "change": receipt.max_relative_change,
    }


def page(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Parameter tokens padded to a multiple of 64",
        "",
        f"One TokenFormer layer, 768 wide, with the paper's norms: forward and backward over {CONTEXT} tokens, CPU "
        f"time of one thread, {results['rounds']} rounds in turns. Speed is that of the padded layer over that of the "
        "other in the same round: median and quartiles. Changed is how far logits move, of the largest one, in single "
        "precision: products of another size round in another way.",
        "",
        f"{made_by_line(results)} Seed {SEED}.",
        "",
        "| attention's, feed-forward tokens | padded | parameters | tokens/s | padded | speed | changed |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for row in results["rows"]:
        plain, padded = (", ".join(f"{number:,}" for number in numbers) for numbers in row["tokens"])
        speeds = " | ".join(f"{number:.1f}" for number in row["tokens_per_second"])
        speed = "{:.3f} ({:.3f} to {:.3f})".format(row["speed"], *row["speed_quartiles"])
        lines.append(f"| {plain} | {padded} | x {row['parameters']:.4f} | {speeds} | {speed} | {row['change']:.1e} |")
    lines += ["", "On CUDA, whose tiles are why it is 64, nothing of this was measured.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write unless --quick."""
    quick = asked_quick(__doc__)
    torch.set_num_threads(1)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    rows = [measure(preset, rounds) for preset in (PRESETS[:1] if quick else PRESETS)]
    results = {**made_by(COMMAND), "seed": SEED, "rounds": rounds, "rows": rows}
    publish(results, RESULTS, page(results), PAGE, quick)


if __name__ == "__main__":
    main()
