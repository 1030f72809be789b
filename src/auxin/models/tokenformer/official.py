"""Official TokenFormer checkpoints: reading the released `pytorch_model.bin` files and writing them back.

The released files are flat dictionaries of float32 tensors under the names of a pipeline of numbered stages: 0 is the
embedding, 1 and L+2 reshape, 2 to L+1 are the layers, L+3 is the final norm, L+4 the output head (stored only when it
is not tied). They hold no config. A conversion counts as done only when the logits of what was written agree with
`reference_logits`, which knows the official names alone and nothing of the table by which tensors are renamed.
"""

import copy
import math
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from auxin.errors import CheckpointError, ConfigError
from auxin.files import flush, new_folder
from auxin.models.loading import load_config, load_model
from auxin.models.tokenformer.configuration import PUBLISHED, TokenFormerConfig
from auxin.models.tokenformer.modeling import TokenFormerForCausalLM
from auxin.models.tokenformer.presets import PRESETS
from auxin.models.tokenformer.slots import SLOTS
from auxin.settings import Settings

EMBEDDING = "sequential.0.word_embeddings.weight"
TOLERANCE = 1e-4
"""Largest accepted difference of the logits, relative to the largest logit, in float32."""
PROBE_SHAPE = (2, 24)
"""Sequences and tokens per sequence on which the logits are compared."""
TOKENIZER_IDS, PADDED_ROWS = 50277, 50304
"""Ids of the official tokenizer, and the rows of the released embeddings: padded to a multiple of 128."""
TOKENIZER_PARTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

State = Mapping[str, Tensor]


class ConversionReport(Settings):
    """What a conversion did."""

    direction: Literal["import", "export"]
    """"import" (official to Auxin) or "export" (Auxin to official)."""
    parameters: int
    """Parameters of the model, tied ones once."""
    max_relative_difference: float
    """Largest difference of the logits before and after, relative to the largest logit."""
    unused_keys: list[str]
    """Entries of the source that the model has no place for; they took no part in the comparison."""
    missing_keys: list[str]
    """Tensors of the model that the source leaves out because they repeat another one (a tied output head)."""
    notes: list[str]
    """What else the reader should know."""


def import_official(
    source: str | Path | State,
    output_dir: str | Path,
    *,
    config: TokenFormerConfig | None = None,
    num_attention_heads: int | None = None,
    tokenizer_dir: str | Path | None = None,
) -> ConversionReport:
    """Turn an official checkpoint into a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        source: a `pytorch_model.bin`, a `.safetensors` file of the same keys, a folder that holds one, or the tensors.
        output_dir: the folder to write; it must not exist or be empty. It appears only when everything succeeded.
        config: the model's config; inferred from the shapes when None.
        num_attention_heads: attention heads, which no shape tells; needed when the widths and depths are of no released
            model and `config` is None.
        tokenizer_dir: folder whose tokenizer files are copied; when None, the folder of `source`, if it holds them.

    Raises:
        CheckpointError: the file is unsafe, unreadable, incomplete or of another model, `output_dir` is not empty, or
            the converted model's logits are not the official ones.
        ConfigError: `config` has no official form, contradicts `num_attention_heads`, or the heads are unknown.
    """
    output_dir = Path(output_dir)
    path = None if isinstance(source, Mapping) else _find_checkpoint(Path(source))
    entries: Mapping[str, object] = source if isinstance(source, Mapping) else _read(cast(Path, path))
    state = _tensors(entries)
    config = _settle_config(state, config, num_attention_heads)
    names = official_names(config)
    _check_complete(state, config, names)
    notes = _vocabulary_notes(config)
    with torch.device("meta"):
        model = TokenFormerForCausalLM(config)
    model.load_state_dict(_unshared(state, names), strict=False, assign=True)
    model.tie_weights()
    with new_folder(output_dir) as folder:
        model.save_pretrained(folder)
        notes += _copy_tokenizer(tokenizer_dir, path, folder)
        del model  # What is compared is what lies on the disk.
        written = cast(TokenFormerForCausalLM, load_model(folder, dtype=torch.float32))
        difference = _compare(state, written, "import")
    return ConversionReport(
        direction="import",
        parameters=config.num_parameters(),
        max_relative_difference=difference,
        unused_keys=sorted(str(key) for key in entries if key not in set(names.values())),
        missing_keys=["lm_head.weight"] if config.tie_word_embeddings and head_name(config) not in state else [],
        notes=notes,
    )


