"""Inputs that are almost right: recipes, plans and command lines, changed at random as people or scripts do."""

import copy
import random
from typing import Any

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 0.5, -0.0, 1e-300, 1e308, float("inf"), float("-inf"), float("nan")),
    *(10**6, 2**31, 2**63, 10**12, 10**30, 10**300, -(10**18)),
    *("", " ", "x", "nonsense", "..", "/", "../../x", "a/b", "~", "*", "null", "1e3", "0x10", "1:30", "2020-01-01"),
    *(
        "\u00e9",
        "e\u0301",
        "\u202e\u200f",
        "\U0001f331",
        "\ufeff",
        "\u0000",
        "\x1b[31m",
        "[bold]x[/]",
        "a\nb",
        "%s {x}",
    ),
    *("y" * 3000, [], {}, [[]], [None], {"kind": "x"}, {"": 1}, [1, 2, 3], {"a": {"b": {}}}),
]
"""Values that some field somewhere does not take."""
FRAGMENTS = [
    *("2020-99-99", "2020-01-01", "0x_", "0b", "1__", "9" * 5000, "!!int x", "!!int ''", "!!float x", "!!bool x"),
    *(
        "!!binary '*'",
        "!!binary aGk=",
        "!!timestamp x",
        "!!null x",
        "!!set {a}",
        "!!omap [a: 1]",
        "!!python/name:os.system",
    ),
    *("!!python/object/apply:os.system [ls]", "!x y", "&a *a", "*a", "*nowhere", "&a [*a]", "<<: 1", "{<<: [1]}"),
    *(
        "[" * 3000,
        "{a: " * 400,
        "- " * 300,
        "'",
        '"',
        "\t",
        "\t- x",
        "@x",
        "`x`",
        "%YAML 9.9",
        "---",
        "...",
        "? [a]: b",
    ),
    *(
        "{[a]: b}",
        "{a: 1, a: 2}",
        "{1: a, true: b}",
        "|",
        ">-",
        "# x",
        ": :",
        "\u2028",
        "\u0085",
        "\x07",
        "\ufeff",
        "\ud800",
    ),
]
"""Pieces of YAML that are broken, or mean what their writer did not think of."""


def misspelt(draw: random.Random, word: str) -> str:
    """`word` with one letter dropped, doubled, swapped or replaced."""
    if not word:
        return "x"
    place = draw.randrange(len(word))
    swapped = word[:place] + word[place + 1 : place + 2] + word[place] + word[place + 2 :]
    return draw.choice(
        [word[:place] + word[place + 1 :], word[:place] + word[place] + word[place:], swapped, word + "s"]
    )


def mutated(draw: random.Random, values: Any) -> Any:
    """A copy of nested `values`, changed in one place, or in several."""
    values = copy.deepcopy(values)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        holders = list(_holders(values))
        holder = draw.choice(holders)
        if isinstance(holder, dict):
            _mutate_mapping(draw, holder, holders)
        else:
            _mutate_list(draw, holder, holders)
    return values


def _holders(values: Any) -> Any:
    """The mappings and lists in `values` that hold something."""
    if isinstance(values, dict | list) and values:
        yield values
        for value in list(values.values() if isinstance(values, dict) else values):
            yield from _holders(value)


def _mutate_mapping(draw: random.Random, holder: dict[Any, Any], holders: list[Any]) -> None:
    key = draw.choice(list(holder))
    match draw.randrange(6):
        case 0:
            del holder[key]
        case 1:
            holder[misspelt(draw, str(key))] = holder.pop(key)
        case 2:
            holder[draw.choice(["extra", "", 5, None, True, 0.5, "y" * 3000, "\u202e", "kind", "name"])] = draw.choice(
                ODD
            )
        case 3 if isinstance(holder[key], str):
            holder[key] = misspelt(draw, holder[key])
        case 4:
            holder[key] = copy.deepcopy(draw.choice(holders))
        case _:
            holder[key] = copy.deepcopy(draw.choice(ODD))


