"""Targets of attention: on which tokens each head of each layer puts its weight.

A head's map gives every query token i weights w_ij of the tokens j that it may see. The share of a target is the sum of
the weights of the tokens that it names, averaged over a sample's query tokens and then over samples. A token counts for
the first one of these that it is, so that the shares sum up to 1:

| target | tokens |
|---|---|
| special | whose id is special: `special_ids`, or those that the config names |
| first | the sample's first token, which often takes the attention that is needed nowhere (a sink) |
| current | the query token itself |
| previous | the one before it |
| other | all others |
| nothing | none: what a learned sink of the layer takes (gpt-oss), or a clipping; only of attentions that have one |

A cross-attention sees the encoder's tokens, of which none is current or previous. `uniform` has the shares of a head
that attends to all it may see alike, which is what a share is to be compared with. The entropy of a head's weights is
given relative to that of uniform attention, log n over n tokens: averaged over the query tokens that may see more than
one, 1 where there is no such token. What goes to no token has no part in it. Two numbers more tell how a head does
nothing: `silent` is the share of query tokens whose weights sum up to less than 0.001, and `apart` how far a row's
scores lie apart, the log of the largest weight over the least one that is not zero, averaged over the query tokens with
several such weights. For softmax that is the largest score minus the least (Bondarenko et al., arXiv 2306.12929: a head
that is to do nothing by a softmax needs scores that lie far apart).

Which tokens a query may see is told by the map: those to which at least one of the layer's heads gives more than zero,
as masks give exactly zero. Padding (`kept_tokens`) counts neither as query nor as key. Clark et al. (arXiv 1906.04341)
looked at BERT's heads so; VTrans (arXiv 2406.05276) reports that pruning takes those first that attend to special or
current tokens.
"""

import inspect
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.analysis.attention_maps import read_maps
from auxin.analysis.attention_shares import AttentionShares, Target, Tokens
from auxin.analysis.measurement import Batch, Measurement, Needs, Result, Table, Tap, check_mask, samples_of
from auxin.analysis.parts import StackParts, stack_parts
from auxin.analysis.run import forward_through_layers
from auxin.analysis.spread import Estimate
from auxin.errors import ConfigError, PlanError
from auxin.models.sublayers import nearest_output
from auxin.report.heat_map import Panel, Row, heat_map_svg
from auxin.settings import Settings

ENTROPY = "entropy"
SPECIAL_FIELDS = (
    "bos_token_id",
    "eos_token_id",
    "cls_token_id",
    "sep_token_id",
    "pad_token_id",
    "decoder_start_token_id",
)
"""Of a config: an id, or several."""
LISTED = 3
"""How many heads the findings name."""
MOST = 0.5
"""Share of a head's attention that is most of it."""


class HeadTargets(Settings):
    """One head."""

    shares: dict[Target, Estimate]
    """Of its attention, by target."""
    entropy: Estimate
    """Of its weights, relative to that of uniform attention: 0 where each query sees one token, 1 where all alike."""
    silent: Estimate
    """Share of the query tokens that read nothing: of less weight than 0.001 together."""
    apart: Estimate
    """The log of a row's largest weight over its least one that is not zero."""

    def share(self, *targets: Target) -> float:
        """The mean share of several targets together; one that the attention lacks has none."""
        return sum(self.shares[target].mean for target in targets if target in self.shares)


class LayerTargets(Settings):
    """One attention of a layer."""

    layer: str
    """The layer's module: "model.layers.0"."""
    module: str
    """The attention's: "model.layers.0.self_attn"."""
    heads: list[HeadTargets]
    """In the order of the queries' heads."""
    uniform: dict[Target, Estimate]
    """The shares of a head that attends to all tokens alike."""


