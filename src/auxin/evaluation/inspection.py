"""What a checkpoint is, told without reading its weights: structure, token groups, costs, lineage."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from auxin.accounting import Ledger, ParameterCount, count_parameters, flops_per_token
from auxin.accounting.ledger import LEDGER_FILE
from auxin.models.loading import load_config
from auxin.models.tokenformer import TokenFormerConfig
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
    nested_parameters: list[int] = []
    """Of a TokenFormer: parameters of the model of the first 1, 2, ... groups (see `truncate_groups`)."""
    ledger: Ledger | None = None
    """The lineage, where the checkpoint carries one."""


def describe_checkpoint(folder: str | Path) -> CheckpointDescription:
    """Describe the causal language model in `folder`.

    Raises:
        CheckpointError: the folder is missing or holds no readable config or ledger.
    """
    folder = Path(folder)
    config = load_config(folder)
    model = _skeleton(config)
    length = min(LONGEST_SEQUENCE, getattr(config, "max_position_embeddings", None) or LONGEST_SEQUENCE)
    groups, nested = [], []
    if isinstance(config, TokenFormerConfig):
        groups = [
            TokenGroups(slot=slot, sizes=list(config.group_sizes(slot)), tau=list(config.group_tau(slot)))
            for slot in SLOTS
        ]
        nested = [
            count_parameters(model.truncate_groups(k)).total  # type: ignore[operator]
            for k in range(1, config.num_groups + 1)
        ]
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
        nested_parameters=nested,
        ledger=Ledger.load(folder) if (folder / LEDGER_FILE).exists() else None,
    )


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
