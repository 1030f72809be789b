"""How much memory a growth needs: peak of the resident set while a model grows, against the new model's size.

    python benchmarks/growth_memory.py                      a model of 1 GB, in memory and as a checkpoint on disk
    python benchmarks/growth_memory.py --megabytes 5000     any other size

Each measurement runs in a process of its own, on Linux (the peak is read from /proc/self/status).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


def resident(kind: str) -> int:
    """Bytes of the resident set: VmHWM (its peak since the last reset), RssAnon or RssFile (now)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {kind}")


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


def measure(mode: str, megabytes: int, folder: Path) -> None:
    """Grow the tokens by a half and print the peak, in this process."""
    import torch

    from auxin.edits import apply, apply_to_checkpoint
    from auxin.methods.grow.tokenformer import TokenGrowth, plan_token_growth
    from auxin.models.tokenformer import TokenFormerForCausalLM

    torch.set_num_threads(1)
    config = config_of(megabytes)
    tokens = config.qkv_tokens[0] * 3 // 2
    growth = TokenGrowth(qkv_tokens=tokens, proj_tokens=tokens, ffn_tokens=4 * tokens)
    plan = plan_token_growth(config, growth)
    small = TokenFormerForCausalLM(config_of(1))
    apply(plan_token_growth(small.config, TokenGrowth(ffn_tokens=2 * small.config.ffn_tokens[0])), small)
    del small
    base = resident("RssAnon")
    model = TokenFormerForCausalLM(config)
    old = sum(p.numel() * p.element_size() for p in model.parameters())
    if mode == "disk":
        model.save_pretrained(folder / "old", max_shard_size="200MB")
        del model
    Path("/proc/self/clear_refs").write_text("5")
    receipt = apply(plan, model) if mode == "memory" else apply_to_checkpoint(plan, folder / "old", folder / "new")
    peak = resident("VmHWM") - resident("RssFile") - base
    new = old + 4 * (receipt.parameters_after - receipt.parameters_before)
    largest = 4 * 4 * tokens * config.hidden_size
    print(json.dumps({"mode": mode, "old": old, "new": new, "largest_tensor": largest, "peak": peak}))


def main() -> None:
    """Measure each mode in its own process and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the model before the growth")
    parser.add_argument("--modes", nargs="+", choices=["memory", "disk"], default=["memory", "disk"])
    parser.add_argument(
        "--check", action="store_true", help="fail when the peak is above the new model and two tensors"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments.child, arguments.megabytes, arguments.folder)
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
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
            output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        result = json.loads(output.splitlines()[-1])
        excess = (result["peak"] - result["new"]) / result["largest_tensor"]
        print(
            f"{mode}: {result['old'] / MIB:.0f} -> {result['new'] / MIB:.0f} MiB, peak {result['peak'] / MIB:.0f} MiB, "
            f"{result['peak'] / result['new']:.3f} times the new model (new model and {excess:+.2f} largest tensors)"
        )
        failed |= excess > 2
    sys.exit(1 if arguments.check and failed else 0)


if __name__ == "__main__":
    main()
