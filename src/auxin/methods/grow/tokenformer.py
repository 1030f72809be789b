"""Growing a TokenFormer by appending parameter tokens (arXiv 2410.23168, section 3.3), under several rules.

A rule says where new keys and new values come from and how the scores of the new tokens are scaled:

| regime | new keys | new values | scale | at growth |
|---|---|---|---|---|
| grouped (default) | random at the old keys' scale | zeros | a group with a norm of its own, sqrt(its size) | exact |
| zero_keys (the paper's proof) | zeros | random | one norm, the old tau kept | exact |
| annealed | zeros | random | as zero_keys; train with the hook `TauAnneal` | exact |
| duplicate | copies | copies; all divided | one norm, tau times sqrt(n'/n), so sqrt(n') if it was sqrt(n) | exact |
| random_keys_zero_values | random at the old keys' scale | zeros | one norm, tau = sqrt(n') | approximate |
| official (as released) | random as at initialisation | random as at initialisation | one norm, tau = sqrt(n') | none |
| padding | zeros | zeros | one norm, the old tau kept | exact, and no token is gained |

The table is of models whose scores have a norm. Where they have none (score functions "gelu" and "linear") a token has
no part in what the others weigh: scale has no effect, and whatever begins with keys or values of zero, or copies both,
is exact.

All but "grouped" enlarge the newest group of each slot; older groups stay as they are, which keeps every promise.
Copies raise the norm of a group, and the epsilon beside it is stored anew for that group. Groups of very few tokens
have norms near zero now and then, which magnify rounding: with fewer than four, "exact" becomes "approximate" and a
note says so.

"padding" makes matrices of a size that is handled faster, and nothing else. A key of zeros scores zero, which has no
part in the norm and weighs nothing; its value gets no gradient for that, and the key none because the value is zero. So
AdamW, weight decay included, leaves both at zero. Padding is of the newest group, whose stored scale stays that of the
tokens that do something. A later growth goes on behind it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, cast

from pydantic import Field
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.edits import Edit, NormalFill, PadParameter, Plan, Promise, Receipt, RepeatFill, SetConfig, ZeroFill, apply
from auxin.edits.probe import Probe
from auxin.edits.structure import config_from_values, config_values
from auxin.errors import PlanError
from auxin.models.anatomy.parts import base_prefix
from auxin.models.tokenformer.layers import SLOT_OF_MODULE, ParameterTokensModel
from auxin.models.tokenformer.presets import check_growable, preset_config
from auxin.models.tokenformer.slots import SLOTS, ParameterTokensConfig, Slot
from auxin.nn.pattention import Pattention
from auxin.nn.scores import NORMED, SCALED, ScoreFunction
from auxin.planning.hooks import Hook, HookContext, HookSettings, OldRates, Ramp
from auxin.planning.lineage import last_changes
from auxin.planning.method import Method
from auxin.settings import Settings

Regime = Literal["grouped", "zero_keys", "annealed", "duplicate", "random_keys_zero_values", "official", "padding"]
KeyRule = Literal["matched", "initial", "zeros", "copies"]
ValueRule = Literal["zeros", "initial", "copies"]
ScaleRule = Literal["own_group", "kept", "recomputed"]

REGIMES: dict[Regime, tuple[KeyRule, ValueRule, ScaleRule]] = {
    "grouped": ("matched", "zeros", "own_group"),
    "zero_keys": ("zeros", "initial", "kept"),
    "annealed": ("zeros", "initial", "kept"),
    "duplicate": ("copies", "copies", "recomputed"),
    "random_keys_zero_values": ("matched", "zeros", "recomputed"),
    "official": ("initial", "initial", "recomputed"),
    "padding": ("zeros", "zeros", "kept"),
}
"""Keys, values and scale of every regime."""


PADDED_TO = 64
"""A multiple of this are tokens padded to where no number is asked for: whole rows of vector registers and of the tiles
in which GPUs multiply."""

FEWEST_TOKENS = 4
"""In a group for which exactness is promised. Measured in float32 on three sequences of 64 tokens, 40 models each: the
largest logit moved by up to 7e-5 with one token in each group, 3e-5 with two, 7e-6 with three, 4e-6 with four to
eight; in float64 by no more than 3e-14."""


class TokenGrowth(Settings):
    """How many parameter tokens a TokenFormer shall have, and by which rule it gets them."""

    qkv_tokens: int | None = Field(default=None, gt=0)
    """Tokens of query, key and value each after the growth, all groups together; None leaves them, under the regime
    "padding" makes a multiple of 64 of them, as for the next two."""
    proj_tokens: int | None = Field(default=None, gt=0)
    """Tokens of the attention's output projection after the growth; None leaves them."""
    ffn_tokens: int | None = Field(default=None, gt=0)
    """Tokens of the feed-forward part after the growth; None leaves them."""
    regime: Regime = "grouped"
    """The rule for the new tokens."""
    keys: KeyRule | None = None
    """Overrides the regime's rule for new keys: "matched" (normal, at the root mean square of the old keys), "initial"
    (normal, as in a new model), "zeros" or "copies"."""
    values: ValueRule | None = None
    """Overrides the regime's rule for new values: "zeros", "initial" (normal, as in a new model) or "copies"."""
    scale: ScaleRule | None = None
    """Overrides the regime's scale: "own_group" (a new group with its own norm), "kept" (the newest group grows and
    keeps its tau) or "recomputed" (the newest group grows and gets tau = sqrt of its size; for copies its tau times the
    square root of the growth factor, which is the same unless the tau was another)."""
    noise: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Only for copies: noise on the divided values, relative to their root mean square. It sums to zero over the copies
    of a value, so that the function stays and the copies can part."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the new tokens' random numbers."""

    @property
    def rules(self) -> tuple[KeyRule, ValueRule, ScaleRule]:
        """Keys, values and scale, overrides applied."""
        keys, values, scale = REGIMES[self.regime]
        return self.keys or keys, self.values or values, self.scale or scale

    @property
    def pads(self) -> bool:
        """Whether the new tokens are to stay without effect."""
        return self.regime == "padding" and self.rules == REGIMES["padding"]


