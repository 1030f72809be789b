"""A run as `auxin run` leaves it, made up: four branches, two growths."""

import math
from itertools import groupby

from auxin.accounting import Ledger, StageRecord
from auxin.accounting.results import BranchResult, CurvePoint, GrowthPoint, MeasureDescription, RunResults

VERSIONS = {"auxin": "0.1.0", "python": "3.12.1", "torch": "2.13.0", "transformers": "5.23.0"}
COSTS = {1: (0.55e12, 0.03), 2: (0.9e12, 0.045), 3: (1.6e12, 0.07)}
"""FLOPs per 1000 tokens (made up) and seconds per 1000 tokens at each size."""
PARAMETERS = {1: 131_328, 2: 262_400, 3: 786_944}
FLOOR = {1: 2.02, 2: 1.88, 3: 1.70}


def loss_at(size: int, tokens: float, start: float = 0.0) -> float:
    """A curve that falls to its size's floor."""
    return FLOOR[size] + 4.2 * math.exp(-(tokens + start) / 130e3) + 60.0 / math.sqrt(tokens + start + 1200.0)


def stage_record(name: str, kind: str, size: int, tokens: int = 0, **values: object) -> StageRecord:
    flops, seconds = COSTS[size]
    return StageRecord.parse(
        {
            "name": name,
            "kind": kind,
            "parameters": PARAMETERS[size],
            "units": tokens,
            "flops": flops * tokens / 1000,
            "seconds": seconds * tokens / 1000 or 0.4,
            "versions": VERSIONS,
            "started_at": "2026-01-02T03:04:05+00:00",
            "seed": 0,
            **values,
        }
    )


def curve(stage: str, size: int, tokens: int, before: Ledger, start: float) -> list[CurvePoint]:
    flops, seconds = COSTS[size]
    result = []
    for step in range(1, 41):
        done = tokens * step // 40
        loss = loss_at(size, done, start)
        result.append(
            CurvePoint(
                stage=stage,
                units=before.total_units() + done,
                flops=before.total_flops + flops * done / 1000,
                seconds=before.total_seconds + seconds * done / 1000,
                training_loss=loss - 0.02 + 0.05 * math.sin(12.9898 * step + size) ** 3,
                value=loss if step % 4 == 0 else None,
            )
        )
    return result


def branch_result(name: str, title: str, ledger: Ledger, points: list[CurvePoint], **values: object) -> BranchResult:
    loss = ledger.stages[-1].value_after
    return BranchResult.parse(
        {
            "name": name,
            "title": title,
            "ledger": ledger,
            "curve": points,
            "parameters": ledger.stages[-1].parameters,
            "units": ledger.total_units(),
            "flops": ledger.total_flops,
            "seconds": ledger.total_seconds,
            "value": loss,
            "perplexity": None if loss is None else math.exp(loss),
            "bits_per_byte": None if loss is None else loss / math.log(2) / 3.1,
            **values,
        }
    )


def grown_branch() -> BranchResult:
    ledger = Ledger().append(stage_record("build", "build", 1))
    points: list[CurvePoint] = []
    growths = []
    start = 0.0
    for name, size, tokens in (("base", 1, 1_600_000), ("middle", 2, 600_000), ("final", 3, 700_000)):
        if size > 1:
            loss = ledger.stages[-1].value_after
            assert loss is not None
            after = loss + 3.1e-7 * (size - 1)
            plan = {"method": "tokenformer", "settings": {"regime": "grouped"}, "promise": "exact", "seed": 0}
            receipt = {"max_relative_change": 2.4e-7, "parameters_after": PARAMETERS[size], "seconds": 0.31}
            before = ledger.stages[-1].parameters
            ledger = ledger.append(
                stage_record(
                    f"grow-{size - 1}", "change", size, value_before=loss, value_after=after, plan=plan, receipt=receipt
                )
            )
            growths.append(
                GrowthPoint(
                    stage=f"grow-{size - 1}",
                    units=ledger.total_units(),
                    flops=ledger.total_flops,
                    seconds=ledger.total_seconds,
                    parameters_before=before,
                    parameters_after=PARAMETERS[size],
                    value_before=loss,
                    value_after=after,
                    promise="exact",
                )
            )
            # Training goes on from the loss that the growth left.
            start = next(t for t in range(0, 4_000_000, 500) if loss_at(size, t) <= loss)
        points += curve(name, size, tokens, ledger, start)
        ledger = ledger.append(stage_record(name, "train", size, tokens, value_after=points[-1].value))
    return branch_result("grown", "TokenFormer, grown", ledger, points, growths=growths)


