"""The script that measures on a GPU, rehearsed on the CPU: it runs from beginning to end, a part that takes too long is
cut off, and nothing of a rehearsal looks like a figure of a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import gpu_training
from gpu_parts import PARTS
from measuring import exact_clock, median_seconds
from products import Products


def test_a_rehearsal_runs_every_part_and_is_not_taken_for_a_gpu(tmp_path, monkeypatch):
    def here(part, rows, options):
        """Spares starting an interpreter for each part."""
        code = gpu.take(part, rows, options.quick, options.seed)
        return subprocess.Popen(["sh", "-c", f"exit {code}"], start_new_session=True)

    start = gpu.start
    monkeypatch.setattr(gpu, "start", lambda part, *rest: (start if part == "pattention" else here)(part, *rest))
    assert gpu.main(["--quick", "--output", str(tmp_path), "--seconds", "1e6"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-quick.json", "gpu-quick.md"]
    results = json.loads((tmp_path / "gpu-quick.json").read_text())
    assert results["quick"] is True
    assert set(results["parts"]) == set(PARTS) == set(gpu.SECONDS)
    for part in results["parts"].values():
        assert (part["ended"], part["device"], part["quick"]) == ("done", "cpu", True)
        assert "--quick" in part["command"]
        assert part["rows"]
    page = (tmp_path / "gpu-quick.md").read_text()
    assert page.startswith("# A rehearsal on a CPU\n\n**Nothing here is a figure of a GPU")
    training = results["parts"]["training"]["rows"]
    assert [row["kind"] for row in training] == ["eager", "compiled"]
    for row in training:
        assert row["precision"] == "bfloat16"
        assert row["mfu"] is row["peak_bytes"] is None
        assert row["products_alone"] > 0
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(row["batch"] * row["context"])
    if not torch.cuda.is_available():
        assert {row["outcome"] for row in results["parts"]["tests"]["rows"]} == {"skipped"}
        assert {row["message"] for row in results["parts"]["tests"]["rows"]} == {"needs a CUDA device"}
    names = {(row["kind"], row["name"]) for row in results["parts"]["pattention"]["rows"]}
    assert {("eager", "gemms only"), ("compiled", "pattention, 1 group")} <= names
    assert all("products_alone" in row for row in results["parts"]["altup"]["rows"])


def test_a_part_without_time_is_cut_off_and_says_so_and_others_stay(tmp_path):
    kept = {
        "ended": "done",
        "seconds": 1.0,
        "rows": [{"test": "a.b", "outcome": "passed", "seconds": 1, "message": ""}],
    }
    (tmp_path / "gpu-quick.json").write_text(json.dumps({"quick": True, "parts": {"tests": kept}}))
    options = ["--quick", "--output", str(tmp_path), "--seconds", "0", "--parts", "altup"]
    assert gpu.main(options) == 1
    parts = json.loads((tmp_path / "gpu-quick.json").read_text())["parts"]
    assert parts["tests"] == kept
    assert parts["altup"]["ended"] == "cut off after 0 s"
    page = (tmp_path / "gpu-quick.md").read_text()
    assert "The part: cut off after 0 s" in page
    assert "1 passed, 0 failed, 0 skipped." in page
    assert page.count("Not run.") == 2


def test_a_run_that_is_interrupted_ends_what_it_has_started_and_leaves_what_there_is(tmp_path, monkeypatch, capsys):
    started = []

    def start(part, rows, options):
        rows.write_text('{"rows": [], "failed": "not yet"}')
        started.append(subprocess.Popen(["sleep", "1000"], start_new_session=True))
        return started[-1]

    def ended(process, seconds):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(gpu, "start", start)
    monkeypatch.setattr(gpu, "ended", ended)
    assert gpu.main(["--quick", "--output", str(tmp_path)]) == 128 + signal.SIGTERM
    assert "Ended by SIGTERM" in capsys.readouterr().err
    assert [process.poll() for process in started] == [-signal.SIGTERM]
    parts = json.loads((tmp_path / "gpu-quick.json").read_text())["parts"]
    assert {name: (part["ended"], part["failed"]) for name, part in parts.items()} == {
        "tests": ("interrupted", "not yet")
    }


def test_what_is_in_the_way_is_named_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "start", lambda *_: pytest.fail("something was measured"))
    (tmp_path / "file").write_text("")
    assert gpu.main(["--quick", "--output", str(tmp_path / "file")]) == 2
    assert "file is a file" in capsys.readouterr().err
    for content in ("{", "[]", '{"parts": 1}'):
        (tmp_path / "gpu-quick.json").write_text(content)
        assert gpu.main(["--quick", "--output", str(tmp_path)]) == 2
        assert "gpu-quick.json holds no results of this script" in capsys.readouterr().err
        assert (tmp_path / "gpu-quick.json").read_text() == content
    for seconds in ("-1", "nan", "inf"):
        with pytest.raises(SystemExit):
            gpu.main(["--quick", "--output", str(tmp_path), "--seconds", seconds])
        assert "--seconds" in capsys.readouterr().err


def test_what_a_part_had_found_is_kept_when_it_is_cut_off_with_all_that_it_started(tmp_path, monkeypatch):
    rows, child = tmp_path / "rows.json", tmp_path / "child"
    # Ignores the request to end, and has a child that would outlive it.
    script = f"trap '' TERM; sleep 1000 & echo $! > {child}; echo '{{\"rows\": [1]}}' > {rows}; wait; sleep 1000"
    process = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    while not rows.exists() or not rows.read_text():
        time.sleep(0.01)
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    assert gpu.ended(process, 0).startswith("cut off")
    gpu.stop(process)
    assert gpu.found_in(rows) == {"rows": [1]}
    number = int(child.read_text())
    while Path(f"/proc/{number}").exists() and "Z" not in Path(f"/proc/{number}/stat").read_text().split():
        time.sleep(0.01)


def test_a_part_that_fails_says_why(tmp_path, monkeypatch):
    def broken(device, quick, seed):
        yield {"test": 1}
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(PARTS, "altup", broken)
    assert gpu.take("altup", tmp_path / "rows.json", quick=True, seed=0) == 1
    found = gpu.found_in(tmp_path / "rows.json")
    assert (found["rows"], found["failed"]) == ([{"test": 1}], "RuntimeError: no such kernel")
    part = {**found, "rows": [], "seconds": 1.0}
    for how, said in (("ended with code 1", True), ("cut off after 9 s", False)):
        page = gpu.page_of({"quick": False, "parts": {"altup": {**part, "ended": how}}})
        assert ("It failed: RuntimeError: no such kernel" in page) is said


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_needs_a_place_of_its_own(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--quick"])
    assert "Give --output FOLDER" in capsys.readouterr().err


def test_together_the_parts_take_less_than_eight_minutes():
    assert sum(gpu.SECONDS.values()) <= 8 * 60 - 4 * gpu.GRACE
    assert gpu.parse(["--parts", "altup", "tests"]).parts == ["tests", "altup"]


def test_a_batch_that_has_no_room_is_halved_and_the_row_says_so(monkeypatch):
    tried = []

    def row(one, batch, compiled, device, steps, seed):
        tried.append(batch)
        if batch > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"batch": batch, "step_seconds": 2.0}

    monkeypatch.setattr(gpu_training, "training_row", row)
    monkeypatch.setattr(gpu_training, "products_alone", lambda one, batch, device: 0.5)
    alone: dict[int, float] = {}
    found = gpu_training.fitting_row(gpu_training.MODELS[0], False, "cpu", 3, 0, alone)
    assert tried == [64, 32, 16]
    assert found == {"batch": 16, "step_seconds": 2.0, "products_alone": 0.25, "out_of_memory_at": [64, 32]}
    assert alone == {16: 0.5}


def test_trainings_have_the_recipe_s_settings_and_one_pass_for_each_step():
    settings = gpu_training.settings_of(64, 25, True, "cpu")
    assert (settings.precision, settings.compile, settings.adam_betas) == ("bfloat16", True, (0.9, 0.95))
    assert settings.samples_per_forward == settings.batch_size == 64


def test_a_gpu_s_time_is_that_between_its_own_events(monkeypatch):
    """Of a GPU that is none: an event is done when it is waited for, and each comes 2 ms behind the one before."""
    queued, done = [], set()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queued.append(self)

        def synchronize(self):
            done.update(queued[: queued.index(self) + 1])

        def elapsed_time(self, later):
            assert {self, later} <= done
            return 2.0 * (queued.index(later) - queued.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queued.append("wait"))
    assert median_seconds(lambda: queued.append("work"), "cuda", rounds=3) == pytest.approx(4e-3)
    assert [one if isinstance(one, str) else "event" for one in queued[-4:]] == ["wait", "event", "work", "event"]
    assert queued.count("work") == 6
    clock = exact_clock("cuda")[1]
    start, middle, end = clock(), clock(), clock()
    assert (middle - start, end - start) == pytest.approx((2e-3, 4e-3))


def test_the_products_of_two_linear_layers_are_six():
    rows, width, inner = 5, 3, 7
    x = torch.randn(rows, width, requires_grad=True)
    up, down = torch.nn.Linear(width, inner, bias=False), torch.nn.Linear(inner, width, bias=True)
    products = Products.of(lambda: down(torch.relu(up(x))).sum().backward())
    assert products.kinds.total() == 6
    assert products.flops == 6 * 2 * rows * width * inner
    assert products.seconds("cpu") > 0


def test_a_tokenformer_s_products_are_its_tokens_and_its_head():
    one = gpu_training.TINY[0]
    model, config = one.kind(one.config()), one.config()
    ids = torch.zeros(2, 16, dtype=torch.long)
    products = Products.of(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())
    tokens = 4 * 8 + 32
    weights = config.num_hidden_layers * 2 * tokens * config.hidden_size + config.vocab_size * config.hidden_size
    assert products.flops == 3 * 2 * ids.numel() * weights


def test_outcomes_are_told_as_they_come(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='needs a CUDA device')\n"
        "def test_left_out(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no such file')\n"
        "def test_without_its_fixture(broken): pass\n"
    )
    told = tmp_path / "told"
    folder = Path(gpu.__file__).parent
    environment = {**os.environ, "AUXIN_OUTCOMES": str(told), "PYTHONPATH": str(folder)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_outcomes", "--noconftest", "test_some.py"]
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False).returncode == 1
    rows = [json.loads(line) for line in told.read_text().splitlines()]
    assert [(row["test"], row["outcome"], row["message"]) for row in rows] == [
        ("test_some.py::test_right", "passed", ""),
        ("test_some.py::test_wrong", "failed", "assert 1 == 2"),
        ("test_some.py::test_left_out", "skipped", "needs a CUDA device"),
        ("test_some.py::test_without_its_fixture", "failed", "OSError: no such file"),
    ]
