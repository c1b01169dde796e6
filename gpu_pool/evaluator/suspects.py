"""Which request kills its worker, or cannot be computed: chunks under suspicion are halved until it stands alone.

Workers die for many reasons, so a chunk is suspected only of deaths while it was computed, and is asked once more, by
itself, before it is taken apart: a request that kills costs two deaths for the chunk, one for each half that it is in,
and four when it is alone. Errors that a worker survives are a matter of the request, and need no second try.

No score is to lack a request on which workers were killed by somebody. Where that is how they ended, more are needed
until a request alone is the cause: eight that ended soon after they had begun it, which chance does not bring about, or
thirty that ended at any time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_pool.evaluator.requests import Unit

MOST_DEATHS = 2
"""Workers that die on the same requests, which are then taken apart."""
MOST_DEATHS_ALONE = 4
"""Workers that die by themselves on a request alone, which is then the cause."""
MOST_SOON_KILLS_ALONE = 8
"""Workers that are killed, by somebody as it seems, within SOON_SECONDS of a request alone."""
MOST_KILLS_ALONE = 30
"""Workers that are killed from outside at any time after they have begun a request alone."""
SOON_SECONDS = 3.0


@dataclass(slots=True, eq=False)
class Suspect:
    """Units of one kind, one of which may be the cause of what went wrong."""

    units: Sequence[Unit]
    deaths: int = 0
    """Workers that died while they computed these, or, of a half, would have done without its other half."""
    kills: int = 0
    """Of a request alone, further ones that somebody killed."""
    soon_kills: int = 0
    """Of those, the ones that were killed soon after they had begun it."""

    def keep(self, units: Sequence[Unit]) -> None:
        """Some of the units are answered elsewhere; these are not."""
        self.units = units

    def part(self, units: Sequence[Unit]) -> Suspect:
        """Some of the units, suspected by themselves: a single one of nothing yet, several of one death at most."""
        return Suspect(units, min(self.deaths, MOST_DEATHS - 1) if len(units) > 1 else 0)

    @property
    def is_alone(self) -> bool:
        """Whether there is but one."""
        return len(self.units) == 1

    @property
    def is_guilty(self) -> bool:
        """Whether so many workers were lost on them that it is certain that one of them is the cause."""
        if not self.is_alone:
            return self.deaths >= MOST_DEATHS
        is_killing = self.soon_kills >= MOST_SOON_KILLS_ALONE or self.kills >= MOST_KILLS_ALONE
        return self.deaths >= MOST_DEATHS_ALONE or is_killing

    @property
    def kind(self) -> str:
        """Of all its units."""
        return self.units[0].kind


class Suspects:
    """Those that wait to be asked: each alone on its worker, in the order of the chunks that they come from."""

    def __init__(self) -> None:
        self._waiting: deque[Suspect] = deque()
        self._known: dict[Unit, Suspect] = {}
        """What each unit that ever was suspected belonged to last."""

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> Suspect | None:
        """The next one."""
        return self._waiting.popleft() if self._waiting else None

    @property
    def waiting(self) -> list[Unit]:
        """The units of all that wait."""
        return [unit for suspect in self._waiting for unit in suspect.units]

    def put_back(self, suspect: Suspect) -> None:
        """Nothing was found out about it: it is asked next."""
        self._waiting.appendleft(suspect)
        self._known.update(dict.fromkeys(suspect.units, suspect))

    def recall(self, units: Sequence[Unit]) -> list[Unit]:
        """Returns those of the units that were never suspected. The others, which other jobs were to answer and did
        not, wait again as what is known of them has it, or jobs would take turns in losing workers on them."""
        before: dict[Suspect, list[Unit]] = {}
        for unit in units:
            if suspect := self._known.get(unit):
                before.setdefault(suspect, []).append(unit)
        for suspect, some in before.items():
            self.put_back(suspect if set(some) == set(suspect.units) else suspect.part(some))
        return [unit for unit in units if unit not in self._known]

    def died(self, suspect: Suspect, *, from_outside: bool = False, after_s: float = 0.0) -> Unit | None:
        """A worker died `after_s` seconds after it had begun these; returns the unit that is the cause, once that is
        certain. `from_outside`: somebody killed it."""
        if from_outside and suspect.is_alone:
            suspect.kills += 1
            suspect.soon_kills += after_s < SOON_SECONDS
        else:
            suspect.deaths += 1
        if suspect.is_guilty:
            return self.failed(suspect)
        self.put_back(suspect)
        return None

    def failed(self, suspect: Suspect) -> Unit | None:
        """A worker could not compute these, and lives; returns the unit that is the cause, once that is certain.

        That is the only unit; of several the halves wait.
        """
        units = suspect.units
        if len(units) == 1:
            return units[0]
        middle = len(units) // 2
        for half in (units[middle:], units[:middle]):
            self.put_back(suspect.part(half))
        return None