def token_growth_to(config: ParameterTokensConfig, preset: str, **settings: Any) -> TokenGrowth:
    """The growth that turns a model of `config` into the size of the preset called `preset`.

    Args:
        config: the model's config.
        preset: for example "757m".
        settings: further fields of `TokenGrowth`.

    Raises:
        PlanError: the preset is no growth stage of this model.
        ConfigError: there is no such preset.
    """
    _check_config(config)
    check_growable(config, preset)
    target = preset_config(preset)
    tokens = {f"{slot}_tokens": sum(target.group_sizes(slot)) for slot in SLOTS}
    return TokenGrowth.parse({**tokens, **settings})


def plan_token_growth(config: PreTrainedConfig, settings: TokenGrowth, prefix: str = "model.") -> Plan:
    """Plan the growth of a TokenFormer of `config`; weights are not needed.

    Args:
        config: the model's, of text or of images.
        settings: what to grow, and by which rule.
        prefix: what the paths of its layers begin with: "" for a model without a head.

    Raises:
        PlanError: no TokenFormer, nothing to grow, fewer tokens than there are, copies that do not come out even, or a
            mixture of rules that would damage the model; the message says what to ask for instead.
    """
    config = _check_config(config)
    grown = _grown_slots(config, settings)
    promise, notes = _check_rules(config, settings, grown), []
    if promise == "exact" and (note := _magnified_rounding(config)):
        promise, notes = "approximate", [note]
    edits: list[Edit] = [SetConfig(values=_new_config_values(config, settings, grown))]
    for module, slot in SLOT_OF_MODULE.items():
        if slot in grown:
            for name, fill in _fills(config, settings, slot).items():
                path = f"{prefix}layers.*.{module}.{name}"
                edits.append(PadParameter(parameter=path, axis=0, size=grown[slot], fill=fill))
    return Plan(
        method="tokenformer",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise=promise,
        seed=settings.seed,
        edits=edits,
        notes=notes,
        made_for=config_values(config),
    )


