"""What a recipe would take on several GPUs; what of it processes do is tested in tests/training/test_ranks.py."""

import json

import pytest

from auxin.cli import main
from auxin.errors import ConfigError
from auxin.recipes import load_recipe
from auxin.recipes.several_gpus import GPUS, Gpu, Shared, find_gpu, price_shared, shared_notes, shared_table

RECIPE = "tokenformer-124m-to-1.4b"


@pytest.fixture(scope="module")
def first():
    """The first training of the paper's run, on eight GPUs, by both strategies."""
    prices = price_shared(load_recipe(RECIPE), 8, GPUS["h100"])
    return [one for one in prices if one.stage == "train-124m"]


def test_copies_hold_sixteen_bytes_for_a_parameter_and_send_its_gradient_round_twice(first):
    """Weights, gradients and two moments in float32; a ring sends 2 (N - 1) / N of what is added up."""
    copies, pieces = first
    parameters = copies.state // 16
    assert copies.state == 16 * parameters
    assert 123e6 < parameters < 125e6
    assert copies.sent == 2 * 7 / 8 * 4 * parameters
    assert copies.sent_between == pieces.sent_between == 0
    assert pieces.state == pytest.approx(copies.state / 8, rel=0.01)


def test_the_time_is_that_of_the_flops_and_of_what_is_sent(first):
    """Copies send behind the backward pass, pieces beside it."""
    copies, pieces = first
    tokens = 512 * 1024
    assert copies.compute_seconds == pytest.approx(6 * 124e6 * tokens / (8 * 0.4 * 989.4e12), rel=0.2)
    assert copies.seconds == copies.compute_seconds + copies.sent / 450e9
    assert pieces.seconds == max(pieces.compute_seconds, pieces.sent / 450e9)


def test_what_fits_is_told_and_what_does_not(first):
    """By the memory of the GPU, a tenth left free."""
    table = shared_table(first, GPUS["h100"])
    assert [row[3] for row in table[1:]] == ["yes", "yes"]
    small = GPUS["a10"]
    large = [one.model_copy(update={"total": 30 * 10**9}) for one in first]
    assert [row[3] for row in shared_table(large, small)[1:]] == ["no", "no"]
    notes = shared_notes(large, 8, small)
    assert any("does not fit. Set activation_checkpointing: true, micro_batch_size lower" in line for line in notes)
    assert not any(line.startswith("Recommended") for line in notes)
    one_way = [large[0], first[1].model_copy(update={"total": 10**9})]
    last = shared_notes(one_way, 8, small)[-1]
    assert last == "Recommended: strategy: sharded. Everything fits, and by no other strategy."


def test_what_takes_least_time_of_what_fits_is_recommended(first):
    """Over all steps of all stages."""
    gpu = GPUS["h100"]
    seconds = {one.strategy: one.seconds for one in first}
    best, other = sorted(seconds, key=lambda strategy: seconds[strategy])
    last = shared_notes(first, 8, gpu)[-1]
    assert last == f"Recommended: strategy: {best}. Everything fits, in less time than by {other}."


SMALL = Gpu("H100", 60e6, 450e9)


def demo(*changes: str, gpus: int = 8, gpu: Gpu = SMALL) -> dict[str, Shared]:
    """Its first training by each strategy."""
    found = price_shared(load_recipe("demo", list(changes)), gpus, gpu)
    return {one.strategy: one for one in found if one.stage == "base"}


def test_the_largest_pass_is_the_largest_that_fits():
    """One sample more takes more than there is."""
    largest = demo()["sharded"].largest
    assert largest > 1
    for samples, fits in ((largest, True), (largest + 1, False)):
        one = demo(f"training.micro_batch_size={samples}", f"training.batch_size={8 * samples}")["sharded"]
        assert (one.total <= 0.9 * SMALL.memory) is fits


def test_layers_that_are_computed_again_take_less_memory_and_more_time():
    """A third more computing; what is sent is the same."""
    plain, again = demo(), demo("training.activation_checkpointing=true")
    for strategy, one in plain.items():
        other = again[strategy]
        assert other.activations < one.activations
        assert other.largest > one.largest
        assert other.sent == one.sent
        assert other.compute_seconds == pytest.approx(4 / 3 * one.compute_seconds)


def test_beyond_one_machine_the_network_counts():
    """Eight GPUs to a machine, each with a network card: rings go by all of them; machines that have a copy each add
    every piece up by one of them."""
    gpu = GPUS["b200"]
    found = {n: demo("training.batch_size=16", gpus=n, gpu=gpu) for n in (8, 16)}
    assert list(found[8]) == ["replicated", "sharded"]
    assert list(found[16]) == ["replicated", "sharded", "hybrid"]
    for strategy in found[8]:
        assert found[8][strategy].link_seconds == found[8][strategy].sent / gpu.link
        assert found[16][strategy].link_seconds == found[16][strategy].sent / (8 * 50e9)
    hybrid, trained = found[16]["hybrid"], found[16]["replicated"].state / 4
    assert hybrid.group == 8
    assert hybrid.state == pytest.approx(found[8]["sharded"].state)
    assert hybrid.sent_between == trained / 8, "twice half of a piece of gradients"
    within = hybrid.sent - hybrid.sent_between
    assert within == pytest.approx(found[8]["sharded"].sent)
    assert hybrid.link_seconds == within / gpu.link + hybrid.sent_between / 50e9


def test_mistakes_are_told():
    """By the field or the option."""
    with pytest.raises(ConfigError, match=r"--gpu: Unknown GPU 'h20'\. Did you mean 'h200'"):
        find_gpu("h20")
    with pytest.raises(ConfigError, match="batch_size: 16 samples can't be shared by 32 GPUs"):
        price_shared(load_recipe("demo"), 32, GPUS["h100"])


def test_the_command_line_computes_and_refuses(monkeypatch, capsys):
    """As a table and as JSON, and nothing without --dry-run."""

    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["auxin", "run", "demo", *words])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert run("--dry-run", "--gpus", "4", "--gpu", "A100") == 0
    assert "Computed, not measured: 4 x A100" in " ".join(capsys.readouterr().out.split())
    assert run("--dry-run", "--gpus", "4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["strategy"] for one in found} == {"replicated", "sharded"}
    assert run("--gpus", "4") == 2
    assert "--gpus 4 is for --dry-run" in " ".join(capsys.readouterr().err.split())
