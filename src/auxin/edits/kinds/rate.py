"""How fast a changed parameter must learn for AdamW to go on exactly as it would have in the smaller model."""

import math

from auxin.settings import Settings


class Rate(Settings):
    """Factors on a parameter's learning rate and on AdamW's epsilon; its weight decay is divided by the former.

    AdamW's step has no scale of its own: where W' = R W C and readers of n copies hold W / n, a step of the old size
    moves the function n times too far. With the moments mapped by the adjoint rule, the learning rate divided by n, the
    decay multiplied by it and epsilon scaled like the gradient, the next steps are those of the smaller model.
    """

    lr: float = 1.0
    """Factor on the learning rate; the weight decay gets its inverse."""
    eps: float = 1.0
    """Factor on epsilon: that of the gradient."""
    exact: bool = True
    """Whether these factors say it all. Not where copies are uneven or new entries learn from the first step on."""

    def then(self, other: "Rate") -> "Rate":
        """The factors of a change by `self` and then by `other`."""
        return Rate(lr=self.lr * other.lr, eps=self.eps * other.eps, exact=self.exact and other.exact)

    @property
    def overshoot(self) -> float:
        """How many times too far a step with the old rate moves the function."""
        return 1 / self.lr if self.lr else math.inf