def export_official(checkpoint_dir: str | Path, output_path: str | Path) -> ConversionReport:
    """Write a Hugging Face TokenFormer folder as an official `pytorch_model.bin` of float32 tensors.

    Args:
        checkpoint_dir: folder with config.json and safetensors weights.
        output_path: the file to write, or an existing folder in which it is called `pytorch_model.bin`. Nothing is
            overwritten; the file appears only when everything succeeded.

    Raises:
        CheckpointError: the folder is no complete TokenFormer, the file exists already, or the written model's logits
            are not the original ones.
        ConfigError: the model has no official form (several groups, another tau, ...); the message lists the reasons.
    """
    checkpoint_dir, output_path = Path(checkpoint_dir), Path(output_path)
    if output_path.is_dir():
        output_path = output_path / "pytorch_model.bin"
    if output_path.exists():
        raise CheckpointError(f"{output_path} exists already. Remove it or give another path.")
    config = _read_config(checkpoint_dir)
    _require_official_form(config)
    model, unused = _load_complete(checkpoint_dir)
    tensors = model.state_dict()
    state = {theirs: _own_storage(tensors[ours]) for ours, theirs in official_names(config).items()}
    output_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = output_path.with_name(f".{output_path.name}.{uuid.uuid4().hex}.tmp")
    try:
        torch.save(state, temporary)  # The official code loads no other format.
        flush(temporary)
        del state
        difference = _compare(_tensors(_read(temporary)), model, "export")
        os.replace(temporary, output_path)
    finally:
        temporary.unlink(missing_ok=True)
    return ConversionReport(
        direction="export",
        parameters=config.num_parameters(),
        max_relative_difference=difference,
        unused_keys=unused,
        missing_keys=[],
        notes=_vocabulary_notes(config),
    )


def official_names(config: TokenFormerConfig) -> dict[str, str]:
    """The official name of every tensor that a checkpoint of `config` stores, by our name."""
    layers = config.num_hidden_layers
    names = {"model.embed_tokens.weight": EMBEDDING}
    for layer in range(layers):
        for part in ("attention.query", "attention.key", "attention.value", "attention.proj", "mlp"):
            ours, theirs = f"model.layers.{layer}.{part}", f"sequential.{layer + 2}.{part}"
            names[f"{ours}.key_tokens"] = f"{theirs}.key_param_tokens"
            names[f"{ours}.value_tokens"] = f"{theirs}.value_param_tokens"
    for kind in ("weight", "bias"):
        names[f"model.norm.{kind}"] = f"sequential.{layers + 3}.norm.{kind}"
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = head_name(config)
    return names


def head_name(config: TokenFormerConfig) -> str:
    """The official name of the output head."""
    return f"sequential.{config.num_hidden_layers + 4}.final_linear.weight"


