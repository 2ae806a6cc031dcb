"""Named choices: one implementation a file, found by the name that plans, recipes and commands use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from lampq_rt.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to implementations of one protocol.

    Args:
        what: what an entry is, as an error message should call it ("range search", "metric").
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files an implementation under `name`; a taken name is our own mistake."""

        def add(entry: T) -> T:
            assert name not in self._entries, f"two {self.what}s are called {name!r}"
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry called `name`.

        Raises:
            UnknownNameError: no entry has that name; the message lists those that exist.
        """
        try:
            return self._entries[name]
        except KeyError:
            known = ", ".join(self.names())
            raise UnknownNameError(f"unknown {self.what} {name!r}; known: {known}") from None

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
