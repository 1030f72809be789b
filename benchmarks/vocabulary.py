"""Does a larger vocabulary help a trained model, and where should its new rows start?

A small Llama with a byte-level BPE of 512 tokens is trained on the Python standard library. Then 512 tokens that go on
with the BPE's training are added, their rows starting by each rule, and the model is trained on; beside them the old
vocabulary, trained on with the same FLOPs, and new rows as transformers draws them without this package
(`resize_token_embeddings(mean_resizing=False)`: normal, standard deviation 0.02, a new optimizer). Judged in bits per
byte of held-out files, since losses per token of two tokenizers can't be compared.

    python benchmarks/vocabulary.py            about two minutes on a free core
    python benchmarks/vocabulary.py --quick    half a minute, to see that it runs
"""

import argparse
import copy
import json
import math
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from auxin.accounting import flops_per_token
from auxin.data.tokenizer import plain_backend, train_tokenizer
from auxin.data.vocabulary import Merge, learn_merges, texts_of
from auxin.methods.grow.vocabulary import grow_vocabulary

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "vocabulary.json"
TABLE = ROOT / "docs" / "results" / "vocabulary.md"
OLD, DRAWN = "old vocabulary", "drawn by transformers"
BRANCHES = ("pieces", "mean", DRAWN, OLD)


@dataclass(frozen=True)
class Trial:
    """Sizes and lengths."""

    seeds: tuple[int, ...] = (0, 1, 2)
    vocabulary: int = 512
    new_tokens: int = 512
    hidden_size: int = 64
    layers: int = 2
    steps_before: int = 600
    steps_after: int = 200
    batch: int = 8
    length: int = 128
    learning_rate: float = 3e-3
    bytes: int = 2_000_000
    held_out: int = 60_000


QUICK = Trial((0,), steps_before=60, steps_after=20, bytes=400_000, held_out=20_000, hidden_size=32, layers=1)