def infer_config(state: State, num_attention_heads: int | None = None) -> TokenFormerConfig:
    """Read the config off the shapes of an official checkpoint.

    The number of heads is in no shape. It is taken from the published model of the same depth and width unless given.
    The output head counts as tied when it is not stored or equals the embedding.

    Raises:
        CheckpointError: this is no official checkpoint.
        ConfigError: no published model has this depth and width and `num_attention_heads` is None, or it is impossible.
    """
    layers = sorted(
        int(match[1]) for name in state if (match := re.fullmatch(r"sequential\.(\d+)\.mlp\..*keys?_.*", name))
    )
    if EMBEDDING not in state or not layers or layers != list(range(2, len(layers) + 2)):
        raise CheckpointError(
            f"This is no official TokenFormer checkpoint: it needs {EMBEDDING!r} and layers numbered from "
            f"'sequential.2.' without gaps; received layers {layers} and the keys {sorted(state)[:5]} ..."
        )
    embedding = state[EMBEDDING]
    if embedding.dim() != 2:
        raise CheckpointError(f"{EMBEDDING} has the shape {tuple(embedding.shape)}, expected (vocabulary, width).")
    vocab_size, hidden_size = embedding.shape
    heads = _published_heads(len(layers), hidden_size) if num_attention_heads is None else num_attention_heads

    def tokens(part: str) -> int:
        name = f"sequential.2.{part}.key_param_tokens"
        if name not in state or not state[name].dim():
            raise CheckpointError(f"The checkpoint has no {name!r}, or a single number there. Is it complete?")
        return state[name].shape[0]

    lengths = {
        preset.context_length
        for preset in PRESETS.values()
        if preset.tokens == tokens("attention.query")
        and (preset.num_hidden_layers, preset.hidden_size) == (len(layers), hidden_size)
    }
    head = state.get(f"sequential.{len(layers) + 4}.final_linear.weight")
    return TokenFormerConfig(
        **PUBLISHED,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        qkv_tokens=tokens("attention.query"),
        proj_tokens=tokens("attention.proj"),
        ffn_tokens=tokens("mlp"),
        max_position_embeddings=max(lengths, default=2048),
        tie_word_embeddings=head is None or (head.dtype == embedding.dtype and torch.equal(head, embedding)),
        pad_token_id=1,
    )


