"""Inputs of the kind that a model takes, on which it is probed and counted."""

import inspect
from collections.abc import Iterator
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.errors import ConfigError, PlanError

IDS, DECODER_IDS, PIXELS = "input_ids", "decoder_input_ids", "pixel_values"
GRID, IMAGE_SIZES, TOKEN_KINDS = "image_grid_thw", "image_sizes", "mm_token_type_ids"
"""What some language models take beside images: how many patches lie in time, height and width; the images' sizes in
pixels; which tokens stand for images."""
CHANNELS = ("in_channels", "in_chans", "num_channels")
"""Names of the number of an image's channels in configs of models that take it in patches."""
IMAGE_SIDE = 224
"""Pixels, for models that take images of any size; the usual size of ImageNet's."""
LONGEST = 2**24
"""Tokens of the longest sequence that inputs are made of."""
KINDS_OF_PLACEHOLDERS = ("image", "video", "audio")


def example_inputs(
    model: PreTrainedModel,
    batch: int,
    length: int,
    seed: int | None = None,
    decoder_length: int | None = None,
    vocabulary: int | None = None,
    illustrated: bool = False,
) -> dict[str, Tensor]:
    """Random inputs of `model` by name: token ids, those of a decoder too, pixels, waveforms or spectrograms.

    A model that scores texts against images gets both. A language model that can look at images, too, gets text alone,
    or, `illustrated`, an image before each.
    Texts that are pooled at their end token have it, once, at the end. Numbers have the type of the model.

    Args:
        model: the model; its weights are looked at where it is `illustrated`, and for nothing else.
        batch: number of sequences, images or recordings.
        length: tokens per sequence, frames per waveform; images and spectrograms have the size that the config says,
            images 224 x 224 where it says none.
        seed: of the random numbers; None: zeros.
        decoder_length: tokens per sequence of the decoder of an encoder-decoder; None: `length`.
        vocabulary: token ids stay below it; None: below the model's vocabulary.
        illustrated: whether a language model that can look at images gets some, where it is known how; a trial run of
            what reads them tells the number of tokens in their place.

    Raises:
        ConfigError: a length beyond any model's.
        PlanError: the model's main input is none of these, or its config does not say how large it is.
    """
    refuse_endless(length, decoder_length or length)
    drawn = _Drawn(model, batch, seed, vocabulary)
    main = main_input(model)
    makers = {IDS: _texts, PIXELS: _images, "input_features": _spectrograms, "input_values": _sounds}
    inputs = makers[main](drawn, length) if main in makers else None
    if inputs is None:
        raise PlanError(
            f"No inputs of a {type(model).__name__} can be made: its main input is {main!r}, and its config does not "
            'say what that looks like. Give auxin.apply a probe: probe={"' + main + '": tensor, ...}.'
        )
    if main == IDS and takes_pairs(model):
        inputs |= _images(drawn, length)
    elif main == IDS and illustrated:
        inputs |= _images_in_text(drawn, inputs[IDS])
    if model.config.is_encoder_decoder and DECODER_IDS in call_arguments(model):
        inputs[DECODER_IDS] = drawn.ids(text_config(model.config, decoder=True), decoder_length or length)
    return inputs


def refuse_endless(*lengths: int) -> None:
    """ConfigError for a length of sequences at which torch no longer knows the sizes of attention's scores."""
    if (longest := max(lengths)) > LONGEST:
        raise ConfigError(
            f"sequence_length: {longest:,} tokens are more than any model reads; costs are counted up to {LONGEST:,}. "
            "Give the length of the texts that the model is for."
        )


def main_input(model: PreTrainedModel) -> str:
    """The name of the model's main input; that of its encoder where it says `inputs`, which are the encoder's."""
    name: Any = model.main_input_name
    encoder = model.get_encoder() if name == "inputs" and model.config.is_encoder_decoder else None
    name = encoder.main_input_name if isinstance(encoder, PreTrainedModel) else name
    return name if isinstance(name, str) else str(name[0])


def takes_pairs(model: PreTrainedModel) -> bool:
    """Whether the model needs texts and images: it has a tower for each, or one whose config has the sizes of both."""
    towers = all(callable(getattr(model, f"get_{kind}_features", None)) for kind in ("text", "image"))
    one = all(getattr(model.config, field, None) is not None for field in ("vocab_size", "image_size"))
    return (towers or one) and PIXELS in call_arguments(model)