class StackTargets(Settings):
    """The attentions of one kind in one stack of layers."""

    path: str
    """The list of layers: "model.layers"."""
    kind: Literal["attention", "cross-attention"]
    attentions: list[LayerTargets]
    """In the order in which they are run; layers without any are left out."""

    @property
    def targets(self) -> list[Target]:
        """Those that one of them has."""
        return list(dict.fromkeys(target for item in self.attentions for target in item.heads[0].shares))

    def number(self, item: LayerTargets) -> str:
        """The number of the layer that `item` belongs to."""
        return item.layer.removeprefix(f"{self.path}.")


class Targets(Result):
    """Where all heads of a model attend to."""

    special_ids: list[int]
    """The ids of tokens that count as special."""
    stacks: list[StackTargets]

    def heads(self) -> Iterator[tuple[str, HeadTargets]]:
        """All heads, each with a name: "head 3 of model.layers.0.self_attn"."""
        for stack in self.stacks:
            for item in stack.attentions:
                for number, head in enumerate(item.heads):
                    yield f"head {number} of {item.module}", head

    def tables(self) -> list[Table]:
        """A table for each kind of attention in each stack, a row for each layer, with the largest margin of a head's
        share."""
        tables = []
        for stack in self.stacks:
            targets = [target for target in stack.targets if target != "other" or "nothing" not in stack.targets]
            rows = [
                [
                    stack.number(item),
                    *(_two([head.share(target) for head in item.heads]) for target in targets),
                    _two([head.entropy.mean for head in item.heads]),
                    _widest([head.shares[target] for head in item.heads for target in head.shares]),
                ]
                for item in stack.attentions
            ]
            title = f"{stack.path}, {stack.kind}: mean of the heads, and the largest"
            tables.append(Table(title, ["layer", *targets, ENTROPY, "margin"], rows))
        return tables

    def findings(self) -> list[str]:
        """The heads that attend most to special or first tokens, and those that attend most to the current one."""
        heads = list(self.heads())
        told = []
        if not any(head.share("special") for _, head in heads):
            told.append(f"No token of the samples is special; special_ids = {self.special_ids}.")
        far = max(heads, key=lambda named: named[1].apart.mean)
        told.append(
            f"The scores of a row lie {sum(head.apart.mean for _, head in heads) / len(heads):.4g} apart on average, "
            f"the farthest in {far[0]}: {far[1].apart.mean:.4g}."
        )
        if any(head.silent.mean for _, head in heads):
            most_silent = max(heads, key=lambda named: named[1].silent.mean)
            told.append(
                f"{sum(head.silent.mean for _, head in heads) / len(heads):.2%} of the rows read nothing, most of them "
                f"in {most_silent[0]}: {most_silent[1].silent.mean:.2%}."
            )
        for words, targets in (
            ("Special and first tokens get", ("special", "first")),
            ("The current token gets", ("current",)),
        ):
            ranked = sorted(heads, key=lambda named: -named[1].share(*targets))
            most = sum(head.share(*targets) > MOST for _, head in heads)
            named = ", ".join(f"{name} ({head.share(*targets):.4f})" for name, head in ranked[:LISTED])
            told.append(f"{words} more than half of the attention of {most} of {len(heads)} heads. Most: {named}.")
        return told

    def picture(self, title: str) -> str:
        """For every target that some token is a panel: a row for each layer, a cell for each head."""
        panels = []
        for stack in self.stacks:
            count = max(len(item.heads) for item in stack.attentions)
            columns = [str(number) for number in range(count)]
            where = stack.path if stack.kind == "attention" else f"{stack.path}, {stack.kind}"
            for target in stack.targets:
                if not any(head.share(target) for item in stack.attentions for head in item.heads):
                    continue
                rows = [
                    Row(stack.number(item), [head.share(target) for head in item.heads]) for item in stack.attentions
                ]
                unit = "of the attention"
                panels.append(Panel(f"{target} ({where})", rows, columns, "head", unit, low=0.0, high=1.0))
            rows = [Row(stack.number(item), [head.entropy.mean for head in item.heads]) for item in stack.attentions]
            unit = "of that of uniform attention"
            panels.append(Panel(f"{ENTROPY} ({where})", rows, columns, "head", unit, low=0.0, high=1.0))
        note = (
            "Share of each head's attention by target, the mean over query tokens and samples, and its entropy. A "
            "token counts for the first target that it is; targets that no token is are left out."
        )
        return heat_map_svg(title, panels, note)


