"""An exception as one sentence for the user: no stack, no value of the environment."""

from __future__ import annotations

import os

from gpu_pool.errors import DISK_FULL, PoolError

MAX_CHARACTERS = 600
_SECRET_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "AUTH")
_SHORTEST_SECRET = 6  # shorter values would blank out ordinary words


class JobError(PoolError):
    """The job cannot be completed."""


class OptionsError(PoolError):
    """A task's generation_kwargs cannot be honoured."""


class ContentChanged(JobError):
    """The model's files are no longer those that were submitted."""


def explain(error: BaseException) -> str:
    """What went wrong, in one line of at most MAX_CHARACTERS."""
    text = " ".join(str(error).split())
    if not isinstance(error, PoolError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = without_secrets(text) + _advice(error)
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"


def _advice(error: BaseException) -> str:
    if not isinstance(error, OSError) or error.errno not in DISK_FULL:
        return ""
    where = "there" if error.filename else "for the data folder, the output folder and HF_HOME"
    return f"; make room {where} and submit the job again"


def without_secrets(text: str) -> str:
    """`text` with the values of environment variables that look like secrets blanked out."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and any(word in name.upper() for word in _SECRET_NAMES):
            text = text.replace(value, "***")
    return text
