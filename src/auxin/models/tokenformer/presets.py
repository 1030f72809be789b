"""The TokenFormer sizes of the paper and of its released checkpoints, by name.

Names are the paper's labels. Two of the labels are not what the shapes give: the paper's "1.4B" has 1,309,705,728
parameters (1.31B, 6.5 % fewer) and its "757M" has 753,796,608 (0.4 % fewer). All counts include the embedding, which is
tied and padded to 50304 rows.

Models of images are named by their counts with 1000 classes and images of 224 pixels, since the paper prints counts
(109M, 407M) that none of the shapes it allows for give, and no token counts: see docs/vision.md.
"""

from typing import Any, Literal

from auxin.errors import ConfigError, PlanError, unknown_name
from auxin.models.tokenformer.configuration import PUBLISHED, TokenFormerConfig
from auxin.models.tokenformer.slots import SLOTS, ParameterTokensConfig
from auxin.models.tokenformer.vision_configuration import VISION_PUBLISHED, VisionTokenFormerConfig
from auxin.settings import Settings

Family = Literal["growth", "owt2", "pile"]


class Shape(Settings):
    """What presets of text and of images share."""

    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Number of layers."""
    num_attention_heads: int
    """Heads of the token-token attention."""
    tokens: int
    """Parameter tokens of query, key, value and output projection each; the feed-forward part has four times these."""

    def sizes(self) -> dict[str, Any]:
        """The config's fields that say it; every slot is one group, as from scratch."""
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "qkv_tokens": self.tokens,
            "proj_tokens": self.tokens,
            "ffn_tokens": 4 * self.tokens,
        }


class Preset(Shape):
    """The shape of one published model."""

    family: Family
    """"growth" (table 6 of the paper; each a growth stage of the next), "owt2" (the OpenWebText2 pair, likewise) or
    "pile" (released models of four widths: not stages of each other)."""
    context_length: int
    """Tokens per training sequence."""

    def config(self) -> TokenFormerConfig:
        """The model's config, with the released models' constants."""
        return TokenFormerConfig(**PUBLISHED, **self.sizes(), max_position_embeddings=self.context_length)


class VisionPreset(Shape):
    """The shape of one model of images."""

    patch_size: int
    """Pixels on a patch's side."""

    def config(self) -> VisionTokenFormerConfig:
        """The model's config, with the paper's constants. It is made for images of 224 pixels
        in colour of 1000 classes, as in ImageNet."""
        config = VisionTokenFormerConfig(**VISION_PUBLISHED, **self.sizes(), patch_size=self.patch_size)
        config.num_labels = 1000
        return config


def _preset(family: Family, layers: int, width: int, heads: int, tokens: int, context: int) -> Preset:
    return Preset(
        family=family,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tokens=tokens,
        context_length=context,
    )


PRESETS: dict[str, Preset] = {
    "124m": _preset("growth", 12, 768, 12, 576, 1024),
    "354m": _preset("growth", 12, 768, 12, 2140, 1024),
    "757m": _preset("growth", 12, 768, 12, 4850, 1024),
    "1.4b": _preset("growth", 12, 768, 12, 8620, 1024),
    "owt2-354m": _preset("owt2", 24, 1024, 16, 768, 1024),
    "owt2-757m": _preset("owt2", 24, 1024, 16, 1792, 1024),
    "pile-150m": _preset("pile", 12, 768, 12, 768, 2048),
    "pile-450m": _preset("pile", 24, 1024, 16, 1024, 2048),
    "pile-900m": _preset("pile", 32, 1280, 16, 1280, 2048),
    "pile-1.5b": _preset("pile", 40, 1536, 16, 1536, 2048),
}
"""Models of text."""


def _vision(layers: int, width: int, heads: int, tokens: int) -> VisionPreset:
    return VisionPreset(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, tokens=tokens, patch_size=16
    )


VISION_PRESETS: dict[str, VisionPreset] = {
    "vit-b16-86m": _vision(12, 768, 12, 576),
    "vit-b16-115m": _vision(12, 768, 12, 768),
    "vit-l16-405m": _vision(24, 1024, 16, 1024),
}
"""Models of images: one with the parameters of ViT-B/16; the paper's B/16 and L/16, whose token counts it does not
print, with as many tokens as a ViT has units."""


def find_preset(name: str) -> Preset | VisionPreset:
    """The preset called `name`, upper or lower case; ConfigError with the nearest names when there is none."""
    known: dict[str, Preset | VisionPreset] = {**PRESETS, **VISION_PRESETS}
    if name.lower() not in known:
        raise ConfigError(unknown_name("TokenFormer preset", name, known))
    return known[name.lower()]


def preset_config(name: str) -> TokenFormerConfig | VisionTokenFormerConfig:
    """A fresh config of the preset called `name`, upper or lower case.

    Raises:
        ConfigError: there is no such preset; the message lists the known ones.
    """
    return find_preset(name).config()


def check_growable(source: ParameterTokensConfig | str, target: str) -> None:
    """Check that appending parameter tokens turns a model of `source` into the preset `target`.

    What tokens don't touch may differ: vocabulary and context, size of images and classes.

    Args:
        source: the config of the model to grow, or the name of its preset.
        target: the name of the preset to grow into.

    Raises:
        PlanError: it does not; the message says why.
        ConfigError: a name is unknown.
    """
    preset, wanted = find_preset(target), preset_config(target)
    config = preset_config(source) if isinstance(source, str) else source
    label = source if isinstance(source, str) else "This model"
    if config.model_type != wanted.model_type:
        raise PlanError(
            f"{label} can't be grown into {target}: it is a {config.model_type}, and the preset is a "
            f"{wanted.model_type}. Choose one of {', '.join(_of_type(config.model_type))}, or give token counts."
        )
    fixed = ("hidden_size", "num_hidden_layers", "num_attention_heads", *_OWN_FIXED.get(config.model_type, ()))
    differing = [field for field in fixed if getattr(config, field) != getattr(wanted, field)]
    if differing:
        changes = ", ".join(f"{field} {getattr(config, field)} against {getattr(wanted, field)}" for field in differing)
        hint = (
            "The released Pile models were each trained alone and are not growth stages of one another; growth stages "
            "are 124m -> 354m -> 757m -> 1.4b and owt2-354m -> owt2-757m."
            if isinstance(preset, Preset) and preset.family == "pile"
            else "Choose a preset of the same width, depth and heads, or give token counts instead of a preset."
        )
        raise PlanError(
            f"{label} can't be grown into {target}: growth only adds parameter tokens, but {changes}. {hint}"
        )
    totals = {slot: (sum(config.group_sizes(slot)), sum(wanted.group_sizes(slot))) for slot in SLOTS}
    fewer = [f"{slot}_tokens {now} -> {then}" for slot, (now, then) in totals.items() if then < now]
    if fewer:
        raise PlanError(
            f"{label} can't be grown into {target}, which has fewer parameter tokens ({', '.join(fewer)}). "
            "Growth can't shrink a model; truncate_groups gives the smaller models inside a grown one."
        )
    if all(now == then for now, then in totals.values()):
        raise PlanError(f"{label} already has the token counts of {target}; there is nothing to grow.")


_OWN_FIXED = {VisionTokenFormerConfig.model_type: ("patch_size",)}
"""What growth leaves as it is beside width, depth and heads, and a preset says, by model type."""


def _of_type(model_type: str) -> list[str]:
    return list(VISION_PRESETS if model_type == VisionTokenFormerConfig.model_type else PRESETS)
