"""How much of two kinds of units goes where both come under one limit: so that what stays is worth most.

The search is step 4 of OPTIN (arXiv 2403.17921), after Kwon et al. (arXiv 2204.09656): for every number of heads the
rest of the limit is filled with the best feed-forward units, and that number is taken at which the scores that stay
have the largest sum, which is where those that go have the smallest.

What a unit costs is the same for all units of one kind in one stack, and doesn't depend on what else is there, so that
a model is built for every kind and stack and not for every state. Of a latency that is true by and large, so that the
number of heads is then near the best one; the limit is kept all the same.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedModel

from auxin.planning.cutting import cut
from auxin.planning.target import Gauge, removal
from auxin.planning.unit_order import Course, Place
from auxin.words.anatomy import Anatomy

Saves = Callable[[Mapping[Place, Sequence[int]]], float]
"""(units that stay, by place) -> how much less a model with these costs."""
_ROUNDING = 1e-12


@dataclass(frozen=True)
class States:
    """Ever smaller states of one kind of units, the first of which is the present one."""

    saved: Sequence[float]
    """What each costs less than the first, rising."""
    lost: Sequence[float]
    """The sum of the scores that are gone, rising."""


def least_lost(one: States, other: States, save: float) -> int:
    """The state of `one` with which, and with the first state of `other` that saves enough, the least is lost.

    Args:
        one: of heads.
        other: of feed-forward units.
        save: how much must be saved.

    Returns:
        The state; of equal ones the first, and the last of all where nothing saves enough.
    """
    best, least = len(one.saved) - 1, float("inf")
    for state, (saved, lost) in enumerate(zip(one.saved, one.lost, strict=True)):
        partner = bisect_left(other.saved, save - saved - _ROUNDING * save)
        if partner < len(other.saved) and lost + other.lost[partner] < least:
            best, least = state, lost + other.lost[partner]
    return best


@dataclass(frozen=True)
class SharedLimit:
    """A model whose heads and feed-forward units come under one limit.

    Args:
        model: the model, on any device; weights are not looked at.
        body: its anatomy.
        groups: how many units can go on their own, by place.
        part: of a model of several towers the one that is cut.
    """

    model: PreTrainedModel
    body: Anatomy
    groups: Mapping[Place, int]
    part: str | None

    def chain(
        self, gauge: Gauge, kinds: Sequence[Mapping[int, Course]], chains: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[int]]:
        """Ever smaller states of all courses, with the heads with which the least is lost and ever fewer feed-forward
        units.

        Args:
            gauge: tells the limit, and what costs how much.
            kinds: the courses of heads, and those of feed-forward units, by their numbers among all courses.
            chains: ever smaller states of all courses in which the one, or the other, are smaller; the first of each is
                the present one.
        """

        def saves(keep: Mapping[Place, Sequence[int]]) -> float:
            left = gauge.of(removal(self.model, cut(self.model, keep, part=self.part).edits))
            return max(0.0, gauge.have - left)  # a time that was measured may be longer

        heads, units = (self._states(*kind, saves) for kind in zip(kinds, chains, strict=True))
        chosen = least_lost(heads, units, gauge.have - float(gauge.limit))
        together = [[one + other for one, other in zip(chains[0][chosen], state, strict=True)] for state in chains[1]]
        return together if chosen else together[1:]

    def _states(self, courses: Mapping[int, Course], chain: Sequence[Sequence[int]], saves: Saves) -> States:
        saved, lost = [0.0] * len(chain), [0.0] * len(chain)
        for number, course in courses.items():
            costs = self._costs(course, chain[-1][number], saves)
            # A score is that of what goes on its own, which may be several entries.
            sizes = [line.units // self.groups[line.stream, line.scope] for line in course.lines]

            def score(at: int, step: int, course: Course = course, sizes: Sequence[int] = sizes) -> float:
                line = course.lines[at]
                return line.scores[step] * len(line.blocks[step]) / sizes[at]

            def cost(at: int, step: int, course: Course = course, costs: Sequence[float] = costs) -> float:
                return costs[at] * len(course.lines[at].blocks[step])

            for total, worth in ((lost, score), (saved, cost)):
                gone = course.gone(worth)
                total[:] = [before + gone[states[number]] for before, states in zip(total, chain, strict=True)]
        return States(saved, lost)

    def _costs(self, course: Course, last: int, saves: Saves) -> list[float]:
        """What an entry of each line costs, told by the state in which the most of its stack is gone."""
        steps, costs = course.steps(last), [0.0] * len(course.lines)
        stacks = [self.body.stack_of(line.scope) for line in course.lines]
        paths = ["" if stack is None else stack.path for stack in stacks]
        for _, numbers in groupby(sorted(range(len(steps)), key=paths.__getitem__), key=paths.__getitem__):
            lines = {at: course.lines[at] for at in numbers if steps[at]}
            gone = sum(line.units - line.left[steps[at]] for at, line in lines.items())
            if gone:
                each = saves({(line.stream, line.scope): line.kept(steps[at]) for at, line in lines.items()}) / gone
                costs = [each if at in lines else cost for at, cost in enumerate(costs)]
        return costs
