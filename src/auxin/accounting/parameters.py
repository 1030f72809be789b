"""How many parameters a model has; a tied parameter counts once."""

from torch import nn
from transformers import PreTrainedModel

from auxin.settings import Settings


class ParameterCount(Settings):
    """Numbers of scalar parameters."""

    total: int
    """All parameters, tied ones once."""
    embedding: int
    """Embedding tables (tokens, learned positions) and the output head, tied ones once."""

    @property
    def non_embedding(self) -> int:
        """All parameters but the embedding tables and the output head."""
        return self.total - self.embedding


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of `model`; the meta device serves as well as any other."""
    tables: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if isinstance(model, PreTrainedModel) and (head := model.get_output_embeddings()) is not None:
        tables.append(head)
    embedding = {id(p): p.numel() for module in tables for p in module.parameters()}
    return ParameterCount(total=sum(p.numel() for p in model.parameters()), embedding=sum(embedding.values()))
