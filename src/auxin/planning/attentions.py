"""Which of a layer's attentions a parameter belongs to, where a layer has several (T5's decoder)."""

from auxin.words.anatomy import Anatomy
from auxin.words.paths import shared_parts
from auxin.words.roles import ParameterRole


def attention_numbers(anatomy: Anatomy) -> dict[str, int]:
    """For the pattern of every parameter of a layer which of the layer's attentions is nearest to it, from 0: the one
    whose module's path shares the most parts with its own, the last of several."""
    numbers: dict[str, int] = {}
    for stack in anatomy.stacks:
        roles = [role for role in anatomy.roles if role.pattern.startswith(f"{stack.path}.")]
        attentions = list(dict.fromkeys(_attention(role) for role in roles if _makes_queries(role)))
        for role in roles:
            parts = role.pattern.split(".")
            shared = [(shared_parts(parts, attention), number) for number, attention in enumerate(attentions)]
            numbers[role.pattern] = max(shared, default=(0, 0))[1]
    return numbers


def _makes_queries(role: ParameterRole) -> bool:
    """Whether the parameter is the architecture's own matrix that does."""
    parts = {part for segments in role.axes for segment in segments for part in segment.parts}
    return "query" in parts and role.kind == "matrix" and not role.added


def _attention(role: ParameterRole) -> tuple[str, ...]:
    """The path, in parts, of the attention that has the matrix of queries of this role."""
    parts = role.pattern.split(".")[:-1]
    while parts[-1] == "inner":  # a wrapper is between
        parts.pop()
    return tuple(parts[:-1])
