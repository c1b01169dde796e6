"""EvalClient and AsyncEvalClient: the server's REST face in Python, with the interface of the reference's clients.

Needs httpx and nothing else of evalpool. Answers are the server's JSON as dictionaries.

    with EvalClient("http://localhost:8000") as client:
        job = client.evaluate("hf", ["arc_easy"], {"pretrained": "/models/mine"}, limit=100)
        print(client.wait_for_job(job["job_id"])["metrics"])
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Generic, Literal, Self, TypedDict, TypeVar, Unpack

import httpx

from server.waiting import JobFailed, Json, Waiting

__all__ = ["AsyncEvalClient", "EvalClient", "EvalError", "JobFailed", "Json", "MergeOptions", "MoreOptions"]

AnswerT = TypeVar("AnswerT", Json, Awaitable[Json])

DEFAULT_URL = "http://localhost:8000"
CONNECT_SECONDS = 10.0  # a server that is there accepts at once; without a limit a wrong host hangs for minutes
SAMPLES_PER_PAGE = 100


class MoreOptions(TypedDict, total=False):
    """Fields of POST /evaluate beyond the reference's; one that is not given has the server's default."""

    merge: Literal["regular", "ema"] | None
    use_cache: bool
    deterministic: bool
    apply_chat_template: bool | str | None
    system_instruction: str | None
    fewshot_as_multiturn: bool
    random_seed: int | None
    numpy_random_seed: int | None
    torch_random_seed: int | None
    fewshot_random_seed: int | None
    bootstrap_iters: int
    priority: int
    timeout_s: float | None
    max_retries: int | None
    max_error_share: float
    tags: list[str]
    idempotency_key: str | None


class MergeOptions(TypedDict, total=False):
    """Fields of POST /merge beyond the reference's; one that is not given has the server's default."""

    max_shard_bytes: int
    priority: int
    tags: list[str]


class EvalError(httpx.HTTPStatusError):
    """The server refused the request. `detail` says why, `fields` lists {"field", "problem", "choices"}."""

    def __init__(self, response: httpx.Response) -> None:
        problem = _problem(response)
        self.detail: str = problem.get("detail") or f"{response.status_code} {response.reason_phrase}"
        self.fields: list[Json] = problem.get("errors") or []
        super().__init__(self.detail, request=response.request, response=response)


def _problem(response: httpx.Response) -> Json:
    try:
        body = response.json()
    except ValueError:  # not ours: a proxy's page
        return {}
    return body if isinstance(body, dict) else {}


def _given(**fields: Any) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        raise EvalError(response)
    return response


class _Endpoints(ABC, Generic[AnswerT]):
    """Every endpoint that answers with an object, for both clients. All raise EvalError and httpx.TransportError."""

    base_url: str

    @abstractmethod
    def _json(self, method: str, path: str, **options: Any) -> AnswerT: ...

    def health(self) -> AnswerT:
        """{"status": "healthy" or "degraded", "timestamp", "queue_size", "trouble"}."""
        return self._json("GET", "/health")

    def evaluate(
        self,
        model: str,
        tasks: list[str],
        model_args: Json | None = None,
        num_fewshot: int | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        limit: int | float | None = None,
        gen_kwargs: str | Json | None = None,
        log_samples: bool = True,
        predict_only: bool = False,
        num_gpus: int = 1,
        output_dir: str | None = None,
        **more: Unpack[MoreOptions],
    ) -> AnswerT:
        """Submit a job: {"job_id", "status", "position_in_queue", "message"}. None means the server's default."""
        fields = _given(
            model=model,
            tasks=tasks,
            model_args=model_args,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            device=device,
            limit=limit,
            gen_kwargs=gen_kwargs,
            log_samples=log_samples,
            predict_only=predict_only,
            num_gpus=num_gpus,
            output_dir=output_dir,
        )
        return self._json("POST", "/evaluate", json={**fields, **more})

    def get_job(self, job_id: str) -> AnswerT:
        """State, progress, metrics, result files and error of one job."""
        return self._json("GET", f"/jobs/{job_id}")

    def jobs(
        self,
        status: str | None = None,
        limit: int = 20,
        cursor: str | None = None,
        tags: Sequence[str] = (),
    ) -> AnswerT:
        """A page of jobs with all `tags`, newest first: {"jobs", "next_cursor"}.

        `next_cursor` is the next page's `cursor`, or None.
        """
        return self._json("GET", "/jobs", params=_given(status=status, limit=limit, cursor=cursor, tag=list(tags)))

    def events(self, job_id: str) -> AnswerT:
        """What happened to one job: {"job_id", "events": [{"at", "event", "status", "attempt", "cause"}]}."""
        return self._json("GET", f"/jobs/{job_id}/events")

    def cancel_job(self, job_id: str) -> AnswerT:
        """Cancel a queued or running job."""
        return self._json("DELETE", f"/jobs/{job_id}")

    def samples_page(
        self, job_id: str, task: str | None = None, offset: int = 0, limit: int = SAMPLES_PER_PAGE
    ) -> AnswerT:
        """Records of one task: {"samples", "total", "offset", "limit", "task"}; a job's only task need not be named."""
        return self._json("GET", f"/jobs/{job_id}/samples", params=_given(task=task, offset=offset, limit=limit))

    def get_queue_status(self) -> AnswerT:
        """{"queue_size", "running_job", "running_jobs", "queued_jobs", "completed_jobs", "failed_jobs"}."""
        return self._json("GET", "/queue")

    def gpus(self) -> AnswerT:
        """{"gpus", "held", "max_gpus", "problem"}: what exists, what is free, and why not."""
        return self._json("GET", "/gpus")

    def release_gpu(self, uuid: str) -> AnswerT:
        """End the quarantine of a GPU; returns the GPU as `gpus` shows it."""
        return self._json("POST", f"/gpus/{uuid}/release")

    def workers(self) -> AnswerT:
        """{"workers"}: each with the model that it holds and the jobs that it serves."""
        return self._json("GET", "/workers")

    def cache(self) -> AnswerT:
        """The response cache: {"entries", "bytes", "max_bytes", "hits", "models"}."""
        return self._json("GET", "/cache")

    def prune_cache(self, older_than_days: int | None = None, model: str | None = None) -> AnswerT:
        """Delete cached answers not used for so long, or a model's (path or fingerprint); with neither, only what is
        above the size limit: {"deleted_entries", "freed_bytes"}."""
        return self._json("POST", "/cache/prune", json=_given(older_than_days=older_than_days, model=model))

    def merge_checkpoint(
        self,
        checkpoint_path: str,
        output_path: str | None = None,
        checkpoint_type: Literal["regular", "ema"] = "regular",
    ) -> AnswerT:
        """Merge a sharded training checkpoint into one folder and wait: {"success", "message", "merged_path"}."""
        fields = {"checkpoint_path": checkpoint_path, "output_path": output_path, "checkpoint_type": checkpoint_type}
        return self._json("POST", "/merge", json=fields)

    def submit_merge(
        self,
        checkpoint_path: str,
        output_path: str | None = None,
        checkpoint_type: Literal["regular", "ema"] = "regular",
        **more: Unpack[MergeOptions],
    ) -> AnswerT:
        """The same without waiting: {"job_id", "status", "position_in_queue", "message"}.

        The job, as `wait_for_job` returns it, has the folder as `merged_path`.
        """
        fields = {"checkpoint_path": checkpoint_path, "output_path": output_path, "checkpoint_type": checkpoint_type}
        return self._json("POST", "/merge", json={**fields, **more}, headers={"Prefer": "respond-async"})


