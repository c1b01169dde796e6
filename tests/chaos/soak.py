"""Processes of a real service die at random under a queue of mixed jobs: every job must complete once, with the scores
and samples of a quiet run.

`python tests/chaos/soak.py --minutes 10`; exit status 1 and a list of what went wrong if not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "scripts", "tests/support", "tests/fakes")]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

from chaos_box import Box  # noqa: E402
from outcomes import Outcome, attempts, outcome, read_samples  # noqa: E402

from gpu_pool.lasting import RELATIVE_TOLERANCE, differences  # noqa: E402

Json = dict[str, Any]

SETTINGS = "max_attempts = 1000\n"  # bad luck must not make a job fail
QUEUE = 8
"""Jobs that are queued or run at any time."""
PAUSE_SECONDS = (0.5, 6.0)
"""Between two kills, drawn evenly."""
WEIGHTS = {"worker": 10, "evaluator": 6, "desk": 2, "server": 2}


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
    """What was submitted, killed and found."""

    def __init__(self, box: Box, choose: random.Random) -> None:
        self._box = box
        self._choose = choose
        self._quiet: dict[str, Outcome] = {}
        self._open: dict[str, Mix] = {}
        self.kills: Counter[str] = Counter()
        self.completed: Counter[str] = Counter()
        self.attempts = 0
        self.problems: list[str] = []

    def learn(self) -> None:
        """What each mix leaves when nobody disturbs it."""
        for mix in MIXES:
            self._box.settle()
            self._quiet[mix.name] = outcome(self._box.completed(self._box.submit(**mix.options)))

    def run(self, seconds: float) -> None:
        """Kill for so long, then let all jobs end."""
        deadline = time.monotonic() + seconds
        next_kill = time.monotonic()
        while time.monotonic() < deadline or self._open:
            under_fire = time.monotonic() < deadline
            if under_fire and time.monotonic() >= next_kill:
                self._kill()
                next_kill = time.monotonic() + self._choose.uniform(*PAUSE_SECONDS)
            while under_fire and len(self._open) < QUEUE:
                mix = self._choose.choice(MIXES)
                self._open[self._box.submit(**mix.options)] = mix
            self._harvest()
            time.sleep(0.1)

    def _kill(self) -> None:
        [kind] = self._choose.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if pids := self._box.control.alive(kind):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._choose.choice(pids), signal.SIGKILL)
                self.kills[kind] += 1

    def _harvest(self) -> None:
        for job_id in list(self._open):
            job = self._box.asked(lambda service, job_id=job_id: service.job(job_id))
            if job["completed_at"]:
                mix = self._open.pop(job_id)
                self.completed[mix.name] += job["status"] == "completed"
                self.problems += [f"job {job_id} ({mix.name}): {problem}" for problem in self._check(job, mix)]

    def _check(self, job: Json, mix: Mix) -> list[str]:
        if job["status"] != "completed":
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
    parser.add_argument("--minutes", type=float, default=10.0, help="of killing")
    parser.add_argument("--seed", type=int, default=0, help="of the choices; when they fall is up to the machine")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        model = Path(folder) / "model"
        subprocess.run([sys.executable, ROOT / "tests" / "make_tiny_model.py", model], check=True, capture_output=True)
        with Box(Path(folder), model, evaluators=3, workers=2, settings=SETTINGS) as box:
            soak = Soak(box, random.Random(arguments.seed))
            soak.learn()
            soak.run(arguments.minutes * 60)
            log = box.service.log()
    print(f"killed: {dict(soak.kills)}; server starts: {box.starts}")
    print(f"completed: {soak.completed.total()} in {soak.attempts} attempts: {dict(soak.completed)}")
    print("\n".join(soak.problems) or "every job completed once, with the scores and samples of the quiet run")
    if soak.problems:
        print(log)
    return bool(soak.problems)


if __name__ == "__main__":
    sys.exit(main())
