"""What the command line shows: progress bars while jobs run, tables of jobs and of scores."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple, Self

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from server.client import EvalClient, Json
from server.waiting import FINAL

GIB = 1024**3
POLL_SECONDS = 0.2  # smooth enough for a person, nothing for the server
ERRORED = "evalpool_errored"
"""In a task's or group's metrics: its requests that ended in an error."""
MISSING = "evalpool_missing"
"""In a task's or group's metrics: why others have no score."""
COLORS = {"completed": "green", "failed": "red", "cancelled": "yellow", "running": "cyan", "queued": "dim"}


class _OrderedProgress(Progress):
    """Draws bars by their place, not in the order in which they were added."""

    def get_renderables(self) -> Iterator[Table]:
        yield self.make_tasks_table(sorted(self.tasks, key=lambda bar: bar.fields["place"]))


class JobBars:
    """One bar a job and, under it, one a task where there are several. A context manager."""

    def __init__(self, console: Console) -> None:
        self._bars = _OrderedProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[share]}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._ids: dict[tuple[str, str], TaskID] = {}
        self._places: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def show(self, job: Json) -> None:
        """Draw `job` as GET /jobs/{id} gave it."""
        job_id, progress = job["job_id"], job["progress"] or {}
        counts = progress.get("tasks", {})
        kind, title = job["kind"], f"[bold]{_label(job)}[/] {_state(job)}"
        self._draw((job_id, ""), title, progress, _share(kind, progress), _note(job, progress))
        for task, count in counts.items() if len(counts) > 1 else ():
            self._draw((job_id, task), f"  {task}", count, _share(kind, count), _errored(count))
        if job["status"] in FINAL:
            for (owner, _), bar in self._ids.items():
                if owner == job_id:
                    self._bars.stop_task(bar)

    def _draw(self, key: tuple[str, str], description: str, count: Json, share: str, note: str) -> None:
        if key not in self._ids:
            self._places.setdefault(key[0], len(self._places))
            place = (self._places[key[0]], len(self._ids))
            self._ids[key] = self._bars.add_task("", place=place, share="", note="")
        total = count.get("total") or None  # until it is known the bar only pulses
        self._bars.update(
            self._ids[key], description=description, completed=count.get("done", 0), total=total, share=share, note=note
        )


def follow(client: EvalClient, job_ids: Iterable[str], console: Console) -> list[Json]:
    """Show bars until every one of the jobs has ended; the jobs as they ended, in order."""
    jobs: dict[str, Json] = {job_id: {"status": "queued"} for job_id in job_ids}
    with JobBars(console) as bars:
        while waiting := [job_id for job_id, job in jobs.items() if job["status"] not in FINAL]:
            for job_id in waiting:
                jobs[job_id] = client.get_job(job_id)
                bars.show(jobs[job_id])
            time.sleep(POLL_SECONDS)
    return list(jobs.values())


class Score(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    filter: str
    value: Any
    stderr: Any


def scores(metrics: dict[str, Json]) -> Iterator[Score]:
    """The scores in a job's `metrics`: keys "acc,none" and "acc_stderr,none", in their order; then missing ones."""
    for task, values in metrics.items():
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                yield Score(task, metric, name, value, values.get(f"{metric}_stderr,{name}"))
        for key, why in values.get(MISSING, {}).items():
            metric, _, name = key.partition(",")
            yield Score(task, metric, name, f"missing: {why}", None)


