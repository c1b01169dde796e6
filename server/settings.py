"""What the operator decides: defaults, then the TOML file, then EVALPOOL_* variables, then flags; the last one wins."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import msgspec
from msgspec import Meta

from gpu_pool.records import Record
from gpu_pool.settings import PoolSettings
from gpu_pool.suggestions import close_names

PREFIX = "EVALPOOL_"
NOT_SETTINGS = frozenset({"EVALPOOL_URL", "EVALPOOL_CACHE", "EVALPOOL_VENV"})
"""Variables with our prefix that are the client's and the scripts'."""


class SettingsError(Exception):
    """A setting cannot be used; the message names it and where it was given."""


class Settings(Record, frozen=True, kw_only=True):
    """The server's own settings and the pool's. Outside, the pool's fields stand beside the others."""

    pool: PoolSettings = PoolSettings()
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """Port to listen on; 0: any free one."""
    max_body_bytes: Annotated[int, Meta(ge=1)] = 1024 * 1024
    """Larger request bodies are refused."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much the server says: debug, info, warning or error."""


def _field_types() -> dict[str, Any]:
    own = {field.name: field.type for field in msgspec.structs.fields(Settings) if field.name != "pool"}
    return {field.name: field.type for field in msgspec.structs.fields(PoolSettings)} | own


FIELD_TYPES = _field_types()
"""Every setting by name, with its type."""


def load_settings(flags: Mapping[str, Any], config_file: Path | None, environ: Mapping[str, str]) -> Settings:
    """All settings. A flag that is None was not given; relative paths in the file are relative to the file.

    Raises:
        SettingsError: unknown name or wrong value, saying where.
    """
    values: dict[str, Any] = {
        "data_dir": Path("evalpool-data").absolute(),
        **_from_file(config_file),
        **_from_environment(environ),
        **_from_flags(flags),
    }
    own = {name: values.pop(name) for name in Settings.__struct_fields__ if name in values}
    return Settings(pool=PoolSettings(**values), **own)


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from error
    for name in values:
        _check_known(name, FIELD_TYPES, f"{path}: {name}")
    base = path.absolute().parent
    return {name: _convert(name, value, base, f"{path}: {name}") for name, value in values.items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    names = {f"{PREFIX}{name.upper()}": name for name in FIELD_TYPES}
    given = {key: text for key, text in environ.items() if key.startswith(PREFIX) and key not in NOT_SETTINGS}
    for key in given:
        _check_known(key, names, key)
    return {
        names[key]: _convert(names[key], _parse(FIELD_TYPES[names[key]], text, key), Path.cwd(), key, strict=False)
        for key, text in given.items()
    }


def _from_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in flags.items() if value is not None}
    for name in given:
        _check_known(name, FIELD_TYPES, name)
    return {name: _convert(name, value, Path.cwd(), flag_of(name)) for name, value in given.items()}


def flag_of(name: str) -> str:
    """The flag of `evalpool serve` for a setting; one for a list is given several times, each with one of its items."""
    is_list = get_origin(FIELD_TYPES[name]) is tuple
    return "--" + (name.removesuffix("s") if is_list else name).replace("_", "-")


def _check_known(name: str, known: Mapping[str, Any], where: str) -> None:
    if name not in known:
        close = close_names(name, known) or sorted(known)
        raise SettingsError(f"{where}: no such setting; did you mean {', '.join(close)}?")


def _parse(type_: Any, text: str, where: str) -> Any:
    """A variable's text as what a file would hold: lists are separated like PATH, tables are JSON."""
    if get_origin(type_) is tuple:
        return [item for item in text.split(os.pathsep) if item]
    if get_origin(type_) is dict:
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise SettingsError(f"{where}: must be a JSON object: {error}") from error
    return text


def _convert(name: str, value: Any, base: Path, where: str, *, strict: bool = True) -> Any:
    try:
        converted = msgspec.convert(value, FIELD_TYPES[name], strict=strict, dec_hook=_path_under(base))
    except msgspec.ValidationError as error:
        raise SettingsError(f"{where}: {str(error).replace('`', '')}") from error
    if name == "dataset_roots":  # its values are paths with placeholders
        return {dataset: str(base / Path(files).expanduser()) for dataset, files in converted.items()}
    return converted


def _path_under(base: Path) -> Callable[[type, Any], Path]:
    def decode(_: type, value: Any) -> Path:
        if not isinstance(value, str) or not value:
            raise ValueError("Expected a path")
        return base / Path(value).expanduser()

    return decode
