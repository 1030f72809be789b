"""Options that take several values at once: `--seeds 0 1 2`."""

import re
from typing import Any, ClassVar

from typer.core import TyperCommand

SEEDS = re.compile(r"\d+(,\d+)*")
NAMES = re.compile(r"[^-].*")


class ListedOptions(TyperCommand):
    """A command whose `listed` options take the words that follow, as far as they match: `--seeds 0 1 2` is read as
    `--seeds 0 --seeds 1 --seeds 2`, which click knows."""

    listed: ClassVar[dict[str, re.Pattern[str]]] = {"--seeds": SEEDS, "--branches": NAMES}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its values, then parse as usual."""
        return super().parse_args(ctx, repeated(args, self.listed))


def repeated(arguments: list[str], listed: dict[str, re.Pattern[str]]) -> list[str]:
    """`arguments` with a `listed` option before each of the values that follow it; the first value is taken whatever it
    is, so that what is wrong with it is told."""
    result: list[str] = []
    option: str | None = None
    for index, word in enumerate(arguments):
        if word == "--":
            return result + arguments[index:]
        if word in listed:
            option = word
            result.append(word)
        elif option is not None and result[-1] != option and listed[option].fullmatch(word):
            result += [option, word]
        else:
            option = option if result and result[-1] == option else None
            result.append(word)
    return result
