"""Does a larger vocabulary help a trained model, and where should its new rows start?

A small Llama with a byte-level BPE of 512 tokens is trained on the Python standard library. Then 512 tokens that go on
with the BPE's training are added, their rows starting by each rule, and the model is trained on; beside them the old
vocabulary, trained on with the same FLOPs, and new rows as transformers draws them without this package
(`resize_token_embeddings(mean_resizing=False)`: normal, standard deviation 0.02, a new optimizer). Judged in bits per
byte of the held-out files, since losses per token of two tokenizers can't be compared.

Each tokenizer has a corpus of its own, of the same files with the same ones held out, by the hash of their content.

    python benchmarks/vocabulary.py            about four minutes on a free core
    python benchmarks/vocabulary.py --quick    20 seconds, to see that it runs
"""

import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import asked_quick, made_by, made_by_line, mean_and_range, publish
from transformers import LlamaConfig, LlamaForCausalLM

from auxin.data import CorpusSettings, PackedData, prepare
from auxin.data.vocabulary import Merge, enlarge_tokenizer, learn_merges
from auxin.edits import apply_to_checkpoint
from auxin.evaluation import perplexity
from auxin.methods import method
from auxin.planning.bench import Bench
from auxin.training import TrainingResult, TrainingSettings, load_model, train, write_checkpoint_folder

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "vocabulary.json"
PAGE = ROOT / "docs" / "results" / "vocabulary.md"
OLD, DRAWN = "old vocabulary", "drawn by transformers"
BRANCHES = ("pieces", "mean", DRAWN, OLD)
"""The last one gets the FLOPs of the one before."""


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


QUICK = Trial((0,), steps_before=60, steps_after=20, bytes=1_000_000, hidden_size=32, layers=1)


@dataclass(frozen=True)
class Corpora:
    """The same text in old and in new tokens."""

    old: PackedData
    new: PackedData
    merges: list[Merge]
    """What makes the new tokens of the old ones."""
    held_out: str
    """The held-out files."""

    @classmethod
    def of(cls, trial: Trial, work: Path) -> "Corpora":
        """Prepare both; the new tokens are learned from the files that are trained on."""
        settings = CorpusSettings(
            vocab_size=trial.vocabulary, context_length=trial.length, max_bytes=trial.bytes, validation_fraction=0.05
        )
        old = prepare(settings, work / "old", progress=False)
        tokenizer = old.tokenizer()
        merges = learn_merges(tokenizer, documents(old, "train"), trial.new_tokens)
        enlarge_tokenizer(tokenizer, merges=merges).tokenizer.save_pretrained(work / "tokenizer")
        again = settings.model_copy(update={"tokenizer": work / "tokenizer"})
        new = prepare(again, work / "new", progress=False)
        return cls(old, new, merges, "\n".join(documents(old, "validation")))


def documents(data: PackedData, split: str) -> list[str]:
    """The documents of a split, as they were packed."""
    tokenizer = data.tokenizer()
    text = str(tokenizer.decode(getattr(data, split).ravel(), clean_up_tokenization_spaces=False))
    return text.split(str(tokenizer.eos_token))


def scored(folder: Path, corpora: Corpora, data: PackedData, trial: Trial) -> float:
    """Bits per byte of the held-out files, in windows that overlap by half, by the model in `folder`."""
    return perplexity(load_model(folder), data.tokenizer(), corpora.held_out, trial.length).bits_per_byte


