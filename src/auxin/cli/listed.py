"""Options that take several values at once, `--seeds 0 1 2`, and values that lack their option."""

import re
import shlex
from typing import Any, ClassVar

from typer.core import TyperCommand

from auxin.errors import ConfigError

SEEDS = re.compile(r"\d+(,\d+)*")
NAMES = re.compile(r"[^-].*")


class SetOptions(TyperCommand):
    """A command with `--set`, which says so where a value was given without it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as usual; ConfigError for a KEY=VALUE that belongs to no option."""
        ctx.allow_extra_args = True
        rest = super().parse_args(ctx, args)
        if values := [word for word in rest if "=" in word.lstrip("=")]:
            raise ConfigError(f"{values[0]}: a value is given with an option. Write --set {shlex.quote(values[0])}.")
        if rest:
            ctx.fail(f"Got unexpected extra argument{'s' * (len(rest) > 1)} ({' '.join(rest)})")
        return rest


class ListedOptions(SetOptions):
    """A command whose `listed` options take the words that follow, as far as they match: `--seeds 0 1 2` is read as
    `--seeds 0 --seeds 1 --seeds 2`, which click knows."""

    listed: ClassVar[dict[str, re.Pattern[str]]] = {"--seeds": SEEDS, "--branches": NAMES, "--methods": NAMES}

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
