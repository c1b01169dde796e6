"""`evalpool db upgrade | check`: the tables of the job database. Everything of the pool is imported by the commands."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

AnswerT = TypeVar("AnswerT")

app = typer.Typer(no_args_is_help=True, help="The job database: whether its tables are up to date, and making them so.")

DataDir = Annotated[str | None, typer.Option(help="As of `serve`.")]
DatabaseUrl = Annotated[str | None, typer.Option("--database", help="As of `serve`.")]
Config = Annotated[Path | None, typer.Option(help="As of `serve`.")]


@app.command()
def check(data_dir: DataDir = None, database: DatabaseUrl = None, config: Config = None) -> None:
    """Say how the tables stand; exit status 0 only when this version can use them as they are."""
    from gpu_pool.database_admin import check_database

    sentence, is_current = _answer(check_database, data_dir, database, config)
    typer.echo(sentence)
    raise typer.Exit(0 if is_current else 1)


@app.command()
def upgrade(data_dir: DataDir = None, database: DatabaseUrl = None, config: Config = None) -> None:
    """Bring the tables up to date; the server must be stopped (it does the same when it starts)."""
    from gpu_pool.database_admin import upgrade_database

    typer.echo(_answer(upgrade_database, data_dir, database, config))


def _answer(
    work: Callable[[Any], Coroutine[Any, Any, AnswerT]],
    data_dir: str | None,
    database: str | None,
    config: Path | None,
) -> AnswerT:
    """What `work` says of the database that these settings mean; an error ends the command with one line."""
    from gpu_pool.errors import PoolError
    from server.settings import SettingsError, load_settings

    try:
        return asyncio.run(work(load_settings({"data_dir": data_dir, "database": database}, config, os.environ).pool))
    except (SettingsError, PoolError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