def follows_length(model: PreTrainedModel) -> bool:
    """Whether the size of all that the model takes follows the number of tokens, or of a waveform's frames."""
    main = main_input(model)
    return (main == IDS and not takes_pairs(model)) or (main == "input_values" and _convolutions(model) is not None)


def needs_length(model: PreTrainedModel) -> bool:
    """Whether the size of some of what the model takes does."""
    return follows_length(model) or main_input(model) == IDS or DECODER_IDS in call_arguments(model)


def unit_of_cost(model: PreTrainedModel) -> Literal["token", "frame", "sample"]:
    """What FLOPs are counted per: a token of a text, a frame of a waveform, or else a whole sample (an image, a
    spectrogram, a text with its image)."""
    if not follows_length(model):
        return "sample"
    return "token" if main_input(model) == IDS else "frame"


def counted_length(model: PreTrainedModel, most: int) -> int:
    """Tokens at which costs are counted: those that the model has positions for, at most `most`. Where a decoder alone
    reads tokens, as Whisper's does, they are its tokens."""
    return text_length(model, most, decoder=main_input(model) != IDS and DECODER_IDS in call_arguments(model))


def text_length(model: PreTrainedModel, most: int, decoder: bool = False) -> int:
    """Tokens of a sequence that the model has positions for, at most `most`.

    Args:
        model: the model.
        most: what is wanted.
        decoder: of the sequences of an encoder-decoder's decoder.
    """
    positions = text_positions(model, decoder)
    return most if positions is None else min(most, positions)


def text_positions(model: nn.Module, decoder: bool = False) -> int | None:
    """Tokens of the longest sequence that the model has positions for; None where nothing bounds them.

    Args:
        model: the model; of one without a config nothing is known but its table of positions.
        decoder: of the sequences of an encoder-decoder's decoder.
    """
    config = text_config(model.config, decoder) if isinstance(model, PreTrainedModel) else None
    limits: list[int] = []
    # MPT has a name of its own.
    fields = ("max_position_embeddings", "max_seq_len", *(("max_target_positions",) if decoder else ()))
    for field in fields:
        limit = getattr(config, field, None)
        if isinstance(limit, int) and limit > 0:  # XLNet says -1, for no limit
            limits.append(limit)
    for path, module in model.named_modules():
        # RoBERTa's positions start behind the padding's.
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits, default=None)


def text_config(config: PreTrainedConfig, decoder: bool = False) -> Any:
    """The config of what reads token ids; of an encoder-decoder, of its encoder or its decoder."""
    if config.is_encoder_decoder:
        for name in ("decoder", "text_config") if decoder else ("text_encoder", "encoder"):
            if isinstance(part := getattr(config, name, None), PreTrainedConfig):
                return part.get_text_config()
    return config.get_text_config()


def placeholder_tokens(config: PreTrainedConfig, *kinds: str) -> tuple[int, ...]:
    """The tokens that stand for what another encoder makes: of `kinds`, or of all."""
    fields = (f"{kind}_token_{end}" for kind in kinds or KINDS_OF_PLACEHOLDERS for end in ("id", "index"))
    return tuple(value for field in fields if isinstance(value := getattr(config, field, None), int))


def call_arguments(model: nn.Module) -> tuple[str, ...]:
    """The names of what `model` is called with."""
    return tuple(inspect.signature(model.forward).parameters)


def without_cache(model: PreTrainedModel) -> dict[str, Any]:
    """What a call must say, so that a model which could keep keys and values for later does not."""
    return {"use_cache": False} if model.can_generate() or "use_cache" in call_arguments(model) else {}


