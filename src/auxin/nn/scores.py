"""How the scores of parameter tokens become weights: the names, for who needs no more."""

from typing import Literal

ScoreFunction = Literal["l2_norm_gelu", "gelu_l2_norm", "gelu", "softmax"]
Gelu = Literal["erf", "tanh"]
