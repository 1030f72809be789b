"""Several real processes that train together, beside one that trains alone."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from auxin.accounting import Ledger, training_memory
from auxin.errors import ConfigError, TrainingError
from auxin.locks import exclusive
from auxin.recipes.process_costs import Layout, converted_bytes, process_costs
from auxin.training import TrainingSettings, latest_checkpoint
from auxin.training.meeting import meet
from auxin.training.ranks import joined, speaks
from auxin.training.strategies import samples_per_pass
from training.tiny import (
    FIFTY,
    apart,
    checkpoint_bits,
    read_metrics,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenformer,
    wide_llama,
)


@pytest.mark.parametrize("strategy", ["replicated", "sharded"])
@pytest.mark.parametrize(
    ("size", "model", "changes"),
    [
        (2, "tokenformer", {}),
        (2, "tied", {"micro_batch_size": 2}),
        # Four samples in two parts: the third process has nothing to do but to take part.
        (3, "tokenformer", {"batch_size": 4}),
        # What gets a gradient in the parts of one process, and not in those of the other.
        (2, "scarce", {"batch_size": 4, "micro_batch_size": 2}),
        (2, "masked", {"objective": "masked_language", "micro_batch_size": 1}),
    ],
)
def test_processes_learn_what_one_learns(trained, strategy, size, model, changes):
    """Fifty steps in double precision: losses, norms, weights and moments, whatever a part's number of targets is."""
    settings = {**FIFTY, **changes}
    alone = trained(1, model, settings=settings)
    together = trained(size, model, settings={**settings, "strategy": strategy})
    losses, tensors = apart(alone, together)
    assert losses < 1e-10
    assert tensors < 1e-10


@pytest.mark.parametrize(
    ("size", "model", "changes"),
    [
        (2, "batch norms", {"strategy": "replicated"}),
        (3, "batch norms", {"strategy": "sharded", "batch_size": 7}),
        (2, "other batch norms", {"strategy": "replicated", "batch_size": 8, "micro_batch_size": 3}),
        (4, "other batch norms", {"strategy": "hybrid", "processes_per_copy": 2, "batch_size": 10}),
    ],
)
def test_batch_norms_look_at_the_samples_of_all(trained, size, model, changes):
    """As those of one process look at all samples of its passes, whose running means and variances it keeps."""
    one = {name: value for name, value in changes.items() if name not in ("strategy", "processes_per_copy")}
    alone = trained(1, model, settings={**FIFTY, **one})
    together = trained(size, model, settings={**FIFTY, **changes})
    losses, tensors = apart(alone, together)
    assert losses < 1e-10
    assert tensors < 1e-10


@pytest.mark.parametrize(
    ("model", "changes", "machine"),
    [
        ("tokenformer", {}, 2),
        # What gets a gradient in the parts of some processes, and not in those of others.
        ("scarce", {"micro_batch_size": 1}, 2),
        # Four processes of a machine with a copy of two each.
        ("tied", {"micro_batch_size": 2, "processes_per_copy": 2}, 4),
    ],
)
def test_a_copy_on_each_machine_learns_what_one_learns(trained, model, changes, machine):
    """Four processes, two to a machine: pieces within, copies between them."""
    settings = {**FIFTY, **changes}
    settings.pop("processes_per_copy", None)
    alone = trained(1, model, settings=settings)
    together = trained(4, model, machine=machine, settings={**FIFTY, **changes, "strategy": "hybrid"})
    losses, tensors = apart(alone, together)
    assert losses < 1e-10
    assert tensors < 1e-10
    assert Ledger.load(latest_checkpoint(together)).stages[-1].notes == ["trained by 4 processes (hybrid, 2 a copy)"]


def test_a_matrix_that_lies_by_columns_learns_the_same(trained):
    """The optimizer reads a gradient as its parameter lies in memory."""
    settings = {**FIFTY, "strategy": "replicated"}
    assert apart(trained(1, "strided", settings=settings), trained(2, "strided", settings=settings))[1] < 1e-10


