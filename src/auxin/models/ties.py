"""Which parameters of a model are one tensor: a fact of its tensors, which its config may tell wrongly.

transformers ties what class and config name (`tie_word_embeddings`), but on loading not what a checkpoint holds twice
with different values: T5 1.1, whose config always says tied, has a head of its own. A config can't say so of single
names, so that here it is marked: `untied_weights` lists the names that have tensors of their own. transformers keeps
such a value in config.json and ignores it; whether a checkpoint's tensors differ, it sees for itself.
"""

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

TIED = "tie_word_embeddings"
"""The config value by which transformers ties."""
UNTIED = "untied_weights"
"""The config value that lists the parameters which class and config tie and the tensors don't."""


def untie(model: PreTrainedModel) -> None:
    """Give every parameter that the config of `model` marks as untied a tensor of its own."""
    for name in getattr(model.config, UNTIED, None) or ():
        if name in (model.all_tied_weights_keys or {}):
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, nn.Parameter(model.get_parameter(name).detach().clone()))
            model.all_tied_weights_keys = {t: kept for t, kept in model.all_tied_weights_keys.items() if t != name}


def unmarked(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of `config` that marks nothing as untied."""
    found = copy.deepcopy(config)
    vars(found).pop(UNTIED, None)
    return found


def configs_with_ties(
    config: PreTrainedConfig, ties: Mapping[str, str], untied: Iterable[str]
) -> list[PreTrainedConfig]:
    """Configs that may tell of a model in which the names `untied` have tensors of their own, the plainest first: with
    `tie_word_embeddings` the other way, which some architectures don't obey and which is for all names or none, and
    marked.

    Args:
        config: marks nothing; stays as it is.
        ties: what class and config tie, by the name that is given up (`all_tied_weights_keys`).
        untied: names of `ties`; none where the config ties too little or marks too much.
    """
    names = sorted(set(untied))
    marked = unmarked(config)
    if names:
        setattr(marked, UNTIED, names)
        if len(names) < len(ties):
            return [marked]
    return [type(config).from_dict({**config.to_dict(), TIED: not getattr(config, TIED, False)}), marked]


def untied_on_loading(ties: Mapping[str, str], stored: Iterable[str], read: Callable[[str], Tensor]) -> list[str]:
    """The names in `ties` to which `from_pretrained` gives tensors of their own: it ties two that a checkpoint holds
    only where their values are the same.

    Args:
        ties: what class and config tie, by the name that is given up.
        stored: the names that the checkpoint holds, as they are in the model.
        read: gives the tensor of one of them.
    """
    holders = {name: name for name in stored}
    found = []
    for tied, kept in ties.items():
        if tied in holders and kept in holders:
            if not _are_equal(read(holders[tied]), read(holders[kept])):
                found.append(tied)
        elif tied in holders:
            holders[kept] = holders[tied]
        elif kept in holders:
            holders[tied] = holders[kept]
    return found


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
