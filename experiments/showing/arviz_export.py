"""Chains for ArviZ: `arviz.summary(to_arviz(result))`,
`arviz.plot_trace(to_arviz(result), var_names=["log_prob"])`.

Needs the extra `arviz`.  Works with ArviZ 0.19 and later, where the result is an `InferenceData`,
and with ArviZ 1, where it is an `xarray.DataTree`.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np

from samplers.mcmc.diagnostics import sites
from samplers.results import Chains, MoveInfo

Groups = dict[str, dict[str, np.ndarray]]


def to_arviz(result: Chains, tokenizer: Any = None) -> Any:
    """A run as ArviZ's own structure, with dimensions (chain, draw, ...).

    Args:
        result: of `chains.run`.
        tokenizer: anything with decode(ids) -> str; adds `text`.

    Returns:
        Group `posterior`: length, every latent site of a model by its name and in its own support
            (`posterior.named` gives chains over R^D theirs), and the floats that the run kept of
            every state (log_prob, position, ...).  Group
        `sample_stats`: the strings (`token_ids`, and `text`), and what the steps reported, averaged
            over the steps of a
        draw.

    Raises:
        ImportError: if ArviZ is not installed.
        ValueError: if there are no draws.
    """
    try:
        with warnings.catch_warnings():
            # 0.23 announces version 1 on import.
            warnings.simplefilter("ignore", FutureWarning)
            import arviz
    except ImportError as error:
        raise ImportError(
            "expected ArviZ, which is not installed; pip install 'tiltlm[arviz]'"
        ) from error
    if not result.num_samples:
        raise ValueError("expected a run with draws, got one without; it was interrupted too early")
    found, dims = groups(result, tokenizer), {"token_ids": ["token"]}
    # ArviZ 1 takes the groups as one dictionary (and still has an attribute InferenceData, which
    # only warns).
    if "posterior" in inspect.signature(arviz.from_dict).parameters:
        return arviz.from_dict(
            posterior=found["posterior"], sample_stats=found["sample_stats"], dims=dims
        )
    return arviz.from_dict(found, dims=dims)


def groups(result: Chains, tokenizer: Any = None) -> Groups:
    """What `to_arviz` exports, as arrays [C, S, ...]."""
    posterior, stats = {}, {}
    for name, value in sites(result.draws).items():
        if name != "sequences":
            # Whole numbers, the rungs of a ladder, are no quantities to average; those of a model
            # are.
            floats = np.issubdtype(np.asarray(value).dtype, np.floating)
            kind = posterior if floats or name not in result.draws else stats
            kind[name] = _chains_first(value)
            continue
        posterior["length"], stats["token_ids"] = (
            _chains_first(value.length),
            _chains_first(value.tokens),
        )
        if tokenizer is not None:
            stats["text"] = _texts(stats["token_ids"], posterior["length"], tokenizer)
    for name, value in _fields(result.info).items():
        stats[name] = _chains_first(np.asarray(value).mean(axis=1))
    return {"posterior": posterior, "sample_stats": stats}


def _fields(info: Any) -> dict[str, np.ndarray]:
    """The arrays [S, thin, C, ...] of an info by name."""
    fields = info if isinstance(info, dict) else getattr(info, "_asdict", dict)()
    if isinstance(info, MoveInfo):
        fields = vars(info) | (info.details or {})
    return {
        name: value
        for name, value in fields.items()
        if isinstance(value, np.ndarray) and value.ndim >= 3
    }


def _chains_first(x: Any) -> np.ndarray:
    return np.swapaxes(np.asarray(x), 0, 1)


def _texts(tokens: np.ndarray, length: np.ndarray, tokenizer: Any) -> np.ndarray:
    """[C, S], each distinct string decoded once: chains stay where they are more often than not."""
    known: dict[bytes, str] = {}
    texts = np.empty(length.shape, object)
    for at in np.ndindex(*length.shape):
        ids = tokens[at][: length[at]]
        if ids.tobytes() not in known:
            known[ids.tobytes()] = tokenizer.decode(ids.tolist())
        texts[at] = known[ids.tobytes()]
    return texts.astype(str)