def test_hooks_draw_alike(run, tmp_path):
    """Before and after a step, although the passes between draw other numbers in each process."""
    settings = {**FIFTY, "steps": 6, "strategy": "replicated"}
    assert run(tmp_path / "run", 2, model="dropout", settings=settings, drawing=True)["codes"] == [0, 0]
    drawn = [json.loads((tmp_path / f"run.{rank}.drawn").read_text()) for rank in (0, 1)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 12


def test_a_pass_has_as_many_samples_as_are_asked_for_where_each_process_has_one():
    """Ten parts of a hundred samples for ten processes stay ten parts of eleven, as one process cuts them."""
    for asked, found in ((11, 11), (12, 10), (None, 10), (3, 3)):
        assert samples_per_pass(TrainingSettings(steps=1, batch_size=100, micro_batch_size=asked), 10) == found


def test_single_precision_stays_near(trained):
    """To 1e-5, as rounding lets it."""
    alone = trained(1, "tokenformer", dtype="float32", settings=FIFTY)
    for strategy in ("replicated", "sharded"):
        together = trained(2, "tokenformer", dtype="float32", settings={**FIFTY, "strategy": strategy})
        assert apart(alone, together)[0] < 1e-5


def test_the_same_bits_every_time_and_dropout_alike_however_the_model_lies(trained, run, tmp_path):
    """Of equally many processes; the parts of a batch draw the same numbers wherever they are computed."""
    settings = {**FIFTY, "strategy": "replicated"}
    first = trained(2, "dropout", settings=settings)
    assert run(tmp_path / "again", 2, model="dropout", settings=settings)["codes"] == [0, 0]
    assert checkpoint_bits(latest_checkpoint(first)) == checkpoint_bits(latest_checkpoint(tmp_path / "again"))
    assert read_metrics(first) == read_metrics(tmp_path / "again")
    sharded = trained(2, "dropout", settings={**settings, "strategy": "sharded"})
    losses, tensors = apart(first, sharded)
    assert losses < 1e-10
    assert tensors < 1e-10
    losses = [line["loss"] for line in read_metrics(first) if "loss" in line]
    undropped = [line["loss"] for line in read_metrics(trained(1, "dropout", settings=FIFTY)) if "loss" in line]
    assert max(abs(a - b) for a, b in zip(losses, undropped, strict=True)) > 1e-3, "one process draws other numbers"


@pytest.mark.parametrize("strategy", ["replicated", "sharded"])
def test_layers_that_are_computed_again_learn_the_same_bits(trained, strategy):
    """Each part of a batch draws its numbers of dropout a second time."""
    settings = {**FIFTY, "strategy": strategy}
    plain, again = (
        trained(2, "dropout", settings={**settings, **changes}) for changes in ({}, {"activation_checkpointing": True})
    )
    assert read_metrics(plain) == read_metrics(again)
    assert checkpoint_bits(latest_checkpoint(plain)) == checkpoint_bits(latest_checkpoint(again))


@pytest.mark.parametrize("strategy", ["replicated", "sharded"])
def test_goes_on_with_another_number_of_processes(trained, run, tmp_path, strategy):
    """Stopped at step 30 of two processes, gone on with by three, and by one."""
    settings = {**FIFTY, "strategy": strategy}
    alone = trained(1, "tokenformer", settings=FIFTY)
    for size in (3, 1):
        folder = tmp_path / str(size)
        for answer in (
            run(folder, 2, model="tokenformer", settings=settings, stop_after=30),
            run(folder, size, model="tokenformer", settings=settings),
        ):
            assert not any(answer["codes"]), answer["messages"]
        assert apart(alone, folder)[0] < 1e-10
        later = "3 processes" if size == 3 else "1 process"
        later += f" ({strategy})" if size == 3 else ""
        notes = Ledger.load(latest_checkpoint(folder)).stages[-1].notes
        assert notes == [f"trained by 2 processes ({strategy})", f"trained by {later} from step 30"]


def test_copies_of_machines_go_on_as_anything_else(trained, run, tmp_path):
    """Stopped at step 30 as four processes of two machines; and begun by two in pieces."""
    alone = trained(1, "tokenformer", settings=FIFTY)
    hybrid = (4, {**FIFTY, "strategy": "hybrid"})
    others = [(2, {**FIFTY, "strategy": "sharded"}), (3, {**FIFTY, "strategy": "replicated"}), (1, FIFTY)]
    for number, courses in enumerate([[hybrid, other] for other in others] + [[others[0], hybrid]]):
        folder = tmp_path / str(number)
        for stop, (size, settings) in zip((30, None), courses, strict=True):
            answer = run(folder, size, model="tokenformer", settings=settings, stop_after=stop, machine=2)
            assert not any(answer["codes"]), answer["messages"]
        losses, tensors = apart(alone, folder)
        assert losses < 1e-10
        assert tensors < 1e-10


@pytest.mark.parametrize("strategy", ["replicated", "sharded"])
def test_stopped_and_gone_on_with_ends_in_the_same_bits(trained, run, tmp_path, strategy):
    """Of equally many processes, dropout included."""
    settings = {**FIFTY, "strategy": strategy}
    whole = trained(2, "dropout", settings=settings)
    folder = tmp_path / "run"
    for stop in (23, None):
        answer = run(folder, 2, model="dropout", settings=settings, stop_after=stop)
        assert answer["codes"] == [0, 0], answer["messages"]
    assert checkpoint_bits(latest_checkpoint(whole)) == checkpoint_bits(latest_checkpoint(folder))


@pytest.mark.parametrize("strategy", ["replicated", "sharded"])
def test_a_bad_step_is_taken_back_by_all(trained, strategy):
    """Rewinding goes back to a checkpoint in every process; they end where one ends."""
    guard = {"action": "rewind", "maximum_events": 50}
    request = {"poisoned": [5], "settings": {**FIFTY, "checkpoint_interval": 2, "guard": guard}}
    alone = trained(1, "poisoned", **request)
    assert any(line.get("event") == "rewind" for line in read_metrics(alone))
    request["settings"] = {**request["settings"], "strategy": strategy}
    together = trained(2, "poisoned", **request)
    last = [read_metrics(folder)[-1]["validation_loss"] for folder in (alone, together)]
    assert math.isclose(*last, abs_tol=1e-10)


def test_a_signal_to_one_process_stops_all_of_them_with_their_work_saved(trained, run, tmp_path):
    """Whichever it comes to; the same command goes on and ends in the same bits."""
    settings = {**FIFTY, "strategy": "replicated"}
    whole = trained(2, "dropout", settings=settings)
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        answer = run(folder, 2, model="dropout", settings=settings, struck=[rank, 17, "SIGTERM"])
        assert answer["codes"] == [130, 130], answer["messages"]
        assert "after step 18 of 50; saved in" in answer["messages"][0]
        assert run(folder, 2, model="dropout", settings=settings, struck=[rank, -5, "SIGTERM"])["codes"] == [0, 0]
        assert checkpoint_bits(latest_checkpoint(whole)) == checkpoint_bits(latest_checkpoint(folder))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("asleep", ": before_step at ranks_server.py:"),
        ("asleep afterwards", ": after_step at ranks_server.py:"),
        ("asleep with the lock", ", and does not say where: it is stopped, or lets no other thread of Python run)."),
    ],
)
def test_a_process_that_hangs_is_named(run, tmp_path, how, named):
    """By those that wait for it, with the step that it is at and the place in the code; its stack is in what it says
    itself, also where its own threads can't run."""
    settings = {**FIFTY, "strategy": "replicated"}
    answer = run(tmp_path / "run", 3, model="llama", settings=settings, struck=[2, 21, how], step_seconds=5)
    assert answer["codes"][:2] == [1, 1]
    for rank in (0, 1):
        assert answer["messages"][rank].startswith(f"TrainingError: Process {rank} of 3 waited in vain for the others")
    assert f"They wait for process 2 (at step 21{named}" in answer["messages"][0]
    hook = "after_step" if how == "asleep afterwards" else "before_step"
    assert f"in {hook}" in answer["said"][2]
    assert hook not in answer["said"][0] + answer["said"][1]
    assert latest_checkpoint(tmp_path / "run").name == "step-00000020"