def _mutate_list(draw: random.Random, holder: list[Any], holders: list[Any]) -> None:
    place = draw.randrange(len(holder))
    match draw.randrange(5):
        case 0:
            del holder[place]
        case 1:
            holder.insert(place, copy.deepcopy(holder[place]))
        case 2:
            holder[place] = copy.deepcopy(draw.choice(ODD))
        case 3:
            holder.append(copy.deepcopy(draw.choice(holders)))
        case _:
            holder.extend(copy.deepcopy([holder[place]]) * draw.choice([5, 3000]))


def mutated_text(draw: random.Random, text: str) -> str:
    """YAML `text` with lines dropped, doubled, moved or indented, or with a piece put in or in place of a value."""
    for _ in range(draw.choice([1, 1, 2])):
        lines = text.split("\n")
        place = draw.randrange(len(lines))
        line = lines[place]
        match draw.randrange(7):
            case 0:
                del lines[place]
            case 1:
                lines.insert(place, line)
            case 2:
                lines[place] = " " * draw.randrange(4) + line.lstrip()
            case 3:
                cut = draw.randrange(len(line) + 1)
                lines[place] = line[:cut] + draw.choice(FRAGMENTS) + line[cut:]
            case 4:
                lines = lines[:place]
            case _:
                lines[place] = line.partition(":")[0] + ": " + draw.choice(FRAGMENTS)
        text = "\n".join(lines)
    return text


WORDS = [
    *("", "-", "--", "---", "-o", "--output", "--set", "--set=", "--json", "--seed", "--seeds", "--help", "--versionn"),
    *(
        "=",
        "a=",
        "=b",
        "a.b.c=1",
        "a..b=1",
        ".=1",
        "0=1",
        "a=[",
        "a=&x [*x]",
        "a={b: 1, b: 2}",
        "a=2020-99-99",
        "steps=3",
    ),
    *(
        "warmup_steps=3",
        "training.stepz=1",
        "branches.0=1",
        "branches.-1.name=x",
        "branches.99.name=x",
        "name=" + "y" * 3000,
    ),
    *(
        "nonsense",
        "-1",
        "0",
        "1",
        "99999999999999999999",
        "1e999",
        "nan",
        "inf",
        "0x",
        "\u0663",
        "/dev/null",
        "/proc/nope",
    ),
    *(
        "..",
        "/",
        "~nobody",
        "nowhere",
        "nowhere/x.yaml",
        "a\nb",
        "\udcff",
        "\u202e",
        "[red]x[/]",
        "y" * 5000,
        "*",
        "%s",
    ),
]
"""Words that a command line may have by mistake."""


def mutated_words(draw: random.Random, words: list[str], files: list[str]) -> list[str]:
    """A command line's words, some left out, doubled, misspelt, or replaced by odd ones or other `files`; values more
    often than options, which are soon refused."""
    words = list(words)
    for _ in range(draw.choice([1, 1, 2, 3])):
        values = [place for place in range(1, len(words)) if not words[place].startswith("-")]
        place = draw.choice(values) if values and draw.random() < 0.7 else draw.randrange(1, len(words) + 1)
        here = words[place] if place < len(words) else ""
        key, equals, _ = here.partition("=")
        match draw.randrange(8):
            case 0:
                del words[place : place + 1]
            case 1:
                words.insert(place, here)
            case 2:
                words[place : place + 1] = [misspelt(draw, here)]
            case 3:
                words.insert(place, draw.choice(WORDS))
            case 4 | 5 if equals:
                words[place] = f"{key}={draw.choice([str(draw.choice(ODD)), draw.choice(FRAGMENTS)])}"
            case 4 | 5:
                words[place : place + 1] = [draw.choice(files)]
            case _:
                words[place : place + 1] = [draw.choice(WORDS)]
    return words
