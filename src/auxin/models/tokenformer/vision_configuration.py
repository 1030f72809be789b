"""Configuration of TokenFormers for images."""

from typing import Any

from auxin.errors import ConfigError, shown
from auxin.models.tokenformer.slots import ParameterTokensConfig, check_positive_int, is_number

VISION_PUBLISHED: dict[str, Any] = {
    "score_function": "l2_norm_gelu",
    "gelu": "erf",
    "norm_parameters": False,
}
"""What the paper's image models share: the best rows of its ablations (tables 4 and 5); a new model's `score_function`
is another one (see `VisionTokenFormerConfig`)."""


class VisionTokenFormerConfig(ParameterTokensConfig):
    """Shape and constants of a TokenFormer for images: a ViT whose projections are Pattention layers (arXiv 2410.23168,
    section 4.2 and table 2).

    Patches, class token, learned positions and classifier are ViT's. A layer's two matrices of the feed-forward part
    are one Pattention. The default size is a ViT-B/16 with the parameters of the original (86.45M with 1000 classes).
    `score_function` is a new text model's by default; `VISION_PUBLISHED` and the presets have the paper's.

    What concerns layers and their parameter tokens is said by `ParameterTokensConfig`, whose fields it has as well.

    Args:
        image_size: pixels on a side, or height and width.
        patch_size: pixels on a patch's side, or height and width; must divide those of the image.
        num_channels: 3 for colour, 1 for grey.
        layer_norm_eps: epsilon of all layer norms: 1e-6, as in the training recipe that the paper takes over.
        norm_parameters: whether the norms inside the layers have gains and biases; the paper's have none. The norm
            behind the layers always has.
        hidden_dropout_prob: share of the numbers that training leaves out, behind the embeddings and behind each part
            of a layer, as in ViT.

    Raises:
        ConfigError: a value is impossible; the message names the field, the value and the mend.
    """

    model_type = "vision_tokenformer"

    qkv_tokens: int | list[int] = 576
    proj_tokens: int | list[int] = 576
    ffn_tokens: int | list[int] = 2304
    image_size: int | list[int] | tuple[int, ...] = 224
    patch_size: int | list[int] | tuple[int, ...] = 16
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    norm_parameters: bool = False
    hidden_dropout_prob: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        check_positive_int("num_channels", self.num_channels)
        for side, step in zip(
            _sides("image_size", self.image_size), _sides("patch_size", self.patch_size), strict=True
        ):
            if side % step:
                raise ConfigError(
                    f"patch_size must divide image_size, received patches of {step} pixels for a side of {side}; the "
                    "model would not see the rest. Choose one of "
                    f"{[size for size in range(1, min(side, 64) + 1) if side % size == 0]}."
                )
        if not isinstance(self.norm_parameters, bool):
            raise ConfigError(f"norm_parameters must be true or false, received {shown(self.norm_parameters)}.")
        if not is_number(self.hidden_dropout_prob) or not 0 <= self.hidden_dropout_prob < 1:
            raise ConfigError(
                f"hidden_dropout_prob must be a number of at least 0 and below 1, received "
                f"{shown(self.hidden_dropout_prob)}."
            )
        super().__post_init__(**kwargs)

    @property
    def num_patches(self) -> int:
        """Patches of an image; the layers see one token more, the class token."""
        height, width = _sides("image_size", self.image_size)
        step_down, step_right = _sides("patch_size", self.patch_size)
        return (height // step_down) * (width // step_right)

    def num_parameters(self) -> int:
        """Parameters of the classifier of `num_labels` = c classes.

        2 L d (3 n_qkv + n_proj + n_ffn) in tokens, C h w d + d for patches of C channels and h x w pixels, d for the
        class token, (patches + 1) d for positions, 2 d for the last norm, c d + c for the classifier, and 4 L d where
        the norms inside the layers have parameters.
        """
        width, classes = self.hidden_size, self.num_labels or 0
        height_of_patch, width_of_patch = _sides("patch_size", self.patch_size)
        patch = self.num_channels * height_of_patch * width_of_patch * width + width
        embeddings = patch + width + (self.num_patches + 1) * width
        norms = 2 * width + (4 * self.num_hidden_layers * width if self.norm_parameters else 0)
        return self.token_parameters + embeddings + norms + classes * (width + 1)


def _sides(field: str, value: Any) -> tuple[int, int]:
    """Height and width."""
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2:
        raise ConfigError(f"{field} must be a whole number, or height and width, received {shown(value)}.")
    for side in sides:
        check_positive_int(field, side)
    return sides[0], sides[1]
