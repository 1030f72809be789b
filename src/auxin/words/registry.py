"""Things of one kind that are called by name: this package's own, and those of other packages.

Methods, bricks, anatomies and whatever else a user may add are found in the same way. The modules of one package of
ours hold our own; another package names its own in an entry point group. What another package breaks is one warning
that names it, and harms nothing else.
"""

import importlib
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from auxin.errors import AuxinError, ConfigError, unknown_name

Thing = TypeVar("Thing")
NAME = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")


class Registry(Generic[Thing]):
    """The things of one kind.

    Args:
        kind: what one of them is called in messages, for example "method".
        package: whose modules hold our own, for example "auxin.methods"; imported when a name is asked for that is not
            known yet, or all names are.
        things: what a module, or what an entry point of another package names, holds: (name, thing) pairs. Raises
            TypeError, with the reason, where that is none. Default: nothing, for things that add themselves when their
            module is imported.
        error: raised for an unknown name.
        plural: of `kind`; default: with an s. Entry points of the group "auxin.PLURAL" name those of other packages.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        things: Callable[[Any], Iterable[tuple[str, Thing]]] = lambda loaded: (),
        error: type[AuxinError] = ConfigError,
        plural: str | None = None,
    ) -> None:
        self.kind, self.group = kind, f"auxin.{plural or kind + 's'}"
        self._package, self._things, self._error = package, things, error
        self._own: dict[str, Thing] = {}
        self._complete = False

    def add(self, name: str, thing: Thing) -> None:
        """Call `thing` by `name` from now on; TypeError when a thing of another module has that name."""
        had = self._own.get(name)
        if had is not None and getattr(had, "__module__", None) != getattr(thing, "__module__", None):
            raise TypeError(f"{had!r} is a {self.kind} of the name {name!r} already; rename one of them")
        self._own[name] = thing

    def all(self) -> dict[str, Thing]:
        """Every thing that is installed, by name, in the order of the names.

        What another package offers and can't be loaded is left out with one warning that names the package.
        """
        found = dict(self._ours())
        owners = dict.fromkeys(found, "auxin")
        for entry in entry_points(group=self.group):
            package = entry.dist.name if entry.dist is not None else entry.value.partition(":")[0]
            try:
                for name, thing in self._offered(entry):
                    if owners.get(name, package) != package:
                        raise TypeError(f"{owners[name]} has a {self.kind} of that name already; rename one of them")
                    found[name], owners[name] = thing, package
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                # Another package's fault must not take what works with it, nor end the program.
                warnings.warn(
                    f"The {self.kind} {entry.name!r} of the package {package} was left out: {type(error).__name__}: "
                    f"{error}. Mend or uninstall {package}.",
                    stacklevel=2,
                )
        return dict(sorted({**found, **self._own}.items()))

    def find(self, name: str) -> Thing:
        """The thing called `name`; the registry's error, with the nearest names, when there is none."""
        thing = self.get(name)
        if thing is None:
            known = unknown_name(self.kind, name, self.all())
            raise self._error(f"{known} If another package has it, install that.")
        return thing

    def get(self, name: str) -> Thing | None:
        """The thing called `name`, if there is one."""
        return self._own[name] if name in self._own else self.all().get(name)

    def _ours(self) -> Mapping[str, Thing]:
        if not self._complete:
            package = importlib.import_module(self._package)
            for info in pkgutil.walk_packages(package.__path__, f"{self._package}."):
                if not info.ispkg:
                    self._own |= self._things(importlib.import_module(info.name))
            self._complete = True
        return self._own

    def _offered(self, entry: EntryPoint) -> list[tuple[str, Thing]]:
        offered = list(self._things(entry.load()))
        if wrong := next((name for name, _ in offered if not NAME.fullmatch(name)), None):
            raise TypeError(
                f"{wrong!r} is no {self.kind}'s name: use lower case letters, digits, and hyphens or underscores"
            )
        return offered
