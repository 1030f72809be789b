"""Feed-forward parts whose matrices are products, and that whole ones guide while they learn ("Building on Efficient
Foundations: Effectively Training LLMs with Structured Feedforward Layers", Wei et al. 2024, arXiv 2406.16450).

Every matrix of the feed-forward parts, but for those of the first layer, becomes a product of a form:

* `low-rank`: W ~ A B (`auxin.nn.low_rank`);
* `block-dense`: B is block diagonal, A is whole; `block-shuffle`: both are block diagonal, and inner units are dealt
  out between the two (`auxin.nn.block_products`).

In a trained model each is made the nearest there is to the matrix, in the sum of squares. In a new one the nearest to
the drawn matrix is the paper's initialisation for low rank; of the other forms it draws orthonormal blocks (`start =
orthogonal`).

With a guide (self-guided training, section 3.2 there; `auxin.nn.guide`) a layer first computes a W x + (1 - a) A B x +
b, and the hook `GuideFade` lets a fall from 1 to 0 by half a cosine. A second plan (`finish`) takes the guides off. W
begins as the product, as in the paper, or as the matrix that was there: then the model is exactly the old one at first.

    auxin plan MODEL structured-ffn --set guide=weight       # then train with GuideFade(5000)
    auxin plan GUIDED structured-ffn --set finish=true

Not as in the paper's code: the guide of `block-shuffle` begins as the product itself, where the code leaves out how
units are dealt; gate and up matrices of a gated part are two products, each with factors of its own. Training beside W
and then without it, on the same tokens again, is two stages of a recipe.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, StrictFloat, StrictInt, model_validator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auxin.accounting import count_parameters
from auxin.edits import Edit, Plan, ReplaceModule
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.nn.block_products import BlockProduct
from auxin.nn.guide import KEPT, Guided
from auxin.nn.linear import known_class, widths
from auxin.nn.low_rank import LowRank
from auxin.planning.bench import Bench
from auxin.planning.hooks import Hook, HookContext, HookSettings, Ramp
from auxin.planning.kept_paths import KeptPaths, is_kept, refuse_impossible
from auxin.planning.linear_layers import linear_layers, merged_paths
from auxin.planning.method import Method
from auxin.planning.product_times import ProductTimes, on_shapes
from auxin.planning.target import Gauge, Removal, Target, least_removal, removal
from auxin.settings import Settings
from auxin.words.anatomy import Anatomy
from auxin.words.widths import FEED_FORWARD

NAME = "structured-ffn"
Form = Literal["low-rank", "block-dense", "block-shuffle"]
BRICKS: dict[tuple[Form, type[nn.Module]], str] = {
    ("low-rank", nn.Linear): "low_rank_linear",
    ("low-rank", Conv1D): "low_rank_conv1d",
    ("block-dense", nn.Linear): "block_dense_linear",
    ("block-dense", Conv1D): "block_dense_conv1d",
    ("block-shuffle", nn.Linear): "block_shuffle_linear",
    ("block-shuffle", Conv1D): "block_shuffle_conv1d",
}


class StructuredFeedForward(Settings):
    """The form of the products and how small they are, whether they are guided; or the end of the guides."""

    form: Form = "low-rank"
    """What the matrices become."""
    rank: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Inner units of every product: a share of the smaller width of its matrix (0.5, as where nothing is said: the
    paper's 63 % of the parameters, 0.25 its 32 %), or a number. Of block-shuffle `blocks` tell it."""
    blocks: int | None = Field(default=None, gt=1)
    """Blocks on the diagonals of block-dense and block-shuffle; 2 where nothing is said."""
    target: Target | None = None
    """How small the model shall be; the rank, one share for all, is the largest that does. Not of block-shuffle."""
    start: Literal["weight", "orthogonal"] = "weight"
    """What factors are made of: the matrix that was there, or, of forms with blocks, random orthonormal blocks, for a
    model that is to be trained from the start."""
    first_layer: bool = False
    """Whether the feed-forward part of the first layer of every stack changes, too; the paper leaves it whole."""
    multiple_of: Annotated[StrictInt, Field(gt=0)] | Literal["machine"] = 1
    """Inner units of every product, or of each of its blocks, are multiples of it, which may suit a machine; `rank` is
    rounded down to one. "machine": of the least power of 2 up to 64 whose multiples are fast on this one, which some
    seconds of timing tell. Not of block-shuffle."""
    measure: bool = False
    """Whether products are timed beside the layers that they replace, on this machine: a finding then says from how
    many tokens at once on they are faster."""
    keep: KeptPaths = ()
    """Paths of layers or parts that stay as they are, `*` for any one part."""
    guide: Literal["weight", "product"] | None = None
    """What guides begin as: the matrix that was there, so that the function stays, or the product, as in the paper;
    None: no guides."""
    skip_guide: bool = False
    """Whether a training step leaves out the guide of a layer by chance, as often as it does not count, which halves
    what guides cost."""
    guide_steps: int | None = Field(default=None, gt=0)
    """In a recipe: steps of the next train stage in which guides fade; None leaves them as they are."""
    finish: bool = False
    """Take the guides off, after they have faded; goes with no other setting."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.finish and (others := sorted(self.model_fields_set - {"finish"})):
            raise ValueError(f"finish takes guides off and goes with no other setting; leave out {others[0]}")
        if self.rank is not None and self.target is not None:
            raise ValueError("give rank or target, and not both.")
        if isinstance(self.rank, float) and self.rank >= 1:
            raise ValueError(f"rank = {self.rank} is no share below 1. Give one (0.5), or a whole number.")
        sized = self.rank is not None or self.target is not None or self.multiple_of != 1
        if self.form == "block-shuffle" and sized:
            raise ValueError("the number of blocks decides how large block-shuffle is. Give blocks alone.")
        if self.form == "low-rank" and (self.blocks is not None or self.start == "orthogonal"):
            raise ValueError(
                f"low-rank has no blocks, and {'blocks' if self.blocks is not None else 'start = orthogonal'} is for "
                "forms that have. Leave it out, or choose block-dense or block-shuffle."
            )
        if self.guide is None and (self.guide_steps is not None or self.skip_guide):
            given = "guide_steps" if self.guide_steps is not None else "skip_guide"
            raise ValueError(f"{given} is about guides, and there are none. Give guide, weight or product.")
        return self


@dataclass(frozen=True)
class Parts:
    """The matrices of a model's feed-forward parts that change."""

    model: PreTrainedModel
    settings: StructuredFeedForward
    layers: dict[str, nn.Module]
    """By path."""

    @classmethod
    def of(cls, model: PreTrainedModel, settings: StructuredFeedForward) -> Self:
        """Those of `model`, of which weights are not looked at.

        Raises:
            PlanError: an unknown architecture, or there are none.
        """
        if any(isinstance(module, Guided) for module in model.modules()):
            raise PlanError(f"The model has {Guided.temporary}. {_finish_first()}")
        body = anatomy(model)
        bodies = [anatomy(model, part=tower) for tower in body.towers] or [body]
        found = {
            path: layer
            for path, layer in linear_layers(model, (), "made products").items()
            if any(_is_feed_forward(one, f"{path}.weight") for one in bodies)
        }
        if not found:
            raise PlanError(
                f"{type(model).__name__} has no feed-forward part that is made of linear layers. Experts that are one "
                "tensor, TokenFormers and layers that are products already stay as they are."
            )
        refuse_impossible(settings.keep, found, "a matrix of a feed-forward part")
        firsts = () if settings.first_layer else tuple(f"{stack.path}.0." for stack in body.stacks)
        left = {
            path: layer
            for path, layer in found.items()
            if not path.startswith(firsts) and not is_kept(path, settings.keep)
        }
        if not left:
            raise PlanError(
                "No feed-forward part is left that could change: those of first layers and what keep names stay. Set "
                "first_layer, or keep fewer."
            )
        return cls(model, settings, left)

    @cached_property
    def blocks(self) -> int:
        """Blocks on the diagonal."""
        return 1 if self.settings.form == "low-rank" else self.settings.blocks or 2

    @cached_property
    def step(self) -> int:
        """What ranks are multiples of: the blocks, or as many multiples of what suits the machine."""
        asked = self.settings.multiple_of
        if asked != "machine":
            return self.blocks * asked
        largest = max(self.layers, key=self.most)
        return self.blocks * self.times.liked_multiple(
            lambda units: self.product(largest, {**self._told, "rank": units * self.blocks}),
            max(self.most(largest) // self.blocks // 2, 1),
        )

    @cached_property
    def times(self) -> ProductTimes:
        """On this machine."""
        return ProductTimes(next(iter(self.layers.values())).get_parameter("weight").dtype)

    @property
    def _told(self) -> dict[str, int]:
        return {"blocks": self.blocks} if self.blocks > 1 else {}

    def product(self, path: str, values: Mapping[str, int]) -> nn.Module:
        """What stands in the place of the layer at `path`, without values."""
        layer = self.layers[path]
        return on_shapes(BRICKS[self.settings.form, known_class(layer)], layer, **values)

    def most(self, path: str) -> int:
        """The largest number of inner units, a multiple of the blocks, with which a product has fewer parameters."""
        inputs, outputs = widths(self.layers[path])
        most = (inputs * outputs - 1) // (inputs // self.blocks + outputs)
        return min(most, min(outputs, inputs // self.blocks) * self.blocks) // self.blocks * self.blocks

    def values(self, path: str, least: float | None = None) -> dict[str, int]:
        """What the brick at `path` is told of its size.

        Args:
            path: of the layer.
            least: the share of the largest rank that saves anything, for a target; None: what the settings say.

        Raises:
            PlanError: nothing would be saved.
        """
        if self.settings.form == "block-shuffle":
            return {"blocks": self.blocks}
        most, asked, step = self.most(path), self.settings.rank, self.step
        if least is not None:
            rank = max(math.floor(least * most) // step, 1) * step
        elif isinstance(asked, int):
            rank = asked if step == self.blocks else max(asked // step, 1) * step
        else:
            rank = max(math.floor((asked or 0.5) * min(widths(self.layers[path]))) // step, 1) * step
        if rank > most:
            multiple = self.settings.multiple_of
            wish = "target" if least is not None else f"rank = {asked or 0.5}"
            if multiple != 1 and most < step:
                wish = f"multiple_of = {multiple}"
            raise PlanError(
                f"{wish}: {path} would have {rank} inner units, and no fewer parameters than the whole matrix. "
                + (f"Give {most} or less." if most >= step else f"Keep it (keep: [{path}]).")
            )
        return {**self._told, "rank": rank}

    def edits(self, least: float | None = None, guided: bool = False) -> Iterator[Edit]:
        """What makes products of the layers.

        Args:
            least: see `values`.
            guided: whether guides are put beside them.
        """
        settings = self.settings
        bricks = {path: BRICKS[settings.form, known_class(layer)] for path, layer in self.layers.items()}
        made = {path: self.values(path, least) for path in self.layers}
        start = {} if settings.start == "weight" else {"start": settings.start}
        for path, name in merged_paths(self.model, self.layers, lambda name: (bricks[name], *made[name].items())):
            values = {**made[name], **start}
            if not guided:
                yield ReplaceModule(module=path, brick=bricks[name], settings=values)
            else:
                guide = {"product": bricks[name], "guide": settings.guide, "skip": settings.skip_guide}
                yield ReplaceModule(module=path, brick=Guided.brick_name, settings={**guide, **values})

    def timed(self, least: float | None) -> str:
        """From how many tokens on products are faster than their layers, in words."""
        made = {path: self.values(path, least) for path in self.layers}
        products = {path: self.product(path, values) for path, values in made.items()}
        forms = {path: _form_in_words(self.settings.form, values) for path, values in made.items()}
        return self.times.findings(self.layers, products, forms)

    def least(self, target: Target) -> tuple[float, Removal]:
        """The share of the largest rank that meets `target`, the largest that does, and what it leaves."""
        count = max(1, *(self.most(path) // self.step for path in self.layers))

        def share(amount: int) -> float:
            return (count - amount + 0.5) / count

        found = least_removal(Gauge(target, self.model), lambda amount: list(self.edits(share(amount))), count, NAME)
        assert found.amount is not None
        return share(found.amount), found


def plan_structured_ffn(bench: Bench, settings: StructuredFeedForward) -> Plan:
    """Plan products in place of the matrices of feed-forward parts, or the end of their guides.

    Raises:
        PlanError: an unknown architecture, there is no such matrix, blocks do not divide, nothing would be saved, a
            target can't be met, or guides are not at 0 yet.
    """
    if settings.finish:
        return plan_without_guides(bench.model)
    parts = Parts.of(bench.model, settings)
    if settings.target is not None:
        least, found = parts.least(settings.target)
    else:
        least, found = None, removal(bench.model, list(parts.edits()))
    edits, said = list(found.edits), [f"{len(parts.layers)} matrices of feed-forward parts become products."]
    if settings.guide is not None:
        edits = list(parts.edits(least, guided=True))
        said.append(
            f"That is without their guides; with them the model has {_size(bench.model, edits)} parameters. Prices and "
            "the books of a training count them until they are taken off."
        )
    if settings.multiple_of == "machine":
        said.append(f"Ranks are multiples of {parts.step}, as this machine likes them.")
    if settings.measure:
        said.append(parts.timed(least))
    return Plan(
        method=NAME,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="exact" if settings.guide == "weight" else "none",
        edits=edits,
        hooks=[GuideFadeSettings(steps=settings.guide_steps).model_dump()] if settings.guide_steps else [],
        findings=[*found.findings(settings.target), *said],
        made_for=config_values(bench.model.config),
    )


def plan_without_guides(model: PreTrainedModel) -> Plan:
    """Plan the end of the guides: products are left, the same function when all guides are at 0.

    Raises:
        PlanError: there are no guides, or one is not at 0 yet.
    """
    guides = dict(_guides(model))
    if not guides:
        raise PlanError("The model has no guides that could be taken off. Ask for a form with guide first.")
    for path, guide in guides.items():
        # A skeleton's guides are as they were made; what they will be is not known yet.
        if not guide.shapes_alone and guide.strength != 0:
            raise PlanError(
                f"The guide of {path} is at {float(guide.strength):.4g}; without it the function would jump. Train "
                "with GuideFade until its last step, or merge the guides back (merge_module), which is exact at any "
                "time."
            )
    return Plan(
        method=NAME,
        settings={"finish": True},
        promise="exact",
        edits=list(_finished(model, guides)),
        made_for=config_values(model.config),
    )


def _finished(model: PreTrainedModel, guides: dict[str, Guided]) -> Iterator[Edit]:
    def told(path: str) -> dict[str, Any]:
        product = guides[path].product
        values = {"rank": product.rank} if isinstance(product, LowRank) else cast(BlockProduct, product).settings
        return {"brick": product.brick_name, "settings": {**values, "start": KEPT}}

    for path, name in merged_paths(model, guides, lambda name: str(told(name))):
        yield ReplaceModule(module=path, **told(name))


class GuideFadeSettings(HookSettings):
    """Guides fade in the course of the stage."""

    kind: Literal["guide_fade"] = "guide_fade"
    """Says that guides fade."""
    steps: int = Field(ge=1)
    """Steps from strength 1 to 0, from the start of the stage."""

    def made(self, context: HookContext) -> Hook:
        """See `GuideFade`."""
        return GuideFade(self.steps)


class GuideFade(Ramp):
    """Training hook: lets the strength of all guides fall from 1 to 0 in `steps` steps, by half a cosine.

    Step s (0-based) sees (1 + cos(pi s / steps)) / 2, and from step `steps` on 0. The strength is saved with the model,
    and is a function of the step alone, also where the guard left updates out.

    Args:
        steps: optimizer steps, counted from the start of the training stage (the paper: half of the training).
    """

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self._guides: list[Guided] = []

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Find the guides; PlanError when there are none."""
        self._guides = [guide for _, guide in _guides(model)]
        if not self._guides:
            raise PlanError(
                f"GuideFade: the {type(model).__name__} has no guides. Change it with structured-ffn and guide first."
            )

    def move(self, step: int) -> None:
        """Set the strength that `step` sees."""
        for guide in self._guides:
            guide.set_strength(faded(step, self.steps))


def faded(step: int, steps: int) -> float:
    """The strength of guides in `step` (0-based), where they fade in so many `steps`; see `GuideFade`."""
    return 0.0 if step == steps else (1 + math.cos(math.pi * step / steps)) / 2


def _guides(model: nn.Module) -> Iterator[tuple[str, Guided]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Guided))


def _is_feed_forward(body: Anatomy, name: str) -> bool:
    role = next((role for role in body.roles if role.matches(name)), None)
    return role is not None and role.kind == "matrix" and any(role.along(stream) for stream in FEED_FORWARD)


def _form_in_words(form: Form, values: Mapping[str, int]) -> str:
    """ "of rank 8 in 2 blocks"."""
    rank = f" of rank {values['rank']}" if "rank" in values else ""
    blocks = f"{' in' if rank else ' of'} {values['blocks']} blocks" if "blocks" in values else ""
    return f"{form}{rank}{blocks}"


def _size(model: PreTrainedModel, edits: list[Edit]) -> str:
    return f"{count_parameters(removal(model, edits).after).total:,}"


def _finish_first() -> str:
    return "Train with GuideFade until they are at 0 and take them off (structured-ffn with finish = true) first."


def _example(model: PreTrainedModel) -> dict[str, Any]:
    parts = Parts.of(model, StructuredFeedForward(first_layer=True))
    return {"rank": max(1, min(parts.most(path) for path in parts.layers) // 2), "first_layer": True}


METHOD = Method(
    name=NAME,
    title="Feed-forward parts as products of low rank or of blocks, guided by whole matrices while they learn",
    paper="arXiv 2406.16450",
    intent="factorize",
    settings=StructuredFeedForward,
    plan=plan_structured_ffn,
    examples=_example,
    promise="exact with guide = weight, and at the end of guides; else none",
)