def gpu_table(gpus: Iterable[Json]) -> Table:
    """One row a GPU, as GET /gpus gives them."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("GPU", no_wrap=True)
    table.add_column("UUID", no_wrap=True, min_width=40)  # what `gpus release` takes
    for name in ("Name", "Free GiB", "Workers", "State"):
        table.add_column(name, overflow="fold")
    for gpu in gpus:
        free = f"{gpu['free_bytes'] / GIB:.1f} of {gpu['total_bytes'] / GIB:.1f}"
        state = escape(gpu["reason"] or "") or ("[green]free[/]" if gpu["free"] else "held")
        table.add_row(gpu["index"], gpu["uuid"], escape(gpu["name"]), free, "\n".join(gpu["worker_ids"]), state)
    return table


def score_table(metrics: dict[str, Json]) -> Table:
    """Scores with standard errors and, where there are any, how many requests ended in an error."""
    table = Table("Task", "Metric", "Filter", title="Scores", title_justify="left")
    table.add_column("Score", justify="right")
    table.add_column("± stderr", justify="right")
    errored = {task: values[ERRORED] for task, values in metrics.items() if ERRORED in values}
    if errored:
        table.add_column("Errored requests", justify="right", style="red")
    shown = list(scores(metrics))
    shown += [Score(task, "", "", None, None) for task in errored if task not in {score.task for score in shown}]
    for score in shown:
        row = [score.task, score.metric, score.filter, _number(score.value), _number(score.stderr)]
        table.add_row(*row, *([str(errored.get(score.task, 0))] if errored else []))
    return table


def job_table(jobs: list[Json]) -> Table:
    """Jobs, one a row."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("Job", no_wrap=True, min_width=36)  # an id that is cut is of no use
    table.add_column("Status")
    table.add_column("Done", no_wrap=True)
    for name in ("Tasks", "Model"):
        table.add_column(name, overflow="fold", min_width=8)
    for job in jobs:
        progress = job["progress"] or {}
        name = _model(job).rstrip("/").rpartition("/")[2]
        share = _share(job["kind"], progress) if progress else ""
        share = "\n".join(filter(None, (share, _errored(progress))))
        table.add_row(job["job_id"], _state(job), share, ", ".join(_tasks(job)), name)
    return table


def event_table(events: list[Json]) -> Table:
    """What happened to a job, one thing a row, in the reader's own time."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("Time", no_wrap=True)
    for name in ("Event", "Attempt"):
        table.add_column(name, no_wrap=True)
    table.add_column("Cause", overflow="fold")
    for event in events:
        at = datetime.fromisoformat(event["at"]).astimezone()
        color = COLORS.get(event["event"], COLORS[event["status"]])
        attempt = str(event["attempt"] or "")
        cause = escape(event["cause"] or "")
        table.add_row(f"{at:%Y-%m-%d %H:%M:%S}", f"[{color}]{event['event']}[/]", attempt, cause)
    return table


def cache_table(cache: Json) -> Table:
    """The response cache, one model a row."""
    title = f"{cache['entries']} answers in {cache['bytes']} of {cache['max_bytes']} bytes, {cache['hits']} hits"
    table = Table("Model", "Fingerprint", title=title, title_justify="left")
    for name in ("Answers", "Bytes", "Hits", "Last used"):
        table.add_column(name, justify="right")
    for model in cache["models"]:
        counts = (str(model[name]) for name in ("entries", "bytes", "hits"))
        table.add_row(model["name"], model["fingerprint"][:12], *counts, model["last_used"] or "")
    return table


def result_paths(job: Json) -> list[str]:
    """The job's files on the server: results first, then samples; of a merge its folder."""
    if job["merged_path"]:
        return [job["merged_path"]]
    return [path for files in (job["result"] or {}).values() for path in (files["results"], *files["samples"])]


def _tasks(job: Json) -> list[str]:
    """What is done, in a word or several."""
    return ["merge"] if job["kind"] == "merge" else job["request"]["tasks"]


def _model(job: Json) -> str:
    """What the job is about: a path or a hub id."""
    request = job["request"]
    if job["kind"] == "merge":
        return request["checkpoint_path"]
    return str((request.get("model_args") or {}).get("pretrained") or request["model"])


def _share(kind: str, count: Json) -> str:
    """How much is done: of so many requests, or of the bytes of a merge."""
    done, total = count.get("done", 0), count.get("total") or 0
    if kind == "merge":
        return f"{done / total:.0%} of {total / GIB:.2f} GiB" if total else ""
    return f"{done}/{total or '?'}"


def _label(job: Json) -> str:
    tasks = _tasks(job)
    return tasks[0] if len(tasks) == 1 else job["job_id"][:8]


def _state(job: Json) -> str:
    status = job["status"]
    text = {"queued": f"queued ({job['position_in_queue']} ahead)", "running": job["phase"] or status}
    return f"[{COLORS[status]}]{text.get(status, status)}[/]"


def _note(job: Json, progress: Json) -> str:
    if job["waits_for"]:
        return escape(job["waits_for"])
    seconds = progress.get("eta_seconds")
    remaining = "" if seconds is None else f"about {seconds:.0f} s left"
    return ", ".join(filter(None, (_errored(progress), remaining)))


def _errored(count: Json) -> str:
    return f"[red]{count['errored']} errored[/]" if count.get("errored") else ""


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "" if value is None else escape(str(value))
