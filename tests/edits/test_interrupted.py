"""Whatever fails, wherever it fails: model and optimizer are as before."""

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _python_dispatch

import auxin.edits.carry
import auxin.edits.executor
import auxin.edits.fresh
import auxin.edits.module_store
import auxin.edits.probe
import auxin.edits.promise
import auxin.edits.tree
import auxin.edits.unread
import auxin.models.evaluating
import auxin.nn.autocast
from auxin.edits import NormalFill, PadParameter, Plan, SetConfig, apply, apply_to_checkpoint
from auxin.edits.kinds.edit import ArrangeLayers, ChangeArchitecture, MakeParameters, TieParameters
from auxin.methods.adapt.graft import Graft, plan_graft
from auxin.methods.grow.masked import MaskedGrowth, plan_masked
from auxin.methods.grow.tokenformer import TokenGrowth, plan_token_growth
from covering import whole
from edits.models import assert_same, everything, tiny_model
from tiny_models import inputs, labels, tiny

WATCHED = {
    str(Path(module.__file__ or "").resolve())
    for module in (
        auxin.edits.carry,
        auxin.edits.executor,
        auxin.edits.fresh,
        auxin.edits.module_store,
        auxin.edits.probe,
        auxin.edits.promise,
        auxin.edits.tree,
        auxin.edits.unread,
        auxin.models.evaluating,
        auxin.nn.autocast,
        torch.utils._python_dispatch,
    )
}
"""The files of all code that runs between the first and the last change of a model, or of torch's settings."""
SETS = (auxin.edits.probe, auxin.nn.autocast, torch.utils._python_dispatch)
"""Those that change settings of torch's."""
Line = tuple[str, int]
Moment = tuple[Line, int]
"""A line, and the how manyeth time it runs."""


class Interrupted(BaseException):
    """What is raised: nothing catches it by its class."""


