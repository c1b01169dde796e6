"""Steps of the journal at which a process may be killed: passages of them are written down, and one may be armed.

Runs inside the server's processes, whose product code knows nothing of it. What they share is a folder: `passages` has
a line a passage, `plan` says at which whom to kill or stop, `roles` who is who, `fired` what has been carried out.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import select
import signal
import time
from pathlib import Path
from typing import NamedTuple

from gpu_pool.file_lock import alone

FOLDER_VARIABLE = "CHAOS_FOLDER"
"""The shared folder."""
RANKS_VARIABLE = "CHAOS_RANKS"
"""Over how many processes every worker shards its model; on the CPU it is one otherwise."""


class Point(NamedTuple):
    """A passage of a step: the n-th of those that are called the same."""

    process: str
    """The kind of process that passes: server, desk, evaluator, worker."""
    step: str
    number: int
    """From 1 on."""

    def __str__(self) -> str:
        return f"{self.step} #{self.number} in the {self.process}"


class Plan(NamedTuple):
    """Kill a process of the kind `victim` at `point`, or stop it; it is dead, or stopped, before the step goes on."""

    point: Point
    victim: str
    signal: int = signal.SIGKILL
    """Or SIGSTOP."""


class Control:
    """The shared folder, from both sides."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock, self._passages = folder / "control", folder / "passages"
        self._plan, self._fired = folder / "plan", folder / "fired"
        self._roles = folder / "roles"
        self._roles.mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------------------- the test's side

    def arm(self, plan: Plan | None) -> None:
        """Forget all passages, and kill as planned from now on."""
        with alone(self._lock):
            self._passages.write_text("")
            self._fired.unlink(missing_ok=True)
            self._plan.unlink(missing_ok=True)
            if plan is not None:
                self._plan.write_text(json.dumps(plan))

    def has_fired(self) -> bool:
        """Whether the plan was carried out."""
        return self._fired.exists()

    def passages(self) -> list[Point]:
        """Those since `arm`, in order."""
        with alone(self._lock):
            return self._read()

    def alive(self, kind: str) -> list[int]:
        """Pids of the living processes of that kind, oldest first. (The warden, which is no child as others are, says
        by its command line who it is.)"""
        if kind == "warden":
            named = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _says(path, b"gpu_pool.warden")]
            return sorted(pid for path in named if self._is_ours(pid := int(path.parent.name)))
        found = [path for path in self._roles.glob(f"{kind}.*") if self._is_ours(int(path.suffix[1:]))]
        return [int(path.suffix[1:]) for path in sorted(found, key=lambda path: path.stat().st_mtime_ns)]

    def _is_ours(self, pid: int) -> bool:
        """Whether the number still means a process of this server, and one that has not ended."""
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()  # empty once it has ended
        except OSError:
            return False
        return f"{FOLDER_VARIABLE}={self.folder}".encode() in environment.split(b"\0")

    # ---------------------------------------------------------------- the processes' side

    def enter(self) -> str:
        """Say that this process lives; returns its kind."""
        name = multiprocessing.current_process().name
        kind = "server" if name == "MainProcess" else re.split(r"[- ]", name)[0]
        (self._roles / f"{kind}.{os.getpid()}").touch()
        return kind

    def passage(self, kind: str, step: str) -> None:
        """This process, of that `kind`, is at `step`."""
        with alone(self._lock):
            number = sum((point.process, point.step) == (kind, step) for point in self._read()) + 1
            with self._passages.open("a") as file:
                file.write(json.dumps((kind, step, number)) + "\n")
            plan = self._planned()
            if plan is not None and plan.point == (kind, step, number):
                self._carry_out(plan)

    def _read(self) -> list[Point]:
        if not self._passages.exists():
            return []
        return [Point(*json.loads(line)) for line in self._passages.read_text().splitlines()]

    def _planned(self) -> Plan | None:
        if not self._plan.exists():
            return None
        point, *how = json.loads(self._plan.read_text())
        return Plan(Point(*point), *how)

    def _carry_out(self, plan: Plan) -> None:
        victims = self.alive(plan.victim)
        if not victims:
            return
        self._plan.unlink()
        self._fired.write_text(f"{plan.victim} {victims[0]}")
        descriptor = os.pidfd_open(victims[0])
        signal.pidfd_send_signal(descriptor, plan.signal)
        if plan.signal == signal.SIGKILL:
            select.select([descriptor], [], [])
        while plan.signal == signal.SIGSTOP and _state_of(victims[0]) != "T":
            time.sleep(0.001)
        os.close(descriptor)


def _says(path: Path, word: bytes) -> bool:
    try:
        return word in path.read_bytes().split(b"\0")
    except OSError:
        return False


def _state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def control_of_this_process() -> Control:
    """The folder that the test named."""
    return Control(Path(os.environ[FOLDER_VARIABLE]))
