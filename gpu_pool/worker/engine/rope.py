# pyright: basic
"""At which positions a model begins to treat tokens otherwise: boundaries of its rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gpu_pool.worker.engine.configs import largest

if TYPE_CHECKING:
    from gpu_pool.worker.engine.loaded_model import LoadedModel

_CHANGING = {"dynamic", "longrope"}
"""Rotary embeddings whose frequencies depend on the longest sequence of a forward pass."""
_ORIGINAL = "original_max_position_embeddings"
_FIRST_FREQUENCIES = "original_inv_freq"
"""What transformers keeps the frequencies in that a model begins with; before it the kind of layers, if any."""


def rope_boundary(loaded: LoadedModel) -> int | None:
    """The length beyond which a batch's longest sequence decides how positions are embedded; None if none can be so."""
    config = loaded.text_config
    for scaling in _settings(config):
        if _kind(scaling) in _CHANGING:
            boundary = _original_length(scaling, config) or int(config.max_position_embeddings)
            return boundary if loaded.max_length > boundary else None
    return None


def stays_changed(loaded: LoadedModel) -> bool:
    """Whether frequencies depend on sequences of earlier forward passes too."""
    return any(_kind(scaling) == "dynamic" for scaling in _settings(loaded.text_config))


def forget_earlier_passes(loaded: LoadedModel) -> None:
    """Let a forward pass use the frequencies that it would use as the first one.

    transformers keeps those of the longest sequence so far for all that are longer than what the model was trained on,
    so that answers would depend on what was asked before.
    """
    if not stays_changed(loaded):
        return
    for module in loaded.model.modules():
        for name in [name for name, _ in module.named_buffers(recurse=False) if name.endswith(_FIRST_FREQUENCIES)]:
            layers = name.removesuffix(_FIRST_FREQUENCIES)
            setattr(module, f"{layers}inv_freq", getattr(module, name).clone())
            setattr(module, f"{layers}max_seq_len_cached", module.original_max_seq_len)


def scaled_from(loaded: LoadedModel) -> list[int]:
    """Positions, ascending, from which on queries may be scaled or embedded otherwise, whatever else is in the pass.

    Those of a context that was extended (YaRN and its kin, with Llama 4's scaling of queries), as far as sequences on
    the token tree go.
    """
    config = loaded.text_config
    found = {_original_length(scaling, config) for scaling in _settings(config) if _kind(scaling) not in _CHANGING}
    found.add(largest(config, "floor_scale"))
    longest = rope_boundary(loaded) or loaded.max_length
    return sorted(position for position in found if 0 < position < longest)


def _original_length(scaling: dict[str, Any], config: Any) -> int:
    """The context that the model was trained on before it was extended; 0 where nothing says so."""
    return int(scaling.get(_ORIGINAL) or largest(config, _ORIGINAL))


def _kind(scaling: dict[str, Any]) -> str | None:
    return scaling.get("rope_type", scaling.get("type"))


def _settings(config: Any) -> Iterator[dict[str, Any]]:
    for name in ("rope_parameters", "rope_scaling"):
        settings = getattr(config, name, None)
        if isinstance(settings, dict):
            nested = [value for value in settings.values() if isinstance(value, dict)]
            yield from nested or [settings]