def grow(
    model: ParameterTokensModel,
    qkv_tokens: int | None = None,
    proj_tokens: int | None = None,
    ffn_tokens: int | None = None,
    regime: Regime = "grouped",
    optimizer: Optimizer | None = None,
    seed: int = 0,
    noise: float = 0.0,
    probe: Probe | None = None,
    keys: KeyRule | None = None,
    values: ValueRule | None = None,
    scale: ScaleRule | None = None,
) -> Receipt:
    """Append parameter tokens to `model` in place; the state of `optimizer` follows.

    Args:
        model: a TokenFormer, of text or of images.
        qkv_tokens: tokens of query, key and value each after the growth; None leaves them, as for the next two.
        proj_tokens: tokens of the output projection after the growth.
        ffn_tokens: tokens of the feed-forward part after the growth.
        regime: the rule for the new tokens, see the module's table.
        optimizer: the optimizer that trains the model, if there is one.
        seed: seed of the new tokens' random numbers.
        noise: relative noise on copied values, for the regime "duplicate".
        probe: token ids (batch, sequence) on which the promise is checked, or inputs by name; default: three random
            sequences or images.
        keys, values, scale: override those of the regime, see `TokenGrowth`.

    Returns:
        What was done, with the largest change of a logit.

    Raises:
        PlanError: the growth is impossible, see `plan_token_growth`.
        PromiseError: the function changed although the regime is exact; the model is as before.
    """
    wanted = {
        "qkv_tokens": qkv_tokens,
        "proj_tokens": proj_tokens,
        "ffn_tokens": ffn_tokens,
        "regime": regime,
        "seed": seed,
        "noise": noise,
        "keys": keys,
        "values": values,
        "scale": scale,
    }
    plan = plan_token_growth(model.config, TokenGrowth.parse(wanted), base_prefix(model))
    return apply(plan, model, optimizer, probe)


def _example(model: PreTrainedModel) -> dict[str, Any]:
    config = _check_config(model.config)
    return {f"{slot}_tokens": 2 * sum(config.group_sizes(slot)) for slot in SLOTS}


METHOD = Method(
    name="tokenformer",
    title="Append parameter tokens to a TokenFormer",
    paper="arXiv 2410.23168, section 3.3",
    intent="grow",
    settings=TokenGrowth,
    plan=lambda bench, settings: plan_token_growth(
        bench.model.config, bench.seeded(settings), base_prefix(bench.model)
    ),
    examples=_example,
    promise="exact with regimes grouped, zero_keys, annealed, duplicate; else less",
)


def _check_config(config: PreTrainedConfig) -> ParameterTokensConfig:
    if not isinstance(config, ParameterTokensConfig):
        raise PlanError(
            f"Only a TokenFormer can grow by parameter tokens, received a model of type "
            f"{getattr(config, 'model_type', type(config).__name__)!r}. The method 'graft' gives others such tokens."
        )
    return config


def _check_rules(config: ParameterTokensConfig, settings: TokenGrowth, grown: Iterable[Slot]) -> Promise:
    """What the combination of rules promises for the slots that are `grown`; PlanError for those that damage them."""
    keys, values, scale = settings.rules
    mixture = f"keys {keys!r}, values {values!r}, scale {scale!r}"
    functions = {config.slot_score_function(slot) for slot in grown}
    if reason := _harm(functions, keys, values, scale, settings.pads):
        raise PlanError(f"The mixture {mixture} is refused: {reason}")
    if settings.noise and keys != "copies":
        raise PlanError(
            f"noise = {settings.noise} has no effect on {mixture}. Leave it out, or use regime 'duplicate'."
        )
    if values == "copies":
        return "exact"
    if functions.isdisjoint(SCALED):
        return "exact" if "zeros" in (keys, values) else "none"
    if scale != "recomputed" and (scale == "kept" or values == "zeros"):
        return "exact"
    return "approximate" if values == "zeros" else "none"


def _magnified_rounding(config: ParameterTokensConfig) -> str | None:
    """Why an exact growth of a model of `config` is exact only without rounding; None where it can be promised."""
    normed = [slot for slot in SLOTS if config.slot_score_function(slot) in NORMED]
    sizes = [(slot, min(config.group_sizes(slot))) for slot in normed]
    slot, size = min(sizes, key=lambda found: found[1], default=("", FEWEST_TOKENS))
    if size >= FEWEST_TOKENS:
        return None
    return (
        f"{slot}_tokens has a group of {size}: the norm of so few scores is near zero for some inputs, where it "
        "magnifies their rounding. The growth is exact in exact arithmetic, and to 1e-12 or so in float64; in float32 "
        "logits may move by more than the executor's 1e-5."
    )