class Lines:
    """Within the context, counts the lines of `WATCHED` that run, and raises `Interrupted` before that of `at`."""

    def __init__(self, at: Moment | None = None) -> None:
        self.at, self.runs, self.raised = at, dict[Line, int](), False

    def __enter__(self) -> "Lines":
        self._before, self._resolve = sys.gettrace(), auxin.edits.executor.resolve
        auxin.edits.executor.resolve = self._unwatched
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._before)
        auxin.edits.executor.resolve = self._resolve

    def _unwatched(self, *arguments: Any) -> Any:
        """Resolving changes nothing, is not watched, and would take most of the time."""
        sys.settrace(None)
        resolved = self._resolve(*arguments)
        sys.settrace(self._called)
        return resolved

    def _called(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename in WATCHED else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        if event == "line" and not self.raised:
            line = (frame.f_code.co_filename, frame.f_lineno)
            self.runs[line] = self.runs.get(line, 0) + 1
            if self.at == (line, self.runs[line]):
                self.raised = True  # what puts everything back runs undisturbed
                raise Interrupted
        return self._line


def wider() -> tuple[Any, Plan]:
    """Tokens behind the old ones, which keep their values, in a group of their own."""
    model = tiny_model(num_hidden_layers=1)
    return model, plan_token_growth(model.config, TokenGrowth(qkv_tokens=16, ffn_tokens=30))


def copied() -> tuple[Any, Plan]:
    """Values that are divided among noisy copies, so that the old ones can't be had back from the new."""
    model = tiny_model(num_hidden_layers=1)
    return model, plan_token_growth(model.config, TokenGrowth(proj_tokens=24, regime="duplicate", noise=0.1))


def deeper() -> tuple[Any, Plan]:
    """A copy of a layer and a fresh one, the first to begin with moments of its own."""
    model = tiny("llama", num_hidden_layers=1)
    edits = [ArrangeLayers(layers="model.layers", order=[0, 0, None], fresh_moments=[0])]
    return model, Plan(method="by hand", promise="none", edits=edits, notes=["Warm up."])


def tied() -> tuple[Any, Plan]:
    """A longer table of a model whose head is the table."""
    model = tiny("gpt2", tie_word_embeddings=True, num_hidden_layers=1)
    size = model.config.vocab_size + 4
    pad = PadParameter(parameter="lm_head.weight", size=size, fill=NormalFill())
    return model, Plan(method="by hand", promise="none", edits=[SetConfig(values={"vocab_size": size}), pad])


def untied_then_tied() -> tuple[Any, Plan]:
    """A parameter that is given up for another one."""
    model = tiny("gpt2", tie_word_embeddings=False, num_hidden_layers=1)
    tie = TieParameters(parameter="lm_head.weight", to="transformer.wte.weight")
    return model, Plan(method="by hand", promise="none", edits=[tie])


def grafted() -> tuple[Any, Plan]:
    """A brick beside the old module."""
    model = tiny("llama", num_hidden_layers=1)
    return model, plan_graft(model, Graft(tokens=3))


def masked() -> tuple[Any, Plan]:
    """Bricks around modules that grow."""
    model = tiny("llama", num_hidden_layers=1)
    return model, plan_masked(model, MaskedGrowth(intermediate_size=20, layers=2, hidden_size=20))


def of_another_class() -> tuple[Any, Plan]:
    """Experts in the place of a feed-forward part."""
    model = tiny("llama", attention_bias=False, mlp_bias=False, dtype=torch.float32, num_hidden_layers=1)
    values = {"num_local_experts": 2, "num_experts_per_tok": 2}
    experts = MakeParameters(module="model.layers.*.mlp", making="expert_copies", settings={"num_experts": 2})
    edits = [ChangeArchitecture(model_type="mixtral", values=values), experts]
    return model, Plan(method="by hand", promise="exact", edits=edits)


MAKERS = (wider, copied, deeper, tied, untied_then_tied, grafted, masked, of_another_class)
CASES = {make.__name__: make for make in MAKERS}


def trained(model: Any) -> torch.optim.Optimizer:
    """After a step; some modules are in evaluation mode, some parameters frozen."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()(**inputs(model), labels=labels(model)).loss.backward()
    optimizer.step()
    next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0].eval()
    next(parameter for parameter in model.parameters() if parameter.dim() == 1).requires_grad_(False)
    return optimizer


@functools.cache
def times(case: str) -> dict[Line, int]:
    """How often every line runs in a case."""
    model, plan = CASES[case]()
    optimizer = trained(model)
    with quiet(), Lines() as lines:
        apply(plan, model, optimizer)
    return lines.runs


def turns(case: str) -> Iterator[Moment]:
    """Of each line one time, in one of the cases that run it: in turn the first and the last."""
    lines: dict[Line, list[str]] = {}
    for other in CASES:
        for line in times(other):
            lines.setdefault(line, []).append(other)
    for number, (line, cases) in enumerate(sorted(lines.items())):
        if cases[number // 2 % len(cases)] == case:
            yield line, times(case)[line] if number % 2 else 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def settings() -> list[Any]:
    """What is no part of the model and must be as before too."""
    modes = [len(_python_dispatch._get_current_dispatch_mode_stack()), torch._C._len_torch_dispatch_stack()]
    flags = {name: value for name, value in vars(_python_dispatch).items() if name.startswith("_is_in_")}
    torch.autocast_increment_nesting()
    contexts = torch.autocast_decrement_nesting()
    autocast = [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda", "mps", "xpu")]
    types = [torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()]
    precisions = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    gradients = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    return [gradients, torch.get_rng_state(), modes, flags, autocast, contexts, types, precisions]


def check(case: str, tried: Iterable[Moment]) -> None:
    model, plan = CASES[case]()
    optimizer = trained(model)
    before, around, kind = everything(model, optimizer), settings(), type(model)
    for moment in tried:
        with pytest.raises(Interrupted), quiet(), Lines(moment):
            apply(plan, model, optimizer)
        try:
            assert_same(everything(model, optimizer), before)
            assert_same(settings(), around)
            assert type(model) is kind
        except (AssertionError, ValueError) as error:
            (file, line), time = moment
            raise AssertionError(f"not as before after a failure in {file}:{line}, time {time}") from error


def test_the_cases_run_what_changes_models():
    ran = {line for case in CASES for line in times(case)}
    assert {file for file, _ in ran} == WATCHED
    assert len(ran) > 400
    assert sorted(moment[0] for case in CASES for moment in turns(case)) == sorted(ran)


@pytest.mark.parametrize("case", CASES)
def test_a_failure_before_any_line_leaves_everything_as_it_was(case):
    check(case, list(turns(case)))


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=whole) for part in range(1, 12))])
def test_a_failure_while_a_folder_is_changed_leaves_torch_as_it_was(tmp_path, part):
    """At a twelfth of the lines of what a probe sets, in turn the first and the last time that one runs."""
    files = {str(Path(module.__file__ or "").resolve()) for module in SETS}
    model, plan = grafted()
    model.save_pretrained(tmp_path / "old")
    with quiet(), Lines() as lines:
        apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "new")
    runs = sorted(line for line in lines.runs if line[0] in files)
    around = settings()
    for number, line in enumerate(runs[part::12]):
        with pytest.raises(Interrupted), quiet(), Lines((line, lines.runs[line] if number % 2 else 1)):
            apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "interrupted")
        assert_same(settings(), around, f"{line[0]}:{line[1]}")
        assert not (tmp_path / "interrupted").exists()


@whole
@pytest.mark.parametrize("case", CASES)
def test_a_failure_before_any_line_in_any_case_leaves_everything_as_it_was(case):
    """The first and the last time that a line runs, in every case."""
    check(case, [(line, time) for line, runs in times(case).items() for time in sorted({1, runs})])
