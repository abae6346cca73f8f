"""A finished decoding as plain arrays: saved as JSON (to read) and npz (exact), and loaded again."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from ppl.sequences import Sequences

RESULTS, ARRAYS = "results.json", "arrays.npz"


@dataclasses.dataclass(frozen=True)
class Config:
    """What was asked for; with the model's weights and the device's kind it determines the result."""

    prompt: str
    system: str | None = None
    model: str = "smollm2-135m"
    regex: str | None = None
    json_schema: Any = None
    alpha: float = 1.0
    method: str = "smc"
    num_particles: int = 32
    max_tokens: int = 32
    seed: int = 0
    compare: bool = False


@dataclasses.dataclass(frozen=True)
class Steps:
    """What happened at each of the T token positions; `history_*` [T, N] as in `samplers.smc.History`."""

    ess: Float[np.ndarray, " T"]
    log_z: Float[np.ndarray, " T"]
    resampled: Bool[np.ndarray, " T"]
    active: Int[np.ndarray, " T"]
    history_tokens: Int[np.ndarray, "T N"]
    history_log_weights: Float[np.ndarray, "T N"]
    history_ancestors: Int[np.ndarray, "T N"]


@dataclasses.dataclass(frozen=True)
class Population:
    """N weighted strings on the host.

    sequences: tokens [N, t] up to the last token position t that was run, so that a string which was still growing
    counts as cut.  log_weights [N], -inf is dead.  log_z and log_z_std_error are None for a method that has no target.
    cost: tokens, forwards, potential calls.  steps: None for methods that run without stopping to look.
    """

    sequences: Sequences
    log_weights: Float[np.ndarray, " N"]
    log_z: float | None
    log_z_std_error: float | None
    num_invalid: int
    cost: dict[str, int]
    steps: Steps | None = None

    @property
    def all_dead(self) -> bool:
        """Whether no string has positive weight."""
        return bool(np.isneginf(self.log_weights).all())

    @property
    def weights(self) -> Float[np.ndarray, " N"]:
        """Normalised weights; zeros if all strings are dead."""
        if self.all_dead:
            return np.zeros_like(self.log_weights)
        weights = np.exp(self.log_weights - self.log_weights.max())
        return weights / weights.sum()

    @property
    def ess(self) -> float:
        """Effective sample size of the weights; 0 if all are dead."""
        return 0.0 if self.all_dead else float(1 / np.square(self.weights).sum())


@dataclasses.dataclass(frozen=True)
class Run:
    """One decoding.

    texts: the N strings decoded, special tokens left out.  pieces: each drawn token's text, by id.  seconds: wall time
    of the decoding and how much of it was compilation.  comparison: for each baseline the shares of its strings,
    largest first.
    """

    config: Config
    population: Population
    texts: list[str]
    pieces: dict[int, str]
    seconds: dict[str, float]
    comparison: dict[str, list[tuple[str, float]]]
    interrupted: bool
    key: list[int]
    versions: dict[str, str]
    device: str


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("tiltlm", "jax", "jaxlib", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device() -> str:
    """What the default device is, for example "cpu: cpu (x86_64)"."""
    first = jax.devices()[0]
    return f"{first.platform}: {first.device_kind} ({platform.machine()})"


def save(run: Run, directory: Path) -> None:
    """Write results.json and arrays.npz into `directory`, which must exist."""
    p = run.population
    arrays = {"tokens": np.asarray(p.sequences.tokens), "length": np.asarray(p.sequences.length)}
    arrays["log_weights"] = p.log_weights
    if p.steps is not None:
        arrays |= {name: np.asarray(value) for name, value in vars(p.steps).items()}
    np.savez_compressed(directory / ARRAYS, allow_pickle=False, **arrays)
    strings = [
        {"text": text, "weight": float(weight), "log_weight": _number(log_weight), "ids": ids[:length].tolist()}
        for text, weight, log_weight, ids, length in zip(
            run.texts, p.weights, p.log_weights, arrays["tokens"], arrays["length"], strict=True
        )
    ]
    document = {
        "config": dataclasses.asdict(run.config),
        "log_z": _number(p.log_z),
        "log_z_std_error": _number(p.log_z_std_error),
        "ess": p.ess,
        "all_dead": p.all_dead,
        "num_invalid": p.num_invalid,
        "cost": p.cost,
        "seconds": run.seconds,
        "interrupted": run.interrupted,
        "key": run.key,
        "versions": run.versions,
        "device": run.device,
        "comparison": run.comparison,
        "strings": strings,
        "pieces": {str(token): piece for token, piece in run.pieces.items()},
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (directory / RESULTS).write_text(text + "\n", encoding="utf-8")


def load(directory: str | Path) -> Run:
    """The run that `save` wrote.

    Raises:
        FileNotFoundError: if there is none.
    """
    directory = Path(directory)
    document = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
    with np.load(directory / ARRAYS, allow_pickle=False) as file:
        arrays = dict(file)
    names = [field.name for field in dataclasses.fields(Steps)]
    population = Population(
        Sequences(arrays["tokens"], arrays["length"]),
        arrays["log_weights"],
        _float(document["log_z"]),
        _float(document["log_z_std_error"]),
        document["num_invalid"],
        document["cost"],
        Steps(**{name: arrays[name] for name in names}) if names[0] in arrays else None,
    )
    return Run(
        config=Config(**document["config"]),
        population=population,
        texts=[row["text"] for row in document["strings"]],
        pieces={int(token): piece for token, piece in document["pieces"].items()},
        comparison={name: [(text, share) for text, share in rows] for name, rows in document["comparison"].items()},
        **{name: document[name] for name in ("seconds", "interrupted", "key", "versions", "device")},
    )


def _number(value: Any) -> float | str | None:
    """A float as JSON, which has no infinities: those become "-inf", "nan"."""
    return None if value is None else float(value) if math.isfinite(value) else str(float(value))


def _float(value: float | str | None) -> float | None:
    return None if value is None else float(value)
