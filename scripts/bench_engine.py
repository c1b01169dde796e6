"""Our engine beside lm-eval's HF backend at its own best batch size: the same model, documents and process, in turns.

    python scripts/bench_engine.py [--dtype float32] [--threads 1] [--rounds 3] [--workloads goals shapes "deep tree" …]
                                   [--selection long] [--generate-batch [16]] [--profile] [--json]

For each workload: documents per CPU second of both (tokenising included) and their ratio, tokens through the layers and
positions through the head for each document, the largest difference of a log-probability relative to max(1, |logp|),
and how many choices or texts differ. "% of limit" is how much of the CPU time is what perfect sharing takes on the
measured peaks of this machine: arithmetic, and in decoding the bytes to be read (the formula is in engine_limit.py).

HF's batch size is the fastest of --hf-batch-sizes on its documents. Its cost per document depends on their length and
not on their number, so it runs a part of them, which are about as long in the mean (less so with a small --share);
differences are counted on that part. In half precision they are differences from the backend at batch size 1, and
beside them stand those that a batch size alone makes: of the backend at the other --hf-batch-sizes from the backend at
batch size 1, the largest, and the root mean square of all. Both are counted with the backend's softmax in fp32, as ours
is: by itself it rounds log-probabilities to the model's dtype, so coarsely that the layers' differences are lost in it.
And what log-probabilities of either side, the backend's as it is, differ by from those in fp32: rounding errors that
have nothing to do with each other make two answers differ by more than either is wrong.

With --profile, a last run of ours is profiled: what its time is spent on, by kinds of operators (engine_profile.py).

With --generate-batch, transformers' own continuous batching answers some of the prompts to be continued in the same
turns. Its ratio is its CPU time beside ours on just these prompts; its texts are compared with lm-eval's.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_WAIT_POLICY="passive")

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fetch_real_data
import msgspec
import torch
import transformers
from engine_limit import FORMULA, Costs, measure_peaks, work_of
from engine_profile import profiled
from engine_shapes import SHAPES
from engine_sides import STOP_STRINGS_NOTE, GenerateBatch, HuggingFace, Meter, Ours, Stock, ask, documents_of
from engine_workloads import WORKLOADS, Library, Workload, document_of, part_of
from lm_eval.api.instance import Instance
from machine import describe_machine
from report import print_report

from gpu_pool.records import ModelArgs, ModelSpec
from gpu_pool.worker.engine.loading import load_model

Row = dict[str, Any]
Cost = dict[str, float]


@dataclass(frozen=True)
class Bench:
    """The sides, and how they are compared."""

    ours: Ours
    hf: HuggingFace
    exact: HuggingFace | None
    """In fp32, where `hf` is not."""
    generate_batch: GenerateBatch
    meter: Meter
    rounds: int
    share: float
    """Of the documents that are evaluated."""
    deterministic: bool
    """Whether deterministic requests are measured, too."""
    generate_batch_prompts: int
    """At most, for transformers' continuous batching."""
    profile: bool
    """Whether to tell what ours spends its time on."""

    def run(self, workload: Workload, library: Library) -> Row:
        """One workload's line of the table."""
        many = workload.build(library, self._documents(workload.documents))
        few = part_of(many, self._documents(workload.hf_documents))
        generating = many[0].request_type == "generate_until"
        third = part_of(few, self.generate_batch_prompts) if generating and self.generate_batch_prompts else []
        size, backend = self.hf.best(few, self.meter)
        theirs: list[Any] = []
        found: list[Any] = []
        costs: list[tuple[Cost, Cost]] = []
        extra: list[Row] = []
        for _ in range(self.rounds):
            theirs, hf_cost = self.meter.measure(lambda: ask(backend, few), documents_of(few))
            found, our_cost = self.meter.measure(lambda: self.ours.answer(many), documents_of(many))
            costs.append((hf_cost, our_cost))
            if third:
                extra.append(self._beside_generate_batch(third, _by_key(few, theirs)))
        if self.exact is None:
            notes = differences(few, theirs, _by_key(many, found))
        else:
            notes = self._half_precision(self.exact, few, theirs, _by_key(many, found))
        if self.deterministic:
            notes["deterministic costs"] = self._deterministic_cost(few)
        if self.profile:
            shares = profiled(lambda: self.ours.answer(many))
            notes |= {f"ours, % in {kind}": share for kind, share in shares.items()}
        return {
            "workload": workload.name,
            "HF batch": size,
            **_compared(costs),
            **self._of_the_limit(many, found if generating else [], costs),
            **notes,
            **_median(extra),
        }

    def _half_precision(
        self, exact: HuggingFace, few: Sequence[Instance], theirs: Sequence[Any], found: dict[Any, Any]
    ) -> Row:
        """How far the answers are from those at batch size 1, lm-eval's at the others, and either side's from fp32."""
        generating = few[0].request_type == "generate_until"
        single, *others = (
            _by_key(few, ask(self.hf.backend(size, torch.float32), few)) for size in (1, *self.hf.sizes_beyond_one(few))
        )
        unbatched = [single[_key(request)] for request in few]
        notes = spread(few, unbatched, [found])
        notes |= {f"HF alone: {name}": value for name, value in spread(few, unbatched, others).items()}
        if not generating:
            true = ask(exact.backend(1), few)
            notes["HF: rms Δ to fp32"] = root_mean_square(few, true, _by_key(few, theirs))
            notes["ours: rms Δ to fp32"] = root_mean_square(few, true, found)
        return notes

    def _documents(self, number: int) -> int:
        return max(1, round(self.share * number))

    def _beside_generate_batch(self, requests: Sequence[Instance], reference: dict[Any, Any]) -> Row:
        """transformers' continuous batching and ours on the same prompts."""
        documents = documents_of(requests)
        texts, cost = self.meter.measure(lambda: list(self.generate_batch.answer(requests)), documents)
        _, our_cost = self.meter.measure(lambda: self.ours.answer(requests), documents)
        return {
            "generate_batch CPU s/doc": cost["cpu"],
            "ours CPU s/doc on its prompts": our_cost["cpu"],
            "ratio to generate_batch": cost["cpu"] / our_cost["cpu"],
            "generate_batch: texts differ": differences(requests, texts, reference)["texts differ"],
        }

    def _deterministic_cost(self, requests: Sequence[Instance]) -> float:
        """CPU time of deterministic requests over that of ordinary ones."""
        ordinary, alone = (
            self.meter.measure(lambda so=so: self.ours.answer(requests, deterministic=so), 1)[1]["cpu"]
            for so in (False, True)
        )
        return alone / ordinary

    def _of_the_limit(self, requests: Sequence[Instance], texts: Sequence[str], costs: list[tuple[Cost, Cost]]) -> Row:
        units = {unit for units in self.ours.units(requests) for unit in units}
        written = self.ours.written(requests, texts) if texts else {}
        model = self.ours.loaded.model
        work, peaks = work_of(Costs.of(model), units, written), measure_peaks(model.dtype)
        least = work.seconds(peaks) / documents_of(requests)
        hf, ours = (statistics.median(cost[side]["cpu"] for cost in costs) for side in (0, 1))
        row: Row = {"HF % of limit": 100 * least / hf, "ours % of limit": 100 * least / ours}
        if texts:
            waiting = sum(step.waits_for_memory(peaks) for step in work.steps)
            row["steps limited by memory"] = f"{waiting} of {len(work.steps)}"
        return row


