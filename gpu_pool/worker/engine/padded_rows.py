# pyright: basic
"""How many rows transformers' generate continues at once, each padded to the longest and grown to its limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_pool.chunk_messages import GenerationOptions
from gpu_pool.worker.engine.generate_arguments import beams
from gpu_pool.worker.engine.limits import Limits

if TYPE_CHECKING:
    from gpu_pool.worker.engine.loaded_model import LoadedModel


@dataclass(frozen=True)
class PaddedRows:
    """What bounds a batch of them."""

    limits: Limits
    most: int
    """Rows, whatever their length."""
    beams: int
    """Of each row."""

    @classmethod
    def of(cls, loaded: LoadedModel, options: GenerationOptions, batch_size: int | None) -> PaddedRows:
        """At most `batch_size` of them, where it is given."""
        most = loaded.limits.generated_rows
        return cls(loaded.limits, min(batch_size or most, most), beams(loaded.model, options))

    def fit(self, rows: int, longest: int) -> bool:
        """Whether so many may grow to `longest` tokens each, prompt and continuation."""
        return rows <= self.most and self._held(rows, longest) <= self.limits.generated_tokens

    def were_too_many(self, rows: int, longest: int) -> None:
        """Memory did not suffice for these."""
        self.limits.shrink_generated(self._held(rows, longest))

    def _held(self, rows: int, longest: int) -> int:
        return rows * self.beams * longest