def source_model(trial: Trial, seed: int, corpora: Corpora, work: Path) -> TrainingResult:
    """Train the model that is to grow, at a constant rate after a warm-up."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=trial.hidden_size,
        intermediate_size=3 * trial.hidden_size,
        num_hidden_layers=trial.layers,
        num_attention_heads=4,
        max_position_embeddings=trial.length,
        tie_word_embeddings=True,
        **corpora.old.form.config_values,
    )
    settings = settings_of(trial, seed, steps=trial.steps_before, warmup_steps=50, decay_fraction=0.0)
    return train(LlamaForCausalLM(config), corpora.old, settings, work / "source", progress=False)


def settings_of(trial: Trial, seed: int, **values: Any) -> TrainingSettings:
    """The settings of one stage."""
    return TrainingSettings(
        batch_size=trial.batch,
        learning_rate=trial.learning_rate,
        evaluation_batches=1,
        checkpoint_interval=None,
        tensorboard=False,
        seed=seed,
        **values,
    )


def start_of(branch: str, source: Path, seed: int, corpora: Corpora, output: Path) -> tuple[Path, bool]:
    """The checkpoint from which a branch trains on, and whether it has moments for AdamW."""
    if branch == OLD:
        return source, True
    if branch == DRAWN:
        model = load_model(source)
        torch.manual_seed(seed)
        model.resize_token_embeddings(corpora.new.vocab_size, mean_resizing=False)
        write_checkpoint_folder(output, model)
        return output, False
    grow = method("vocabulary")
    settings = grow.settings.parse({"merges": corpora.merges, "rule": branch, "tokenizer": source})
    plan = grow.plan(Bench(load_model(source), folder=output.with_suffix(".files")), settings)
    apply_to_checkpoint(plan, source, output)
    return output, True


def run(trial: Trial, seed: int, corpora: Corpora, work: Path) -> dict[str, dict[str, float]]:
    """One seed: train, grow by every rule, train on."""
    result = source = source_model(trial, seed, corpora, work)
    before = scored(source.checkpoint, corpora, corpora.old, trial)
    numbers: dict[str, dict[str, float]] = {}
    for branch in BRANCHES:
        data = corpora.old if branch == OLD else corpora.new
        start, moments = start_of(branch, source.checkpoint, seed, corpora, work / branch)
        # The old vocabulary has a smaller head: the same FLOPs are more steps.
        budget = {"flops": result.flops} if branch == OLD else {"steps": trial.steps_after}
        result = train(
            load_model(start),
            data,
            settings_of(trial, seed, decay_fraction=1.0, **budget),
            work / f"{branch}, trained",
            optimizer_from=start if moments else None,
            data_position=source.data_position,
            progress=False,
        )
        numbers[branch] = {
            "before": before,
            "after": scored(start, corpora, data, trial),
            "final": scored(result.checkpoint, corpora, data, trial),
            "steps": result.steps,
            "bytes_per_token": data.bytes_per_unit,
        }
        print(seed, branch, numbers[branch], file=sys.stderr, flush=True)
    return numbers


def table(results: dict[str, Any]) -> str:
    """The results as a page."""
    trial = results["trial"]
    lines = [
        "# A larger vocabulary for a trained model",
        "",
        f"A Llama of width {trial['hidden_size']} and {trial['layers']} layers with a byte-level BPE of "
        f"{trial['vocabulary']} tokens, trained {trial['steps_before']} steps of {trial['batch']} x {trial['length']} "
        f"tokens on the Python standard library, gets {trial['new_tokens']} tokens more (learned from the training "
        f"files) and is trained {trial['steps_after']} steps on, the rate falling to zero. The branch with the old "
        "vocabulary gets as many steps as the same FLOPs allow. Bits per byte of the held-out files "
        f"({results['held_out_bytes']:,} bytes): mean over the seeds (least to largest).",
        "",
        f"{made_by_line(results)} Seeds: {list(trial['seeds'])}. Corpus: standard library of Python "
        f"{results['versions']['python']}, fingerprint {results['fingerprint'][:16]}.",
        "",
        "| new rows | bytes per token | steps | before | right after growth | trained on |",
        "|---|---|---|---|---|---|",
    ]
    for branch in BRANCHES:
        found = [numbers[branch] for numbers in results["seeds"]]
        cells = [mean_and_range([numbers[key] for numbers in found], ".3f") for key in ("before", "after", "final")]
        bytes_per_token = statistics.mean(numbers["bytes_per_token"] for numbers in found)
        lines.append(f"| {branch} | {bytes_per_token:.2f} | {found[0]['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all seeds and write the page."""
    quick = asked_quick(__doc__)
    trial = QUICK if quick else Trial()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        corpora = Corpora.of(trial, work)
        results = {
            **made_by("python benchmarks/vocabulary.py"),
            "trial": asdict(trial),
            "fingerprint": corpora.old.fingerprint,
            "held_out_bytes": len(corpora.held_out.encode()),
            "seeds": [run(trial, seed, corpora, work / str(seed)) for seed in trial.seeds],
        }
    publish(results, RESULTS, table(results), PAGE, quick)


if __name__ == "__main__":
    main()