def _compared(costs: list[tuple[Cost, Cost]]) -> Row:
    hf, ours = (statistics.median(cost[side]["cpu"] for cost in costs) for side in (0, 1))
    return {
        "HF docs/CPU s": 1 / hf,
        "ours docs/CPU s": 1 / ours,
        "ratio": statistics.median(a["cpu"] / b["cpu"] for a, b in costs),
        "wall ratio": statistics.median(a["wall"] / b["wall"] for a, b in costs),
        "HF tokens": round(costs[0][0]["tokens"]),
        "ours tokens": round(costs[0][1]["tokens"]),
        "HF positions": round(costs[0][0]["positions"]),
        "ours positions": round(costs[0][1]["positions"]),
    }


def _median(rows: Sequence[Row]) -> Row:
    """The median of each number over the rounds; of words, the last round's."""
    return {
        name: statistics.median(row[name] for row in rows) if isinstance(value, float) else value
        for name, value in (rows[-1].items() if rows else ())
    }


def differences(requests: Sequence[Instance], theirs: Sequence[Any], ours: dict[Any, Any]) -> Row:
    """How far the answers to `requests` are apart."""
    if requests[0].request_type == "generate_until":
        other = sum(their != ours[_key(request)] for request, their in zip(requests, theirs, strict=True))
        return {"texts differ": f"{other} of {len(requests)}"}
    values = _log_probs(requests, theirs, ours)
    found: Row = {"max Δ logp": max(map(_relative, values))}
    if requests[0].request_type == "loglikelihood":
        choices: dict[Any, list[tuple[float, float]]] = {}
        for request, pair in zip(requests, values, strict=True):
            choices.setdefault(document_of(request), []).append(pair)
        other = sum(_best(0, some) != _best(1, some) for some in choices.values())
        found["picks differ"] = f"{other} of {len(choices)}"
    return found