def test_a_process_of_another_machine_that_says_nothing_any_more_is_taken_for_dead(run, tmp_path):
    """Though nobody can look for it there."""
    answer = run(tmp_path / "run", 2, "vanish", machines=True, step_seconds=4)
    assert answer["messages"][0].startswith("TrainingError: process 1 of 2 has died.")


def test_who_meets_in_a_store_that_others_have_met_in_meets_nobody_of_them():
    """Whatever is left in it: torchrun keeps its store when it starts the processes again."""
    store = torch.distributed.HashStore()
    store.set("here/2", "long gone")
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            parts = list(pool.map(lambda rank: meet(store, rank, 3, 60.0), range(3)))
        for rank, part in enumerate(parts):
            assert not part.check(["said"]), "nothing of an earlier attempt"
            part.set(f"said/{rank}", str(rank))
        assert all(part.check([f"said/{rank}" for rank in range(3)]) for part in parts), "they read each other"
        parts[0].set("said", "")


def test_who_does_not_come_is_named():
    """Instead of a wait without end."""
    store = torch.distributed.HashStore()
    with pytest.raises(TrainingError, match="Processes 1, 2 of 3 have not come in the time"):
        meet(store, 0, 3, 0.1)
    with pytest.raises(TrainingError, match="Process 0 has not called the others together"):
        meet(store, 1, 3, 0.1)


