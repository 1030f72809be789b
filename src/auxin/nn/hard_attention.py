"""Hard attention as a brick: an attention whose queries read the most probable tokens alone (see
`auxin.nn.reading_few`)."""

from typing import Any, Self

from torch import nn

from auxin.errors import PlanError
from auxin.nn.attention_functions import refuse_others
from auxin.nn.bricks import Brick, NothingMade, brick
from auxin.nn.extension import extended
from auxin.nn.reading_few import reading_few


@brick("hard_attention")
class HardAttention(Brick):
    """An attention module of transformers in which each query reads the K most probable tokens alone. It has the
    module's parameters and takes and gives the same. The map that it gives is A', whose rows sum to 1 or less."""

    making = NothingMade()
    keep: int
    """K."""

    @classmethod
    def replacing(cls, module: nn.Module, keep: int = 30) -> Self:
        """`module`, an attention of one of transformers' models, so extended.

        Args:
            module: also on the meta device.
            keep: K, 1 or more.

        Raises:
            PlanError: `keep` is below 1, or the module computes its attention by itself, where no other can be put in.
        """
        if keep < 1:
            raise PlanError(f"hard_attention: keep = {keep}. A query reads 1 token or more; give that.")
        refuse_others(module, "hard_attention", "no other can be put in its place")
        return extended(module, cls, keep=keep)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention.

        Raises:
            PlanError: the model's implementation of attention is one that makes masks of its own kind.
        """
        with reading_few(self, self.keep):
            return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        """K."""
        return f"keep={self.keep}"
