"""The example for Kubernetes: its fields by the models of the API, and what its pods do, by real processes. No cluster
has had it."""

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from auxin.training import latest_checkpoint
from recipes.torchruns import (
    STAGE,
    TORCHRUN,
    free_port,
    needs_proc,
    outcome,
    run_alone,
    same_end,
    saved,
    started,
    wait_until,
    write_recipe,
)

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "kubernetes.yaml"
SERVICE, JOB = yaml.safe_load_all(EXAMPLE.read_text(encoding="utf-8"))
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
INSTALL = "kubernetes (74 MB) is not installed here: make test-kubernetes has it beside the environment"


def read(kind: str, written: dict[str, Any]) -> dict[str, Any]:
    """What the API's models understand of it; they refuse wrong types, and leave out what they don't know."""
    client = pytest.importorskip("kubernetes.client", reason=INSTALL)
    return client.ApiClient().sanitize_for_serialization(getattr(client, kind).from_dict(written))


@pytest.mark.parametrize(("kind", "written"), [("V1Service", SERVICE), ("V1Job", JOB)])
def test_the_example_is_what_the_api_knows(kind, written):
    assert read(kind, written) == written


def test_a_wrong_field_or_value_would_be_seen():
    mistyped = {**JOB, "spec": {**JOB["spec"], "completionMod": "Indexed"}}
    assert read("V1Job", mistyped) != mistyped
    with pytest.raises(ValueError, match="parallelism"):
        read("V1Job", {**JOB, "spec": {**JOB["spec"], "parallelism": "two"}})


def test_the_parts_of_the_example_fit_together():
    """Names that lead from one to the other, which no model checks; and torchrun gives up before the pod is killed."""
    assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    assert f"--master-addr={JOB['metadata']['name']}-0.{POD['subdomain']}" in CONTAINER["args"]
    assert f"--nnodes={JOB['spec']['completions']}" in CONTAINER["args"]
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"]
    assert f"--nproc-per-node={CONTAINER['resources']['limits']['nvidia.com/gpu']}" in CONTAINER["args"]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    (grace,) = [entry["value"] for entry in CONTAINER["env"] if entry["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert int(grace) < POD["terminationGracePeriodSeconds"]


def pod(number: int, port: int, places: dict[str, str]) -> subprocess.Popen[str]:
    """The container's process of that pod, with one worker, and `places` of this machine for those of the cluster."""
    own = {"NODE": str(number)}
    words = [re.sub(r"\$\((\w+)\)", lambda found: own[found[1]], word) for word in CONTAINER["args"]]
    places = {**places, "--nproc-per-node=8": "--nproc-per-node=1", "auxin-0.auxin": "127.0.0.1", "29500": str(port)}
    for name, here in places.items():
        assert any(name in word for word in words)
        words = [word.replace(name, here) for word in words]
    assert CONTAINER["command"] == ["torchrun"]
    given = {entry["name"]: entry["value"] for entry in CONTAINER["env"] if "value" in entry}
    return started([*TORCHRUN, f"--local-addr=127.0.0.{number + 1}", *words], **given)


@needs_proc
def test_a_pod_that_has_to_go_saves_and_both_go_on_to_the_same_bits(tmp_path):
    """SIGTERM reaches the second pod alone; the first one ends with it, and both are started again."""
    recipe, output = write_recipe(tmp_path), tmp_path / "run"
    alone = run_alone(recipe, tmp_path / "alone")
    places = {"/work/recipe.yaml": str(recipe), "/work/runs/recipe": str(output)}
    port = free_port()
    both = [pod(number, port, places) for number in (0, 1)]
    wait_until(lambda: saved(output, 20), *both)
    os.kill(both[1].pid, signal.SIGTERM)
    how = [outcome(one) for one in both]
    assert [one.returncode for one in how] == [1, 1], "a restart is due"
    assert "Interrupted by a signal to another process after step" in how[0].stdout
    step = int(latest_checkpoint(output / STAGE).name.removeprefix("step-"))
    assert 20 <= step < 200
    how = [outcome(one) for one in [pod(number, port, places) for number in (0, 1)]]
    assert [one.returncode for one in how] == [0, 0], how[0].stdout + how[1].stdout
    assert f"goes on from step {step} of 200" in how[0].stdout
    assert same_end(output, alone)
