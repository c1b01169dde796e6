"""Bootstrap errors equal lm-eval's, resample for resample."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from lm_eval.api import metrics

from gpu_pool.evaluator import bootstrap

WORDS = ["the", "capital", "of", "France", "is", "Paris,", "not", "Rome."]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


def numbers(random: random.Random) -> list[float]:
    return [random.gauss(-3, 2) for _ in range(40)]


def some_nan(random: random.Random) -> list[float]:
    return [math.nan if random.random() < 0.3 else random.gauss(0, 1) for _ in range(12)]


def labels(*choices: Any) -> Callable[[random.Random], list[Any]]:
    return lambda random: [(random.choice(choices), random.choice(choices)) for _ in range(30)]


def sentence(random: random.Random) -> str:
    return " ".join(random.choices(WORDS, k=random.randrange(9)))


def one_reference(random: random.Random) -> list[Any]:
    return [(sentence(random), sentence(random)) for _ in range(15)]


def two_references(random: random.Random) -> list[Any]:
    return [([sentence(random), sentence(random)], [sentence(random)]) for _ in range(15)]


def mixed_references(random: random.Random) -> list[Any]:
    return [([sentence(random)] * random.randrange(1, 3), [sentence(random)]) for _ in range(15)]


CASES = [
    (metrics.perplexity, numbers),
    (metrics.median, numbers),
    (metrics.nanmean, some_nan),
    (metrics.f1_score, labels(0, 1)),
    (metrics.f1_score, labels(True, False)),
    (metrics.matthews_corrcoef, labels(0, 1)),
    (metrics.matthews_corrcoef, labels("yes", "no", "maybe")),
    *((score, make) for score in (metrics.bleu, metrics.chrf, metrics.ter) for make in (one_reference, two_references)),
    (metrics.chrfpp, one_reference),
    (metrics.bleu, mixed_references),
]


SLOW = {
    metrics.f1_score,
    metrics.matthews_corrcoef,
    metrics.bleu,
    metrics.chrf,
    metrics.chrfpp,
    metrics.ter,
}  # in lm-eval


@pytest.mark.parametrize(("metric", "make"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_lm_eval(metric: Any, make: Callable[[random.Random], list[Any]], seed: int) -> None:
    items = make(random.Random(seed))
    iterations = 50 if metric in SLOW else 1000
    expected = metrics.bootstrap_stderr(metric, items, iterations)
    assert bootstrap.bootstrap_stderr(metric, items, iterations) == pytest.approx(expected, rel=1e-9)


def test_f1_without_positives() -> None:
    items = [(0, 0)] * 6 + [(1, 1)]  # resamples without the last item have no positive at all
    values = [0.0 if 6 not in row else 1.0 for rows in bootstrap.resamples(7, 100) for row in rows]
    assert bootstrap.bootstrap_stderr(metrics.f1_score, items, 100) == pytest.approx(np.std(values, ddof=1))


@pytest.mark.parametrize(("items", "iterations"), [(3, 2500), (3, 7), (1000, 1000)])
def test_resamples(items: int, iterations: int) -> None:
    rows = [row for block in bootstrap.resamples(items, iterations) for row in block.tolist()]
    assert rows == list(_python_resamples(items, iterations))


def _python_resamples(items: int, iterations: int) -> Iterator[list[int]]:
    samples = min(1000, iterations)
    for seed in range(iterations // samples):
        generator = random.Random(seed)
        for _ in range(samples):
            yield generator.choices(range(items), k=items)


def test_everything_that_lm_eval_bootstraps_is_known() -> None:
    everything = {value for value in vars(metrics).values() if inspect.isfunction(value)}
    assert {metric for metric in everything if _is_bootstrapped(metric)} == set(bootstrap._STATISTICS)


def _is_bootstrapped(metric: Any) -> bool:
    error = metrics.stderr_for_metric(metric, 1)
    return error is not None and error.__name__ == "<lambda>"


def test_infinite_perplexities_have_no_error() -> None:
    assert math.isnan(bootstrap.bootstrap_stderr(metrics.perplexity, [-math.inf, -1.0], 100))
