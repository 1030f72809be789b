"""The anatomy of a transformer: what every parameter's axes run along, where its layers are, how its norms sit.

Growing, pruning and merging methods ask this one room instead of knowing architectures by name. A module describes the
architectures that share a naming of their modules; `auxin.words` has the words in which it is written.
"""

from auxin.models.anatomy.found import ANATOMIES, anatomy
from auxin.models.anatomy.parts import norm_epsilon

__all__ = ["ANATOMIES", "anatomy", "norm_epsilon"]
