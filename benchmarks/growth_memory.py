"""How much memory a growth needs: peak of the resident set while a model grows, against what is there afterwards.

    python benchmarks/growth_memory.py                      a model of 1 GB: in memory, with AdamW, and on the disk
    python benchmarks/growth_memory.py --megabytes 5000     any other size
    python benchmarks/growth_memory.py --regime duplicate   another rule for the new tokens
    python benchmarks/growth_memory.py --modes disk --method llama-pro --set group_size=4   any method, on a Llama

What is there afterwards is the new model and, in the mode "optimizer", AdamW's two moments of it. The claim, checked
by --check for every regime but "duplicate" (which keeps old tensors until its promise was checked): the peak is that
and one tensor, the largest at its new size, and at most 8 MiB of the interpreter's own. Each measurement runs in a
process of its own, on Linux (the peak is read from /proc/self/status).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from measuring import reset_peak, resident

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
# Freed tensors go back to the system at once: what is measured is what the growth holds, not what malloc keeps.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "MALLOC_MMAP_THRESHOLD_": "65536"}
INTERPRETER = 8 * MIB
MODES = ["memory", "optimizer", "disk"]


def config_of(megabytes: int) -> Any:
    """A model whose parameters take about `megabytes` in float32, nearly all of them in the parameter tokens."""
    from auxin.models.tokenformer import TokenFormerConfig

    layers, width = 4, 512
    tokens = max(8, megabytes * MIB // 4 // (2 * layers * width * 8))
    return TokenFormerConfig(
        vocab_size=512,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        qkv_tokens=tokens,
        proj_tokens=tokens,
        ffn_tokens=4 * tokens,
        max_position_embeddings=64,
    )


def llama_of(megabytes: int) -> Any:
    """A Llama of 24 layers whose parameters take about `megabytes` in bfloat16; 2,700 are 1.4 billion parameters."""
    from transformers import LlamaConfig

    layers = 24
    width = round((megabytes * MIB / 2 / layers / 11) ** 0.5 / 128) * 128
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=int(2.75 * width),
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )


def measure(mode: str, megabytes: int, regime: Any, folder: Path, method_name: str, settings: dict[str, Any]) -> None:
    """Grow a model and print the peak, in this process; a TokenFormer grows by a half (doubles to duplicate)."""
    import torch
    from transformers import AutoModelForCausalLM

    from auxin.edits import apply, apply_to_checkpoint
    from auxin.methods import method
    from auxin.methods.grow.tokenformer import TokenGrowth, plan_token_growth
    from auxin.models.tokenformer import TokenFormerForCausalLM
    from auxin.planning.bench import Bench

    torch.set_num_threads(1)
    small = TokenFormerForCausalLM(config_of(1))
    apply(plan_token_growth(small.config, TokenGrowth(ffn_tokens=2 * small.config.group_sizes("ffn")[0])), small)
    del small
    found = method(method_name)
    base = resident("RssAnon")
    if method_name == "tokenformer":
        config = config_of(megabytes)
        old_tokens = config.group_sizes("qkv")[0]
        tokens = 2 * old_tokens if regime == "duplicate" else old_tokens * 3 // 2
        settings = {"qkv_tokens": tokens, "proj_tokens": tokens, "ffn_tokens": 4 * tokens, "regime": regime}
        model = TokenFormerForCausalLM(config)
    else:
        model = AutoModelForCausalLM.from_config(llama_of(megabytes), dtype=torch.bfloat16)
    plan = found.plan(Bench(model), found.settings.parse(settings))
    optimizer = trained_once(model) if mode == "optimizer" else None
    copies = 3 if optimizer else 1  # the model, two moments
    size = next(model.parameters()).element_size()
    old = copies * sum(p.numel() * p.element_size() for p in model.parameters())
    if mode == "disk":
        model.save_pretrained(folder / "old", max_shard_size="200MB")
        del model
    reset_peak()
    if mode == "disk":
        receipt = apply_to_checkpoint(plan, folder / "old", folder / "new")
        model = AutoModelForCausalLM.from_pretrained(folder / "new", dtype="auto")
    else:
        receipt = apply(plan, model, optimizer)
    peak = resident("VmHWM") - resident("RssFile") - base
    new = old + copies * size * (receipt.parameters_after - receipt.parameters_before)
    largest = size * max(parameter.numel() for parameter in model.parameters())
    counts = {"before": receipt.parameters_before, "after": receipt.parameters_after}
    print(json.dumps({"mode": mode, "old": old, "new": new, "largest_tensor": largest, "peak": peak, **counts}))


def trained_once(model: Any) -> Any:
    """An AdamW with both moments of every parameter, the gradients gone."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        moments = {name: torch.rand_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    return optimizer


def main() -> None:
    """Measure each mode in its own process and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the model before the growth")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument(
        "--check", action="store_true", help="fail when the peak is above what is there afterwards and one tensor"
    )
    parser.add_argument("--regime", default="grouped", help="rule for the new tokens")
    parser.add_argument("--method", default="tokenformer", help="method; all but tokenformer grow a Llama in bfloat16")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="the method's settings")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        settings = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in arguments.set)}
        measure(arguments.child, arguments.megabytes, arguments.regime, arguments.folder, arguments.method, settings)
        return
    failed = False
    for mode in arguments.modes:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                __file__,
                "--child",
                mode,
                "--folder",
                folder,
                "--megabytes",
                str(arguments.megabytes),
                "--regime",
                arguments.regime,
                "--method",
                arguments.method,
                "--set",
                *arguments.set,
            ]
            environment = {**os.environ, **ENVIRONMENT}
            output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        result = json.loads(output.splitlines()[-1])
        excess = result["peak"] - result["new"]
        sizes = ", peak ".join(f"{result[key] / MIB:.0f}" for key in ("new", "peak"))
        print(
            f"{mode}: {result['before']:,} -> {result['after']:,} parameters, "
            f"{result['old'] / MIB:.0f} -> {sizes} MiB, {result['peak'] / result['new']:.3f} times what is "
            f"there afterwards ({excess / result['largest_tensor']:+.2f} largest tensors)"
        )
        failed |= excess > result["largest_tensor"] + INTERPRETER
    sys.exit(1 if arguments.check and failed else 0)


if __name__ == "__main__":
    main()