def test_processes_that_begin_with_other_weights_are_told_before_anything_is_written(run, tmp_path):
    """A script that forgets its seed would train copies that differ, in silence."""
    answer = run(tmp_path / "run", 3, model="llama", settings=FIFTY, differs=1)
    assert answer["codes"] == [1, 2, 1]
    assert answer["messages"][1].startswith("ConfigError: The weights of this process differ from those of process 0.")
    assert answer["messages"][0].startswith("TrainingError: process 1 of 3: The weights of this process differ")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_ends_all_of_them_and_what_was_saved_goes_on_to_the_same_bits(trained, run, tmp_path):
    """The leader's, whose writes really fail; the other, which waits for it, says the same."""
    settings = {**FIFTY, "strategy": "replicated"}
    whole = trained(2, "dropout", settings=settings)
    folder = tmp_path / "run"
    answer = run(folder, 2, model="dropout", settings=settings, struck=[0, 30, "disk full"], step_seconds=60)
    assert answer["codes"] == [1, 1], answer["messages"]
    for message in answer["messages"]:
        assert "step-00000040 could not be saved" in message
        assert "File too large" in message
    assert latest_checkpoint(folder).name == "step-00000020"
    assert run(folder, 2, model="dropout", settings=settings, struck=[0, -5, "disk full"])["codes"] == [0, 0]
    assert checkpoint_bits(latest_checkpoint(whole)) == checkpoint_bits(latest_checkpoint(folder))


def test_machines_of_unlike_sizes_are_told_before_they_wait_for_each_other(run, tmp_path):
    """Which processes have a copy between them, all have to see alike."""
    settings = {**FIFTY, "strategy": "hybrid"}
    answer = run(tmp_path / "run", 4, model="llama", settings=settings, machine=[2, 2, 1, 1])
    assert answer["codes"] == [1, 1, 2, 2]
    assert answer["messages"][2].startswith("ConfigError: The devices, or the processes of a machine (LOCAL_WORLD_SIZE")
    assert not (tmp_path / "run").exists()


def test_what_the_leader_alone_does_fails_in_all(run, tmp_path):
    """Nobody waits for a leader that has given up."""
    answer = run(tmp_path / "run", 3, "tell")
    assert answer["messages"] == ["ConfigError: the disk is full", *["TrainingError: the disk is full"] * 2]


@pytest.mark.parametrize("failing", [0, 2])
def test_what_fails_in_one_fails_in_all_and_names_it(run, tmp_path, failing):
    """Nobody waits for a process that has given up."""
    messages = run(tmp_path / "run", 3, "meet", failing=failing)["messages"]
    assert messages.pop(failing) == "ConfigError: no such file here"
    assert messages == [f"TrainingError: process {failing} of 3: no such file here"] * 2


def test_a_folder_in_use_ends_all_of_them(run, tmp_path):
    """The leader alone asks for it."""
    (tmp_path / "run").mkdir()
    with exclusive(tmp_path / "run"):
        answer = run(tmp_path / "run", 2, model="llama", settings=FIFTY, step_seconds=60)
    assert answer["codes"] == [1, 1]
    assert answer["messages"][1] == answer["messages"][0].replace("TrainingError: ", "TrainingError: process 0 of 2: ")


