"""What a checkpoint is: structure, token groups, costs, lineage; its weights are read only to score nested models."""

from pathlib import Path
from typing import cast

from auxin.accounting import Ledger, ParameterCount, count_parameters, flops_per_token
from auxin.accounting.inputs import text_length
from auxin.accounting.ledger import LEDGER_FILE
from auxin.data import PackedData
from auxin.data.tokenizer import load_tokenizer
from auxin.edits.structure import edited_skeleton
from auxin.evaluation.corpus import score_held_out
from auxin.models.loading import load_config, load_model
from auxin.models.tokenformer import TokenFormerConfig, TokenFormerForCausalLM
from auxin.models.tokenformer.configuration import SLOTS
from auxin.settings import Settings

LONGEST_SEQUENCE = 1024
"""Sequence length at which FLOPs are counted, where the model's context is not shorter."""


class TokenGroups(Settings):
    """The parameter tokens of one slot (qkv, proj or ffn), a group per growth stage."""

    slot: str
    sizes: list[int]
    tau: list[float]
    """Score scale of each group."""


class NestedModel(Settings):
    """The model of the first groups of a TokenFormer (see `truncate_groups`); nothing is promised about it."""

    num_groups: int
    parameters: int
    validation_loss: float | None = None
    """Nats per token on a held-out split, where one was given."""


class CheckpointDescription(Settings):
    """What `auxin show` tells."""

    path: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    parameters: ParameterCount
    sequence_length: int
    """At which `flops_per_token` is counted."""
    flops_per_token: float
    """Forward, with attention."""
    token_groups: list[TokenGroups] = []
    """Of a TokenFormer."""
    nested: list[NestedModel] = []
    """Of a TokenFormer: the models of its first 1, 2, ... groups, the last of which is the whole."""
    ledger: Ledger | None = None
    """The lineage, where the checkpoint carries one."""


def describe_checkpoint(folder: str | Path, corpus: PackedData | None = None) -> CheckpointDescription:
    """Describe the causal language model in `folder`.

    Args:
        folder: a checkpoint.
        corpus: with it, the nested models of a TokenFormer are scored on its held-out split; that reads the weights.

    Raises:
        CheckpointError: the folder is missing or holds no readable config or ledger.
        DataError: the corpus was prepared with another tokenizer than the checkpoint's.
    """
    folder = Path(folder)
    config = load_config(folder)
    model = edited_skeleton(config)
    length = text_length(model, LONGEST_SEQUENCE)
    groups: list[TokenGroups] = []
    nested: list[NestedModel] = []
    if isinstance(config, TokenFormerConfig):
        groups = [
            TokenGroups(slot=slot, sizes=list(config.group_sizes(slot)), tau=list(config.group_tau(slot)))
            for slot in SLOTS
        ]
        nested = _nested_models(folder, config, corpus)
    return CheckpointDescription(
        path=str(folder),
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        parameters=count_parameters(model),
        sequence_length=length,
        flops_per_token=flops_per_token(model, length).forward,
        token_groups=groups,
        nested=nested,
        ledger=Ledger.load(folder) if (folder / LEDGER_FILE).exists() else None,
    )


def _nested_models(folder: Path, config: TokenFormerConfig, corpus: PackedData | None) -> list[NestedModel]:
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
