"""What a model says on a probe, whatever the caller's settings, and torch's settings afterwards as before."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch
from transformers import PreTrainedModel

from auxin.accounting.inputs import (
    DECODER_IDS,
    IDS,
    example_inputs,
    main_input,
    placeholder_tokens,
    text_length,
    without_cache,
)
from auxin.edits.plan import Plan
from auxin.edits.renumbering import in_new_ids, with_kept_tokens
from auxin.errors import PlanError
from auxin.models.evaluating import evaluation_mode
from auxin.nn.autocast import autocast_switches, without_autocast
from auxin.words.paths import dotted

PROBE_SEQUENCES = 3
"""Two would hide a module that returns one tensor where a pair is unpacked."""
PROBE_LENGTH = 64

Probe = Tensor | Mapping[str, Tensor]
"""Token ids (batch, sequence) or another main input of the model, or its inputs by name."""
Outputs = dict[str, Tensor]
"""What a model says on a probe, by name."""

LOGITS = "logits"
INNER = ("hidden_state", "hidden_states", "pooler_output")
"""How names of outputs end that lie below a head."""
BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
"""What has a precision of products, each for itself: torch refuses to read its summary where a caller has set one."""


def probe_and_outputs(plan: Plan, model: PreTrainedModel, probe: Probe | None) -> tuple[Probe, Outputs]:
    """The probe, and what `model` says on it: `probe`, or by default inputs with which all parts of the model run. A
    language model that can look at images gets text alone where it doesn't take the images that are made for it.

    Raises:
        PlanError: as `probe_outputs`.
    """
    compared = plan.vocabulary if plan.kept_tokens is None else plan.kept_tokens
    if probe is not None:
        if plan.kept_tokens is not None:
            in_new_ids(_by_name(probe, model), plan.kept_tokens)  # refuses what it can't say
        return probe, probe_outputs(model, probe, compared)
    with evaluation_mode(model):
        whole = default_probe(plan, model, illustrated=True)
    try:
        return whole, probe_outputs(model, whole, compared)
    except PlanError:
        text = default_probe(plan, model)
        if text.keys() == whole.keys():
            raise
    return text, probe_outputs(model, text, compared)


def default_probe(plan: Plan, model: PreTrainedModel, illustrated: bool = False) -> dict[str, Tensor]:
    """Inputs drawn with the plan's seed, `example_inputs`: three images, recordings, or sequences of 64 token ids, of
    fewer where the model has no positions for them. One sequence for a classifier that finds its last token by the
    padding behind it and has none."""
    alone = type(model).__name__.endswith("ForSequenceClassification") and model.config.pad_token_id is None
    probe = example_inputs(
        model,
        1 if alone else PROBE_SEQUENCES,
        text_length(model, PROBE_LENGTH),
        seed=plan.seed,
        decoder_length=text_length(model, PROBE_LENGTH, decoder=True),
        vocabulary=plan.vocabulary,
        illustrated=illustrated,
    )
    return probe if plan.kept_tokens is None else with_kept_tokens(probe, plan.kept_tokens, model.config)


def probe_outputs(model: PreTrainedModel, probe: Probe, vocabulary: int | Sequence[int] | None = None) -> Outputs:
    """What `model` says on `probe` in evaluation mode, `compared_outputs`; training flags are put back.

    Under autocast or with TF32 products two exact models would differ by the rounding of the shorter type, so both are
    off here, whatever the caller's settings. What a model draws, as a masked autoencoder its masks, is drawn with the
    same seed each time.

    Args:
        model: the model.
        probe: its inputs.
        vocabulary: of logits over the vocabulary only the first so many are given, or those of these tokens; None: all.

    Raises:
        PlanError: the model does not run on the probe, or says nothing that could be compared.
    """
    inputs = _by_name(probe, model)
    extra = without_cache(model) | ({} if model.config.return_dict else {"return_dict": True})
    with evaluation_mode(model), torch.no_grad(), full_precision(), same_draws(model.device):
        try:
            outputs = compared_outputs(model(**{name: _moved(value, model) for name, value in inputs.items()}, **extra))
        except Exception as error:
            given = ", ".join(f"{name} {list(getattr(value, 'shape', []))}" for name, value in inputs.items())
            raise PlanError(
                f"{type(model).__name__} does not run on the probe ({given}): {error!r}. Give auxin.apply a probe "
                'on which it runs: probe={"name": tensor, ...}.'
            ) from error
    if not outputs:
        raise PlanError(
            f"{type(model).__name__} gives no tensor on the probe that could be compared. Give auxin.apply a probe "
            'on which it does: probe={"name": tensor, ...}.'
        )
    if vocabulary is None:
        return outputs
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    tokens = slice(vocabulary) if isinstance(vocabulary, int) else torch.tensor(vocabulary, device=model.device)
    return {
        name: value[..., tokens] if LOGITS in name and value.shape[-1] == size else value
        for name, value in outputs.items()
    }


def _by_name(probe: Probe, model: PreTrainedModel) -> dict[str, Tensor]:
    if isinstance(probe, Mapping):
        return dict(probe)
    return {main_input(model) if probe.is_floating_point() else IDS: probe}


def _moved(value: Tensor, model: PreTrainedModel) -> Tensor:
    return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)


def compared_outputs(result: Any) -> Outputs:
    """The outputs by name that make up a model's function: all floating tensors, losses left out. Where there are
    logits, hidden states and what is pooled of them are no part of it, as below a head they may have another width.

    Args:
        result: what the model returned; what lies in tuples, or in the outputs of its parts, counts where there is
            nothing else.
    """
    whole = dict(result) if isinstance(result, Mapping) else {"output": result}
    found = {name: value for name, value in whole.items() if _is_compared(value)} or dict(_inside("", whole))
    if any(LOGITS in name for name in found):
        return {name: value for name, value in found.items() if not name.endswith(INNER)}
    return found


def _is_compared(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _inside(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested mappings and tuples, named as in `text_model_output.last_hidden_state`."""
    if _is_compared(value):
        yield name, value
    elif isinstance(value, Mapping | tuple | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in items:
            yield from _inside(dotted(name, str(key)), part)


def edited_outputs(plan: Plan, model: PreTrainedModel, probe: Probe) -> Outputs:
    """The outputs after the edits, `probe_outputs`. A model with new tokens has to run on them, too.

    Args:
        plan: what was done.
        model: the edited model.
        probe: in the ids of the model before.

    Raises:
        PlanError: the edited model does not run.
    """
    if plan.kept_tokens is not None:
        probe = in_new_ids(_by_name(probe, model), plan.kept_tokens)
    try:
        outputs = probe_outputs(model, probe, plan.vocabulary)
    except PlanError as error:
        raise PlanError(
            f"The model that the plan of {plan.method} makes does not run on the probe: {error.__cause__ or error!r}. "
            "Nothing was changed. What its edits of modules put somewhere does not do what that place needs."
        ) from error
    if plan.vocabulary is not None:
        try:
            probe_outputs(model, _with_new_tokens(_by_name(probe, model), plan.vocabulary, model))
        except PlanError as error:
            raise PlanError(
                f"The model that the plan of {plan.method} makes does not run on its new tokens: "
                f"{error.__cause__ or error!r}. Nothing was changed. Something in it still has the old number of them."
            ) from error
    return outputs


def _with_new_tokens(probe: dict[str, Tensor], first: int, model: PreTrainedModel) -> dict[str, Tensor]:
    """The probe with every other token of its texts one of those from `first` on."""
    count = model.config.get_text_config().vocab_size - first
    kept = torch.tensor(placeholder_tokens(model.config), dtype=torch.long)
    for name in probe.keys() & {IDS, DECODER_IDS} if count > 0 else ():
        ids = probe[name]
        new = first + torch.arange(ids.numel(), device=ids.device).view(ids.shape) % count
        stays = torch.isin(ids, kept.to(ids.device))
        stays[..., 1::2] = True
        stays[..., -1] = True  # a text may have to end in a certain token
        probe[name] = torch.where(stays, ids, new.to(ids.dtype))
    return probe


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the context, products are computed in the type of their factors."""
    put_back = _precisions()
    try:
        for backend in BACKENDS:
            backend.fp32_precision = "ieee"
        with without_autocast():
            yield
    finally:
        put_back()


@contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Within the context, torch's own random numbers are the same each time; the caller's go on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


@contextmanager
def settings_kept() -> Iterator[None]:
    """When the context, or the function that it decorates, ends by an exception, torch has the settings again that it
    had before: all those that a probe changes for a while.

    The contexts that change them put them back, but for an interrupt between two of their own instructions.
    """
    put_back = [_draws_and_gradients(), _precisions(), autocast_switches(), _dispatch_modes()]
    try:
        yield
    except BaseException:
        for each in put_back:
            each()
        raise


def _draws_and_gradients() -> Callable[[], None]:
    """What gives torch the random states again that it has now, and says whether gradients are wanted."""
    gradients, state = torch.is_grad_enabled(), torch.get_rng_state()
    states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def put_back() -> None:
        torch.set_grad_enabled(gradients)
        torch.set_rng_state(state)
        torch.cuda.set_rng_state_all(states)

    return put_back


def _dispatch_modes() -> Callable[[], None]:
    """What takes those modes off torch's stack that are not on it now. An `__exit__` that was interrupted can't do it:
    called again, it fails at flags that it has taken already."""
    depth = len(_python_dispatch._get_current_dispatch_mode_stack())
    flags = {name: value for name, value in vars(_python_dispatch).items() if name.startswith("_is_in_")}

    def put_back() -> None:
        while len(_python_dispatch._get_current_dispatch_mode_stack()) > depth:
            _python_dispatch._pop_mode()
        vars(_python_dispatch).update(flags)
        # torch's compiler has a copy of one, in some versions.
        tell = getattr(_python_dispatch, "set_is_in_mode_without_ignore_compile_internals", None)
        if tell is not None:
            tell(flags["_is_in_any_mode_without_ignore_compile_internals"])

    return put_back


def _precisions() -> Callable[[], None]:
    """What gives products of float32 the types again that they are computed in now."""
    precisions = [backend.fp32_precision for backend in BACKENDS]

    def put_back() -> None:
        for backend, precision in zip(BACKENDS, precisions, strict=True):
            backend.fp32_precision = precision

    return put_back
