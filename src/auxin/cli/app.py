"""The application: its options that several commands share, and how it ends when something is wrong."""

import contextlib
import os
import shlex
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from typer.core import TyperGroup

from auxin.cli.printing import escaped, to_stderr
from auxin.errors import AuxinError, ConfigError, reason, shown
from auxin.interruption import LAUNCHED, Interrupted, ended_by_signals


class _Commands(TyperGroup):
    """Says in the words of all other messages what is wrong with an option's value."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            from pydantic import ValidationError

            from auxin.field_errors import wrong_value

            if isinstance(error.__cause__, ValidationError):
                error.message = wrong_value(error.__cause__)
            raise


app = typer.Typer(
    name="auxin",
    cls=_Commands,
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
_PATIENCE = 5.0
"""Seconds in which a process that torchrun has started says what is wrong in the others, too."""
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="Folder of a checkpoint.")]


def main() -> None:
    """Entry point; see `_main`. Of several processes each ends without the interpreter's own end, at which torch now
    and then turned a finished run into SIGABRT ("terminate called without an active exception")."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        _main()
        return
    code = 0
    try:
        _main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _main() -> None:
    """An error of the user's is one message and an exit code, never a traceback (unless AUXIN_DEBUG=1)."""
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
        if _speaks() or not (isinstance(error, Interrupted) or _said_elsewhere()):
            Console(stderr=True, highlight=False).print(f"[bold red]auxin:[/] {escaped(message)}", soft_wrap=True)
        sys.exit(error.exit_code if isinstance(error, AuxinError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _speaks() -> bool:
    """Of processes that torchrun has started one of a machine speaks for all: what goes wrong in another it is told."""
    if os.environ.get("RANK", "0") == "0":
        return True
    from auxin.training.ranks import speaks

    return speaks()


def _said_elsewhere() -> bool:
    """Whether the process that speaks for this one has said what is wrong in both. torchrun ends all as soon as one has
    ended, so that it goes first; where it does not end in time, what is wrong is wrong here alone, and said here."""
    if LAUNCHED not in os.environ:
        return True
    if not hasattr(signal, "sigtimedwait"):  # macOS has none
        return False
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    return signal.sigtimedwait({signal.SIGTERM}, _PATIENCE) is not None


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


def refuse_swapped(swapped: bool, command: str, first: object, second: object) -> None:
    """ConfigError that says how it is written where two arguments of `command` were given the other way round."""
    if swapped:
        raise ConfigError(
            f"{shown(str(first))} and {shown(str(second))} stand the other way round. Give "
            f"{shlex.join(['auxin', command, str(second), str(first)])}, with the same options."
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
    if not _speaks():
        return
    if issubclass(category, UserWarning) and Path(filename).is_relative_to(Path(__file__).parents[1]):
        to_stderr(f"auxin: warning: {message}")
    else:
        to_stderr(warnings.formatwarning(message, category, filename, lineno, line).rstrip("\n"))
