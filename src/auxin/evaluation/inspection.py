"""What a checkpoint is: structure, token groups, costs, lineage; its weights are read only to score nested models."""

from pathlib import Path
from typing import Literal, Self, cast

from transformers import PreTrainedConfig

from auxin.accounting import Ledger, ParameterCount, count_parameters, flops_per_token
from auxin.accounting.inputs import counted_length, unit_of_cost
from auxin.accounting.ledger import LEDGER_FILE
from auxin.data.corpus import PackedData
from auxin.data.streamed_text import StreamedText
from auxin.data.tokenizer import load_tokenizer
from auxin.edits.structure import edited_skeleton
from auxin.evaluation.corpus import score_held_out
from auxin.models.loading import load_config, load_model
from auxin.models.tokenformer import TokenFormerConfig, TokenFormerForCausalLM
from auxin.models.tokenformer.configuration import SLOTS
from auxin.models.weight_files import readable_files
from auxin.settings import Settings

LONGEST_SEQUENCE = 1024
"""Sequence length at which FLOPs are counted, where the model's context is not shorter."""


class TokenGroups(Settings):
    """The parameter tokens of one slot (qkv, proj or ffn), a group per growth stage."""

    slot: str
    sizes: list[int]
    score_function: str
    """How scores become weights."""
    tau: list[float]
    """Score scale of each group; of no effect under "gelu" and "linear"."""


class NestedModel(Settings):
    """The model of the first groups of a TokenFormer (see `truncate_groups`); nothing is promised about it."""

    num_groups: int
    parameters: int
    validation_loss: float | None = None
    """Nats per token on a held-out split, where one was given."""


class Widths(Settings):
    """What the config of a model, or of a part of one, says of its size; None where it says nothing."""

    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    vocab_size: int | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        """The sizes that `config` has."""
        found = {name: getattr(config, name, None) for name in cls.model_fields}
        return cls(**{name: size for name, size in found.items() if isinstance(size, int)})

    def __str__(self) -> str:
        words = {"{} layers": self.num_hidden_layers, "hidden size {}": self.hidden_size}
        words |= {"{} heads": self.num_attention_heads, "vocabulary {:,}": self.vocab_size}
        return ", ".join(word.format(size) for word, size in words.items() if size is not None)


class CheckpointDescription(Widths):
    """What `auxin show` tells."""

    path: str
    model_type: str
    has_weights: bool = True
    """Whether the folder holds weights, and not a config alone."""
    parts: dict[str, Widths] = {}
    """Of a model whose config has configs of parts, such as `text_config`: theirs, by these names."""
    parameters: ParameterCount
    sequence_length: int
    """At which `flops_per_token` is counted."""
    flops_per_token: float
    """Forward, with attention, per `unit`."""
    unit: Literal["token", "frame", "sample"] = "token"
    """What the FLOPs are counted per; a sample is an image, a spectrogram, or a text with its image."""
    token_groups: list[TokenGroups] = []
    """Of a TokenFormer."""
    nested: list[NestedModel] = []
    """Of a TokenFormer: the models of its first 1, 2, ... groups, the last of which is the whole."""
    ledger: Ledger | None = None
    """The lineage, where the checkpoint carries one."""


def describe_checkpoint(folder: str | Path, corpus: PackedData | StreamedText | None = None) -> CheckpointDescription:
    """Describe the model in `folder`.

    Args:
        folder: a checkpoint.
        corpus: with it, the nested models of a TokenFormer are scored on its held-out split; that reads the weights.

    Raises:
        CheckpointError: the folder is missing or holds no readable config or ledger, or its weights are cut off.
        DataError: the corpus was prepared with another tokenizer than the checkpoint's.
    """
    folder = Path(folder)
    config = load_config(folder)
    model = edited_skeleton(config)
    length = counted_length(model, LONGEST_SEQUENCE)
    groups: list[TokenGroups] = []
    nested: list[NestedModel] = []
    if isinstance(config, TokenFormerConfig):
        groups = [
            TokenGroups(
                slot=slot,
                sizes=config.group_sizes(slot),
                score_function=config.slot_score_function(slot),
                tau=config.group_tau(slot),
            )
            for slot in SLOTS
        ]
        nested = _nested_models(folder, config, corpus)
    return CheckpointDescription(
        path=str(folder),
        model_type=config.model_type,
        has_weights=bool(readable_files(folder)),
        **Widths.of(config).model_dump(),
        parts={name: Widths.of(part) for name in config.sub_configs if (part := getattr(config, name, None))},
        parameters=count_parameters(model),
        sequence_length=length,
        flops_per_token=flops_per_token(model, length).forward,
        unit=unit_of_cost(model),
        token_groups=groups,
        nested=nested,
        ledger=Ledger.load(folder) if (folder / LEDGER_FILE).exists() else None,
    )


def _nested_models(
    folder: Path, config: TokenFormerConfig, corpus: PackedData | StreamedText | None
) -> list[NestedModel]:
    if corpus is None:
        model, tokenizer = cast(TokenFormerForCausalLM, edited_skeleton(config)), None
    else:
        model, tokenizer = cast(TokenFormerForCausalLM, load_model(folder)), load_tokenizer(folder)
    nested = []
    for num_groups in range(1, config.num_groups + 1):
        smaller = model.truncate_groups(num_groups)
        loss = None
        if corpus is not None and tokenizer is not None:
            loss = score_held_out(smaller, tokenizer, corpus).nats_per_token
        nested.append(
            NestedModel(num_groups=num_groups, parameters=count_parameters(smaller).total, validation_loss=loss)
        )
    return nested