class AttentionTargets(Measurement[Targets]):
    """On which tokens each head puts its weight."""

    name: ClassVar[str] = "attention-targets"
    title: ClassVar[str] = "how much of each head's attention goes to special, first, current and previous tokens"
    needs: ClassVar[Needs] = "batches"
    version: ClassVar[int] = 2
    result_type: ClassVar[type[Result]] = Targets

    special_ids: list[NonNegativeInt] | None = None
    """Ids of the tokens that count as special; None: those that the config names as beginning, end, class, separator,
    padding and start of the decoder."""

    def observe(self, model: PreTrainedModel) -> "AttentionTargetsObserver":
        """An observer of all attentions of `model`.

        Raises:
            PlanError: the architecture is not known. That a model gives no attention maps shows at the first batch.
            ConfigError: a special id is none of the model's.
        """
        size = getattr(model.config.get_text_config(), "vocab_size", None)
        if beyond := [number for number in self.special_ids or () if size is not None and number >= size]:
            raise ConfigError(f"special_ids: {beyond[0]} is no token of the model, whose vocab_size is {size}.")
        ids = _named_by(model) if self.special_ids is None else sorted(set(self.special_ids))
        return AttentionTargetsObserver(model, ids)


MEASUREMENT = AttentionTargets


class AttentionTargetsObserver:
    """Runs the model with eager attention and reads one map after the other.

    Args:
        model: of a known architecture.
        special_ids: ids that count as special.

    Raises:
        PlanError: as `AttentionTargets.observe`.
    """

    def __init__(self, model: PreTrainedModel, special_ids: list[int]) -> None:
        self._model, self._special_ids = model, special_ids
        self._forward = forward_through_layers(model)
        self._stacks: list[_StackObserver] = []
        for parts in stack_parts(model):
            # A decoder's cross-attention sees the tokens of the stack before.
            encoder = self._stacks[-1] if "cross-attention" in parts.kinds and self._stacks else None
            self._stacks.append(_StackObserver(parts, special_ids, encoder))
        self.taps: list[Tap] = []

    def before(self, batch: Batch) -> None:
        """The batch is looked at when it is run."""

    def after(self, batch: Batch, output: Any) -> None:
        """Run the model on the batch.

        Raises:
            PlanError: a stack of the model gives no attention maps.
        """
        of_layer = {path: stack for stack in self._stacks for path in stack.parts.layers}
        layers = {path: layer for stack in self._stacks for path, layer in stack.parts.layers.items()}

        def read(layer: str, path: str, weights: Tensor) -> None:
            of_layer[layer].read(layer, path, weights)

        entered = []
        try:
            for stack in self._stacks:
                stack.begin(batch)
                entered.append(stack.parts.runner.register_forward_pre_hook(stack.enter, with_kwargs=True))
            with read_maps(self._model, layers, read):
                self._forward(**batch)
        finally:
            for handle in entered:
                handle.remove()
        for stack in self._stacks:
            stack.leave()

    def result(self) -> Targets:
        """The estimates of all attentions."""
        found = [kind for stack in self._stacks for kind in stack.result()]
        return Targets(special_ids=self._special_ids, stacks=found)