def _harm(functions: set[ScoreFunction], keys: KeyRule, values: ValueRule, scale: ScaleRule, pads: bool) -> str | None:
    """Why a mixture of rules is refused where scores become weights by `functions`, and what to do instead; None when
    it is not."""
    if keys == "zeros" and values == "zeros" and not pads:
        return (
            "with keys and values both zero, neither gets a gradient and the new tokens never wake. Make one random, "
            "or say regime 'padding' where that is what is wanted."
        )
    unscaled = functions.isdisjoint(SCALED)
    if values == "copies" and keys != "copies":
        return "copied values are divided between copies, which without copied keys are none. Use regime 'duplicate'."
    if keys == "copies" and values != "copies" and not (unscaled and values == "zeros"):
        return "copied keys keep the function only when the values are copied, too. Use regime 'duplicate'."
    if unscaled:
        return None
    if keys == "copies" and scale != "recomputed":
        return "copies raise the norm, and keep the function only when the scale is recomputed. Use regime 'duplicate'."
    if keys == "zeros" and scale == "recomputed":
        return (
            "zero keys leave the norm as it is, so a recomputed scale multiplies every old score by sqrt(n'/n) (37.5 % "
            "change of one layer's output for 1024 -> 1792 tokens). Keep the scale: regime 'zero_keys' or 'annealed'."
        )
    if keys == "zeros" and scale == "own_group":
        return (
            "a group of nothing but zero keys has a norm of zero, on which its scores and their gradients depend. "
            "Use random keys: regime 'grouped'."
        )
    if keys != "zeros" and scale == "kept":
        return (
            "random keys raise the norm that the old scores are divided by, and a kept scale does not make up for it. "
            "Recompute the scale ('random_keys_zero_values') or give the new tokens their own norm ('grouped')."
        )
    if keys == "zeros" and "softmax" in functions:
        return (
            "under the softmax score function a zero key has weight exp(0) = 1 and takes from the old tokens. "
            "Use regime 'grouped' or 'duplicate'."
        )
    return None


def _grown_slots(config: ParameterTokensConfig, settings: TokenGrowth) -> dict[Slot, int]:
    """Total tokens after the growth of each slot that grows."""
    grown: dict[Slot, int] = {}
    for slot in SLOTS:
        field, now = f"{slot}_tokens", sum(config.group_sizes(slot))
        wanted = getattr(settings, field)
        if wanted is None and settings.pads:
            wanted = math.ceil(now / PADDED_TO) * PADDED_TO
        if wanted is None or wanted == now:
            continue
        if wanted < now:
            raise PlanError(
                f"{field} = {wanted} is fewer than the {now} that the model has; growth can't shrink. Ask for more "
                f"than {now}, or use truncate_groups for the smaller models inside a grown one."
            )
        if "copies" in settings.rules:
            _check_even_copies(field, wanted, now, config.group_sizes(slot)[-1])
        grown[slot] = wanted
    if not grown:
        have = ", ".join(f"{slot}_tokens = {sum(config.group_sizes(slot))}" for slot in SLOTS)
        raise PlanError(f"There is nothing to grow: the model already has {have}. Ask for more of one of them.")
    return grown


def _check_even_copies(field: str, wanted: int, now: int, newest: int) -> None:
    if (wanted - now) % newest:
        below = now + (wanted - now) // newest * newest
        near = [total for total in (below, below + newest) if total > now]
        raise PlanError(
            f"{field} = {wanted}: copying keeps the function only when every token of the newest group ({newest} of "
            f"{now}) is copied equally often. The nearest possible totals are {' and '.join(map(str, near))}."
        )


def _new_config_values(config: ParameterTokensConfig, settings: TokenGrowth, grown: dict[Slot, int]) -> dict[str, Any]:
    """Group sizes and scales after the growth, for every slot that grows."""
    keys, _, scale = settings.rules
    values: dict[str, Any] = {}
    for slot, total in grown.items():
        sizes, tau, eps = config.group_sizes(slot), config.group_tau(slot), config.group_eps(slot)
        added = total - sum(sizes)
        if scale == "own_group":
            sizes, tau, eps = [*sizes, added], [*tau, math.sqrt(added)], [*eps, config.pattention_eps]
        else:
            sizes[-1] += added
            if scale == "recomputed":
                tau[-1] = _recomputed_tau(tau[-1], sizes[-1] - added, sizes[-1], keys)
            if keys == "copies":  # which raise the norm, beside which epsilon must stay as small as it was
                eps[-1] *= math.sqrt(sizes[-1] / (sizes[-1] - added))
        values[f"{slot}_tokens"] = sizes
        # None says "the square root of every group's size" and is left in place where it stays true.
        values[f"{slot}_tau"] = None if tau == [math.sqrt(size) for size in sizes] else tau
        if any(number != config.pattention_eps for number in eps):
            values[f"{slot}_eps"] = eps
    return values


