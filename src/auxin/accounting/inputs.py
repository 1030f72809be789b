"""Inputs of the kind that a model takes, on which it is probed and counted."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


def example_inputs(
    model: PreTrainedModel, batch: int, length: int, seed: int | None = None, decoder_length: int | None = None
) -> dict[str, Tensor]:
    """Random inputs of `model` by name: token ids, those of a decoder too, or pixels.

    Args:
        model: the model, its weights are not looked at.
        batch: number of sequences or images.
        length: tokens per sequence; images have the size that the config says.
        seed: of the random numbers; None: zeros.
        decoder_length: tokens per sequence of the decoder of an encoder-decoder; None: `length`.
    """
    config = model.config
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        shape = image_shape(config)
        pixels = torch.zeros(batch, *shape) if generator is None else torch.randn(batch, *shape, generator=generator)
        return {"pixel_values": pixels}

    def ids(length: int) -> Tensor:
        shape, vocabulary = (batch, length), config.get_text_config().vocab_size
        if generator is None:
            return torch.zeros(shape, dtype=torch.long)
        return torch.randint(vocabulary, shape, generator=generator)

    inputs = {"input_ids": ids(length)}
    return inputs | ({"decoder_input_ids": ids(decoder_length or length)} if config.is_encoder_decoder else {})


def image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model of `config` takes."""
    size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
    return config.num_channels, size[0], size[1]
