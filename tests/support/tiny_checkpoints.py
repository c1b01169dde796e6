"""Random checkpoints made by the scripts `make_tiny_*.py` beside this file, without a process for each.

To import torch and transformers takes a process seconds, and the tests' own mostly has them.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path


def make_tiny(kind: str, *arguments: Path | str) -> Path:
    """What `python make_tiny_KIND.py ARGUMENTS…` makes; returns the folder, the one argument that is a path."""
    import torch

    main = importlib.import_module(f"make_tiny_{kind}").main
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in a process of its own
        main(*map(str, arguments))
    return next(argument for argument in arguments if isinstance(argument, Path))