def spread(requests: Sequence[Instance], theirs: Sequence[Any], others: Sequence[dict[Any, Any]]) -> Row:
    """How far each of some answers to `requests` is from `theirs`: the most of any, and the root mean square of all."""
    if not others:
        return {}
    by_other = [differences(requests, theirs, other) for other in others]
    found = {name: max((row[name] for row in by_other), key=_leading_number) for name in by_other[0]}
    if "max Δ logp" in found:
        squares = [root_mean_square(requests, theirs, other) ** 2 for other in others]
        found["rms Δ logp"] = math.sqrt(statistics.fmean(squares))
    return found


def _leading_number(value: float | str) -> float:
    """Of a number, or of "3 of 80"."""
    return float(str(value).split()[0])


def root_mean_square(requests: Sequence[Instance], exact: Sequence[Any], found: dict[Any, Any]) -> float:
    """Of what log-probabilities differ by from the `exact` ones."""
    return math.sqrt(statistics.fmean(_relative(pair) ** 2 for pair in _log_probs(requests, exact, found)))


def _relative(pair: tuple[float, float]) -> float:
    return abs(pair[0] - pair[1]) / max(1.0, abs(pair[0]))


def _log_probs(requests: Sequence[Instance], theirs: Sequence[Any], ours: dict[Any, Any]) -> list[tuple[float, float]]:
    pairs = [(their, ours[_key(request)]) for request, their in zip(requests, theirs, strict=True)]
    return [(a, b) if isinstance(a, float) else (a[0], b[0]) for a, b in pairs]


def _key(request: Instance) -> tuple[Any, ...]:
    return (*document_of(request), request.idx)


def _by_key(requests: Sequence[Instance], answers: Sequence[Any]) -> dict[Any, Any]:
    return {_key(request): answer for request, answer in zip(requests, answers, strict=True)}


def _best(side: int, pairs: list[tuple[float, float]]) -> int:
    return max(range(len(pairs)), key=lambda index: pairs[index][side])


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    path = arguments.model or fetch_real_data.smollm2()
    args = ModelArgs(pretrained=str(path), dtype=arguments.dtype, max_length=arguments.max_length)
    spec = ModelSpec(kind="hf", args=args, fingerprint="bench")
    loaded = load_model(spec, allow_remote_code=False)
    stock = Stock.load(args, loaded.max_length)
    ours = Ours(loaded, spec)
    bench = Bench(
        ours,
        HuggingFace(stock, arguments.hf_batch_sizes),
        None if loaded.model.dtype == torch.float32 else HuggingFace(in_fp32(args, loaded.max_length), [1]),
        GenerateBatch(stock, ours),
        Meter(loaded.model, stock.model),
        arguments.rounds,
        arguments.share,
        arguments.deterministic,
        arguments.generate_batch,
        arguments.profile,
    )
    peaks = measure_peaks(loaded.model.dtype)
    facts = {
        "model": loaded.describe(),
        "route": loaded.route[1],
        "threads": arguments.threads,
        "selection": arguments.selection,
        "matrix peak, GFLOP/s": peaks.flops / 1e9,
        "memory bandwidth, GB/s": peaks.bandwidth / 1e9,
        "limit": FORMULA,
    }
    if arguments.generate_batch:
        facts["generate_batch"] = STOP_STRINGS_NOTE
    with tempfile.TemporaryDirectory() as folder:
        library = Library(Path(folder), arguments.max_length)
        rows = [bench.run(workload, library) for workload in wanted(arguments.workloads, arguments.selection)]
    print_report("Engine", describe_machine(), rows, facts, as_json=arguments.json)
    return 0


def in_fp32(args: ModelArgs, max_length: int) -> Stock:
    """The same checkpoint in full precision."""
    return Stock.load(msgspec.structs.replace(args, dtype="float32"), max_length)


def wanted(names: Sequence[str], selection: str) -> list[Workload]:
    """The workloads of these names, of which "goals" and "shapes" stand for several."""
    groups = {"goals": WORKLOADS[selection], "shapes": SHAPES}
    alone = {workload.name: (workload,) for group in groups.values() for workload in group}
    return list(dict.fromkeys(workload for name in names for workload in (groups | alone)[name]))


def parse_arguments() -> argparse.Namespace:
    names = ["goals", "shapes", *(workload.name for workload in (*WORKLOADS["long"], *SHAPES))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of SmolLM2")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the documents that are evaluated")
    parser.add_argument("--deterministic", action="store_true", help="also what deterministic requests cost")
    parser.add_argument("--hf-batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--workloads", nargs="+", choices=names, default=["goals"], metavar="NAME", help=f"of {names}")
    parser.add_argument(
        "--selection", choices=list(WORKLOADS), default="long", help="of the goals' documents: see engine_workloads.py"
    )
    parser.add_argument(
        "--generate-batch",
        type=int,
        nargs="?",
        const=16,
        default=0,
        metavar="PROMPTS",
        help="also transformers' continuous batching, on so many prompts at most (16): it is slow on a CPU",
    )
    parser.add_argument("--profile", action="store_true", help="also what ours spends its time on")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
