"""What every benchmark prints: a table for people, or one JSON document for programs, with the machine it ran on."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from machine import Machine
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
"""A line of a table: column names to values. Lines may lack columns that others have."""

_FILE_COLUMNS = 240  # a file has no width to fit a table to


def print_report(
    title: str, machine: Machine, rows: Sequence[Row], facts: Mapping[str, Any], *, as_json: bool = False
) -> None:
    """Print `rows` with the settings and single figures in `facts`; JSON has every digit, the table three."""
    if as_json:
        document = {"title": title, "machine": dataclasses.asdict(machine), "facts": facts, "rows": rows}
        json.dump(document, sys.stdout, indent=2)
        print()
        return
    console = Console() if sys.stdout.isatty() else Console(width=_FILE_COLUMNS)
    console.print(str(machine), highlight=False)
    for name, value in facts.items():
        console.print(f"{name}: {in_words(value)}", highlight=False)
    console.print(as_table(title, rows))


def as_table(title: str, rows: Sequence[Row]) -> Table:
    """Columns in the order in which they first appear; numbers to the right."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(title=title)
    for column in columns:
        numeric = any(isinstance(row.get(column), int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(in_words(row.get(column)) for column in columns))
    return table


def in_words(value: Any) -> str:
    """Floats with three significant digits, at least to the unit; large numbers with commas; None as nothing."""
    match value:
        case None:
            return ""
        case bool():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
        case _:
            return str(value)
