"""The goals' workloads of bench_engine: requests of real benchmark documents, built by lm-eval's own tasks.

They differ in how much their requests share, which is what the engine lives on. `WORKLOADS` has them in two selections
of the same data; the goals were set with documents of the size in the last column. Tokens a document, counted as in
engine_limit.py with SmolLM2's tokenizer (and Python 3.11's texts): those of its distinct prompts and choices, and in
brackets those with all that documents share counted once.

    | workload             | long          | short         | goals |
    |----------------------|---------------|---------------|-------|
    | mmlu 5-shot          |   601   (79)  |   469   (73)  |   609 |
    | hellaswag 0-shot     |   314  (159)  |   172   (73)  |   309 |
    | hellaswag 5-shot     | 1,741  (517)  | 1,541  (409)  | 1,827 |
    | gsm8k 5 fixed shots  |   875   (79)  |   488   (70)  |   893 |
    | gsm8k 5 random shots | 1,064 (1,062) | 1,057 (1,055) |       |
    | rolling perplexity   | 3,097 (3,096) | 1,288 (1,287) | 3,121 |

long: documents spread evenly over each split, because its first ones may be of one sort: HellaSwag's first third is
    video captions, the rest how-to articles of more than twice the length. MMLU subjects whose five examples take
    about 500 tokens. GSM8K's fixed examples are test questions with their full solutions (which are not asked), because
    the eight that the fetched data has for training are of half their length; answers after fixed examples go on to 64
    tokens, without the task's stop strings, which would end them after 25 or so. Rolling perplexity reads Python's
    language reference as well.
short: the first documents of each split, MMLU subjects with shorter examples, GSM8K's fixed examples the short ones.
"""

from __future__ import annotations

import ast
import contextlib
import io
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import fetch_real_data
import pyarrow.parquet
from lm_eval.api import samplers
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from gpu_pool.evaluator.dataset_roots import DatasetRoots
from server.settings import load_settings

GENERATED_TOKENS = 64
GREEDY = {"max_gen_toks": GENERATED_TOKENS, "do_sample": False, "temperature": 0.0}
_LONG_TEXT = range(3_000, 18_000)
"""Characters of a document for rolling perplexity: about 900 to 5,000 tokens."""
_LONGEST = 30
"""Texts from which those for rolling perplexity are taken, evenly."""


class Library:
    """lm-eval's tasks over the fetched benchmark data, and that data itself."""

    def __init__(self, cache_folder: Path, max_length: int) -> None:
        self.max_length = max_length
        """Of the model, in tokens: longer documents would be cut."""
        self._data = fetch_real_data.benchmarks()
        config = self._data / "dataset_roots.toml"
        DatasetRoots(load_settings({}, config, {}).pool.dataset_roots, cache_folder).install()
        self._manager = TaskManager()

    def task(self, name: str) -> Any:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return self._manager.load([name])["tasks"][name]

    def rows(self, data_set: str, split: str) -> list[dict[str, Any]]:
        """The documents of a split, in the hub's columns."""
        return pyarrow.parquet.read_table(self._data / data_set / f"{split}.parquet").to_pylist()


@dataclass(frozen=True)
class Workload:
    """Some documents and how they are asked."""

    name: str
    hf_documents: int
    """Documents a task for lm-eval's HF backend, whose cost per document depends on their length, not their number."""
    documents: int
    """Documents a task for our engine; HF's are some of them, or all where ours shares nothing between documents."""
    build: Callable[[Library, int], list[Instance]]
    """lm-eval's requests, all of one type, for that many documents a task."""


@dataclass(frozen=True)
class Tasks:
    """Builds the requests of lm-eval's own tasks."""

    names: tuple[str, ...]
    shots: int = 0
    shots_from: str = ""
    """The split of the examples, where it is not the task's own."""
    fixed_shots: bool = False
    """The first examples for all documents, instead of a draw for each."""
    stop_strings: bool = True
    """The task's own, instead of none."""
    spread: bool = True
    """Documents from all over the split, instead of its first ones."""

    def __call__(self, library: Library, documents: int) -> list[Instance]:
        return [request for name in self.names for request in self._requests(library.task(name), documents)]

    def _requests(self, task: Any, documents: int) -> Sequence[Instance]:
        task.set_config(key="num_fewshot", value=self.shots)
        if task.OUTPUT_TYPE == "generate_until":
            options = GREEDY if self.stop_strings else {**GREEDY, "until": []}
            task.set_config(key="generation_kwargs", value=options, update=True)
        if self.shots_from or self.fixed_shots:
            if self.shots_from:
                task.config.fewshot_split = self.shots_from
                task.fewshot_cfg.split = self.shots_from
            make: Callable[..., Any] = samplers.get_sampler("first_n" if self.fixed_shots else "default")
            task.sampler = make(list(task.fewshot_docs()), rnd=None)
        task.set_fewshot_seed(1234)
        first = self.shots if self.fixed_shots and self.shots_from else 0  # no document is its own example
        total = len(task.eval_docs) - first
        chosen = [first + i for i in (spread(total, documents) if self.spread else range(min(total, documents)))]
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            task.build_all_requests(samples=chosen)
        return task.instances


