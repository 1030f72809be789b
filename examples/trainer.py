"""Growing a model in the middle of its training by transformers' Trainer, in two ways.

    python examples/trainer.py runs/trainer

needs accelerate, as the Trainer does. The model and the text are toys; what matters is that each way goes on with the
optimizer's moments, the learning rate's schedule and the place in the data that it had before.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import auxin

GROWTH_STEP = 10
STEPS = 20


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes))


def rows() -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards, each from another number."""
    counted = [(torch.arange(32) + start) % 64 for start in range(64)]
    return [{"input_ids": ids, "labels": ids} for ids in counted]


def trainer(model: torch.nn.Module, folder: Path, callbacks: list[TrainerCallback]) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        warmup_steps=5,
        weight_decay=0.1,
        save_steps=GROWTH_STEP,
        logging_steps=5,
        report_to=[],
    )
    return Trainer(model, arguments, train_dataset=rows(), callbacks=callbacks)


class Grow(TrainerCallback):
    """Doubles the widths once a step is done: gradients are gone by then, and the next step has not begun."""

    def on_step_end(self, args: Any, state: Any, control: Any, **training: Any) -> None:
        if state.global_step == GROWTH_STEP:
            plan = auxin.plan(training["model"], "hypercloning", factor=2)
            auxin.apply(plan, training["model"], optimizer=training["optimizer"])


def grown_in_one_run(folder: Path) -> Trainer:
    """The model and its optimizer are changed where they are; the Trainer goes on with them."""
    run = trainer(small_model(), folder, [Grow()])
    run.train()
    return run


def grown_between_two_runs(folder: Path) -> Trainer:
    """A checkpoint is changed, the Trainer's files in it along, and a new Trainer resumes in it."""
    trainer(small_model(), folder / "small", []).train()
    checkpoint = folder / "small" / f"checkpoint-{GROWTH_STEP}"
    grown = folder / "grown"
    auxin.apply(auxin.plan(checkpoint, "hypercloning", factor=2), checkpoint, output=grown)
    run = trainer(auxin.load(grown), folder / "large", [])
    run.train(resume_from_checkpoint=str(grown))
    return run


def main(folder: Path) -> None:
    for way in (grown_in_one_run, grown_between_two_runs):
        run = way(folder / way.__name__)
        losses = [f"{entry['loss']:.2f}" for entry in run.state.log_history if "loss" in entry]
        print(f"{way.__name__}: {run.model.config.hidden_size} wide after {run.state.global_step} steps, loss {losses}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trainer"))