def _recomputed_tau(tau: float, old_size: int, new_size: int, keys: KeyRule) -> float:
    """The scale of a group that grew. Copies raise the norm by sqrt(new_size / old_size) and the scale must follow from
    where it was, which after "zero_keys" is not the square root of the size."""
    if keys != "copies" or tau == math.sqrt(old_size):
        return math.sqrt(new_size)
    return tau * math.sqrt(new_size / old_size)


def _fills(config: ParameterTokensConfig, settings: TokenGrowth, slot: Slot) -> dict[str, Any]:
    """Where the new rows of keys and values come from."""
    key_rule, value_rule, _ = settings.rules
    first = sum(config.group_sizes(slot)[:-1])
    keys = {
        "matched": NormalFill(),
        "initial": NormalFill(std=config.key_std(config.slot_score_function(slot))),
        "zeros": ZeroFill(),
        "copies": RepeatFill(first=first),
    }
    values = {
        "zeros": ZeroFill(),
        "initial": NormalFill(std=config.value_std),
        "copies": RepeatFill(first=first, divide=True, noise=settings.noise),
    }
    return {"key_tokens": keys[key_rule], "value_tokens": values[value_rule]}


def _tokenformer(model: nn.Module) -> ParameterTokensModel:
    if not isinstance(model, ParameterTokensModel):
        raise PlanError(f"This hook works on a TokenFormer, received a {type(model).__name__}. Leave the hook out.")
    return model


def _token_modules(model: nn.Module) -> Iterator[tuple[str, Slot, Pattention]]:
    """Every Pattention of a TokenFormer with its path and the slot whose tokens it holds."""
    for path, module in _tokenformer(model).named_modules():
        if isinstance(module, Pattention):
            yield path, next(slot for end, slot in SLOT_OF_MODULE.items() if path.endswith(end)), module


def _hooked(config: PreTrainedConfig, hook: str) -> ParameterTokensConfig:
    """`config`, if it is a TokenFormer's; PlanError."""
    if not isinstance(config, ParameterTokensConfig):
        raise PlanError(f"{hook} is for a TokenFormer, and this is a {config.model_type}. Leave the hook out.")
    return config


def _check_scaled(config: ParameterTokensConfig) -> None:
    """Refuse a model whose scores have no scale that could move; PlanError."""
    if SCALED.isdisjoint(config.slot_score_function(slot) for slot in SLOTS):
        raise PlanError(
            "tau_anneal moves the scale of normalised scores, but this TokenFormer's scores have no norm "
            "(score_function 'gelu' or 'linear'). Leave the hook out."
        )


class TauAnnealSettings(HookSettings):
    """After a growth with the regime "annealed": the score scale goes to the grown size's."""

    kind: Literal["tau_anneal"] = "tau_anneal"
    """Says that the score scale moves."""
    steps: int = Field(ge=1)
    """Steps that it takes, from the start of the stage."""

    def check(self, config: PreTrainedConfig) -> None:
        """Only a TokenFormer whose scores have a norm has such a scale."""
        _check_scaled(_hooked(config, self.kind))

    def made(self, context: HookContext) -> Hook:
        """See `TauAnneal`."""
        return TauAnneal(self.steps)


