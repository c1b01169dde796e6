"""Can a data set that is not mapped be had: from a local folder, the library's cache, or the hub?"""

# pyright: basic
from __future__ import annotations

import os
import time
from pathlib import Path

import datasets.config
import huggingface_hub
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from datasets.packaged_modules.cache.cache import _find_hash_in_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

HUB_TIMEOUT_S = 5.0
"""A hub that has not answered by then counts as unreachable; a person waits for the submission."""
REMEMBERED_S = 60.0
"""For so long an answer of the hub (or none) is not asked for again."""


class HubData:
    """Asks, and remembers for a while."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, str | None]] = {}
        self._unreachable_at = float("-inf")

    def problem(self, dataset: str, config: str | None, data_files: tuple[str, ...]) -> str | None:
        """Why the data set cannot be had here, or None."""
        if dataset in _PACKAGED_DATASETS_MODULES:
            return self._files_problem(data_files)
        if Path(dataset).exists():
            return None
        if dataset.startswith(("/", "./", "../", "~")):
            return f"the data folder {dataset} does not exist"
        if is_cached(dataset, config):
            return None
        return self._remembered(dataset)

    def _files_problem(self, data_files: tuple[str, ...]) -> str | None:
        for name in data_files:
            if "://" in name:
                if _is_offline():
                    return f"the data file {name} cannot be reached from this server"
            elif not any(Path().glob(name)) if not os.path.isabs(name) else not _exists_or_matches(Path(name)):
                return f"the data file {name} does not exist"
        return None

    def _remembered(self, dataset: str) -> str | None:
        now = time.monotonic()
        if dataset not in self._answers or now - self._answers[dataset][0] > REMEMBERED_S:
            self._answers[dataset] = (now, self._ask(dataset, now))
        return self._answers[dataset][1]

    def _ask(self, dataset: str, now: float) -> str | None:
        unreachable = (
            f"its data set {dataset} is not on this server and the hub cannot be reached: "
            "map it to local files in the setting `dataset_roots`"
        )
        if _is_offline() or now - self._unreachable_at < REMEMBERED_S:
            return unreachable
        try:
            huggingface_hub.HfApi().dataset_info(dataset, timeout=HUB_TIMEOUT_S)
        except GatedRepoError:
            return f"the hub gives its data set {dataset} only to accounts that were granted access"
        except RepositoryNotFoundError:
            return f"its data set {dataset} is neither on the hub nor mapped in the setting `dataset_roots`"
        except Exception:  # no route, time limit, refused: many classes, one meaning
            self._unreachable_at = now
            return unreachable
        return None


def is_cached(dataset: str, config: str | None) -> bool:
    """Whether `datasets` has prepared this data set here before."""
    try:
        _find_hash_in_cache(dataset, config, None, {}, None)
    except ValueError:
        return False
    return True


def _exists_or_matches(path: Path) -> bool:
    return path.exists() or any(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def _is_offline() -> bool:
    return bool(datasets.config.HF_HUB_OFFLINE)
