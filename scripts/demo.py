"""A real benchmark scored by a real model through the whole service; `scripts/demo` runs it after doing the set-up.

Without arguments: SmolLM2-135M-Instruct on ARC-Easy and PIQA (200 documents each) and on NQ-open (40 documents, 4
examples before each). With --model or tasks: those, 200 documents of each task.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import fetch_real_data
import httpx
from local_server import running_server
from rich.console import Console

from server.cli_view import follow, result_paths, score_table
from server.client import EvalClient, EvalError

DOCUMENTS = 200
console = Console()


def main() -> int:
    """0 when every job completed."""
    arguments = parse_arguments()
    model = arguments.model or fetch_real_data.smollm2()
    folder = Path(tempfile.mkdtemp(prefix="evalpool-demo-"))
    config = fetch_real_data.benchmarks() / "dataset_roots.toml"
    with running_server(folder, "--config", config, keep=arguments.keep) as url, EvalClient(url) as client:
        console.print(f"Server   {url}   (log: {folder / 'server.log'})", highlight=False)
        jobs = [submit(client, str(model), request) for request in requests(arguments)]
        ended = follow(client, jobs, console)
        console.print(score_table({task: scores for job in ended for task, scores in job["metrics"].items()}))
        show_where(url, ended, kept=arguments.keep)
    return 0 if all(job["status"] == "completed" for job in ended) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help="leave the server running")
    parser.add_argument("--model", help="a checkpoint folder or hub id instead of SmolLM2")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="tasks of lm-eval's library instead of the three")
    return parser.parse_args()


def requests(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What to submit, one job each."""
    if arguments.tasks:
        return [{"tasks": [task], "limit": DOCUMENTS} for task in arguments.tasks]
    return [
        {"tasks": ["arc_easy"], "limit": DOCUMENTS},
        {"tasks": ["piqa"], "limit": DOCUMENTS},
        {"tasks": ["nq_open"], "limit": 40, "num_fewshot": 4, "gen_kwargs": {"max_gen_toks": 16}},
    ]


def submit(client: EvalClient, model: str, request: dict[str, Any]) -> str:
    """The job's id."""
    if Path(model).exists():
        model = os.path.abspath(model)
    return client.evaluate(model, **request)["job_id"]


def show_where(url: str, jobs: list[dict[str, Any]], *, kept: bool) -> None:
    """Where to look further; the URLs answer for as long as the server runs."""
    console.print(f"API documentation   {url}/docs" + ("" if kept else "   (with --keep)"), highlight=False)
    for job in jobs:
        console.print(f"Result   {url}/jobs/{job['job_id']}", highlight=False, soft_wrap=True)
        if job["error"]:
            console.print(job["error"], style="red", markup=False)
        for path in result_paths(job):
            console.print(f"  {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (EvalError, httpx.TransportError, RuntimeError) as failure:
        sys.exit(f"error: {failure}")
