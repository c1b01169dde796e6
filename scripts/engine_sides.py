"""Who answers the same requests in bench_engine: our engine, lm-eval's HF backend, transformers' continuous batching.

All around the same checkpoint, in one process; each takes text and tokenises it itself. The others have transformers'
model as it is, because our engine changes how its own computes products on a CPU.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from engine_limit import Tokens, tokens_of
from engine_workloads import document_of
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from gpu_pool.chunk_messages import GenerationChunk, GenerationOptions, LoglikelihoodChunk
from gpu_pool.evaluator.prompts import PromptEncoder
from gpu_pool.evaluator.requests import RequestBuilder, Unit
from gpu_pool.records import ModelArgs, ModelSpec
from gpu_pool.token_sequences import TokenSequences
from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loglikelihood import score
from gpu_pool.worker.engine.tokenizer import load_tokenizer
from gpu_pool.worker.engine.weights import load_weights

STOP_STRINGS_NOTE = (
    "transformers' generate_batch knows stop tokens only: it writes up to the length limit, and its texts are cut at "
    "the stop strings afterwards"
)


class Meter:
    """Seconds and work of a call: tokens through the layers and positions through the head, by hooks on the models."""

    def __init__(self, *models: Any) -> None:
        self.tokens = self.positions = 0
        for model in models:
            model.base_model.register_forward_pre_hook(self._layers, with_kwargs=True)
            model.get_output_embeddings().register_forward_hook(self._head)

    def _layers(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.tokens += ids.numel()

    def _head(self, module: Any, args: Any, output: Any) -> None:
        self.positions += output.numel() // output.shape[-1]

    def measure(self, call: Callable[[], list[Any]], documents: int) -> tuple[list[Any], dict[str, float]]:
        """(what `call` returns, its cost for each document)."""
        self.tokens = self.positions = 0
        wall, cpu = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            answers = call()
        cost = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        cost |= {"tokens": self.tokens, "positions": self.positions}
        return answers, {name: value / documents for name, value in cost.items()}


class Ours:
    """The engine with the evaluator's tokenisation before it, without the processes between them."""

    def __init__(self, loaded: LoadedModel, spec: ModelSpec) -> None:
        self.loaded = loaded
        self._spec = spec
        self._encoder = PromptEncoder(spec.args)  # evaluators keep it between jobs, as lm-eval's backend keeps its own

    def units(self, requests: Sequence[Instance]) -> list[list[Unit]]:
        """The distinct questions behind each request, tokenised."""
        builder = RequestBuilder(self._spec, self._encoder, seed=1234)
        built = builder.build(requests)
        return [units for _, repeats in built.responses for units in repeats]

    def answer(self, requests: Sequence[Instance], *, deterministic: bool = False) -> list[Any]:
        """Answers from an empty prefix cache."""
        self.loaded.prefix_cache.clear()
        asked = self.units(requests)
        distinct = sorted({unit for units in asked for unit in units}, key=tokens_of)
        sequences = TokenSequences.pack(map(tokens_of, distinct))
        answers: Sequence[Any]
        if (options := distinct[0].options) is not None:
            chunk = GenerationChunk(chunk_id=1, prompts=sequences, options=options, deterministic=deterministic)
            answers = generate(self.loaded, chunk, lambda: False)
        else:
            scored = tuple(len(unit.continuation) for unit in distinct)
            asked_once = LoglikelihoodChunk(chunk_id=1, sequences=sequences, scored=scored, deterministic=deterministic)
            answers = score(self.loaded, asked_once, lambda: False)
        by_unit = dict(zip(distinct, answers, strict=True))
        if requests[0].request_type == "loglikelihood_rolling":
            return [sum(by_unit[unit][0] for unit in units) for units in asked]
        return [by_unit[units[0]] for units in asked]

    def written(self, requests: Sequence[Instance], texts: Sequence[str]) -> dict[Tokens, int]:
        """Tokens that each distinct prompt was continued by, at least: those of its text, and one that ended it."""
        counts: dict[Tokens, int] = {}
        for [unit], text in zip(self.units(requests), texts, strict=True):
            if unit.options is not None:
                tokens = len(self.loaded.tokenizer.encode(text, add_special_tokens=False))
                counts[tokens_of(unit)] = min(tokens + 1, unit.options.max_gen_toks)
        return counts