def main() -> None:
    """Run all seeds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run that writes nothing")
    quick = parser.parse_args().quick
    trial = QUICK if quick else Trial()
    torch.set_num_threads(1)
    # Every 20th file is held out.
    texts = list(texts_of("stdlib", trial.bytes))
    training = [text for number, text in enumerate(texts) if number % 20]
    held_out = "\n".join(texts[::20]).encode()[: trial.held_out].decode(errors="ignore")
    tokenizer = train_tokenizer(training, trial.vocabulary, trial.length)
    merges = learn_merges(tokenizer, training, trial.new_tokens)
    found: dict[str, list[dict[str, float]]] = {branch: [] for branch in BRANCHES}
    for seed in trial.seeds:
        for branch, numbers in run(trial, seed, tokenizer, merges, training, held_out).items():
            found[branch].append(numbers)
            print(seed, branch, numbers, file=sys.stderr, flush=True)
    report = {
        "trial": asdict(trial),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "corpus": f"standard library of Python {platform.python_version()}",
        "branches": found,
    }
    page = table(report)
    print(page)
    if not quick:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        TABLE.write_text(page, encoding="utf-8")


def run(
    trial: Trial,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    merges: list[Merge],
    training: list[str],
    held_out: str,
) -> dict[str, dict[str, float]]:
    """One seed: train, grow by every rule, train on."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=trial.vocabulary,
        hidden_size=trial.hidden_size,
        intermediate_size=3 * trial.hidden_size,
        num_hidden_layers=trial.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=trial.length,
        tie_word_embeddings=True,
        pad_token_id=None,
    )
    source = LlamaForCausalLM(config)
    optimizer = AdamW(source.parameters(), lr=trial.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    ids = encoded(tokenizer, training)
    train(source, optimizer, ids, trial.steps_before, seed, trial)
    before = bits_per_byte(source, tokenizer, held_out, trial)
    first_flops = flops_per_token(source, trial.length).forward
    numbers: dict[str, dict[str, float]] = {}
    for branch in BRANCHES:
        model, grown_tokenizer, state = copy.deepcopy((source, tokenizer, optimizer.state_dict()))
        own = AdamW(model.parameters(), lr=trial.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        own.load_state_dict(state)
        if branch in ("pieces", "mean"):
            grow_vocabulary(model, grown_tokenizer, merges=merges, rule=branch, optimizer=own)  # type: ignore[arg-type]
        elif branch == DRAWN:
            grow_vocabulary(copy.deepcopy(model), grown_tokenizer, merges=merges)
            torch.manual_seed(seed)
            model.resize_token_embeddings(trial.vocabulary + trial.new_tokens, mean_resizing=False)
            own = AdamW(model.parameters(), lr=trial.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        after = bits_per_byte(model, grown_tokenizer, held_out, trial)
        # The old vocabulary has a smaller head: the same FLOPs are more steps.
        new_flops = flops_per_token(model, trial.length).forward
        grown_flops = first_flops + 2 * trial.new_tokens * trial.hidden_size
        steps = round(trial.steps_after * grown_flops / new_flops)
        grown_ids = ids if branch == OLD else encoded(grown_tokenizer, training)
        train(model, own, grown_ids, steps, seed + 1, trial, decay=True)
        numbers[branch] = {
            "before": before,
            "after": after,
            "final": bits_per_byte(model, grown_tokenizer, held_out, trial),
            "steps": steps,
            "bytes_per_token": len(held_out.encode()) / len(encoded(grown_tokenizer, [held_out])),
        }
    return numbers


def encoded(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one row of ids."""
    found = plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return torch.tensor([index for encoding in found for index in encoding.ids])


def train(
    model: PreTrainedModel, optimizer: AdamW, ids: Tensor, steps: int, seed: int, trial: Trial, decay: bool = False
) -> None:
    """Train on random stretches; the rate is constant after a warm-up, or falls linearly to zero."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        rate = 1 - step / steps if decay else min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = trial.learning_rate * rate
        starts = torch.randint(len(ids) - trial.length, (trial.batch,), generator=generator)
        batch = torch.stack([ids[start : start + trial.length] for start in starts])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str, trial: Trial) -> float:
    """Of `text`, in windows that overlap by half; the first token is given."""
    model.eval()
    ids = encoded(tokenizer, [text])
    nats, half = 0.0, trial.length // 2
    for start in range(0, len(ids) - 1, half):
        window = ids[max(0, start - half) : start + half]
        scored = len(window) - (half if start else 1)
        if scored <= 0:
            break
        log = model(input_ids=window[None]).logits[0, :-1].log_softmax(-1)
        nats -= log[-scored:].gather(-1, window[-scored:, None]).sum().item()
    return nats / math.log(2) / len(text.encode())


def table(report: dict[str, Any]) -> str:
    """The results as a page."""
    trial = report["trial"]
    lines = [
        "# A larger vocabulary for a trained model",
        "",
        f"A Llama of width {trial['hidden_size']} and {trial['layers']} layers with a byte-level BPE of "
        f"{trial['vocabulary']} tokens, trained {trial['steps_before']} steps of {trial['batch']} x {trial['length']} "
        f"tokens on the Python standard library, gets {trial['new_tokens']} tokens more (learned from the training "
        f"files) and is trained {trial['steps_after']} steps on, the rate falling to zero. The branch with the old "
        "vocabulary gets as many steps as the same FLOPs allow. Bits per byte of held-out files: mean over the seeds "
        "(least to largest).",
        "",
        f"Command: `python benchmarks/vocabulary.py`. Seeds: {list(trial['seeds'])}. Versions: {report['versions']}. "
        f"Corpus: {report['corpus']}.",
        "",
        "| new rows | bytes per token | steps | before | right after growth | trained on |",
        "|---|---|---|---|---|---|",
    ]
    for branch, found in report["branches"].items():
        cells = [_range([run[key] for run in found]) for key in ("before", "after", "final")]
        bytes_per_token = statistics.mean(run["bytes_per_token"] for run in found)
        lines.append(f"| {branch} | {bytes_per_token:.2f} | {found[0]['steps']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _range(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
