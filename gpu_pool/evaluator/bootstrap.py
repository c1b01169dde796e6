"""Standard errors by bootstrap: lm-eval's own resamples, computed on as arrays.

lm-eval draws a thousand resamples with each of `random.Random(0)`, `random.Random(1)`… and calls the metric on each, an
item at a time. `numpy.random.RandomState([seed])` is the same generator with the same seeding, so the resamples are the
same here, and errors equal lm-eval's up to the order of additions.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api import metrics
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
"""Resamples, shape [resamples, items]: which item each draw took."""
Statistic = Callable[[Rows], Floats]
"""The metric of each resample."""

SAMPLES_PER_SEED = 1000  # lm-eval's
_BLOCK = 1 << 18  # draws at a time: arrays that stay in the processor's cache

_one_at_a_time = metrics.bootstrap_stderr


def install() -> None:
    """Put `bootstrap_stderr` in the place of lm-eval's, for this whole process."""
    metrics.bootstrap_stderr = bootstrap_stderr


def bootstrap_stderr(f: Callable[[Sequence[Any]], float], xs: Sequence[Any], iters: int) -> float:
    """Standard deviation of `f` over `iters` resamples of `xs` (in whole thousands, as in lm-eval, if above one)."""
    statistic = _STATISTICS[f](xs) if f in _STATISTICS else None
    if statistic is None:
        return _one_at_a_time(f, xs, iters)
    with np.errstate(all="ignore"):  # infinite perplexities have no standard error: it is nan
        values = np.concatenate([statistic(rows) for rows in resamples(len(xs), iters)])
        return float(np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1)))


def resamples(items: int, iters: int) -> Iterator[Rows]:
    """Blocks of lm-eval's resamples (`_bootstrap_internal`: `random.Random(seed).choices`)."""
    samples = min(SAMPLES_PER_SEED, iters)
    block = max(1, _BLOCK // items)
    for seed in range(iters // samples):
        generator = np.random.RandomState([seed])  # seeded by init_by_array, as Python's
        for start in range(0, samples, block):
            drawn = generator.random_sample((min(block, samples - start), items))
            yield (drawn * items).astype(np.intp)


# ---------------------------------------------------------------- the metrics that lm-eval bootstraps


def _sums(columns: Sequence[Floats], rows: Rows) -> list[Floats]:
    """The sum of each column, shape [items], over each resample."""
    return [column[rows].sum(axis=1) for column in columns]


def _perplexity(xs: Sequence[Any]) -> Statistic:
    values = np.asarray(xs, np.float64)
    return lambda rows: np.exp(-values[rows].mean(axis=1))


def _median(xs: Sequence[Any]) -> Statistic:
    values = np.asarray(xs, np.float64)
    middle = len(values) // 2
    return lambda rows: np.partition(values[rows], middle, axis=1)[:, middle]


def _nanmean(xs: Sequence[Any]) -> Statistic:
    values = np.asarray(xs, np.float64)
    columns = [np.nan_to_num(values, posinf=np.inf, neginf=-np.inf), (~np.isnan(values)).astype(np.float64)]
    return lambda rows: np.divide(*_sums(columns, rows))


def _f1(xs: Sequence[Any]) -> Statistic | None:
    """2 TP / (positives + predicted positives), and 0 without any (scikit-learn's `f1_score` of labels 0 and 1)."""
    golds, predictions = zip(*xs, strict=True)
    if not {0, 1}.issuperset((*golds, *predictions)):
        return None
    gold, predicted = np.asarray(golds, np.float64), np.asarray(predictions, np.float64)

    def statistic(rows: Rows) -> Floats:
        hits, positives = _sums([gold * predicted, gold + predicted], rows)
        return np.where(positives > 0, 2 * hits / positives, 0.0)

    return statistic


def _matthews(xs: Sequence[Any]) -> Statistic:
    """scikit-learn's `matthews_corrcoef`, by the sums of the confusion matrix that it is made of."""
    golds, predictions = map(list, zip(*xs, strict=True))
    labels, codes = np.unique([*golds, *predictions], return_inverse=True)
    gold, predicted = codes[: len(xs)], codes[len(xs) :]
    is_label = [(code == np.arange(len(labels))[:, None]).astype(np.float64) for code in (gold, predicted)]
    columns = [(gold == predicted).astype(np.float64), *is_label[0], *is_label[1]]

    def statistic(rows: Rows) -> Floats:
        correct, *counts = _sums(columns, rows)
        true, found = np.array(counts).reshape(2, len(labels), len(rows))
        total = rows.shape[1]
        covariance = correct * total - (true * found).sum(axis=0)
        product = (total**2 - (found**2).sum(axis=0)) * (total**2 - (true**2).sum(axis=0))
        return np.where(product > 0, covariance / np.sqrt(product), 0.0)

    return statistic


def _corpus(make: Callable[[], Any]) -> Callable[[Sequence[Any]], Statistic | None]:
    """One of sacrebleu's: its score is made of sums of counts of each sentence, which are taken once."""

    def prepare(xs: Sequence[Any]) -> Statistic | None:
        references, hypotheses = zip(*xs, strict=True)
        if len({len(some) if metrics.is_non_str_iterable(some) else None for some in references}) > 1:
            return None  # how many references count depends on the resample
        streams, hypotheses = metrics._sacreformat(references, hypotheses)
        metric = make()
        counts = np.asarray(metric._extract_corpus_statistics(hypotheses, streams))
        return lambda rows: np.array(
            [metric._compute_score_from_stats(counts[r].sum(axis=0).tolist()).score for r in rows]
        )

    return prepare


_STATISTICS: dict[Any, Callable[[Sequence[Any]], Statistic | None]] = {
    metrics.perplexity: _perplexity,
    metrics.median: _median,
    metrics.nanmean: _nanmean,
    metrics.f1_score: _f1,
    metrics.matthews_corrcoef: _matthews,
    metrics.bleu: _corpus(BLEU),
    metrics.chrf: _corpus(CHRF),
    metrics.chrfpp: _corpus(lambda: CHRF(word_order=2)),
    metrics.ter: _corpus(TER),
}
"""All of `lm_eval.api.metrics.stderr_for_metric`; None: these items are for lm-eval's own way."""
