"""A table of named objects. The error for an unknown name lists the known ones."""

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Generic, TypeVar

from .errors import FewbitsError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names -> objects of one kind, plus parsers for names that follow a grammar (`int4_g96`)."""

    def __init__(self, kind: str, error: type[FewbitsError]):
        self.kind = kind
        self.error = error
        self._things: dict[str, T] = {}
        self._parsers: list[Callable[[str], T | None]] = []

    def add(self, name: str, thing: T) -> T:
        """Register `thing`; each name can be registered once."""
        if name in self._things:
            raise self.error(f"{self.kind} {name!r} is already registered; choose another name")
        self._things[name] = thing
        return thing

    def add_parser(self, parse: Callable[[str], T | None]) -> None:
        """`parse(name)` returns an object for a name of its grammar, else None."""
        self._parsers.append(parse)

    def get(self, name: str) -> T:
        """The object with this name; raises the registry's error, with similar names, if it is unknown."""
        if name in self._things:
            return self._things[name]
        for parse in self._parsers:
            thing = parse(name)
            if thing is not None:
                return thing
        near = get_close_matches(name, self._things, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise self.error(f"unknown {self.kind} {name!r}; {hint}known: {', '.join(sorted(self._things))}")

    def __contains__(self, name: str) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def items(self) -> list[tuple[str, T]]:
        return list(self._things.items())
