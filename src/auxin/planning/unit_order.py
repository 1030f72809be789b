"""In which order the units of streams go: courses of ever smaller states, from scores; no model is known here."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise
from math import ceil, gcd, inf, isfinite
from operator import neg
from statistics import fmean, pstdev

from auxin.errors import PlanError
from auxin.words.paths import encloses
from auxin.words.widths import Stream

Place = tuple[Stream, str]
"""A stream and a scope."""
Scores = Mapping[Place, Sequence[float]]
"""What every unit is worth, by stream and scope. Of "query" one for each query head, or as many for each as it has
entries, which are added up over a key-value group, or one for each key-value head with its group. Scores of narrower
scopes are added up over a wider one whose units go together."""


@dataclass(frozen=True)
class Line:
    """The units of a stream in one scope, in the order in which they go."""

    stream: Stream
    scope: str
    units: int
    blocks: tuple[tuple[int, ...], ...]
    """What goes at every step; what is in none stays."""
    scores: tuple[float, ...]
    """Of the blocks, rising."""
    standings: tuple[float, ...]
    """The same where scores are standardised within the scope: of all those that were given, the finest that there are,
    the mean is 0 and the standard deviation 1; what goes together has their mean."""

    @cached_property
    def left(self) -> tuple[int, ...]:
        """How many units are left after every number of steps, from none on."""
        return tuple(accumulate((-len(block) for block in self.blocks), initial=self.units))

    def kept(self, steps: int) -> list[int]:
        """The units that are left."""
        gone = {unit for block in self.blocks[:steps] for unit in block}
        return [unit for unit in range(self.units) if unit not in gone]


@dataclass(frozen=True)
class Course:
    """Ever smaller states of a stream, the first of which is the present one."""

    name: str
    stream: Stream
    lines: tuple[Line, ...]
    left: tuple[int, ...]
    """Units in every state: of a layer where layers are alike (of the widest before), else of all layers."""
    moves: tuple[tuple[int, ...], ...]
    """From every state to the next one the lines, by number, in which something goes; a line as often as it takes
    steps."""
    standardised: bool = False
    """Whether what goes next was told by standings."""

    def steps(self, state: int) -> list[int]:
        """The steps of every line up to a state."""
        counts = Counter(number for move in self.moves[:state] for number in move)
        return [counts[number] for number, _ in enumerate(self.lines)]

    def gone(self, worth: Callable[[int, int], float]) -> list[float]:
        """By state the sum of `worth` over all that is gone.

        Args:
            worth: (number of a line, number of one of its blocks) -> what goes with it.
        """
        sums, taken = [0.0], Counter[int]()
        for move in self.moves:
            total = sums[-1]
            for number in move:
                total += worth(number, taken[number])
                taken[number] += 1
            sums.append(total)
        return sums

    def scores(self) -> list[float]:
        """Of every move the mean score, or standing, of what goes with it, rising."""
        means, taken = [], Counter[int]()
        for move in self.moves:
            found = []
            for number in move:
                line = self.lines[number]
                found.append((line.standings if self.standardised else line.scores)[taken[number]])
                taken[number] += 1
            means.append(sum(found) / len(found) if found else -inf)
        return list(accumulate(means, max))

    def keep(self, state: int) -> dict[Place, list[int]]:
        """The units that stay in a state."""
        steps = self.steps(state)
        return {(self.stream, line.scope): line.kept(n) for line, n in zip(self.lines, steps, strict=True)}

    def share(self, state: int) -> Fraction:
        """What part of the units is left."""
        return Fraction(self.left[state], self.left[0])

    def state(self, share: float) -> int:
        """The last state in which at least a share of the units is left."""
        # 0.07 of 100 is 7, and 7 / 12 of 24 is 14, whatever their binary digits.
        least = ceil(Fraction(share).limit_denominator(10**6) * self.left[0])
        return max(state for state, left in enumerate(self.left) if left >= least)


def line(
    place: Place, scores: Scores, groups: int, entries: int, multiple: int = 1, apart: int = 1, least: int = 1
) -> Line:
    """The order of the units in one place: those of the lowest score first, of equal ones the last.

    Args:
        place: stream and scope.
        scores: of this place, or of narrower ones within.
        groups: how many can go on their own.
        entries: units of the stream in them.
        multiple: what is left is a multiple of this many groups.
        apart: in so many stretches of them, one after the other, every step takes one of each.
        least: how many of a stretch stay.

    Raises:
        PlanError: scores are missing, too many or too few, or not finite.
    """
    fine = _scores_at(*place, scores, groups, entries)
    parts = len(fine) // groups
    found = [sum(fine[group * parts : (group + 1) * parts]) for group in range(groups)]
    size, stretch = entries // groups, groups // apart
    orders = [
        sorted(range(start, start + stretch), key=lambda group: (found[group], -group))
        for start in range(0, groups, stretch)
    ]
    # The first block leaves a multiple; the last ones stay.
    ends = list(range((stretch - 1) % multiple + 1, stretch, multiple)) if stretch > multiple else []
    ends = [end for end in ends if stretch - end >= least]
    blocks = [
        [group for order in orders for group in order[start:end]] for start, end in zip([0, *ends], ends, strict=False)
    ]
    means = [sum(found[group] for group in block) / len(block) for block in blocks]
    rising = tuple(accumulate(means, max))  # sorted also where rounding of the means says otherwise
    centre, spread = fmean(fine), pstdev(fine)
    return Line(
        *place,
        entries,
        tuple(tuple(group * size + one for group in block for one in range(size)) for block in blocks),
        rising,
        tuple((mean / parts - centre) / spread if spread else 0.0 for mean in rising),
    )


def alike(name: str, stream: Stream, lines: list[Line]) -> Course:
    """Every layer keeps as many; those that have fewer already keep what they have."""
    widest = max(lines, key=lambda line: line.units)
    steps = [
        [min(bisect_left(line.left, -size, key=neg), len(line.blocks)) for line in lines]  # the first that is no larger
        for size in widest.left
    ]
    moves = (
        tuple(number for number, (old, new) in enumerate(zip(*both, strict=True)) for _ in range(new - old))
        for both in pairwise(steps)
    )
    return Course(name, stream, tuple(lines), widest.left, tuple(moves))


def ranked(name: str, stream: Stream, lines: list[Line], standardised: bool) -> Course:
    """The blocks of all layers in one ranking, by their scores or by their standings."""
    scored = [
        (score, place, step)
        for place, line in enumerate(lines)
        for step, score in enumerate(line.standings if standardised else line.scores)
    ]
    ranking = [(place, step) for _, place, step in sorted(scored)]
    total = sum(line.units for line in lines)
    gone = (-len(lines[place].blocks[step]) for place, step in ranking)
    moves = tuple((place,) for place, _ in ranking)
    return Course(name, stream, tuple(lines), tuple(accumulate(gone, initial=total)), moves, standardised)


def _scores_at(stream: Stream, scope: str, scores: Scores, groups: int, entries: int) -> list[float]:
    """What the units that go together in a scope are worth, or parts of them: as finely as all scores there say it."""
    inner = [found for (name, place), found in scores.items() if name == stream and encloses(scope, place)]
    given = [scores[stream, scope]] if (stream, scope) in scores else inner
    where = f"{stream} of {scope}" if scope else stream
    if not given:
        raise PlanError(f"There are no scores for the units of {where}.")
    for found in given:
        whole = len(found) in (groups, entries) or (stream == "query" and found and not len(found) % entries)
        if not whole:
            raise PlanError(f"There are {len(found)} scores for the units of {where}, of which there are {groups}.")
    count = gcd(*map(len, given))
    total = [0.0] * count
    for found in given:
        size = len(found) // count
        total = [total[part] + sum(found[part * size : (part + 1) * size]) for part in range(count)]
    if not all(map(isfinite, total)):
        raise PlanError(f"Scores for the units of {where} are not finite, so that none can be called the lowest.")
    return total
