"""The TokenFormer sizes of the paper and of its released checkpoints, by name.

Names are the paper's labels. Two of the labels are not what the shapes give: the paper's "1.4B" has 1,309,705,728
parameters (1.31B, 6.5 % fewer) and its "757M" has 753,796,608 (0.4 % fewer). All counts include the embedding, which is
tied and padded to 50304 rows.
"""

from typing import Literal

from auxin.errors import ConfigError, PlanError, unknown_name
from auxin.models.tokenformer.configuration import PUBLISHED, SLOTS, TokenFormerConfig
from auxin.settings import Settings

Family = Literal["growth", "owt2", "pile"]


class Preset(Settings):
    """The shape of one published model."""

    family: Family
    """"growth" (table 6 of the paper; each a growth stage of the next), "owt2" (the OpenWebText2 pair, likewise) or
    "pile" (released models of four widths: not stages of each other)."""
    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Number of layers."""
    num_attention_heads: int
    """Heads of the token-token attention."""
    tokens: int
    """Parameter tokens of query, key, value and output projection each; the feed-forward part has four times these."""
    context_length: int
    """Tokens per training sequence."""

    def config(self) -> TokenFormerConfig:
        """The model's config, with the released models' constants; every slot is one group, as from scratch."""
        return TokenFormerConfig(
            **PUBLISHED,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            qkv_tokens=self.tokens,
            proj_tokens=self.tokens,
            ffn_tokens=4 * self.tokens,
            max_position_embeddings=self.context_length,
        )


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


def find_preset(name: str) -> Preset:
    """The preset called `name`, upper or lower case; ConfigError with the nearest names when there is none."""
    preset = PRESETS.get(name.lower())
    if preset is None:
        raise ConfigError(unknown_name("TokenFormer preset", name, PRESETS))
    return preset


def preset_config(name: str) -> TokenFormerConfig:
    """A fresh config of the preset called `name`, upper or lower case.

    Raises:
        ConfigError: there is no such preset; the message lists the known ones.
    """
    return find_preset(name).config()


def check_growable(source: TokenFormerConfig | str, target: str) -> None:
    """Check that appending parameter tokens turns a model of `source` into the preset `target`.

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
    fixed = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    differing = [field for field in fixed if getattr(config, field) != getattr(wanted, field)]
    if differing:
        changes = ", ".join(f"{field} {getattr(config, field)} against {getattr(wanted, field)}" for field in differing)
        hint = (
            "The released Pile models were each trained alone and are not growth stages of one another; growth stages "
            "are 124m -> 354m -> 757m -> 1.4b and owt2-354m -> owt2-757m."
            if preset.family == "pile"
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