def image_shape(config: PreTrainedConfig, side: int | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model of `config` takes.

    Args:
        config: the config, or one that has such a config as a part.
        side: height and width where the config says none; None: that is an error.

    Raises:
        ConfigError: no size is known.
    """
    part = _part(config, "image_size", "num_channels") or _part(config, "num_channels") or _part(config, "image_size")
    size = getattr(part, "image_size", None) or side
    if part is None or size is None:
        raise ConfigError(f"image_size: the config of {config.model_type} does not say how large its images are.")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return getattr(part, "num_channels", 3), height, width  # architectures for colours alone don't say so


class _Drawn:
    """Tensors of random numbers for a model, or of zeros."""

    def __init__(self, model: PreTrainedModel, batch: int, seed: int | None, vocabulary: int | None) -> None:
        self.model, self.config, self.batch = model, model.config, batch
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._vocabulary = vocabulary

    def numbers(self, *shape: int) -> Tensor:
        """(batch, *shape), normal with variance 1."""
        shape = (self.batch, *shape)
        numbers = torch.zeros(shape) if self._generator is None else torch.randn(shape, generator=self._generator)
        return numbers.to(self.model.dtype)

    def ids(self, config: Any, length: int, last: int | None = None, never: tuple[int, ...] = ()) -> Tensor:
        """Token ids (batch, length) in the vocabulary of `config`.

        Args:
            config: of the part that reads them.
            length: tokens.
            last: the token at the end of each, which is nowhere else.
            never: tokens that are left out.
        """
        shape = (self.batch, length)
        if self._generator is None:
            return torch.zeros(shape, dtype=torch.long)
        ids = torch.randint(config.vocab_size, shape, generator=self._generator)
        limit = min(config.vocab_size, self._vocabulary or config.vocab_size)
        ids %= limit
        last = None if last is None else min(last, limit - 1)
        kept = torch.ones(limit, dtype=torch.bool)
        kept[[token for token in (*never, last) if token is not None and 0 <= token < limit]] = False
        if not kept.all() and kept.any():
            ids = kept.nonzero()[:, 0][ids % int(kept.sum())]
        if last is not None:
            ids[:, -1] = last
        return ids


def _texts(drawn: _Drawn, length: int) -> dict[str, Tensor] | None:
    config = text_config(drawn.config)
    if getattr(config, "vocab_size", None) is None:
        return None
    ids = drawn.ids(config, length, _end_token(drawn.model, config), placeholder_tokens(drawn.config))
    # Several answers to one question are told apart; one answer each here.
    return {IDS: ids[:, None] if type(drawn.model).__name__.endswith("ForMultipleChoice") else ids}


def _end_token(model: PreTrainedModel, config: Any) -> int | None:
    """The token at which texts are pooled, where they are pooled at one: by towers for text and by classifiers that
    are encoder-decoders."""
    own = (vars(module)["eos_token_id"] for module in model.modules() if "eos_token_id" in vars(module))
    end = next(own, config.eos_token_id if model.config.is_encoder_decoder and not model.can_generate() else None)
    if end == 2 and not model.config.is_encoder_decoder:
        return int(config.vocab_size) - 1  # configs of early CLIPs say 2, and texts are pooled at the largest id
    return end if isinstance(end, int) and 0 <= end < config.vocab_size else None


def _images(drawn: _Drawn, length: int) -> dict[str, Tensor]:
    patches = _part(drawn.config, "num_patches", "patch_size", "num_channels")
    if patches is not None and not hasattr(patches, "image_size") and "spatial_shapes" in call_arguments(drawn.model):
        # Images of any shape, cut into patches by the processor.
        height = isqrt(patches.num_patches)
        sides = torch.tensor([height, patches.num_patches // height])
        return {
            PIXELS: drawn.numbers(height * int(sides[1]), patches.num_channels * patches.patch_size**2),
            "pixel_attention_mask": torch.ones(drawn.batch, height * int(sides[1]), dtype=torch.long),
            "spatial_shapes": sides.repeat(drawn.batch, 1),
        }
    frames = getattr(_part(drawn.config, "num_frames", "image_size"), "num_frames", None)
    return {PIXELS: drawn.numbers(*(() if frames is None else (frames,)), *image_shape(drawn.config, IMAGE_SIDE))}


def _images_in_text(drawn: _Drawn, ids: Tensor) -> dict[str, Tensor]:
    """An image for each text, and before the text the tokens in whose place it is read; nothing where the model looks
    at none, or it is not known how."""
    model = drawn.model
    token = next(iter(placeholder_tokens(drawn.config, "image")), None)
    if token is None or PIXELS not in call_arguments(model):
        return {}
    for images in _images_to_look_at(drawn):
        count = _features(model, images) // drawn.batch
        room = text_length(model, count + ids.shape[1]) - count
        if count and room > 0:
            inputs = {IDS: torch.cat([torch.full((drawn.batch, count), token), ids[:, :room]], dim=1), **images}
            if TOKEN_KINDS in call_arguments(model):  # the positions of image tokens have height and width
                inputs[TOKEN_KINDS] = (inputs[IDS] == token).long()
            return inputs
    return {}


def _images_to_look_at(drawn: _Drawn) -> Iterator[dict[str, Tensor]]:
    """One image for each sequence, in the forms in which language models take them."""
    part = _part(drawn.config, "patch_size", "temporal_patch_size", "spatial_merge_size")
    if part is not None and GRID in call_arguments(drawn.model):
        # Cut into patches by the processor; two by two of them, merged, are four tokens.
        side = 2 * part.spatial_merge_size
        channels = next(getattr(part, name) for name in CHANNELS if hasattr(part, name))
        values = channels * part.temporal_patch_size * part.patch_size**2
        yield {
            PIXELS: drawn.numbers(side**2, values).flatten(0, 1),
            GRID: torch.tensor([[1, side, side]]).repeat(drawn.batch, 1),
        }
    elif _part(drawn.config, "image_size") is not None:
        image = drawn.numbers(*image_shape(drawn.config))
        sizes = {IMAGE_SIZES: torch.tensor([image.shape[-2:]]).repeat(drawn.batch, 1)}
        # A text may have several images, or one that is cut into tiles and stands before them as a whole.
        for images in (image, *(image[:, None].repeat(1, count, 1, 1, 1) for count in (1, 2, 3))):
            yield {PIXELS: images}
            if IMAGE_SIZES in call_arguments(drawn.model):
                yield {PIXELS: images, **sizes}


def _features(model: PreTrainedModel, images: dict[str, Tensor]) -> int:
    """How many tokens are read from the images; 0 where the model does not take them so."""
    looks: Any = model if hasattr(model, "get_image_features") else model.base_model
    try:
        with torch.no_grad():
            found: Any = looks.get_image_features(**{name: value.to(model.device) for name, value in images.items()})
    except Exception:  # whatever the code of a model says that takes them otherwise
        return 0
    found = getattr(found, "pooler_output", found)
    return sum(part[..., 0].numel() for part in found if isinstance(part, Tensor))


def _spectrograms(drawn: _Drawn, length: int) -> dict[str, Tensor] | None:
    name, config = "input_features", drawn.config
    if (part := _part(config, "num_mel_bins", "max_source_positions")) is not None:
        return {name: drawn.numbers(part.num_mel_bins, 2 * part.max_source_positions)}
    if (part := _part(config, "input_feat_per_channel", "max_source_positions")) is not None:
        frames = min(length, part.max_source_positions)
        return {name: drawn.numbers(frames, part.input_feat_per_channel * part.input_channels)}
    if (part := _part(config, "feature_projection_input_dim")) is not None:
        return {name: drawn.numbers(length, part.feature_projection_input_dim)}
    return None


def _sounds(drawn: _Drawn, length: int) -> dict[str, Tensor] | None:
    name = "input_values"
    if (convolutions := _convolutions(drawn.model)) is not None:
        samples = length
        for kernel, stride in reversed(convolutions):
            samples = (samples - 1) * stride + kernel
        return {name: drawn.numbers(samples)}
    part = _part(drawn.config, "num_mel_bins", "max_length")
    return None if part is None else {name: drawn.numbers(part.max_length, part.num_mel_bins)}


def _convolutions(model: PreTrainedModel) -> list[tuple[int, int]] | None:
    """Kernel and stride of the convolutions that make frames of a waveform, first to last; None if there are none."""
    part = _part(model.config, "conv_kernel", "conv_stride")
    return None if part is None else list(zip(part.conv_kernel, part.conv_stride, strict=True))


def _part(config: PreTrainedConfig, *fields: str) -> Any:
    """The config, or else the first of its parts, that has all the fields; None if none has."""
    has_all = (part for part in _parts(config) if all(getattr(part, field, None) is not None for field in fields))
    return next(has_all, None)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from _parts(part)
