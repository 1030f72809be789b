"""Every method on every further architecture: exact to rounding or refused with the reason, and whole when saved.

`test_every_method.py` tries some architectures, one of each kind, in more ways.
"""

import copy
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from auxin.methods import methods
from auxin.models.anatomy import anatomy
from auxin.planning.pruning import Pruning
from capabilities import Result, attempt, built_in, check, check_page, probe
from outputs import output
from tiny_models import FURTHER, GROUPS, VOCABULARY, inputs, tiny

SHARE = 7
"""Methods that look at data run the model, which takes seconds, and those that prune units have all but their scores in
common: each of both is tried on so many times fewer architectures, in turn, and on the others with --all."""


def has_a_turn(name: str, family: str) -> bool:
    """Whether `make test` tries the method on this further architecture."""
    found = built_in()[name]
    if found.calibration is None and not issubclass(found.settings, Pruning):
        return True
    return (list(FURTHER).index(family) + list(built_in()).index(name)) % SHARE == 0


CASES = [
    pytest.param(name, family, marks=() if has_a_turn(name, family) else pytest.mark.whole)
    for family in FURTHER
    for name in built_in()
]
KINDS = {group.__name__: list(group.MODELS) for group in GROUPS}
LOADED = [
    *(pytest.param(families[::5], id=f"{kind}, some") for kind, families in KINDS.items()),
    *(
        pytest.param([family for family in families if family not in families[::5]], id=kind, marks=pytest.mark.whole)
        for kind, families in KINDS.items()
    ),
]
"""Families whose results are loaded again: of every kind some, all others with --all."""


@pytest.mark.parametrize("family", FURTHER)
def test_every_parameter_has_one_role_of_its_shape(family):
    model = tiny(family)
    found = anatomy(model)
    for name, parameter in model.named_parameters():
        (role,) = [role for role in found.roles if role.matches(name)]
        assert len(role.axes) == len(role.access) == parameter.dim(), name
        for size, segments, access in zip(parameter.shape, role.axes, role.access, strict=True):
            # Experts are chosen: nothing writes or reads them.
            assert (access is None) == (not segments or {segment.stream for segment in segments} == {"expert"}), name
            assert not segments or sum(segment.size for segment in segments) == size, name


@pytest.mark.parametrize(("name", "family"), CASES)
def test_the_method_is_applied_as_promised_or_refused_with_the_reason(name, family):
    """And then writes with a cache what it writes without one."""
    outcome = probe(name, family)
    check(methods()[name], outcome)
    check_page(name, family, outcome)
    if isinstance(outcome, Result) and outcome.model.can_generate():
        ids = {key: value for key, value in inputs(outcome.model).items() if not key.startswith("decoder")}
        # Whisper drops what it wrote of padding, and fails where it wrote nothing else: an id that none writes.
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": VOCABULARY}
        if "input_ids" in ids:
            settings["attention_mask"] = torch.ones_like(ids["input_ids"])  # else generate() hides whatever is token 0
        written = outcome.model.generate(**ids, use_cache=True, **settings)
        assert torch.equal(written, outcome.model.generate(**ids, use_cache=False, **settings))


NOT_LOADED_AS_SAVED = ("gpt_neo",)
"""transformers 5.23 does not make the masks of its local layers again when it loads one, changed or not."""


@pytest.mark.parametrize("families", LOADED)
def test_every_result_loads_in_a_new_process_bit_by_bit(families, tmp_path, pytestconfig):
    """In float32, as models are kept; what is plain in a process without auxin."""
    everything = pytestconfig.getoption("--all")
    cases: dict[str, dict[str, dict[str, str]]] = {"plain": {}, "replayed": {}}
    for family, (name, method) in product(families, built_in().items()):
        if family in NOT_LOADED_AS_SAVED or not (everything or has_a_turn(name, family)):
            continue
        try:
            outcome = attempt(method, tiny(family, seed=3, dtype=torch.float32))
            if not isinstance(outcome, Result):
                continue
            with torch.no_grad():
                expected = output(copy.deepcopy(outcome.model)(**inputs(outcome.model))).contiguous()
        except RuntimeError as error:
            if "multiple of 16 bytes" in str(error):
                continue  # a width that torch's product for experts does not take on a CPU
            raise
        folder = tmp_path / f"{family}-{name}"
        outcome.model.save_pretrained(folder)
        save_file({**inputs(outcome.model), "expected": expected}, folder / "probe.safetensors")
        case = {"folder": str(folder), "model_class": type(outcome.model).__name__}
        cases["plain" if outcome.is_plain else "replayed"][f"{name} on {family}"] = case
    task = tmp_path / "cases.json"
    task.write_text(json.dumps({kind: list(of_kind.values()) for kind, of_kind in cases.items()}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("reload.py")), str(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    wrong = dict(zip([*cases["plain"], *cases["replayed"]], json.loads(done.stdout), strict=True))
    assert {name: error for name, error in wrong.items() if error} == {}
