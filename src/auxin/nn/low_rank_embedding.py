"""The table of an embedding as a product of two smaller ones; see `auxin.nn.low_rank`."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxin.nn.bricks import brick
from auxin.nn.low_rank import LowRank, LowRankLinear


@brick("low_rank_embedding")
class LowRankEmbedding(LowRank):
    """An `nn.Embedding` of low rank: of token t, row t of A (tokens, rank) times B (rank, width), as in ALBERT (arXiv
    1909.11942, section 3.1), where the rank is called E.

    Args:
        in_features: width.
        out_features: tokens.
        rank: from 1 to the smaller of both.
        padding_idx: the token whose row of A gets no gradient.
        scale: by which embeddings are multiplied (Gemma's, BART's).
        rounded: whether the scale is rounded to the parameters' type before (Gemma's).
        device, dtype: of the parameters, which are not filled.
    """

    layer = nn.Embedding
    making = LowRankLinear.making  # the same, so that a tied head and its table are of one value

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        padding_idx: int | None = None,
        scale: float = 1.0,
        rounded: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, False, device, dtype)
        self.padding_idx, self.scale, self.rounded = padding_idx, scale, rounded

    @classmethod
    def can_replace(cls, module: nn.Module) -> bool:
        """Of an `nn.Embedding`, or one that does no more than multiply by a number, whose rows are not kept short and
        get the gradients of all."""
        if not isinstance(module, nn.Embedding) or module.max_norm is not None:
            return False
        plain = type(module).forward is nn.Embedding.forward or any(hasattr(module, name) for name in SCALES)
        if not plain or any(True for _ in module.children()) or module.scale_grad_by_freq or module.sparse:
            return False
        public = {name for name in vars(module) if not name.startswith("_")} - vars(EMBEDDING).keys()
        return public | {name for name, _ in module.named_buffers()} <= set(SCALES)

    @classmethod
    def _for(cls, module: nn.Module, outputs: int, inputs: int, rank: int) -> Self:
        if isinstance(module, cls):
            padding, scale, rounded = module.padding_idx, module.scale, module.rounded
        else:
            assert isinstance(module, nn.Embedding)
            padding, rounded = module.padding_idx, hasattr(module, SCALES[0])
            scale = float(next((getattr(module, name) for name in SCALES if hasattr(module, name)), 1.0))
        example = next(module.parameters())
        return cls(inputs, outputs, rank, padding, scale, rounded, example.device, example.dtype)

    @property
    def num_embeddings(self) -> int:
        """nn.Embedding's name for the number of tokens."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """nn.Embedding's name for the width."""
        return self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Token ids (...) -> (..., width)."""
        found = F.embedding(x, self.output_factor, self.padding_idx) @ self.input_factor
        if self.scale == 1:
            return found
        # A tensor without axes is a number to whatever it multiplies, on any device; it only is rounded before.
        return found * (torch.tensor(self.scale, dtype=self.output_factor.dtype) if self.rounded else self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, padding_idx={self.padding_idx}, scale={self.scale:g}"


EMBEDDING = nn.Embedding(1, 1, device="meta")
"""One that does nothing else."""
SCALES = ("scalar_embed_scale", "embed_scale")
"""What classes of transformers call the number by which they multiply embeddings. Those that have the first, a float,
multiply by the second, a tensor, in the parameters' type."""