class EvalClient(_Endpoints[Json]):
    """Blocking client; use it as a context manager, or close it."""

    def __init__(self, base_url: str = DEFAULT_URL, timeout: float | None = None) -> None:
        """`timeout`: seconds that one request may take; None: no limit."""
        self.base_url = base_url.rstrip("/")
        self.client = httpx.Client(timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        return _checked(self.client.request(method, f"{self.base_url}{path}", **options))

    def _json(self, method: str, path: str, **options: Any) -> Json:
        return self._send(method, path, **options).json()

    def is_healthy(self) -> bool:
        """Whether a server answers and says that it is healthy."""
        try:
            return self.health()["status"] == "healthy"
        except (httpx.HTTPError, ValueError):
            return False

    def list_tasks(self) -> list[str]:
        """Names that `tasks` may contain."""
        return self._json("GET", "/tasks")["tasks"]

    def list_models(self) -> list[str]:
        """Kinds that `model` may name."""
        return self._json("GET", "/models")["models"]

    def progress(self, job_id: str) -> Json | None:
        """Phase, requests done and total, per task and worker; None before the job runs."""
        return self.get_job(job_id)["progress"]

    def log(self, job_id: str) -> str:
        """The job's log as text."""
        return self._send("GET", f"/jobs/{job_id}/log").text

    def samples(self, job_id: str, task: str | None = None) -> Iterator[Json]:
        """Every record of one task, in file order, fetched page by page."""
        offset, total = 0, 1
        while offset < total:
            page = self.samples_page(job_id, task, offset)
            yield from page["samples"]
            offset, total = offset + SAMPLES_PER_PAGE, page["total"]

    def wait_for_job(
        self,
        job_id: str,
        poll_interval: float | None = None,
        timeout: float | None = None,
        verbose: bool = True,
        on_progress: Callable[[Json], object] | None = None,
    ) -> Json:
        """The job once it is completed or cancelled; raises JobFailed when it failed, TimeoutError after `timeout` s.

        `on_progress` is called with the job at each look. Looks are `poll_interval` s apart; None: 0.1 s, then rarer.
        """
        waiting = Waiting(poll_interval, timeout, verbose, on_progress)
        while (delay := waiting.seconds_after(job := self.get_job(job_id))) is not None:
            time.sleep(delay)
        return job


class AsyncEvalClient(_Endpoints[Awaitable[Json]]):
    """The same for asyncio: every method is awaited; use it as an async context manager, or close it."""

    def __init__(self, base_url: str = DEFAULT_URL, timeout: float | None = None) -> None:
        """`timeout`: seconds that one request may take; None: no limit."""
        self.base_url = base_url.rstrip("/")
        self.client = httpx.AsyncClient(timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    async def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        return _checked(await self.client.request(method, f"{self.base_url}{path}", **options))

    async def _json(self, method: str, path: str, **options: Any) -> Json:
        return (await self._send(method, path, **options)).json()

    async def is_healthy(self) -> bool:
        """Whether a server answers and says that it is healthy."""
        try:
            return (await self.health())["status"] == "healthy"
        except (httpx.HTTPError, ValueError):
            return False

    async def list_tasks(self) -> list[str]:
        """Names that `tasks` may contain."""
        return (await self._json("GET", "/tasks"))["tasks"]

    async def list_models(self) -> list[str]:
        """Kinds that `model` may name."""
        return (await self._json("GET", "/models"))["models"]

    async def progress(self, job_id: str) -> Json | None:
        """Phase, requests done and total, per task and worker; None before the job runs."""
        return (await self.get_job(job_id))["progress"]

    async def log(self, job_id: str) -> str:
        """The job's log as text."""
        return (await self._send("GET", f"/jobs/{job_id}/log")).text

    async def samples(self, job_id: str, task: str | None = None) -> AsyncIterator[Json]:
        """Every record of one task, in file order, fetched page by page."""
        offset, total = 0, 1
        while offset < total:
            page = await self.samples_page(job_id, task, offset)
            for sample in page["samples"]:
                yield sample
            offset, total = offset + SAMPLES_PER_PAGE, page["total"]

    async def wait_for_job(
        self,
        job_id: str,
        poll_interval: float | None = None,
        timeout: float | None = None,
        verbose: bool = True,
        on_progress: Callable[[Json], object] | None = None,
    ) -> Json:
        """As `EvalClient.wait_for_job`."""
        waiting = Waiting(poll_interval, timeout, verbose, on_progress)
        while (delay := waiting.seconds_after(job := await self.get_job(job_id))) is not None:
            await asyncio.sleep(delay)
        return job