def spread(total: int, count: int) -> list[int]:
    """`count` indices of range(total), the middles of as many equal parts; all, when there are not as many."""
    count = min(count, total)
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def document_of(request: Instance) -> tuple[Any, Any]:
    return request.task_name, request.doc_id


def part_of(requests: Sequence[Instance], documents: int) -> list[Instance]:
    """The requests of `documents` of each task's documents, which are as long as all of them: in mean and in spread."""
    lengths: dict[Any, Counter[Any]] = {}
    for request in requests:
        task, document = document_of(request)
        characters = sum(len(text) for text in request.args if isinstance(text, str))
        lengths.setdefault(task, Counter())[document] += characters
    chosen = {(task, document) for task, length in lengths.items() for document in _typical(length, documents)}
    return [request for request in requests if document_of(request) in chosen]


def _typical(length: Counter[Any], count: int) -> list[Any]:
    """Every n-th document in order of length, from where on their mean is nearest to that of all."""
    by_length = sorted(length, key=length.__getitem__)
    total, count = len(by_length), min(count, len(by_length))
    parts = [[by_length[index * total // count + start] for index in range(count)] for start in range(total // count)]
    return min(parts, key=lambda part: abs(sum(map(length.__getitem__, part)) * total - length.total() * count))


def read_longest_texts(library: Library, documents: int) -> list[Instance]:
    texts = long_texts()[:_LONGEST]
    return _rolling([texts[index] for index in spread(len(texts), documents)])


def read_docstrings(library: Library, documents: int) -> list[Instance]:
    return _rolling(_longest_first(_docstrings())[:documents])


def _rolling(texts: Sequence[str]) -> list[Instance]:
    return [
        Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("text", index, 1))
        for index, text in enumerate(texts)
    ]


@cache
def long_texts() -> tuple[str, ...]:
    """Python's language reference and the documentation strings of its standard library, the longest first."""
    return _longest_first([*topics.values(), *_docstrings()])


def _longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    long = {text[: _LONG_TEXT.stop]: len(text) for text in texts if len(text) > _LONG_TEXT.start}
    return tuple(sorted(long, key=lambda text: (-long[text], text)))


def _docstrings() -> Iterator[str]:
    """Of the modules and classes of the standard library."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(errors="ignore"))
        yield from (
            text
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef) and (text := ast.get_docstring(node))
        )


def _goals(
    subjects: tuple[str, ...],
    fixed_shots_from: str,
    read: Callable[[Library, int], list[Instance]],
    *,
    stop_strings: bool,
    spread: bool,
) -> tuple[Workload, ...]:
    mmlu = Tasks(tuple(f"mmlu_{subject}" for subject in subjects), shots=5, spread=spread)
    endings = Tasks(("hellaswag",), spread=spread)
    endings_with_shots = Tasks(("hellaswag",), shots=5, shots_from="validation", spread=spread)
    fixed = Tasks(
        ("gsm8k",), shots=5, shots_from=fixed_shots_from, fixed_shots=True, stop_strings=stop_strings, spread=spread
    )
    drawn = Tasks(("gsm8k",), shots=5, shots_from="test", spread=spread)
    return (
        Workload("mmlu 5-shot", 8, 100, mmlu),
        Workload("hellaswag 0-shot", 32, 120, endings),
        Workload("hellaswag 5-shot", 8, 8, endings_with_shots),
        Workload("gsm8k 5 fixed shots", 32, 64, fixed),
        Workload("gsm8k 5 random shots", 16, 16, drawn),
        Workload("rolling perplexity", 3, 3, read),
    )


WORKLOADS: dict[str, tuple[Workload, ...]] = {
    "long": _goals(
        ("astronomy", "college_mathematics", "nutrition"), "test", read_longest_texts, stop_strings=False, spread=True
    ),
    "short": _goals(("anatomy", "astronomy", "college_biology"), "", read_docstrings, stop_strings=True, spread=False),
}
"""The goals' workloads by selection of documents."""