class TauAnneal(Ramp):
    """Training hook: moves tau^2 of every group linearly from its stored value to the group's size in `steps` steps.

    For models grown with the regime "annealed": the scores of a group whose scale was kept are too small once its new
    keys are active. The value is a function of the step alone.

    Args:
        steps: optimizer steps, counted from the start of the training stage, after which tau is sqrt(size).
    """

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self._start: dict[Slot, list[float]] = {}

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Note the scales from which to start; those of a restored state take precedence. PlanError where the model's
        scores have no scale."""
        self._model = _tokenformer(model)
        _check_scaled(self._model.config)
        self._start = self._start or {slot: self._model.config.group_tau(slot) for slot in SLOTS}

    def move(self, step: int) -> None:
        """Set the scales that `step` sees; the first step sees the model as it was grown."""
        if step == 0:
            return
        done = step / self.steps
        taus: dict[Slot, list[float]] = {}
        for slot, start in self._start.items():
            sizes = self._model.config.group_sizes(slot)
            taus[slot] = [math.sqrt((1 - done) * tau**2 + done * size) for tau, size in zip(start, sizes, strict=True)]
        self._model.set_tau(**taus)

    def state_dict(self) -> dict[str, Any]:
        """The scales from which the hook started."""
        return super().state_dict() | {"start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the hook that gave `state`."""
        super().load_state_dict(state)
        self._start = state["start"]


class OldTokenRatesSettings(HookSettings):
    """A TokenFormer's tokens from before the last growth learn at another rate than the new ones."""

    kind: Literal["old_token_rates"] = "old_token_rates"
    """Says that this is the rate of old tokens."""
    ratio: float = Field(ge=0.0, le=1.0)
    """Learning rate of old tokens relative to the new ones'; 0 freezes them."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of the stage for which this holds; None: all."""

    def check(self, config: PreTrainedConfig) -> None:
        """Only a TokenFormer has such tokens."""
        _hooked(config, self.kind)

    def made(self, context: HookContext) -> Hook:
        """For the tokens before the last changes that no training lies between."""
        plans = last_changes(context.ledger, f"{context.place}: old_token_rates")
        assert plans[0].made_for is not None  # methods say what a plan is made for
        before = cast(ParameterTokensConfig, config_from_values(plans[0].made_for))
        return OldTokenRates(self.ratio, {slot: sum(before.group_sizes(slot)) for slot in SLOTS}, self.steps)


class OldTokenRates(OldRates):
    """Training hook: the rows of old tokens move by `ratio` times what the optimizer moves them, weight decay included.

    With a ratio of 0 they are frozen, bit by bit. Costs a copy of the old rows during the step.

    Args:
        ratio: 0 (frozen) to 1 (as all others).
        old_counts: number of old tokens per slot, {"qkv": ..., "proj": ..., "ffn": ...}; None means all but the newest
            group of each slot, for models whose slots grew together.
        steps: optimizer steps of the stage for which this holds; None: all.
    """

    def __init__(self, ratio: float, old_counts: Mapping[Slot, int] | None = None, steps: int | None = None) -> None:
        super().__init__(ratio, {}, steps)
        self.old_counts = None if old_counts is None else dict(old_counts)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Find the old rows; PlanError when the groups don't tell which they are."""
        counts = self._counts(_tokenformer(model).config)
        self.old_shapes = {
            f"{path}.{name}": (counts[slot], *parameter.shape[1:])
            for path, slot, module in _token_modules(model)
            if counts.get(slot)
            for name, parameter in module.named_parameters()
        }
        super().attach(model, optimizer)

    def _counts(self, config: ParameterTokensConfig) -> dict[Slot, int]:
        if self.old_counts is not None:
            for slot, count in self.old_counts.items():
                have = sum(config.group_sizes(slot)) if slot in SLOTS else 0
                if not 0 <= count <= have:
                    raise PlanError(
                        f"OldTokenRates: old_counts[{slot!r}] = {count}, but the model has {have} such tokens."
                    )
            return self.old_counts
        if config.num_groups == 1:
            raise PlanError(
                "OldTokenRates: every slot of the model is one group, so there is no telling old tokens from new ones. "
                "Give old_counts, or leave the hook out."
            )
        sizes = {slot: config.group_sizes(slot) for slot in SLOTS}
        if len({len(groups) for groups in sizes.values()}) > 1:
            listed = ", ".join(f"{slot} {len(groups)}" for slot, groups in sizes.items())
            raise PlanError(
                f"OldTokenRates: the slots have different numbers of groups ({listed}), which does not tell which of "
                "them grew last. Give old_counts, the number of old tokens of each slot."
            )
        return {slot: sum(groups[:-1]) for slot, groups in sizes.items()}

    def state_dict(self) -> dict[str, Any]:
        """Ratio, steps and counts."""
        return {**super().state_dict(), "old_counts": self.old_counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the hook that gave `state`."""
        super().load_state_dict(state)
        self.old_counts = state["old_counts"]
