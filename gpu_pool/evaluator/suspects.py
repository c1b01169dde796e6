"""Which request kills its worker, or cannot be computed: chunks under suspicion are halved until it stands alone.

Workers die for many reasons, so a chunk is suspected only of deaths while it was computed, and is asked once more, by
itself, before it is taken apart: a request that kills costs two deaths for the chunk, one for each half that it is in,
and two when it is alone. Errors that a worker survives are a matter of the request, and need no second try.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_pool.evaluator.requests import Unit

MOST_DEATHS = 2
"""Workers that die on the same requests by coincidence."""


@dataclass(slots=True, eq=False)
class Suspect:
    """Units of one kind, one of which may be the cause of what went wrong."""

    units: Sequence[Unit]
    deaths: int = 0
    """Workers that died while they computed these, or, of a half, would have done without its other half."""

    def keep(self, units: Sequence[Unit]) -> None:
        """Some of the units are answered elsewhere; these are not."""
        self.units = units

    @property
    def kind(self) -> str:
        """Of all its units."""
        return self.units[0].kind


class Suspects:
    """Those that wait to be asked: each alone on its worker, in the order of the chunks that they come from."""

    def __init__(self) -> None:
        self._waiting: deque[Suspect] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> Suspect | None:
        """The next one."""
        return self._waiting.popleft() if self._waiting else None

    def put_back(self, suspect: Suspect) -> None:
        """Nothing was found out about it: it is asked next."""
        self._waiting.appendleft(suspect)

    def died(self, suspect: Suspect) -> Unit | None:
        """A worker died while it computed these; returns the unit that is the cause, once that is certain."""
        suspect.deaths += 1
        if suspect.deaths < MOST_DEATHS:
            self.put_back(suspect)
            return None
        return self._convict(suspect, deaths=MOST_DEATHS - 1)

    def failed(self, suspect: Suspect) -> Unit | None:
        """A worker could not compute these, and lives; returns the unit that is the cause, once that is certain."""
        return self._convict(suspect, deaths=suspect.deaths)

    def _convict(self, suspect: Suspect, deaths: int) -> Unit | None:
        """The only unit, or None and the halves wait, each suspected of so many `deaths` if it is of several units."""
        units = suspect.units
        if len(units) == 1:
            return units[0]
        middle = len(units) // 2
        for half in (units[middle:], units[:middle]):
            self.put_back(Suspect(half, deaths if len(half) > 1 else 0))
        return None
