"""One name space for the tasks of two libraries.

lm-eval's names (the operator's own tasks are among them) mean what they say. So do lmms-eval's, unless lm-eval has the
same one: then the name alone is lm-eval's. `lm:NAME` and `lmms:NAME` always choose.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

Library = Literal["lm", "lmms"]


class TaskNames:
    """What each name means."""

    def __init__(self, lm: Collection[str], lmms: Collection[str]) -> None:
        """The names that each library has: tasks, groups and tags."""
        self._lm = lm
        self._lmms = lmms

    def find(self, name: str) -> tuple[Library, str] | None:
        """The library that a request's name means and its name there; None: there is no such task."""
        if name in self._lm:
            return "lm", name
        if name in self._lmms:
            return "lmms", name
        library, colon, rest = name.partition(":")
        if colon and library == "lm" and rest in self._lm:
            return "lm", rest
        if colon and library == "lmms" and rest in self._lmms:
            return "lmms", rest
        return None

    def full(self, library: Library, name: str) -> str:
        """The one name by which requests, results and files call a library's task."""
        return f"lmms:{name}" if library == "lmms" and name in self._lm else name

    def note(self, library: Library, name: str) -> str | None:
        """What a person should know who sees this name in a list."""
        if name not in self._lm or name not in self._lmms:
            return None
        if library == "lm":
            return f"lm-eval's; lmms-eval's task of this name is lmms:{name}"
        return f"lmms-eval's; {name} alone is lm-eval's"