@dataclass(frozen=True)
class Stock:
    """The checkpoint as transformers loads it."""

    model: Any
    tokenizer: Any
    max_length: int

    @classmethod
    def load(cls, args: ModelArgs, max_length: int) -> Stock:
        tokenizer = load_tokenizer(args, trust_remote_code=False)
        return cls(load_weights(args, "cpu", 1, tokenizer, trust_remote_code=False), tokenizer, max_length)


class HuggingFace:
    """lm-eval's HF backend."""

    def __init__(self, stock: Stock, sizes: Sequence[int]) -> None:
        self._stock, self._sizes = stock, sizes

    def backend(self, batch_size: int, softmax_dtype: torch.dtype | None = None) -> Any:
        """lm-eval's backend; its softmax is of the model's dtype by itself."""
        stock, sizes = self._stock, {"batch_size": batch_size, "max_length": self._stock.max_length}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return HFLM(stock.model, tokenizer=stock.tokenizer, softmax_dtype=softmax_dtype, **sizes)

    def sizes_beyond_one(self, requests: Sequence[Instance]) -> list[int]:
        """Batch sizes that so many requests tell apart from 1."""
        return [size for size in self._sizes if 1 < size <= len(requests)]

    def best(self, requests: Sequence[Instance], meter: Meter) -> tuple[int, Any]:
        """(batch size, backend) that answers `requests` in the least CPU time."""
        costs: dict[int, float] = {}
        ask(self.backend(1), requests[:1])  # what the first forward pass alone pays
        for size in [size for size in self._sizes if size <= len(requests)] or [1]:
            backend = self.backend(size)
            costs[size] = meter.measure(lambda backend=backend: ask(backend, requests), 1)[1]["cpu"]
        size = min(costs, key=costs.__getitem__)
        return size, self.backend(size)


def ask(backend: Any, requests: Sequence[Instance]) -> list[Any]:
    return getattr(backend, requests[0].request_type)(list(requests))


class GenerateBatch:
    """transformers' own continuous batching."""

    PAGE = 32
    """Tokens: only whole pages are shared."""
    BATCH_TOKENS = 512
    """Of a forward pass. Its attention covers each pair of a batch's tokens and the cached ones, whosever they are."""

    def __init__(self, stock: Stock, ours: Ours) -> None:
        self._stock, self._units = stock, ours.units

    def answer(self, requests: Sequence[Instance]) -> list[str]:
        """Greedy texts, cut at the stop strings.

        Raises:
            RuntimeError: it gave no answer to some of the prompts.
        """
        units = [unit for [unit] in self._units(requests)]
        options = units[0].options
        assert options is not None
        prompts = [list(tokens_of(unit)) for unit in units]
        room = sum(-(-(len(prompt) + options.max_gen_toks) // self.PAGE) + 1 for prompt in prompts)
        outputs = self._stock.model.generate_batch(
            prompts,
            generation_config=self._generation_config(options),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=self.PAGE, num_blocks=room, max_batch_tokens=self.BATCH_TOKENS
            ),
        )
        if len(outputs) < len(prompts) or any(output.error for output in outputs.values()):
            raise RuntimeError(f"generate_batch: {len(outputs)} answers to {len(prompts)} prompts, or an error")
        decode = self._stock.tokenizer.decode
        texts = [decode(output.generated_tokens, skip_special_tokens=True) for output in outputs.values()]
        return [postprocess_generated_text(text, list(options.until), None) for text in texts]

    def _generation_config(self, options: GenerationOptions) -> GenerationConfig:
        own = self._stock.model.generation_config
        return GenerationConfig(
            max_new_tokens=options.max_gen_toks,
            do_sample=False,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
        )


def documents_of(requests: Sequence[Instance]) -> int:
    return len(set(map(document_of, requests)))
