"""Processes of a real service are killed and stopped at random under a queue of mixed jobs, some of them cancelled: all
others must complete once, with the scores and samples of a quiet run. All settings are the default ones.

`python tests/chaos/soak.py --minutes 10`; exit status 1 and a list of what went wrong if not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "scripts", "tests/support", "tests/fakes")]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

from chaos_box import Box, try_to_cancel  # noqa: E402
from outcomes import Outcome, attempts, outcome, read_samples  # noqa: E402
from tiny_checkpoints import make_tiny  # noqa: E402

from gpu_pool.lasting import RELATIVE_TOLERANCE, differences  # noqa: E402

Json = dict[str, Any]

QUEUE = 8
"""Jobs that are queued or run at any time."""
PAUSE_SECONDS = (0.5, 6.0)
"""Between two blows, drawn evenly."""
BLOWS = {
    ("worker", signal.SIGKILL): 10,
    ("evaluator", signal.SIGKILL): 6,
    ("desk", signal.SIGKILL): 2,
    ("server", signal.SIGKILL): 2,
    ("warden", signal.SIGKILL): 1,
    ("evaluator", signal.SIGSTOP): 1,
    ("worker", signal.SIGSTOP): 1,
}
"""Kind of process and signal, with how often it is chosen."""
CANCELLED_SHARE = 0.1
"""Of the blows, those that come with the cancellation of a job."""
PRIORITIES = (-2, 0, 0, 0, 3)


class Mix(NamedTuple):
    """One kind of job."""

    name: str
    options: Json


MIXES = (
    Mix("all tasks, same bits", {"limit": 40}),
    Mix("all tasks on two workers, same bits", {"limit": 150, "num_gpus": 2}),
    Mix("same bits without the cache", {"limit": 60, "use_cache": False}),
    Mix("scoring", {"tasks": ["chaos_choice"], "limit": 600, "deterministic": False, "use_cache": False}),
    Mix("generation on two workers", {"tasks": ["chaos_story"], "limit": 300, "deterministic": False, "num_gpus": 2}),
)


class Soak:
    """What was submitted, struck and found."""

    def __init__(self, box: Box, choose: random.Random) -> None:
        self._box = box
        self._choose = choose
        self._quiet: dict[str, Outcome] = {}
        self._open: dict[str, Mix] = {}
        self._cancelled: dict[str, bool] = {}
        """Jobs that were to be cancelled, and whether a server has answered that they are. If not, they had ended, or
        had been cancelled by a server that was killed before it could answer."""
        self.blows: Counter[str] = Counter()
        self.completed: Counter[str] = Counter()
        self.cancelled = 0
        self.attempts = 0
        self.problems: list[str] = []

    def learn(self) -> None:
        """What each mix leaves when nobody disturbs it."""
        for mix in MIXES:
            self._box.settle()
            self._quiet[mix.name] = outcome(self._box.completed(self._box.submit(**mix.options)))

    def run(self, seconds: float) -> None:
        """Strike for so long, then let all jobs end."""
        deadline = time.monotonic() + seconds
        next_blow = time.monotonic()
        while time.monotonic() < deadline or self._open:
            under_fire = time.monotonic() < deadline
            if under_fire and time.monotonic() >= next_blow:
                if self._open and self._choose.random() < CANCELLED_SHARE:
                    self._cancel(self._choose.choice(list(self._open)))
                self._strike()
                next_blow = time.monotonic() + self._choose.uniform(*PAUSE_SECONDS)
            while under_fire and len(self._open) < QUEUE:
                mix = self._choose.choice(MIXES)
                job_id = self._box.submit(**mix.options, priority=self._choose.choice(PRIORITIES))
                self._open[job_id] = mix
            self._harvest()
            time.sleep(0.1)

    def _strike(self) -> None:
        [(kind, number)] = self._choose.choices(list(BLOWS), list(BLOWS.values()))
        if pids := self._box.control.alive(kind):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._choose.choice(pids), number)
                self.blows[f"{number.name} to {kind}"] += 1

    def _cancel(self, job_id: str) -> None:
        """Ask for it; when the next blow comes before there is an answer, the next server is asked."""
        self._cancelled[job_id] = self._box.asked(lambda service: try_to_cancel(service, job_id))

    def _harvest(self) -> None:
        for job_id in list(self._open):
            job = self._box.asked(lambda service, job_id=job_id: service.job(job_id))
            if job["completed_at"]:
                mix = self._open.pop(job_id)
                if job_id in self._cancelled and job["status"] == "cancelled":
                    self.cancelled += 1
                    continue
                self.completed[mix.name] += job["status"] == "completed"
                self.problems += [f"job {job_id} ({mix.name}): {problem}" for problem in self._check(job, mix)]

    def _check(self, job: Json, mix: Mix) -> list[str]:
        if job["status"] != "completed" or self._cancelled.get(job["job_id"]):
            return [f"is {job['status']}: {job['error']}"]
        ends = [end for _, end in attempts(self._box.data_dir, job["job_id"])]
        self.attempts += len(ends)
        problems: list[str] = []
        if ends != ["requeued"] * (len(ends) - 1) + ["completed"]:
            problems.append(f"its attempts ended as {ends}")
        try:
            left = outcome(job)
        except AssertionError as error:
            return [*problems, f"its folder: {error}"]
        quiet = self._quiet[mix.name]
        if mix.options.get("deterministic", True):
            same = left == quiet
        else:
            samples = [{task: read_samples(file) for task, file in some.samples.items()} for some in (left, quiet)]
            pairs = ((left.metrics, quiet.metrics), samples)
            same = not any(differences(one, other, RELATIVE_TOLERANCE) for one, other in pairs)
        return problems if same else [*problems, "its scores or samples differ from the quiet run's"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of blows")
    parser.add_argument("--seed", type=int, default=0, help="of the choices; when they fall is up to the machine")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        model = Path(folder) / "model"
        make_tiny("model", model)
        with Box(Path(folder), model, evaluators=None, workers=2) as box:
            soak = Soak(box, random.Random(arguments.seed))
            soak.learn()
            soak.run(arguments.minutes * 60)
            log = box.service.log()
    print(f"blows: {dict(soak.blows)}; server starts: {box.starts}")
    print(f"completed: {soak.completed.total()} in {soak.attempts} attempts: {dict(soak.completed)}")
    print(f"cancelled: {soak.cancelled}")
    print("\n".join(soak.problems) or "every job ended once, with the scores and samples of the quiet run or cancelled")
    if soak.problems:
        print(log)
    return bool(soak.problems)


if __name__ == "__main__":
    sys.exit(main())