@pytest.mark.parametrize("strategy", ["replicated", "sharded"])
def test_a_checkpoint_that_one_can_not_read_ends_all_of_them(run, tmp_path, strategy):
    """Before the first step, and not when the others have waited for it."""
    request = {"model": "llama", "settings": {**FIFTY, "strategy": strategy}, "step_seconds": 60}
    assert run(tmp_path / "run", 2, stop_after=3, **request)["codes"] == [0, 0]
    answer = run(tmp_path / "run", 2, blind=1, **request)
    assert answer["messages"] == [
        "TrainingError: process 1 of 2: step-00000003 can't be read",
        "CheckpointError: step-00000003 can't be read",
    ]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two' and RANK '0' in the environment"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "WORLD_SIZE is '2' and RANK '2' in the environment"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "WORLD_SIZE is '2' and RANK '-1' in the environment"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "the processes can't meet"),
        *(
            ({"WORLD_SIZE": "2", "RANK": "0", "AUXIN_STEP_SECONDS": value}, f"AUXIN_STEP_SECONDS is '{value}'")
            for value in ("soon", "0", "-1", "nan", "inf")
        ),
    ],
)
def test_an_environment_that_is_wrong_is_named(monkeypatch, environment, message):
    """At once: nobody waits for processes that are not there."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), joined():
        pass


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"RANK": "1"}, True),
        ({"RANK": "1", "WORLD_SIZE": "1"}, True),  # not a process of one: it says so itself
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, False),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
    ],
)
def test_one_process_of_a_machine_speaks(monkeypatch, environment, expected):
    """One that is alone always does."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert speaks() is expected


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"settings": {**FIFTY, "batch_size": 1, "warmup_steps": 5}}, "batch_size: 1 samples can't be shared by 2"),
        (
            {"settings": {**FIFTY, "strategy": "sharded"}, "struck": [0, -5, "SIGTERM"]},
            "strategy: 'sharded' cuts parameters into pieces, and what takes part in this stage reads or changes whole "
            "ones (Struck). Set strategy: replicated.",
        ),
        (
            {"settings": {**FIFTY, "strategy": "hybrid", "processes_per_copy": 3}},
            "processes_per_copy: copies of 3 processes don't divide 2. Set a divisor of 2",
        ),
        ({"settings": {**FIFTY, "strategy": "hybrid"}, "machine": "two"}, "LOCAL_WORLD_SIZE is 'two' in the environ"),
        ({"settings": {**FIFTY, "strategy": "sharded", "compile": True}}, "compiling them was never tried"),
        (
            {"model": "batch norms", "settings": {**FIFTY, "micro_batch_size": 7}},
            "micro_batch_size: over_places is a batch norm, so that 2 processes share the samples of each forward "
            "pass, and one of a batch of 8 has 1. Leave it out.",
        ),
        (
            {"model": "batch norms", "settings": {**FIFTY, "compile": True}},
            "compile: over_places is a batch norm, which asks the other processes in the middle of a pass",
        ),
        ({"model": "factor", "settings": {**FIFTY, "strategy": "sharded"}}, "factor, which is a single number, can't"),
        (
            {"model": "strided", "settings": {**FIFTY, "strategy": "sharded"}},
            "up_proj.weight, which is not contiguous in memory, can't be cut",
        ),
    ],
)
def test_what_several_processes_can_not_do_is_refused_before_anything_is_written(run, tmp_path, request_, message):
    """By all of them, in the same words."""
    answer = run(tmp_path / "run", 2, **{"model": "llama", **request_})
    assert answer["codes"] == [2, 2]
    assert all(message in told for told in answer["messages"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize(
    ("model", "size", "group", "passes"),
    [("llama", 2, 2, 2), ("tied", 3, 3, 1), ("tokenformer", 2, 2, 1), ("llama", 4, 2, 2)],
)
def test_what_is_computed_for_several_gpus_is_what_processes_hold_and_send(
    run, tmp_path, model, size, group, passes, once
):
    """To the byte where sizes divide; where rows don't, FSDP2 fills up what goes between the processes. A step of
    several passes adds gradients up once, and gathers what is to be gathered once in it no more often."""
    strategy = "sharded" if group == size else "hybrid"
    settings = {"strategy": strategy, "gather_once": once}
    answer = run(tmp_path / "flow", size, "flow", model=model, passes=passes, settings=settings, machine=group)
    assert answer["codes"] == [0] * size, answer["messages"]
    found = json.loads((tmp_path / "flow.json").read_text())
    models = {"llama": tiny_llama, "tied": partial(tiny_gpt2, dropout=0.0), "tokenformer": tiny_tokenformer}
    costs = process_costs(models[model](), Layout(size, group, once), passes)
    assert costs.state == found["held"]
    # Of two layers, one more or less at a time is much; docs/results/process_costs.md has models of six.
    assert costs.at_once(training_memory(models[model](), 2, 16).activations) == pytest.approx(found["peak"], rel=0.15)
    gathered, added, around = (
        found["bytes"][name] for name in ("_allgather_base_", "_reduce_scatter_base_", "allreduce_")
    )
    within = (gathered + added) * (group - 1) / group
    assert costs.within == within if group == 2 else costs.within == pytest.approx(within, rel=0.05)
    copies = size // group
    assert costs.between == 2 * around * (copies - 1) / copies
    groups = 2 + 1  # both layers, and what lies outside of them
    assert found["calls"] == {
        "_allgather_base_": groups if once else passes * (2 * 2 + 1),
        "_reduce_scatter_base_": groups,
        "allreduce_": groups if copies > 1 else 0,
    }
    assert found["stepped"] == ["_fused_adamw_"]
    assert not found["sent by the optimizer"], "each process steps on its pieces"


@pytest.mark.parametrize(("strategy", "group"), [("replicated", 1), ("sharded", 2)])
def test_what_products_take_of_weights_in_bfloat16_is_held_as_computed(run, tmp_path, strategy, group):
    """Up to the backward pass; of pieces whose layers are computed again, that of what lies outside of them alone, and
    no cache keeps the rest."""
    answer = run(tmp_path / "run", 2, "converted", settings={"strategy": strategy})
    assert answer["codes"] == [0, 0], answer["messages"]
    model = wide_llama()
    matrices = 2 * sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    whole = 4 * 3 * model.lm_head.weight.numel() if group > 1 else 0  # at most, of what lies outside of the layers
    for again, held in enumerate(json.loads((tmp_path / "run.json").read_text())):
        kept = training_memory(model, 2, 16, recompute=bool(again)).activations
        converted = converted_bytes(model, Layout(2, group), bool(again))
        assert held < kept + converted + whole
        assert (converted > matrices) is (held > matrices) is (group == 1 or not again)


@pytest.mark.parametrize("model", ["scarce", "dropout"])
def test_layers_that_are_gathered_once_in_a_step_learn_the_same_bits(trained, model):
    """Weights are the same, wherever they are kept."""
    settings = {**FIFTY, "micro_batch_size": 2, "strategy": "sharded"}
    plain, once = (trained(2, model, settings={**settings, **changes}) for changes in ({}, {"gather_once": True}))
    assert read_metrics(plain) == read_metrics(once)
    assert checkpoint_bits(latest_checkpoint(plain)) == checkpoint_bits(latest_checkpoint(once))


@pytest.mark.parametrize(
    ("model", "size", "batches", "settings"),
    [
        ("tied", 2, 3, {"strategy": "replicated"}),
        ("tokenformer", 3, 4, {"strategy": "sharded"}),
        ("masked", 2, 3, {"strategy": "sharded", "objective": "masked_language"}),
        ("masked", 3, 2, {"strategy": "replicated", "objective": "masked_language"}),
        ("scarce", 4, 3, {"strategy": "hybrid", "processes_per_copy": 2}),
    ],
)
def test_processes_share_what_is_held_out_and_find_the_same_bits(run, tmp_path, model, size, batches, settings):
    """Also where some have no batch, and where the noise of a batch comes behind that of others' batches."""
    request = {"model": model, "batches": batches}
    alone = {name: value for name, value in settings.items() if name == "objective"}
    expected = measured(run, tmp_path / "alone", 1, **request, settings=alone)
    assert expected[0]["passes"] == batches
    in_step = settings["strategy"] != "replicated"
    passes = [len(range(0 if in_step else rank, batches, size)) for rank in range(size)]
    assert measured(run, tmp_path / "run", size, **request, settings=settings) == [
        {**expected[0], "passes": number} for number in passes
    ]


def test_processes_that_divide_layers_measure_every_batch_together(run, tmp_path):
    one, two = measured(run, tmp_path / "run", 2, model="tokenformer", batches=3, settings={"strategy": "tensor"})
    assert one == two
    assert one["passes"] == 3
    (alone,) = measured(run, tmp_path / "alone", 1, model="tokenformer", batches=3, settings={})
    assert float.fromhex(one["loss"]) == pytest.approx(float.fromhex(alone["loss"]), rel=1e-12)


def measured(run, folder, size: int, **request) -> list[dict]:
    """What each of so many processes finds."""
    answer = run(folder, size, "measure", **request)
    assert answer["codes"] == [0] * size, answer["messages"]
    return [json.loads(folder.with_name(f"{folder.name}.{rank}.json").read_text()) for rank in range(size)]


def test_threads_and_devices_are_left_alone():
    """One process is as it was: nothing of torch.distributed is set up."""
    assert not torch.distributed.is_initialized()
