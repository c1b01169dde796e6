"""`evalpool serve | submit | merge | watch | jobs | events | results | cancel | gpus | cache | db`.

Only `serve` imports the server.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NoReturn

import httpx
import typer
from rich.console import Console
from rich.markup import escape

from server import cli_db
from server.cli_view import cache_table, event_table, follow, gpu_table, job_table, result_paths, score_table
from server.client import DEFAULT_URL, EvalClient, EvalError, Json, MergeOptions

SHOWN_CHOICES = 8

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Evaluation as a service for language and multimodal models.",
)
app.add_typer(cli_db.app, name="db")
output = Console()
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def _limit(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


CheckpointType = Literal["regular", "ema"]
Url = Annotated[str, typer.Option(envvar="EVALPOOL_URL", help="Where the server is.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.")]


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(context: typer.Context) -> None:
    """Run the server until SIGTERM or Ctrl-C."""
    from gpu_pool.errors import PoolError
    from server.cli_serve import run
    from server.settings import SettingsError

    try:
        run(context.args, context.command_path)
    except (SettingsError, PoolError, OSError) as error:
        _fail(str(error))


@app.command()
def submit(
    model: Annotated[str, typer.Option(help='A path, a hub id, or a kind such as "hf" with pretrained in model args.')],
    tasks: Annotated[list[str], typer.Option(help="Tasks, groups or tags: a,b,c or several times.")],
    model_args: Annotated[
        list[str] | None, typer.Option(help="dtype=float32,revision=… or a JSON object; several times.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Few-shot examples (default: what the task says).")] = None,
    batch_size: Annotated[str | None, typer.Option(help="A positive integer or auto.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or a UUID.")] = None,
    limit: Annotated[
        float | None, typer.Option(parser=_limit, help="Documents of each task (8) or a fraction of them (0.1).")
    ] = None,
    gen_kwargs: Annotated[str | None, typer.Option(help="temperature=0,max_gen_toks=64 or a JSON object.")] = None,
    num_gpus: Annotated[int, typer.Option(help="Most GPUs to use; 0: CPU.")] = 1,
    merge_first: Annotated[
        CheckpointType | None, typer.Option("--merge", help="The model is sharded: merge these of its weights first.")
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="Where result files go, under an allowed root.")] = None,
    log_samples: Annotated[bool, typer.Option(help="Keep a record of every sample.")] = True,
    predict_only: Annotated[bool, typer.Option("--predict-only", help="Predictions without metrics.")] = False,
    use_cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Reuse this model's earlier answers.")] = True,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="The same bits whatever the batches.")] = False,
    apply_chat_template: Annotated[
        bool | None,
        typer.Option(
            "--apply-chat-template/--no-chat-template", help="Prompts as chats; by default as the task's library."
        ),
    ] = None,
    chat_template: Annotated[str | None, typer.Option(help="Prompts as chats, by this template of several.")] = None,
    system_instruction: Annotated[str | None, typer.Option(help="A text before every prompt.")] = None,
    fewshot_as_multiturn: Annotated[bool, typer.Option(help="Few-shot examples as turns of the chat.")] = True,
    priority: Annotated[int, typer.Option(help="From -1000 to 1000; larger goes first.")] = 0,
    timeout_s: Annotated[float | None, typer.Option(help="Seconds that it may run.")] = None,
    max_retries: Annotated[int | None, typer.Option(help="Further attempts after its processes were lost.")] = None,
    max_error_share: Annotated[float, typer.Option(help="Share of requests that may end in an error.")] = 0.0,
    tag: Annotated[list[str] | None, typer.Option(help="A word to find it by; several times.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key again means the same job.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch it and show the scores.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Submit an evaluation; prints the job's id."""
    with _client(url) as client:
        job = client.evaluate(
            model,
            [name.strip() for names in tasks for name in names.split(",")],
            _pairs(model_args or []),
            num_fewshot,
            _batch_size(batch_size),
            device,
            limit,
            _gen_kwargs(gen_kwargs),
            log_samples,
            predict_only,
            num_gpus,
            os.path.abspath(output_dir) if output_dir else None,
            merge=merge_first,
            use_cache=use_cache,
            deterministic=deterministic,
            apply_chat_template=chat_template or apply_chat_template,
            system_instruction=system_instruction,
            fewshot_as_multiturn=fewshot_as_multiturn,
            priority=priority,
            timeout_s=timeout_s,
            max_retries=max_retries,
            max_error_share=max_error_share,
            tags=tag or [],
            idempotency_key=idempotency_key,
        )
        typer.echo(job["job_id"])
        if wait:
            _watch(client, job["job_id"])


@app.command()
def merge(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A sharded checkpoint, or a run of several.")],
    output_path: Annotated[
        str | None, typer.Option("--output", help="A folder, under an allowed root (default: the checkpoint itself).")
    ] = None,
    checkpoint_type: Annotated[
        CheckpointType, typer.Option("--type", help="The weights, or their average.")
    ] = "regular",
    max_shard_bytes: Annotated[
        int | None, typer.Option(min=1, help="Most bytes in a file of weights (default: 5 GB).")
    ] = None,
    priority: Annotated[int, typer.Option(help="From -1000 to 1000; larger goes first.")] = 0,
    tag: Annotated[list[str] | None, typer.Option(help="A word to find it by; several times.")] = None,
    wait: Annotated[bool, typer.Option(help="Show its progress; otherwise only its id.")] = True,
    url: Url = DEFAULT_URL,
) -> None:
    """Merge a sharded training checkpoint into one that can be loaded; prints its folder."""
    options: MergeOptions = {"priority": priority, "tags": tag or []}
    if max_shard_bytes is not None:
        options["max_shard_bytes"] = max_shard_bytes
    target = os.path.abspath(output_path) if output_path else None
    with _client(url) as client:
        job = client.submit_merge(os.path.abspath(checkpoint), target, checkpoint_type, **options)
        if wait:
            _watch(client, job["job_id"])
        else:
            typer.echo(job["job_id"])


