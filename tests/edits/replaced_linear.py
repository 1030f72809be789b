"""A plan that replaces modules of a tiny Llama, which the config can't say, and one that merges them back."""

from auxin.edits import MergeModule, Plan, ReplaceModule

LINEAR = "model.layers.*.mlp.down_proj"
REPLACED = Plan(
    method="by hand",
    promise="none",
    edits=[ReplaceModule(module=LINEAR, brick="low_rank_linear", settings={"rank": 4})],
)
MERGED = Plan(method="by hand", promise="exact", edits=[MergeModule(module=LINEAR)])