@torch.no_grad()
def reference_logits(state: State, input_ids: Tensor, num_attention_heads: int) -> Tensor:
    """The official model's logits in float32, (batch, sequence, vocabulary), straight from its tensors.

    Written from the description of the official code and on purpose without anything of `modeling` or `official_names`:
    it is what conversions are judged by.
    """
    batch, length = input_ids.shape
    last = max(int(name.split(".")[1]) for name in state if name.endswith(".attention.proj.value_param_tokens"))
    stream = F.embedding(input_ids, state[EMBEDDING]).float()
    width = stream.shape[-1]
    head = width // num_attention_heads
    turned = int(head * 0.25)
    speeds = 10000.0 ** (-torch.arange(0, turned, 2).double() / turned)
    turns = torch.outer(torch.arange(length).double(), speeds)[:, None]  # (sequence, 1 for the heads, turned / 2)
    hidden_future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def attend_parameters(x: Tensor, where: str) -> Tensor:
        scores = torch.einsum("btd,nd->btn", x, state[f"{where}.key_param_tokens"].float())
        scores = scores / scores.square().sum(-1, keepdim=True).sqrt() * math.sqrt(scores.shape[-1])
        return torch.einsum("btn,nd->btd", F.gelu(scores), state[f"{where}.value_param_tokens"].float())

    def position(x: Tensor) -> Tensor:
        low, high, rest = x.split([turned // 2, turned // 2, head - turned], dim=-1)
        cosine, sine = turns.cos().float(), turns.sin().float()
        return torch.cat((low * cosine - high * sine, high * cosine + low * sine, rest), dim=-1)

    for stage in range(2, last + 1):
        normed = F.layer_norm(stream, (width,), eps=1e-5)
        query, key, value = (
            attend_parameters(normed, f"sequential.{stage}.attention.{part}").view(batch, length, -1, head)
            for part in ("query", "key", "value")
        )
        weights = torch.einsum("bthd,bshd->bhts", position(query), position(key)) / math.sqrt(head)
        weights = weights.masked_fill(hidden_future, -math.inf).softmax(-1)
        mixed = torch.einsum("bhts,bshd->bthd", weights, value).reshape(batch, length, width)
        stream = stream + attend_parameters(mixed, f"sequential.{stage}.attention.proj")
        stream = stream + attend_parameters(F.layer_norm(stream, (width,), eps=1e-5), f"sequential.{stage}.mlp")
    weight, bias = (state[f"sequential.{last + 2}.norm.{kind}"].float() for kind in ("weight", "bias"))
    output = state.get(f"sequential.{last + 3}.final_linear.weight", state[EMBEDDING])
    return F.layer_norm(stream, (width,), weight, bias, eps=1e-5) @ output.float().T


def _compare(state: State, model: TokenFormerForCausalLM, direction: str) -> float:
    """The relative difference of the model's logits from the official ones; CheckpointError when it is too large."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, model.config.vocab_size, PROBE_SHAPE, generator=generator)
    expected = reference_logits(state, input_ids, model.config.num_attention_heads)
    with torch.no_grad():
        logits = model.eval()(input_ids, use_cache=False).logits.float()
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:  # so that NaN fails
        raise CheckpointError(
            f"The {direction} failed its check: logits differ by {difference:.3g} relative to the largest one, at most "
            f"{TOLERANCE} is accepted. Nothing was written. Non-finite weights, a wrong config or tensors in wrong "
            "places are the usual causes."
        )
    return difference


def _find_checkpoint(path: Path) -> Path:
    if path.is_dir():
        candidates = [path / name for name in ("pytorch_model.bin", "pytorch_model.safetensors", "model.safetensors")]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise CheckpointError(f"{path} holds none of {[candidate.name for candidate in candidates]}.")
        return found[0]
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Give a pytorch_model.bin or .safetensors file, or its folder.")
    return path


def _read(path: Path) -> Mapping[str, object]:
    """Map a checkpoint file into memory without running anything that is in it."""
    with path.open("rb") as file:
        head = file.read(4)
    if path.suffix != ".safetensors" and not head.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(
            f"{path} is no PyTorch file (it begins with {head!r}). A file of about 130 bytes is a git-LFS pointer: "
            "download the file itself."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The format before 2019 ("\x80...") can't be mapped, only read.
        entries = torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and would have to run code to be read, which Auxin never does "
            f"({str(error).splitlines()[0]}). If you trust its author, read it once in an isolated place with "
            "torch.load(..., weights_only=False), write its tensors with safetensors.torch.save_file, and give that "
            "file instead."
        ) from error
    except Exception as error:  # Damaged bytes can make the unpickler fail in any way.
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} can't be read, it may be incomplete or damaged: {reason}") from error
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{path} holds a {type(entries).__name__}, expected a dictionary of tensors.")
    return entries


def _tensors(entries: Mapping[str, object]) -> dict[str, Tensor]:
    return {name: value for name, value in entries.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _unshared(state: State, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors by our names, copied where two are one memory: saving would keep one of them only."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for ours, theirs in names.items():
        place = state[theirs].data_ptr()
        tensors[ours] = state[theirs].clone() if place in seen else state[theirs]
        seen.add(place)
    return tensors


def _settle_config(state: State, config: TokenFormerConfig | None, heads: int | None) -> TokenFormerConfig:
    if config is None:
        return infer_config(state, heads)
    if heads is not None and heads != config.num_attention_heads:
        raise ConfigError(
            f"num_attention_heads is {heads}, but the given config says {config.num_attention_heads}. Give one of them."
        )
    _require_official_form(config)
    return copy.deepcopy(config)  # saving a model writes into its config


def _published_heads(layers: int, hidden_size: int) -> int:
    for preset in PRESETS.values():
        if (preset.num_hidden_layers, preset.hidden_size) == (layers, hidden_size):
            return preset.num_attention_heads
    raise ConfigError(
        f"No published TokenFormer has {layers} layers of width {hidden_size}, and the checkpoint doesn't hold its "
        "number of attention heads. Give num_attention_heads (or the config)."
    )


def _check_complete(state: State, config: TokenFormerConfig, names: Mapping[str, str]) -> None:
    missing = [name for name in names.values() if name not in state]
    if missing:
        extra = sorted(set(state) - set(names.values()))
        raise CheckpointError(
            f"{len(missing)} tensor(s) are missing, the first {missing[:3]}; {len(extra)} are of no use, the first "
            f"{extra[:3]}. Give a complete checkpoint and a config that fits it."
        )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in TokenFormerForCausalLM(config).state_dict().items()}
    for ours, theirs in names.items():
        if state[theirs].shape != shapes[ours]:
            raise CheckpointError(
                f"{theirs} has the shape {tuple(state[theirs].shape)}, but the config asks for {tuple(shapes[ours])}."
            )


def _require_official_form(config: TokenFormerConfig) -> None:
    """Raise ConfigError with every reason why the official code could not run a model of `config`."""
    reasons = []
    for slot in SLOTS:
        sizes = config.group_sizes(slot)
        if len(sizes) > 1:
            reasons.append(
                f"its {slot} tokens form {len(sizes)} groups with a norm each, the official code has one norm"
            )
        elif not math.isclose(config.group_tau(slot)[0], math.sqrt(sizes[0]), rel_tol=1e-6):
            reasons.append(
                f"its {slot} scale is {config.group_tau(slot)[0]:.6g}, the official code always uses sqrt({sizes[0]})"
            )
    has = {field: getattr(config, field) for field in PUBLISHED if field != "score_function"}
    functions = {f"{slot}_score_function": config.slot_score_function(slot) for slot in SLOTS}
    same = len(set(functions.values())) == 1
    has |= {"score_function": functions["qkv_score_function"]} if same else functions
    for field, value in has.items():
        published = PUBLISHED["score_function" if field in functions else field]
        if value != published:
            reasons.append(f"{field} is {value!r}, the released models have {published!r}")
    if reasons:
        raise ConfigError(f"This model has no official form: {'; '.join(reasons)}.")


def _read_config(checkpoint_dir: Path) -> TokenFormerConfig:
    config = load_config(checkpoint_dir)
    if not isinstance(config, TokenFormerConfig):
        raise CheckpointError(f"{checkpoint_dir} holds a model of type {config.model_type!r}, expected 'tokenformer'.")
    return config


def _load_complete(checkpoint_dir: Path) -> tuple[TokenFormerForCausalLM, list[str]]:
    """The model in float32 and the keys of its files that it did not use."""
    model = cast(TokenFormerForCausalLM, load_model(checkpoint_dir, dtype=torch.float32))
    known = model.state_dict().keys()
    unused: list[str] = []
    for path in sorted(checkpoint_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            unused += [key for key in file.keys() if key not in known]  # noqa: SIM118 - a file, not a dict
    return model, sorted(unused)


def _own_storage(tensor: Tensor) -> Tensor:
    """`tensor`, copied when it is a view: torch.save writes the whole storage behind a view."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _vocabulary_notes(config: TokenFormerConfig) -> list[str]:
    if config.vocab_size != PADDED_ROWS:
        return []
    return [
        f"The vocabulary keeps its {PADDED_ROWS} rows; the official tokenizer has {TOKENIZER_IDS} ids, the last "
        f"{PADDED_ROWS - TOKENIZER_IDS} rows are padding."
    ]


def _copy_tokenizer(tokenizer_dir: str | Path | None, checkpoint: Path | None, folder: Path) -> list[str]:
    origin = Path(tokenizer_dir) if tokenizer_dir is not None else checkpoint.parent if checkpoint else None
    files = [origin / name for name in TOKENIZER_PARTS if (origin / name).is_file()] if origin else []
    if not any(file.name == "tokenizer.json" for file in files):
        if tokenizer_dir is not None:
            raise CheckpointError(f"{tokenizer_dir} holds no tokenizer.json.")
        return [
            "No tokenizer was copied: there is no tokenizer.json beside the checkpoint. tokenizer_dir names its folder."
        ]
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return [f"Tokenizer copied from {origin}."]