class _StackObserver:
    """The attentions of one stack, and what its tokens are in the batch that runs through."""

    def __init__(self, parts: StackParts, special_ids: list[int], encoder: "_StackObserver | None") -> None:
        self.parts, self.encoder = parts, encoder
        self._special_ids = special_ids
        self._batch: Batch = {}
        self._ids: Tensor | None = None
        self._found: dict[str, tuple[str, AttentionShares]] = {}
        self._heard: list[str] = []

    def begin(self, batch: Batch) -> None:
        """A batch is about to be run."""
        self._batch, self._ids, self._heard = batch, None, []

    def enter(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note the ids that the stack's model is about to read, which may be made of labels."""
        bound = inspect.signature(module.forward).bind(*arguments, **named)
        self._ids = (bound.arguments | named).get("input_ids")

    def read(self, layer: str, path: str, weights: Tensor) -> None:
        """One attention's map, (samples, heads, queries, keys)."""
        if path in self._heard:
            raise PlanError(f"{path} is run several times in one pass, so that its maps are not those of one layer.")
        self._heard.append(path)
        across = self._kind(layer, path) == "cross-attention"
        queries = self.tokens(weights.shape[2])
        keys = self.encoder.tokens(weights.shape[3]) if across and self.encoder else queries
        if len(weights) != len(keys.kept) or weights.shape[3] != keys.kept.shape[1]:
            raise PlanError(
                f"{path} gives a map of (samples, heads, queries, keys) = {tuple(weights.shape)}, but there are "
                f"{tuple(keys.kept.shape)} (samples, tokens) to look at. Measure the model before the edit that "
                "changed that; layers that make fewer keys of all tokens (SegFormer's) can't be measured so."
            )
        _, shares = self._found.setdefault(path, (layer, AttentionShares(across)))
        shares.add(weights, queries.kept, keys)

    def tokens(self, places: int) -> Tokens:
        """What the stack's places are, of which there are so many."""
        samples = samples_of(self._batch)
        kept = self.parts.kept(self._batch)
        if kept is None:
            kept = torch.ones(samples, places, dtype=torch.bool, device=self.parts.model.device)
        check_mask(kept, (samples, places))
        special = None
        if self._ids is not None and self._ids.shape == kept.shape:
            special = torch.isin(
                self._ids, torch.tensor(self._special_ids, device=self._ids.device, dtype=self._ids.dtype)
            )
        return Tokens(special, kept)

    def leave(self) -> None:
        """The batch is through.

        Raises:
            PlanError: no map was heard of.
        """
        if not self._heard:
            raise PlanError(
                f"No attention of {self.parts.stack.path} gives its map, also with eager attention "
                f"({type(self.parts.model).__name__}), so that nobody knows what it attends to."
            )
        self._batch, self._ids = {}, None

    def result(self) -> Iterator[StackTargets]:
        """The stack's parts of the result, by kind."""
        for kind in ("attention", "cross-attention"):
            found = []
            for path, (layer, shares) in self._found.items():
                if shares.across == (kind == "cross-attention"):
                    by_head, uniform = shares.estimates()
                    heads = [HeadTargets(**head._asdict()) for head in by_head]
                    found.append(LayerTargets(layer=layer, module=path, heads=heads, uniform=uniform))
            if found:
                yield StackTargets(path=self.parts.stack.path, kind=kind, attentions=found)

    def _kind(self, layer: str, path: str) -> str:
        """Of the part that the attention at `path` lies next to."""
        outputs = self.parts.stack.outputs
        near = nearest_output(path.removeprefix(f"{layer}."), outputs)
        return "attention" if near is None else self.parts.kinds[outputs.index(near)]


def _named_by(model: PreTrainedModel) -> list[int]:
    """The special ids of the model's config, and of that of its text."""
    found: set[int] = set()
    for config in (model.config, model.config.get_text_config()):
        for field in SPECIAL_FIELDS:
            value = getattr(config, field, None)
            found.update(
                number for number in (value if isinstance(value, list | tuple) else [value]) if number is not None
            )
    return sorted(found)


def _widest(shares: list[Estimate]) -> str:
    """The largest margin."""
    margins = [share.margin for share in shares if share.margin is not None]
    return f"± {max(margins):.2g}" if margins else ""


def _two(values: list[float]) -> str:
    """Their mean and the largest."""
    return f"{sum(values) / len(values):.2f} {max(values):.2f}"
