"""What it takes to prepare a job: CPU seconds by stage, and how soon the first chunk could leave. No model runs.

    python scripts/bench_preparation.py [--tasks mmlu] [--num-fewshot 5] [--limit N] [--stock-limit 5] [--json]

One process is an evaluator as it waits for a job, everything imported, and runs the whole of one; in the place of its
workers is a sink that answers whatever it gets at once. Another runs lm-eval's `simple_evaluate` with the tokenising of
its HF backend, also without a model, over the first --stock-limit documents of each task (0: not at all).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import logging
import os
import platform
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import fetch_real_data
from rich.console import Console
from rich.table import Table

Json = dict[str, Any]
PREPARATION = (
    "tokenizer, is the model unchanged",
    "load tasks and data",
    "build prompts",
    "tokenise",
    "requests and cache keys",
    "look up in the cache",
    "sort and submit",
)


class Options(NamedTuple):
    """What both processes are told."""

    model: str
    roots: dict[str, str]
    evaluation: Json
    """Arguments of `gpu_pool.records.Evaluation`."""


class Stages:
    """CPU seconds of the process by stage; what a stage calls of another one is the other's."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open = ["everything else"]
        self._since = time.process_time()

    def measure(self, owner: Any, method: str, stage: str) -> None:
        """Count the calls of `owner.method` as `stage` from now on."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage):
                return original(*args, **kwargs)

        setattr(owner, method, measured)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What runs inside is of this stage."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def so_far(self) -> dict[str, float]:
        """The seconds of each stage until now."""
        self._count()
        return dict(self.seconds)

    def _count(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


class Sink:
    """In a dispatcher's place: counts units and answers them at once."""

    def __init__(
        self,
        on_answers: Callable[[str, Sequence[Any]], None],
        put_in_line: Callable[[Sequence[Any], str | None], None],
        stages: Stages,
    ) -> None:
        self.welcome = None
        self.plainly: list[str] = []
        self.units = self.tokens = 0
        self.first: Json | None = None
        """When the first units came, and how many."""
        self._tokens: list[Any] = []
        """Kept, as if no answer came before the last request is built: the most memory that a job needs."""
        self._on_answers = on_answers
        self._put_in_line = put_in_line
        self._stages = stages
        self._started = time.perf_counter(), time.process_time()

    def submit(self, units: Sequence[Any], group: str | None = None) -> None:
        """As `Dispatcher.submit`."""
        if self.first is None and units:
            wall, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
            self.first = {"seconds": wall, "cpu_seconds": cpu, "units": len(units)}
        self.units += len(units)
        self.tokens += sum(unit.cost for unit in units)
        self._tokens += [(unit.prompt, unit.continuation) for unit in units]
        self._put_in_line([copy.copy(unit) for unit in units], group)  # answered ones forget their tokens
        with self._stages.stage("answers into the cache"):
            for unit in units:
                unit.answer = "" if unit.options else (-1.0, False)
            self._on_answers("sink", units)

    def close(self) -> None:
        """As `Dispatcher.close`."""


def prepare(options: Options) -> Json:
    """A whole job in this process, its answers from a sink."""
    from gpu_pool.evaluator import entry
    from gpu_pool.messages import EvaluatorStart, RunJob

    with tempfile.TemporaryDirectory() as folder:
        start = EvaluatorStart(evaluator_id="bench", data_dir=folder, log_path="", dataset_roots=options.roots)
        entry._set_environment(start)

        from gpu_pool.evaluator import harness_lm_eval as harness
        from gpu_pool.evaluator.catalogue import TaskLibrary
        from gpu_pool.evaluator.job import JobRun
        from gpu_pool.evaluator.prefix_line import Line
        from gpu_pool.evaluator.prompts import EncoderPool, PromptEncoder
        from gpu_pool.evaluator.requests import RequestBuilder
        from gpu_pool.fingerprint import fingerprint_model, memo_path
        from gpu_pool.records import Evaluation, ModelArgs, ModelSpec
        from gpu_pool.results import ResultFiles

        library = TaskLibrary(Path(folder), (), options.roots, False)
        open_job = entry._prepare_for_jobs(start, library)
        args = ModelArgs(pretrained=options.model)
        # at submission, by the server
        fingerprint = fingerprint_model(args, memo_path(Path(folder)))
        job = RunJob(
            job_id="bench",
            evaluation=Evaluation(model=options.model, **options.evaluation),
            model=ModelSpec(kind="hf", args=args, fingerprint=fingerprint),
            output_dir=folder,
            log_path="",
        )
        entry.settle_memory()
        stages = Stages()
        cache = type(open_job.keywords["workshop"].cache)  # type: ignore[attr-defined]
        for owner, method, stage in (
            (EncoderPool, "get", PREPARATION[0]),
            (TaskLibrary, "load", PREPARATION[1]),
            (_task_class(), "build_all_requests", PREPARATION[2]),
            *((PromptEncoder, name, PREPARATION[3]) for name in ("encode", "encode_pairs", "encode_prompts")),
            (RequestBuilder, "build", PREPARATION[4]),
            (cache, "lookup", PREPARATION[5]),
            (JobRun, "_ask", PREPARATION[6]),
            (harness, "score_task", "filters, metrics, standard errors"),
            (ResultFiles, "write_samples", "write samples"),
        ):
            stages.measure(owner, method, stage)
        before = _peak_mib()
        run = open_job(job, lambda message: None)
        run.dispatcher = sink = Sink(run._on_answers, Line("all").add, stages)  # type: ignore[assignment]
        done = run.execute()
        return {
            "seconds": stages.so_far(),
            "first_chunk": sink.first,
            "requests": done.progress.total,
            "units": sink.units,
            "tokens": sink.tokens,
            "peak_mib": _peak_mib(),
            "peak_mib_before_the_job": before,
        }


