"""Methods and profilers of other packages, found through Python entry points.

A package names them in its `pyproject.toml`:

    [project.entry-points."adaptive_lora.methods"]
    my_method = "my_package:MyMethod"

Names are read from the installed packages' metadata; a package is imported when its name is used.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Generic, TypeVar

from adaptive_lora.errors import ConfigError

T = TypeVar("T")


_MOVED = {
    "adaptive_lora.importance": "adaptive_lora.methods.importance",
    "adaptive_lora.sites": "adaptive_lora.allocation.site",
    "adaptive_lora.allocation.demand": "adaptive_lora.allocation.request",
}
"""Module that plug-ins for version 0.2 and earlier import -> where it is; what is inside a package moved with it."""


class _MovedModules(MetaPathFinder, Loader):
    """Finds modules that have moved under their earlier names."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return a specification where the name is an earlier one."""
        return ModuleSpec(name, self) if self._place(name) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module where it is now."""
        place = self._place(spec.name)
        logging.getLogger(__name__).warning(
            "%s has moved to %s; a plug-in imports it by its old name.", spec.name, place
        )
        return importlib.import_module(place)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: it has run under its own name."""

    @staticmethod
    def _place(name: str) -> str:
        return next((new + name[len(old) :] for old, new in _MOVED.items() if f"{name}.".startswith(f"{old}.")), "")


_MOVED_MODULES = _MovedModules()


@cache
def _offers(group: str) -> Mapping[str, tuple[EntryPoint, ...]]:
    """Return name -> entry points of a group that have it."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=group):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def package_of(entry: EntryPoint) -> str:
    """Return the package that has an entry point, as `name==version`."""
    return "unknown==0" if entry.dist is None else f"{entry.dist.name}=={entry.dist.version}"


class PluginTable(Mapping[str, T], Generic[T]):
    """A table of this package's own entries and those that other packages add to a group."""

    def __init__(self, own: Mapping[str, T], group: str, read: Callable[[EntryPoint], T]) -> None:
        """Make a table; nothing is looked up yet.

        Args:
            own: entries of this package.
            group: entry-point group of the added entries.
            read: returns the object of an entry point, or raises if it is not valid.
        """
        self._own, self._group, self._read = own, group, read
        self._loaded: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        """Return an entry; another package is imported when one of its entries is first read.

        Raises:
            ConfigError: two packages use the name, or a package cannot be imported.
        """
        entry = self._entry(name)
        if entry is None:
            return self._own[name]
        if name not in self._loaded:
            try:
                self._loaded[name] = self._read(entry)
            except Exception as error:  # importing another package's module can fail in any way
                raise ConfigError(
                    f"'{name}' ({self._group}) of the package {package_of(entry)} cannot be used: "
                    f"{type(error).__name__}: {error}. Fix or uninstall that package."
                ) from error
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a name, without importing anything."""
        return name in self._own or name in _offers(self._group)

    def __iter__(self) -> Iterator[str]:
        """Yield own names, then those of other packages."""
        yield from self._own
        yield from sorted(set(_offers(self._group)) - set(self._own))

    def __len__(self) -> int:
        """Return the number of names."""
        return len(set(self._own) | set(_offers(self._group)))

    def package(self, name: str) -> str | None:
        """Return the package that adds a name, as `name==version`; None for own entries."""
        entry = self._entry(name)
        return None if entry is None else package_of(entry)

    def usable(self) -> Iterator[tuple[str, T]]:
        """Yield names and entries; entries that cannot be used are logged and left out."""
        for name in self:
            try:
                yield name, self[name]
            except ConfigError as error:
                logging.getLogger(__name__).warning(str(error))

    def name_of(self, kind: object) -> str:
        """Return the name of an entry that was read from this table."""
        entries = {**self._own, **self._loaded}.items()
        return next(name for name, entry in entries if entry is kind)

    def _entry(self, name: str) -> EntryPoint | None:
        """Return the only entry point of a name, or None where this package has it.

        Raises:
            ConfigError: several packages use the name.
        """
        offers = _offers(self._group).get(name, ())
        if len(offers) + (name in self._own) > 1:
            rivals = ["adaptive-lora itself"] if name in self._own else []
            rivals += [package_of(entry) for entry in offers]
            raise ConfigError(
                f"'{name}' ({self._group}) is the name of several: {', '.join(rivals)}; required "
                "one, so rename it in the other package or uninstall that."
            )
        return offers[0] if offers else None


def checked(
    check: Callable[[Any], str | None], adopt: Callable[[Any], Any] = lambda found: found
) -> Callable[[EntryPoint], Any]:
    """Return a reader that imports an entry point and checks its object.

    Args:
        check: returns the problem with an object, or None.
        adopt: converts an object to the entry; by default the object is the entry.
    """

    def read(entry: EntryPoint) -> Any:
        if _MOVED_MODULES not in sys.meta_path:
            sys.meta_path.append(_MOVED_MODULES)
        found = entry.load()
        problem = check(found)
        if problem is not None:
            raise TypeError(problem)
        return adopt(found)

    return read
