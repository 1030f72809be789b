"""The application: its options that several commands share, and how it ends when something is wrong."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console

from auxin.cli.printing import escaped, to_stderr
from auxin.errors import AuxinError, CheckpointError, reason, shown
from auxin.interruption import ended_by_signals

app = typer.Typer(
    name="auxin",
    help="Change the size of a transformer without starting over: grow it, prove what was preserved, keep the books.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not hold something else.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; repeatable.")
]
LARGEST_SEED = 2**63 - 1
ASIDE = (".", "damaged-", "former-")
"""What the names of folders begin with that hold no checkpoint to go on from."""
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="Folder of a checkpoint.")]


def main() -> None:
    """Entry point: an error of the user's is one message and an exit code, never a traceback (unless AUXIN_DEBUG=1)."""
    try:
        try:
            with warnings.catch_warnings(), ended_by_signals():
                warnings.showwarning = _show_warning
                app()
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be dealt with, and not when the interpreter ends
    except BrokenPipeError:
        # The reader of a pipe went away (`auxin show ... | head`): no more output is wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (AuxinError, OSError) as error:
        if os.environ.get("AUXIN_DEBUG"):
            raise
        message = str(error) if isinstance(error, AuxinError) else _of_a_file(error)
        Console(stderr=True, highlight=False).print(f"[bold red]auxin:[/] {escaped(message)}", soft_wrap=True)
        sys.exit(error.exit_code if isinstance(error, AuxinError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _of_a_file(error: OSError) -> str:
    """An error of the system's that no command foresaw, for whoever can mend it."""
    path = next((name for name in (error.filename2, error.filename) if name is not None), None)
    told = reason(error) if path is None else f"{shown(str(path), quoted=False)}: {reason(error)}"
    return f"{told}. Give another path, or mend what is in the way (AUXIN_DEBUG=1 shows where it happened)."


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        import importlib.metadata

        print(importlib.metadata.version("auxin"))
        raise typer.Exit


def model_folder(folder: Path) -> Path:
    """`folder`; where it is the folder of a run (or of a stage), an error that names the checkpoints in it."""
    marks = ("recipe.yaml", "branches", "checkpoints", "checkpoint")
    if (folder / "config.json").is_file() or not any((folder / mark).exists() for mark in marks):
        return folder
    configs = sorted(path for path in folder.rglob("config.json") if not path.parent.name.startswith(ASIDE))
    # The last of each stage: names of checkpoints sort by step.
    newest = {path.parent.parent: path.parent for path in configs}
    if not newest:
        raise CheckpointError(f"{folder} is the folder of a run, which has saved no checkpoint yet.")
    raise CheckpointError(
        f"{folder} is the folder of a run, not of a checkpoint. Give one of those in it: "
        + ", ".join(map(str, newest.values()))
    )


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of the package's own is for whoever runs the command: one line, without the place in the code."""
    if issubclass(category, UserWarning) and Path(filename).is_relative_to(Path(__file__).parents[1]):
        to_stderr(f"auxin: warning: {message}")
    else:
        to_stderr(warnings.formatwarning(message, category, filename, lineno, line).rstrip("\n"))
