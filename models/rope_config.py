"""Rotary embeddings as a Hugging Face `config.json` describes them, in its older and newer
layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .config import Rope, real, size

_SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor",),
}


def rope(
    config: Mapping[str, Any], theta: float, head_dim: int, layer_type: str | None = None
) -> Rope:
    """The rope of one layer type; `theta` is the family's default base.

    yarn (arXiv 2309.00071) and longrope (arXiv 2402.13753) divide every frequency by a number of
    its own.  Of longrope's two lists it is the one for texts within the original context, to which
    `context` keeps the model: a list that changed with a text's length would change the law of the
    tokens that have been read.

    Raises:
        ValueError: if the scaling is none of those known, or incomplete, or turns only part of a
            head.
    """
    entry = _entry(config, layer_type)
    given = {"rope_theta": entry.get("rope_theta") or config.get("rope_theta") or theta}
    theta = real(given, "rope_theta")
    kind = _kind(entry)
    part = entry.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if float(part) != 1.0:
        raise ValueError(
            "expected rotary embeddings over the whole head, got a partial_rotary_factor of"
            f" {part}; load another checkpoint"
        )
    needed = _SCALINGS.get(kind)
    if needed is None:
        raise ValueError(
            f"expected rope scaling of type {', '.join(_SCALINGS)}, got {kind!r}; remove the"
            " scaling from config.json to use the model within its original context"
        )
    absent = [name for name in needed if entry.get(name) is None]
    if absent:
        raise ValueError(
            f"expected {kind} rope scaling with {', '.join(needed)}, but {', '.join(absent)} is"
            " absent; use the checkpoint's complete config.json"
        )
    if "factor" in needed:
        real(entry, "factor")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, float(entry["factor"]))
    if kind == "yarn":
        return _yarn(entry, theta, head_dim, _original(config, entry))
    if kind == "longrope":
        return _longrope(config, entry, theta, head_dim)
    return Rope(
        theta,
        real(entry, "factor"),
        size(entry, "original_max_position_embeddings"),
        real(entry, "low_freq_factor"),
        real(entry, "high_freq_factor"),
    )


def context(config: Mapping[str, Any]) -> int:
    """The greatest number of positions: with longrope those of the original context."""
    most = size(config, "max_position_embeddings")
    entry = _entry(config, "full_attention")
    return min(most, _original(config, entry)) if _kind(entry) == "longrope" else most


def _entry(config: Mapping[str, Any], layer_type: str | None) -> Mapping[str, Any]:
    entry = config.get("rope_parameters") or {}
    if layer_type in entry:
        entry = entry[layer_type]
    return entry or {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}


def _kind(entry: Mapping[str, Any]) -> str:
    return entry.get("rope_type") or entry.get("type") or "default"


def _original(config: Mapping[str, Any], entry: Mapping[str, Any]) -> int:
    """The context of the model before it was scaled."""
    name = "original_max_position_embeddings"
    given = entry.get(name) or config.get(name) or config["max_position_embeddings"]
    return size({name: given}, name)


def _yarn(entry: Mapping[str, Any], theta: float, head_dim: int, original: int) -> Rope:
    """Frequencies that turn over `beta_fast` times in the original context are kept, those that do
    under `beta_slow` times are divided by the factor s, and between them the ramp is linear in the
    pair's number.  Cosine and sine are multiplied by 0.1 ln s + 1.
    """
    factor = float(entry["factor"])

    def pair(turns: float) -> float:
        """The pair of coordinates that turns that often, head_dim / 2 of them being all."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(float(entry.get("beta_fast") or 32)), pair(float(entry.get("beta_slow") or 1))
    if entry.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    scaled = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    divisors = 1.0 / (scaled / factor + 1.0 - scaled)
    magnitude = entry.get("attention_factor")
    if magnitude is None:
        one, all_dim = entry.get("mscale"), entry.get("mscale_all_dim")
        magnitude = _magnitude(factor, 1.0)
        if one and all_dim:
            magnitude = _magnitude(factor, float(one)) / _magnitude(factor, float(all_dim))
    return Rope(theta, divisors=tuple(divisors.tolist()), magnitude=float(magnitude))


def _magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(
    config: Mapping[str, Any], entry: Mapping[str, Any], theta: float, head_dim: int
) -> Rope:
    """Each frequency divided by its own factor; cosine and sine are multiplied by
    sqrt(1 + ln s / ln original), s the growth of the context.
    """
    divisors = tuple(float(value) for value in entry["short_factor"])
    if len(divisors) != head_dim // 2:
        raise ValueError(
            f"expected longrope scaling with {head_dim // 2} short factors, one for each pair of a"
            f" head's coordinates, got {len(divisors)}; use the checkpoint's own config.json"
        )
    original = _original(config, entry)
    growth = config["max_position_embeddings"] / original
    if "original_max_position_embeddings" not in config:
        growth = float(entry.get("factor") or growth)
    magnitude = entry.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0
    return Rope(theta, divisors=divisors, magnitude=float(magnitude))
