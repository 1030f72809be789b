"""Every parameter of an edited model has one role, too: the architecture's, a wrapper's inner one's, or a brick's."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from auxin.edits import ConstantFill, Plan, ReplaceModule, WrapModule, apply
from auxin.edits.structure import edited_skeleton
from auxin.errors import PlanError
from auxin.methods import method
from auxin.models.anatomy import anatomy
from auxin.nn.bricks import Brick, Roles, brick
from auxin.planning.bench import Bench
from auxin.words.roles import ParameterRole
from tiny_models import FAMILIES, tiny


@brick("test_factors")
class Factors(Brick):
    """Factors behind a module, or before it: a wrapper with one parameter."""

    def __init__(self, inner: nn.Module, size: int, before: bool = False, tells: str = "truth") -> None:
        super().__init__()
        self.inner, self.before, self.tells = inner, before, tells
        self.factors = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.factors) if self.before else self.inner(x) * self.factors

    def roles(self, replaced: Roles) -> Roles:
        weight = replaced["weight"]
        if self.tells == "nothing":
            return {}
        if self.tells == "nonsense":
            return {"factors": weight}
        if self.tells == "too much":
            return {"weight": weight}
        return {"factors": weight.vector(1 if self.before else 0, "scale"), "absent": weight.vector(0, "bias")}


def put(model, *edits):
    """`model` with edits, one after the other."""
    for edit in edits:
        apply(Plan(method="by hand", promise="none", edits=[edit]), model)
    return model


def factors(path, size, **settings):
    return WrapModule(
        module=path,
        brick="test_factors",
        settings={"size": size, **settings},
        fills={"factors": ConstantFill(value=1.0)},
    )


def by(name, model, **values):
    found = method(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply(found.plan(Bench(model), found.settings.parse({**found.examples(model), **values})), model)
    return model


EDITED = [
    ("graft", {}),
    ("altup", {}),
    ("altup", {"coefficients": "dynamic"}),
    ("sequence-altup", {}),
    ("masked", {"new_layers": "copies"}),
    ("masked", {"new_layers": "random"}),
]


def fits(role: ParameterRole, parameter: Tensor) -> bool:
    return len(role.axes) == len(role.access) == parameter.dim() and all(
        (access is None) == (not segments) and (not segments or sum(segment.size for segment in segments) == size)
        for size, segments, access in zip(parameter.shape, role.axes, role.access, strict=True)
    )


@pytest.mark.parametrize(("name", "values"), EDITED)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_one_role_that_fits_its_shape(family, name, values):
    if (name, family) == ("graft", "tokenformer"):
        return
    model = tiny(family, **{"num_layers" if family == "t5" else "num_hidden_layers": 3})
    before = anatomy(model)
    by(name, model, **values)
    found = anatomy(model)
    for key, parameter in model.named_parameters():
        roles = [role for role in found.roles if role.matches(key)]
        assert len(roles) == 1, key
        assert fits(roles[0], parameter), key
    assert anatomy(edited_skeleton(model.config, type(model))) == found
    # What the architecture has is what it was, and roles stay few: one for all layers.
    added = {role.pattern for role in found.roles if role.added}
    assert bool(added) == (name != "masked")
    assert len(added) <= 2 * len(before.roles)
    assert set(found.embeddings) <= set(dict(model.named_parameters()))


@pytest.mark.parametrize("conversion", ["copies", "free"])
@pytest.mark.parametrize("family", FAMILIES)
def test_wide_streams_have_roles_too(family, conversion):
    model = tiny(family)
    try:
        by("altup", model, conversion=conversion)
    except PlanError:
        assert conversion == "free"  # a tied head reads all blocks
        return
    found = anatomy(model)
    assert found.residual_blocks == "wide"
    assert "residual" in dict(found.fixed_widths)
    assert all(sum(role.matches(name) for role in found.roles) == 1 for name, _ in model.named_parameters())


def test_a_wrapper_adds_its_own_and_keeps_those_inside():
    model = put(tiny("llama"), factors("model.layers.*.mlp.up_proj", 12))
    plain, found = anatomy(tiny("llama")), anatomy(model)
    old = plain.role("model.layers.1.mlp.up_proj.weight")
    weight, own = (found.role(f"model.layers.1.mlp.up_proj.{name}") for name in ("inner.weight", "factors"))
    assert (weight.axes, weight.access, weight.kind, weight.added) == (old.axes, old.access, "matrix", False)
    assert weight.pattern == "model.layers.*.mlp.up_proj.inner.weight"
    assert own == ParameterRole("model.layers.*.mlp.up_proj.factors", (old.axes[0],), ("writes",), "scale", True)


def test_wrappers_within_wrappers_are_seen_through():
    @brick("test_around")
    class Around(Brick):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

        def roles(self, replaced: Roles) -> Roles:
            told.append(dict(replaced))
            return {}

    told: list[dict[str, ParameterRole]] = []
    model = put(
        tiny("llama"),
        factors("model.layers.0.mlp.up_proj", 12),
        factors("model.layers.0.mlp.up_proj", 16, before=True),
        WrapModule(module="model.layers.0", brick="test_around"),
    )
    told.clear()
    found = anatomy(model)
    path = "model.layers.0.inner.mlp.up_proj"
    assert found.role(f"{path}.inner.inner.weight").axes == found.role("model.layers.1.mlp.up_proj.weight").axes
    assert [segment.stream for segment in found.role(f"{path}.inner.factors").axes[0]] == ["ffn"]
    assert [segment.stream for segment in found.role(f"{path}.factors").axes[0]] == ["residual"]
    # Who is around is told of what is inside by the names that the architecture gives.
    (replaced,) = told
    assert replaced["mlp.up_proj.weight"].kind == "matrix"
    assert replaced["mlp.up_proj.factors"].kind == "scale"
    assert not any("inner" in name or name.startswith("model") for name in replaced)


def test_layers_that_differ_have_roles_of_their_own():
    model = put(
        tiny("llama"),
        factors("model.layers.0.mlp.up_proj", 12),
        factors("model.layers.1.mlp.up_proj", 16, before=True),
    )
    found = anatomy(model)
    streams = {layer: found.role(f"model.layers.{layer}.mlp.up_proj.factors").axes[0][0].stream for layer in range(2)}
    assert streams == {0: "ffn", 1: "residual"}
    assert found.role("model.layers.0.mlp.up_proj.inner.weight").pattern == "model.layers.*.mlp.up_proj.inner.weight"


def test_what_stands_before_the_head_and_behind_the_ids_is_found_below_its_wrappers():
    model = put(
        tiny("t5"),
        factors("decoder.final_layer_norm", 16, tells="nonsense"),
    )
    found = anatomy(model)
    assert found.final_norm == "decoder.final_layer_norm.inner"
    assert model.get_submodule(found.final_norm).weight is not None
    assert found.role(f"{found.final_norm}.weight").kind == "gain"


@pytest.mark.parametrize(
    ("tells", "message"),
    [
        (
            "nothing",
            r"up_proj of the llama model is test_factors since .* entries of model\.layers\.0\.mlp\.up_proj\.factors",
        ),
        (
            "nonsense",
            r"up_proj\.factors has shape \[12\], and the role that the brick 'test_factors' gives .* \[12, 16\]",
        ),
        ("too much", r"up_proj: the brick 'test_factors' has weight as a parameter of its own, and so has the module"),
    ],
)
def test_a_brick_that_tells_something_else_is_refused(tells, message):
    model = put(tiny("llama"), factors("model.layers.0.mlp.up_proj", 12, tells=tells))
    with pytest.raises(PlanError, match=message):
        anatomy(model)


def test_a_wrapper_does_not_call_its_own_as_the_module_inside_does():
    @brick("test_namesake")
    class Namesake(Brick):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.weight = inner, nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * self.inner(x)

    one = {"weight": ConstantFill(value=1.0)}
    model = put(tiny("llama"), WrapModule(module="model.layers.0.mlp.up_proj", brick="test_namesake", fills=one))
    with pytest.raises(PlanError, match=r"'test_namesake' has weight as a parameter of its own"):
        anatomy(model)


def test_reasons_for_widths_and_blocks_come_from_the_bricks():
    assert anatomy(tiny("llama")).fixed_widths == ()
    model = by("altup", tiny("llama"))
    assert (anatomy(model).residual_blocks, anatomy(model).fixed_widths) == ("recycled", ())
    model = by("altup", tiny("llama"), control="sum", conversion="random")
    assert anatomy(model).residual_blocks == "one"
    assert dict(anatomy(model).fixed_widths).keys() == {"residual"}
    model = put(tiny("llama"), ReplaceModule(module="model.layers.0.mlp", brick="zeros"))
    assert (anatomy(model).residual_blocks, anatomy(model).fixed_widths) == ("one", ())
