"""A finished decoding as plain arrays: saved as JSON (to read) and npz (exact), and
loaded again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from models.refusals import reading
from ppl.files import latest, together
from ppl.sequences import Sequences
from samplers.diagnostics import Health, health
from samplers.results import History, Trace

from . import lineages

RESULTS, ARRAYS = "results.json", "arrays.npz"


@dataclasses.dataclass(frozen=True)
class Config:
    """What was asked for; with the model's weights and the device's kind it determines
    the result.
    """

    prompt: str
    system: str | None = None
    model: str = "smollm2-135m"
    regex: str | None = None
    json_schema: Any = None
    alpha: float = 1.0
    method: str = "smc"
    num_particles: int = 32
    max_tokens: int = 32
    moves_per_block: int = 10
    block_size: int = 16
    steps_every: int | None = None
    step_delimiter: str | None = None
    seed: int = 0
    compare: bool = False


@dataclasses.dataclass(frozen=True)
class Population:
    """N weighted strings on the host, and how they came about.

    sequences: tokens [N, t] up to the last position t that any string uses, its EOS included.
    log_weights [N], -inf is dead.  log_z and log_z_std_error are None for a method that has no
    target.  num_roots, log_density [N]: as in `results.Weighted`, None where they are not known;
    of its `details` what `health` reads.
    cost: tokens, forwards, potential calls. trace and history: the rounds that were run;
    None where none were kept.
    """

    sequences: Sequences
    log_weights: Float[np.ndarray, " N"]
    log_z: float | None
    log_z_std_error: float | None
    num_invalid: int
    cost: dict[str, int]
    missing_support: float = 0.0
    trace: Trace | None = None
    history: History | None = None
    num_roots: int | None = None
    log_density: Float[np.ndarray, " N"] | None = None
    details: dict[str, float] | None = None

    @property
    def health(self) -> Health:
        """What speaks against it."""
        return health(self)

    @property
    def all_dead(self) -> bool:
        """Whether no string has positive weight."""
        return bool(np.isneginf(self.log_weights).all())

    @property
    def weights(self) -> Float[np.ndarray, " N"]:
        """Normalised weights; zeros if all strings are dead."""
        return normalise(self.log_weights)

    @property
    def ess(self) -> float:
        """Effective sample size of the weights; 0 if all are dead."""
        return 0.0 if self.all_dead else float(1 / np.square(self.weights).sum())

    @property
    def ended(self) -> Bool[np.ndarray, " N"]:
        """Which strings ended by EOS; the others grow still, or were cut by the horizon."""
        drawn = _drawn(self.history)
        length = np.asarray(self.sequences.length)
        return length < self.sequences.tokens.shape[1] if drawn is None else drawn > length


def normalise(log_weights: Float[np.ndarray, "*R N"]) -> Float[np.ndarray, "*R N"]:
    """Weights that sum to one along the last axis; zeros where all are dead."""
    most = log_weights.max(axis=-1, keepdims=True)
    weights = np.exp(log_weights - np.where(np.isneginf(most), 0, most))
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)


def _drawn(history: History | None) -> Int[np.ndarray, " N"] | None:
    """How many tokens, EOS included, were drawn for each string."""
    if history is None:
        return None
    slots = lineages.ancestry(np.asarray(history.ancestors))
    return np.take_along_axis((np.asarray(history.drawn) >= 0).sum(axis=2), slots, axis=1).sum(
        axis=0
    )


def population(result: Any) -> Population:
    """The result of a sampler on the host, without the rounds that were not run.

    Args:
        result: of `samplers.smc.run`, or anything with `sequences`, `log_weights` and as many of
            its other fields as it has, itself or in its `details`; a `Population` is returned as it
            is.

    Raises:
        ValueError: if it is a list of populations.
    """
    if isinstance(result, Population):
        return result
    found = jax.device_get(vars(result) | (getattr(result, "details", None) or {}))
    tokens, length = jax.tree.leaves(jax.device_get(result.sequences))
    if tokens.ndim != 2:
        raise ValueError(
            f"expected one population with tokens [N, T], got {tokens.shape}; pick one prompt's"
            " result, for example"
            " jax.tree.map(lambda leaf: leaf[0], out)"
        )
    trace, history = (
        jax.tree.map(lambda leaf: np.asarray(leaf)[: int(found["rounds"])], found.get(name))
        for name in ("trace", "history")
    )
    log_z, error = (
        None if name not in found else float(found[name]) for name in ("log_z", "log_z_std_error")
    )
    drawn = _drawn(history)
    used = int((np.minimum(length + 1, tokens.shape[1]) if drawn is None else drawn).max())
    return Population(
        sequences=Sequences(tokens[:, :used], length),
        log_weights=np.asarray(found["log_weights"]),
        log_z=log_z,
        log_z_std_error=error,
        num_invalid=int(found.get("num_invalid", 0)),
        cost={name: int(value) for name, value in vars(found["cost"]).items()}
        if "cost" in found
        else {},
        missing_support=float(found.get("missing_support", 0.0)),
        trace=trace,
        history=history,
        num_roots=None if found.get("num_roots") is None else int(found["num_roots"]),
        log_density=found.get("log_density"),
        details={"dropped": float(found["dropped"])} if "dropped" in found else None,
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """One decoding.

    texts: the N strings decoded, special tokens left out.  pieces: the text of what a round drew,
    by its ids, separated by blanks.  seconds: wall time
    of the decoding and how much of it was compilation.  comparison: for each baseline the shares of
    its strings, largest first.
    """

    config: Config
    population: Population
    texts: list[str]
    pieces: dict[str, str]
    seconds: dict[str, float]
    comparison: dict[str, list[tuple[str, float]]]
    interrupted: bool
    key: list[int]
    versions: dict[str, str]
    device: str

    def decode(self, ids: Any) -> str:
        """The text of one of its strings, or of what one round drew: a run can stand in for its
        tokenizer.
        """
        key = _key(ids)
        return self._texts[key] if key in self._texts else self.pieces[key]

    @functools.cached_property
    def _texts(self) -> dict[str, str]:
        tokens, length = (np.asarray(leaf) for leaf in jax.tree.leaves(self.population.sequences))
        return {_key(tokens[i, : length[i]]): text for i, text in enumerate(self.texts)}


def texts(p: Population, tokenizer: Any) -> list[str]:
    """The N strings decoded."""
    rows = zip(np.asarray(p.sequences.tokens), np.asarray(p.sequences.length), strict=True)
    return [tokenizer.decode(row[:length].tolist()) for row, length in rows]


def pieces(history: History | None, tokenizer: Any) -> dict[str, str]:
    """The texts that `Run.pieces` wants."""
    if history is None:
        return {}
    drawn = np.unique(np.asarray(history.drawn).reshape(-1, history.drawn.shape[2]), axis=0)
    rows = [row[row >= 0].tolist() for row in drawn]
    return {_key(ids): tokenizer.decode(ids) for ids in rows if ids}


def _key(ids: Any) -> str:
    return " ".join(str(int(token)) for token in ids)


def save(run: Run, directory: Path) -> None:
    """Write results.json and arrays.npz into `directory`, which must exist: both, or neither."""
    p = run.population
    arrays = {"tokens": np.asarray(p.sequences.tokens), "length": np.asarray(p.sequences.length)}
    arrays["log_weights"] = p.log_weights
    if p.log_density is not None:
        arrays["log_density"] = p.log_density
    for name, part in (("trace", p.trace), ("history", p.history)):
        if part is not None:
            arrays |= {
                f"{name}_{field}": np.asarray(value)
                for field, value in vars(part).items()
                if value is not None
            }
    strings = [
        {
            "text": text,
            "weight": float(weight),
            "log_weight": _number(log_weight),
            "ids": ids[:length].tolist(),
        }
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
        "missing_support": p.missing_support,
        "num_roots": p.num_roots,
        "details": p.details,
        "health": p.health.words,
        "cost": p.cost,
        "seconds": run.seconds,
        "interrupted": run.interrupted,
        "key": run.key,
        "versions": run.versions,
        "device": run.device,
        "comparison": run.comparison,
        "strings": strings,
        "pieces": run.pieces,
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    with together(directory) as fresh:
        np.savez_compressed(fresh / ARRAYS, allow_pickle=False, **arrays)
        (fresh / RESULTS).write_text(text + "\n", encoding="utf-8")


def load(directory: str | Path) -> Run:
    """The run that `save` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a file is damaged.
    """
    with reading(directory, f"a run in {RESULTS} and {ARRAYS}"):
        return _load(latest(directory, RESULTS), latest(directory, ARRAYS))


def _load(results: Path, arrays_file: Path) -> Run:
    document = json.loads(results.read_text(encoding="utf-8"))
    with np.load(arrays_file, allow_pickle=False) as file:
        arrays = dict(file)

    def part(name: str, kind: type) -> Any:
        """What was saved of it, if it was."""
        found = {
            key.removeprefix(f"{name}_"): array
            for key, array in arrays.items()
            if key.startswith(f"{name}_")
        }
        return kind(**found) if found else None

    population = Population(
        Sequences(arrays["tokens"], arrays["length"]),
        arrays["log_weights"],
        _float(document["log_z"]),
        _float(document["log_z_std_error"]),
        document["num_invalid"],
        document["cost"],
        document["missing_support"],
        part("trace", Trace),
        part("history", History),
        document["num_roots"],
        arrays.get("log_density"),
        document["details"],
    )
    return Run(
        config=Config(**document["config"]),
        population=population,
        texts=[row["text"] for row in document["strings"]],
        comparison={
            name: [(text, share) for text, share in rows]
            for name, rows in document["comparison"].items()
        },
        **{
            name: document[name]
            for name in ("pieces", "seconds", "interrupted", "key", "versions", "device")
        },
    )


def _number(value: Any) -> float | str | None:
    """A float as JSON, which has no infinities: those become "-inf", "nan"."""
    return None if value is None else float(value) if math.isfinite(value) else str(float(value))


def _float(value: float | str | None) -> float | None:
    return None if value is None else float(value)
