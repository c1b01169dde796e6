"""`evalpool serve`: a flag for every setting that one can express. Loaded by that command alone."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec
import typer

from gpu_pool.settings import PoolSettings
from server.serve import serve
from server.settings import PREFIX, Settings, flag_of, load_settings

_CONFIG = Annotated[Path | None, typer.Option(help="A TOML file with these settings, and those that are tables.")]


def run(arguments: Sequence[str], name: str) -> None:
    """Serve until SIGTERM or SIGINT, or show the help. Raises SettingsError, PoolError, OSError and click's errors."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(_with_flags())
    typer.main.get_command(command).main(list(arguments), prog_name=name, standalone_mode=False)


def _with_flags() -> Any:
    """The command as typer reads it: a function with a parameter for each flag."""

    def command(config: Path | None, **flags: Any) -> None:
        given = {name: value for name, value in flags.items() if value != []}  # that is a list of which none was given
        serve(load_settings(given, config, os.environ))

    command.__doc__ = f"Run the server until SIGTERM or Ctrl-C. Each setting may be given as {PREFIX}<NAME>, too."
    annotations = {**dict(_flags()), "config": _CONFIG}
    command.__annotations__ = annotations
    command.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in annotations.items()
        ]
    )
    return command


def _flags() -> Iterator[tuple[str, Any]]:
    """Each setting's name with what typer is to know of its flag."""
    for struct in (Settings, PoolSettings):
        explained = dict(_docstrings(struct))
        for field in msgspec.structs.fields(struct):
            if (kind := _kind(field.type)) is not None:
                flag = f"{flag_of(field.name)}/--no{flag_of(field.name)[1:]}" if kind is bool else flag_of(field.name)
                shown = "" if field.default in (None, (), False) else f" (default: {field.default})"
                option = typer.Option(flag, help=explained[field.name] + shown, show_default=False)
                yield field.name, Annotated[kind | None, option]


def _kind(type_: Any) -> Any:
    """What typer reads; the settings check it, and make paths of words. None: no flag can express it."""
    if get_origin(type_) in (Union, UnionType):
        [type_] = [one for one in get_args(type_) if one is not NoneType]
    if get_origin(type_) is Annotated:
        type_ = get_args(type_)[0]
    if get_origin(type_) is tuple:
        return list[str]
    if get_origin(type_) is dict or (isinstance(type_, type) and issubclass(type_, msgspec.Struct)):
        return None
    return type_ if type_ in (bool, int, float) else str


def _docstrings(struct: type) -> Iterator[tuple[str, str]]:
    """The text below each field."""
    [body] = [node.body for node in ast.parse(inspect.getsource(struct)).body if isinstance(node, ast.ClassDef)]
    for pair in itertools.pairwise(body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())
            case _:
                pass