def stock(options: Options, limit: int) -> Json:
    """lm-eval's own preparation of the first `limit` documents of each task."""
    os.environ.update(DISABLE_MULTIPROC="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    from gpu_pool.evaluator.dataset_roots import DatasetRoots

    class WithoutModel(HFLM):
        """The HF backend's tokenising; every answer is the same."""

        AUTO_MODEL_CLASS = None  # type: ignore[assignment]

        def __init__(self) -> None:
            TemplateLM.__init__(self)
            self.tokenizer = AutoTokenizer.from_pretrained(options.model)
            self.backend, self.add_bos_token, self.custom_prefix_token_id = "causal", None, None
            self.enable_thinking, self.chat_template_args = None, {}
            self._rank, self._world_size, self.pretrained = 0, 1, options.model

        @property
        def max_length(self) -> int:
            return 1 << 30

        def get_model_info(self) -> Json:
            return {}

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            count.update(requests=len(requests), tokens=sum(len(context) + len(more) for _, context, more in requests))
            return [(-1.0, False)] * len(requests)

    count: Counter[str] = Counter()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        DatasetRoots(options.roots, Path(folder)).install()
        manager = TaskManager()
        evaluation = {key: value for key, value in options.evaluation.items() if key != "use_cache"}
        model = WithoutModel()
        stages = Stages()
        stages.measure(_task_class(), "build_all_requests", "build prompts")
        stages.measure(TemplateLM, "loglikelihood", "tokenise")
        simple_evaluate(
            model, task_manager=manager, **evaluation | {"limit": limit, "tasks": list(evaluation["tasks"])}
        )
    return {"seconds": {name: stages.seconds[name] for name in ("build prompts", "tokenise")}, **count}


def _task_class() -> Any:
    from lm_eval.api.task import Task

    return Task


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(function: Callable[..., Json], *arguments: Any) -> Json:
    """Call it in a fresh interpreter: it sets its environment before anything is imported."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> int:
    arguments = parse_arguments()
    from server.settings import load_settings

    roots = load_settings({}, fetch_real_data.benchmarks() / "dataset_roots.toml", {}).pool.dataset_roots
    model = str(arguments.model or fetch_real_data.smollm2())
    evaluation: Json = {"tasks": tuple(arguments.tasks), "num_fewshot": arguments.num_fewshot}
    evaluation |= {"limit": arguments.limit, "bootstrap_iters": 0, "apply_chat_template": arguments.chat}
    options = Options(model, dict(roots), evaluation)
    ours = in_a_process(prepare, options)
    theirs = in_a_process(stock, options, arguments.stock_limit) if arguments.stock_limit else None
    report = {"machine": machine(), "evaluation": evaluation, "ours": ours, "stock": theirs}
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of SmolLM2")
    parser.add_argument("--tasks", nargs="+", default=["mmlu"])
    parser.add_argument("--num-fewshot", type=int, default=5)
    parser.add_argument("--chat", action="store_true", help="apply the chat template, examples as turns")
    parser.add_argument("--limit", type=int, help="documents of each task; default: all")
    parser.add_argument("--stock-limit", type=int, default=5, help="documents of each task for lm-eval; 0: without it")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


def machine() -> str:
    """One line for people."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = int(next(line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")).split()[1]) / 2**20
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} CPUs, {names[0] if names else platform.machine()}, {memory:.0f} GiB, {system}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def show(report: Json) -> None:
    """The report as tables."""
    ours, theirs = report["ours"], report["stock"]
    table = Table("CPU seconds", f"ours, {ours['requests']:,} requests", *(() if theirs is None else _header(theirs)))
    for stage in PREPARATION:
        table.add_row(stage, *_row(ours["seconds"].get(stage, 0.0), theirs, stage, ours))
    total = sum(ours["seconds"].get(stage, 0.0) for stage in PREPARATION)
    table.add_row("preparation", *_row(total, theirs, None, ours), style="bold")
    for stage, seconds in ours["seconds"].items():
        if stage not in PREPARATION:
            table.add_row(f"not preparation: {stage}", f"{seconds:.2f}", *(() if theirs is None else ("", "")))
    console = Console()
    console.print(table)
    first = ours["first_chunk"] or {"seconds": 0.0, "cpu_seconds": 0.0}
    console.print(
        f"The first chunk could leave after {first['seconds']:.2f} s ({first['cpu_seconds']:.2f} CPU s). "
        f"{ours['units']:,} distinct requests of {ours['tokens']:,} tokens. "
        f"Peak memory {ours['peak_mib']:.0f} MiB, {ours['peak_mib_before_the_job']:.0f} MiB before the job."
    )
    console.print(report["machine"], highlight=False)


def _header(theirs: Json) -> tuple[str, str]:
    return f"lm-eval, {theirs['requests']:,} requests", "the same for all requests"


def _row(seconds: float, theirs: Json | None, stage: str | None, ours: Json) -> tuple[str, ...]:
    """Our seconds of a stage, lm-eval's, and lm-eval's as they would be for as many requests as ours."""
    if theirs is None:
        return (f"{seconds:.2f}",)
    other = sum(theirs["seconds"].values()) if stage is None else theirs["seconds"].get(stage)
    if other is None:
        return f"{seconds:.2f}", "", ""
    return f"{seconds:.2f}", f"{other:.2f}", f"{other / theirs['requests'] * ours['requests']:.1f}"


if __name__ == "__main__":
    sys.exit(main())