@app.command()
def watch(job: JobId, url: Url = DEFAULT_URL) -> None:
    """Show a job's progress until it ends, then its scores, or where a merge has written."""
    with _client(url) as client:
        _watch(client, job)


@app.command()
def jobs(
    status: Annotated[str | None, typer.Option(help="Only queued, running, completed, failed or cancelled.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only with this tag; several times: with all.")] = None,
    limit: Annotated[int, typer.Option(help="How many.")] = 20,
    url: Url = DEFAULT_URL,
) -> None:
    """List jobs, newest first."""
    with _client(url) as client:
        output.print(job_table(client.jobs(status, limit, tags=tag or ())["jobs"]))


@app.command()
def events(job: JobId, url: Url = DEFAULT_URL) -> None:
    """Show what happened to a job: when it was submitted and started, lost a worker or was requeued and why, and how it
    ended."""
    with _client(url) as client:
        output.print(event_table(client.events(job)["events"]))


@app.command()
def results(
    job: JobId,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Show a job's scores and where its files are."""
    with _client(url) as client:
        found = client.get_job(job)
    if as_json:
        typer.echo(json.dumps(found["metrics"], indent=2))
    else:
        _show_results(found)
    _expect_completed(found)


@app.command()
def cancel(job: JobId, url: Url = DEFAULT_URL) -> None:
    """Cancel a queued or running job."""
    with _client(url) as client:
        typer.echo(client.cancel_job(job)["message"])


gpus_app = typer.Typer(help="The GPUs: show them, release one from quarantine.")
app.add_typer(gpus_app, name="gpus")


@gpus_app.callback(invoke_without_command=True)
def gpus(context: typer.Context, url: Url = DEFAULT_URL) -> None:
    """Show every GPU, who is on it, and why it is not free."""
    if context.invoked_subcommand is not None:
        return
    with _client(url) as client:
        shown = client.gpus()
    output.print(gpu_table(shown["gpus"]))
    if shown["problem"]:
        errors.print(escape(shown["problem"]))


@gpus_app.command()
def release(uuid: Annotated[str, typer.Argument(metavar="UUID", help="A GPU's UUID.")], url: Url = DEFAULT_URL) -> None:
    """Let a quarantined GPU be used again."""
    with _client(url) as client:
        gpu = client.release_gpu(uuid)
    typer.echo(f"GPU {gpu['index']} is released" + (f"; {gpu['reason']}" if gpu["reason"] else ""))


cache = typer.Typer(no_args_is_help=True, help="The response cache: answers kept for jobs to come.")
app.add_typer(cache, name="cache")


@cache.command()
def stats(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False, url: Url = DEFAULT_URL
) -> None:
    """Show how much it holds, of which models."""
    with _client(url) as client:
        found = client.cache()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        output.print(cache_table(found))


@cache.command()
def prune(
    older_than_days: Annotated[int | None, typer.Option(min=0, help="Answers not used for so many days.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model's: its path or fingerprint.")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Delete answers; without options only what is above the size limit."""
    with _client(url) as client:
        pruned = client.prune_cache(older_than_days, model)
    typer.echo(f"{pruned['deleted_entries']} answers deleted, {pruned['freed_bytes']} bytes freed")


def _watch(client: EvalClient, job_id: str) -> None:
    [job] = follow(client, [job_id], errors)
    _show_results(job)
    _expect_completed(job)


def _expect_completed(job: Json) -> None:
    if job["status"] != "completed":
        _fail(f"the job is {job['status']}" + (f": {job['error']}" if job["error"] else ""))


def _show_results(job: Json) -> None:
    if job["metrics"]:
        output.print(score_table(job["metrics"]))
    for path in result_paths(job):
        output.print(path, soft_wrap=True, highlight=False)


@contextmanager
def _client(url: str) -> Generator[EvalClient]:
    """A client whose errors end the command with one line."""
    try:
        with EvalClient(url) as client:
            yield client
    except EvalError as error:
        _fail(_explain(error))
    except (httpx.TransportError, httpx.InvalidURL) as error:
        _fail(f"no server answers at {url} ({error}); start one with `evalpool serve`, or say where with --url")


def _explain(error: EvalError) -> str:
    """The problem's detail, and what could have been meant where the detail does not say it."""
    choices = [str(choice) for field in error.fields for choice in field.get("choices") or []]
    if not choices or all(choice in error.detail for choice in choices[:SHOWN_CHOICES]):
        return error.detail
    return f"{error.detail} (choices: {', '.join(choices[:SHOWN_CHOICES])}{', …' * (len(choices) > SHOWN_CHOICES)})"


def _fail(message: str) -> NoReturn:
    errors.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}")
    raise typer.Exit(1)


def _pairs(texts: list[str]) -> Json | None:
    """`k=v,k=v` texts and JSON objects as one object; a value that reads as JSON (1, true, null) is that."""
    merged: Json = {}
    for text in texts:
        if text.lstrip().startswith("{"):
            merged |= _json_object(text)
        else:
            merged |= dict(_pair(pair) for pair in text.split(","))
    return merged or None


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is not of the form name=value")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


def _json_object(text: str) -> Json:
    try:
        return json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}") from error


def _gen_kwargs(text: str | None) -> str | Json | None:
    return _json_object(text) if text and text.lstrip().startswith("{") else text


def _batch_size(text: str | None) -> int | str | None:
    return int(text) if text and text.isdecimal() else text