def results() -> RunResults:
    """Growth beats the small model trained on, and loses to the large one from scratch."""
    grown = grown_branch()
    branches = [grown]
    base = Ledger(stages=grown.ledger.stages[:2])
    for name, title, size, bonus in (
        ("small", "Small TokenFormer, trained on", 1, 0.0),
        ("scratch", "TokenFormer of the final size, from scratch", 3, 0.0),
        ("dense", "Dense Transformer, from scratch", 3, -0.06),
    ):
        ledger = base if name == "small" else Ledger().append(stage_record("build", "build", size))
        start = 1_600_000.0 if name == "small" else 0.0
        tokens = round((grown.flops - ledger.total_flops) / COSTS[size][0] * 1000)
        points = [
            point.model_copy(
                update={
                    key: value - bonus
                    for key in ("training_loss", "value")
                    if (value := getattr(point, key)) is not None
                }
            )
            for point in curve("train", size, tokens, ledger, start)
        ]
        ledger = ledger.append(stage_record("train", "train", size, tokens, value_after=points[-1].value))
        fork = {"parent": "grown", "fork_stage": "base"} if name == "small" else {}
        inherited = [point for point in grown.curve if point.stage == "base"] if fork else []
        branches.append(branch_result(name, title, ledger, inherited + points, **fork))
    return RunResults(
        name="demo",
        title="Grow a TokenFormer from 8 to 64 parameter tokens",
        description="One model grows twice by appending parameter tokens. The others spend the same training FLOPs "
        "without growing.",
        command="auxin run demo --output runs/demo",
        seed=0,
        machine={"processor": "Example CPU @ 2.40GHz", "cores": "2", "memory": "7.8 GiB", "system": "Linux 6.1"},
        versions=VERSIONS,
        data={"source": "stdlib", "documents": "1,021", "fingerprint": "9f2c" * 16},
        main_branch="grown",
        branches=branches,
    )


def results_of_images() -> RunResults:
    """The same branches as classifiers of images, compared by an accuracy that rises as the losses fall; their losses
    in nats per image were measured, too."""
    run = results()

    def accuracy(loss: float | None) -> float | None:
        return None if loss is None else 1 - loss / 8

    def relabelled(branch: BranchResult) -> BranchResult:
        stages = [
            stage.model_copy(
                update={
                    "unit": "image",
                    "measure": None if stage.value_after is None else "accuracy",
                    "value_before": accuracy(stage.value_before),
                    "value_after": accuracy(stage.value_after),
                }
            )
            for stage in branch.ledger.stages
        ]
        growths = [
            growth.model_copy(
                update={"value_before": accuracy(growth.value_before), "value_after": accuracy(growth.value_after)}
            )
            for growth in branch.growths
        ]
        curve = [point.model_copy(update={"value": accuracy(point.value)}) for point in branch.curve]
        values = {"ledger": Ledger(stages=stages), "growths": growths, "curve": curve}
        none = {"perplexity": None, "bits_per_byte": None}
        measures = {"accuracy": accuracy(branch.value), "loss": branch.value}
        return branch.model_copy(update={**values, **none, "value": accuracy(branch.value), "measures": measures})

    return run.model_copy(
        update={
            "title": "Grow a ViT",
            "description": "One model grows twice.",
            "unit": "image",
            "measure": MeasureDescription(kind="accuracy", name="accuracy", unit="", better="higher"),
            "other_measures": [MeasureDescription(unit="nats/image")],
            "branches": [relabelled(branch) for branch in run.branches],
        }
    )


def partial_results() -> RunResults:
    """A run that failed: one branch without a measurement, one whose loss became NaN."""
    whole = results()
    grown, small = whole.branches[:2]
    broken = grown.model_copy(
        update={
            "value": math.nan,
            "perplexity": math.inf,
            "bits_per_byte": None,
            "curve": [grown.curve[0].model_copy(update={"value": math.nan}), *grown.curve[1:30]],
            "growths": [grown.growths[0].model_copy(update={"value_after": math.nan})],
        }
    )
    empty = small.model_copy(
        update={"curve": [], "ledger": Ledger(), "value": None, "perplexity": None, "bits_per_byte": None}
    )
    return whole.model_copy(update={"branches": [broken, empty], "machine": {}})


def seeded(seed: int, shift: float, small_shift: float) -> RunResults:
    """The run with another seed: all losses are shifted by `shift`, those of the small branch by `small_shift` too."""

    def moved(branch: BranchResult) -> BranchResult:
        by = shift + (small_shift if branch.name == "small" else 0.0)

        def higher(value: float | None) -> float | None:
            return None if value is None else value + by

        curve = [
            point.model_copy(update={"value": higher(point.value), "training_loss": higher(point.training_loss)})
            for point in branch.curve
        ]
        growths = [
            growth.model_copy(
                update={"value_before": higher(growth.value_before), "value_after": higher(growth.value_after)}
            )
            for growth in branch.growths
        ]
        return branch.model_copy(update={"value": higher(branch.value), "curve": curve, "growths": growths})

    run = results()
    return run.model_copy(update={"seed": seed, "branches": [moved(branch) for branch in run.branches]})


PART = 0.07
"""By how much the loss on the part lies above that on the whole split."""


def on_a_part(run: RunResults, samples: int = 64) -> RunResults:
    """`run` as one whose evaluations on the way took the first `samples` of the held-out split."""

    def moved(branch):
        curve = [
            point if point.value is None else point.model_copy(update={"value": point.value + PART, "samples": samples})
            for point in branch.curve
        ]
        return branch.model_copy(update={"curve": curve})

    return run.model_copy(update={"branches": [moved(branch) for branch in run.branches]})


def only_ends(run: RunResults) -> RunResults:
    """`run` without evaluations between the first and the last point of each stage."""

    def bare(branch):
        stages = [list(stage) for _, stage in groupby(branch.curve, key=lambda point: point.stage)]
        curve = []
        for stage in stages:
            start = next(point.value for point in stage if point.value is not None)
            ends = {id(stage[0]): start, id(stage[-1]): stage[-1].value}
            curve += [point.model_copy(update={"value": ends.get(id(point))}) for point in stage]
        return branch.model_copy(update={"curve": curve})

    return run.model_copy(update={"branches": [bare(branch) for branch in run.branches]})
