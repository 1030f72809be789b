"""Random targets for every method over all architectures: each is applied or refused with a reason."""

import copy
import functools
import random
import types
import typing
from collections import Counter

import pytest
from pydantic import BaseModel

from auxin.edits import apply
from auxin.edits.resolution import resolve
from auxin.errors import AuxinError, PromiseError
from auxin.methods import methods
from auxin.models.loading import skeleton
from auxin.objectives.calibration import Calibration
from auxin.planning.bench import Bench
from capabilities import labelled
from mixtures import EXPERTS as MIXTURES
from tiny_models import FAMILIES, inputs, tiny

FEW, MANY = 40, 200
"""Targets for each method: always, and with --all."""
REALLY_APPLIED = 8
"""So many fitting plans (every third) are applied to a model with weights."""
WORDS = ["", "encoder", "decoder", "x", "model.layers", "../nothing"]


@functools.cache
def model_with_weights(family):
    return tiny(family)


@functools.cache
def model_without(family):
    model = model_with_weights(family)
    return skeleton(model.config, type(model))


def whole_number(draw, sizes):
    """A size of the model, one near it or a multiple, or any small number, also an impossible one."""
    if draw.random() < 0.5:
        size = draw.choice(sizes)
        return draw.choice([size, 2 * size, 3 * size, size + 1, size - 1, size // 2, size + size // 2, -size])
    return draw.choice([-1, 0, 1, 2, 3, 4, 5, 7, 24, 40])


def value(draw, annotation, sizes):
    """A random value of the type `annotation`, now and then of another one."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if draw.random() < 0.02:
        return draw.choice([None, "nonsense", -1, 0.5, [], {}, True])
    if origin in (typing.Union, types.UnionType):
        return value(draw, draw.choice(arguments), sizes)
    if origin is typing.Annotated:
        return value(draw, arguments[0], sizes)
    if origin is typing.Literal:
        return draw.choice(arguments)
    if origin in (list, tuple, set, frozenset):
        inner = arguments[0] if arguments else int
        if origin is tuple and Ellipsis not in arguments:
            return [value(draw, argument, sizes) for argument in arguments]
        return [value(draw, inner, sizes) for _ in range(draw.randint(0, 3))]
    if origin is dict:
        return {
            str(value(draw, arguments[0], sizes)): value(draw, arguments[1], sizes) for _ in range(draw.randint(0, 2))
        }
    if annotation in (type(None), None):
        return None
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return fields(draw, annotation, sizes)
    if annotation is bool:
        return draw.random() < 0.5
    if annotation is int:
        return whole_number(draw, sizes)
    if annotation is float:
        return draw.choice([0.0, 0.1, 0.5, 1.0, 2.0, -1.0, 1e-6, float("inf"), float("nan")])
    return draw.choice(WORDS)


def fields(draw, settings, sizes, few=False):
    """Values for some of the fields of a settings class."""
    names = list(settings.model_fields)
    count = draw.randint(1, min(len(names), 2 if few else len(names))) if names else 0
    return {name: value(draw, settings.model_fields[name].annotation, sizes) for name in draw.sample(names, count)}


def target(draw, method, model):
    """Random settings: any, few, or those of the method's example with some changed."""
    config = model.config.to_dict()
    sizes = [size for size in config.values() if isinstance(size, int) and not isinstance(size, bool) and 0 < size < 99]
    wild = fields(draw, method.settings, sizes, few=draw.random() < 0.7)
    if draw.random() < 0.5:
        try:
            return {**method.examples(model), **wild} if draw.random() < 0.9 else method.examples(model)
        except AuxinError:
            pass
    return wild


def suits(method, family):
    """Whether the method has an example for the architecture and plans it."""
    model = model_with_weights(family) if method.needs_weights else model_without(family)
    try:
        settings = method.settings.parse(method.examples(model))
        method.plan(bench(method, model, settings), settings)
    except AuxinError:
        return False
    return True


def bench(method, model, settings):
    """With data for a method that looks at some. LiGO draws whether it learns, and is refused without."""
    looks = method.calibration is not None and method.name != "ligo"
    return Bench(model, Calibration.of_batches(model, [labelled(model)]) if looks else None)


def tried(draw, method, family, counted):
    """Plan a random target, resolve the plan where it fits, and now and then apply it to a model with weights; a
    refusal's reason."""
    model = model_with_weights(family) if method.needs_weights else model_without(family)
    wanted = target(draw, method, model)
    try:
        settings = method.settings.parse(wanted)
        plan = method.plan(bench(method, model, settings), settings)
        resolve(plan.edits, model_without(family))
        counted["fits"] += 1
        if counted["fits"] % 3 == 1 and counted["applied"] < REALLY_APPLIED:
            victim = copy.deepcopy(model_with_weights(family))
            # Of a plan that takes tokens away the probe holds those that stay.
            apply(plan, victim, probe=inputs(victim) if plan.kept_tokens is None else None)
            counted["applied"] += 1
    except PromiseError as error:
        pytest.fail(f"{method.name} on {family} with {wanted} broke its promise: {error}")
    except AuxinError as error:
        counted["refused"] += 1
        return str(error)
    except Exception as error:
        raise AssertionError(f"{method.name} on {family} with {wanted} crashed: {error!r}") from error
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [FEW, pytest.param(MANY, marks=pytest.mark.whole)])
@pytest.mark.parametrize("name", methods())
def test_every_random_target_is_applied_or_refused(name, targets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # LiGO writes its operator into a folder, which is drawn too
    draw, method = random.Random(f"{name}, {targets}"), methods()[name]
    suited = [family for family in FAMILIES if suits(method, family)]
    suited = suited or [family for family in MIXTURES if suits(method, family)]
    counted = Counter()
    reasons = set()
    for _ in range(targets):
        family = draw.choice(FAMILIES if draw.random() < 0.5 else suited)
        reasons.add(tried(draw, method, family, counted))
    assert min(len(reason) for reason in reasons if reason) > 20
    assert counted["applied"]
    assert counted["refused"]
