"""How the scores of parameter tokens become weights: the names, for who needs no more."""

from typing import Literal

ScoreFunction = Literal["l2_norm_gelu", "gelu_l2_norm", "gelu", "linear", "softmax"]
Gelu = Literal["erf", "tanh"]

NORMED: frozenset[ScoreFunction] = frozenset({"l2_norm_gelu", "gelu_l2_norm"})
"""Those that divide by the norm of a group's scores."""
SCALED: frozenset[ScoreFunction] = NORMED | {"softmax"}
"""Those in which tau counts, and every token of a group has a part in what the others weigh."""
