"""The files of a checkpoint's folder that a plan does not rewrite: what goes along, and what no longer fits.

Nothing that holds tensors of the old model may lie beside the new one: a program that resumes would load it, or go on
with it without a word. Such files stay behind, and it is said which and why.
"""

import json
import re
import shutil
from collections.abc import Set
from pathlib import Path

TRAINER_STATE = "trainer_state.json"
ADAPTER = "adapter_config.json"

FITTING = re.compile(r"rng_state(_\d+)?\.pth|scheduler\.(pt|bin)|scaler\.pt|sampler(_\d+)?\.bin|training_args\.bin")
"""What transformers' Trainer and accelerate write and what says nothing of the model's tensors: random generators,
schedule, loss scale, position in the data, arguments. Copied byte by byte and never loaded."""
OPTIMIZER = re.compile(
    r"optimizer(_\d+)?\.(pt|bin)|optimizer\.pt_.*|rank\d+-of-\d+-optimizer\.pt"  # plain, by SageMaker, by XLA's FSDP
    r"|(optimizer|pytorch_model_fsdp)_\d+|pytorch_model_fsdp\.bin"  # FSDP
    r"|global_step\d+"  # DeepSpeed
)
"""Optimizers' states, of one process or in pieces, and the weights that lie in pieces beside them."""
FOREIGN_WEIGHTS = re.compile(
    r".*\.(onnx([._]data(_\d+)?)?|gguf|ggml|h5|keras|msgpack|ot|tflite|mlmodel|mlpackage)|openvino_.*\.(xml|bin)"
    r"|consolidated.*\.(pth|safetensors)"
)
"""Weights as other programs read them, in whatever folder they lie."""
OWN_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt([.-].*)?)")
"""Weights where they lie in the folder itself."""
EARLIER = re.compile(r"checkpoint-\d+")
"""A Trainer's checkpoints, below the folder of its run."""

WITHOUT_MOMENTS = "Training goes on with fresh moments; a Trainer that resumes begins its schedule anew, too."

BEST = ("best_model_checkpoint", "best_global_step", "best_metric")


def copy_other_files(source: Path, target: Path, rewritten: Set[Path]) -> list[str]:
    """Copy what fits the new model from `source` to `target`.

    Args:
        source: the old folder.
        target: the new one.
        rewritten: relative paths of what is not copied since it is written anew.

    Returns:
        A sentence for every file or folder that stays behind.
    """
    notes: list[str] = []

    def ignore(folder: str, names: list[str]) -> list[str]:
        ignored = []
        for name in sorted(names):
            path = Path(folder) / name
            relative = path.relative_to(source)
            reason = None if relative in rewritten else _reason(path, relative)
            if relative in rewritten or reason is not None:
                ignored.append(name)
            if reason is not None:
                notes.append(f"{relative} was left out: {reason}")
        return ignored

    shutil.copytree(source, target, ignore=ignore, dirs_exist_ok=True)
    return notes


def _reason(path: Path, relative: Path) -> str | None:
    """Why a file or folder doesn't fit the new model; None where it does."""
    if not path.is_file() and not path.is_dir():
        return "it is neither a file nor a folder, or a link that leads nowhere."
    name, is_top = path.name.removesuffix(".index.json"), len(relative.parts) == 1
    if path.is_dir() and (path / ADAPTER).is_file():
        return "it is an adapter for the model before. Merge it before the change, or train one for the new model."
    if is_top and path.is_dir() and EARLIER.fullmatch(name):
        return "it is a checkpoint of the model before. Apply the plan to it, if it is to be continued."
    if is_top and (OPTIMIZER.fullmatch(name) or (name == "latest" and _names_pieces(path))):
        return (
            "it is the state of an optimizer, or of weights, for the model before, in pieces or in an order that is "
            f"not known. {WITHOUT_MOMENTS}"
        )
    if FOREIGN_WEIGHTS.fullmatch(name) or (is_top and OWN_WEIGHTS.fullmatch(name) and not FITTING.fullmatch(name)):
        return "it holds weights of the model before. Write it anew from the new model, if it is needed."
    return None


def _names_pieces(path: Path) -> bool:
    """Whether the file `latest` is DeepSpeed's, which names the folder of its pieces."""
    try:
        return OPTIMIZER.fullmatch(path.read_text(encoding="utf-8").strip()) is not None
    except (OSError, UnicodeDecodeError):
        return False


def forget_best(folder: Path) -> list[str]:
    """Let a Trainer that resumes in `folder` not go back to the best checkpoint of the old model, which
    `load_best_model_at_end` would load into the new one. Its counts of steps and epochs, its log and so its place in
    the data stay.

    Returns:
        A sentence that says so, where a best one was named.
    """
    path = folder / TRAINER_STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(state, dict) or all(state.get(key) is None for key in BEST):
        return []
    path.write_text(json.dumps({**state, **dict.fromkeys(BEST)}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [
        f"{TRAINER_STATE} names no best checkpoint any more: that of the old folder ({state.get(BEST[0])}, "
        f"{state.get(BEST[2])}) is of the model before, and would be loaded into the new one at the end of training."
    ]
