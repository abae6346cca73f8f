"""Samples of strings as texts and as a table: rich text in a terminal, HTML in a notebook.

`python -m ppl.table DIRECTORY` shows a run that `python -m experiments.decode` has saved.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.table
from rich.console import Console
from rich.text import Text

from ..rows import weighted_rows
from ..sequences import Sequences
from ..showing import LIMIT, shown

PICK = "pick one prompt's result, for example jax.tree.map(lambda leaf: leaf[0], out)"


@shown
class Row(NamedTuple):
    """A string's text, and its weight beside it."""

    text: str
    weight: float


class Table(rich.table.Table):
    """A rich table that `print` shows too."""

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), color_system=None)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # pyright: ignore[reportAttributeAccessIssue]

    def __repr__(self) -> str:
        return str(self)[:LIMIT]


class Tabled:
    """What is shown as its `table`, wherever it is shown."""

    @property
    def table(self) -> Table:
        """Of what there is."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return repr(self.table)

    def __str__(self) -> str:
        return str(self.table)

    def __rich__(self) -> Table:
        return self.table

    def _repr_mimebundle_(self, include: Any = (), exclude: Any = (), **kwargs: Any) -> Any:
        return self.table._repr_mimebundle_(include, exclude, **kwargs)


def merge(population: Any, tokenizer: Any) -> list[tuple[str, float, int, bool]]:
    """A population's strings with duplicates merged, heaviest first: (text, weight, copies, ended
    by EOS).

    Args:
        population: any result of a sampler: `sequences` [N] with `log_weights` [N]; independent
            draws and the draws of chains weigh the same; of a choice, the strings of its pool weigh
            exp(score).
        tokenizer: anything with decode(ids) -> str.

    Weights are normalised; dead particles are left out.  Strings are merged by their tokens: a text
    that was spelled in two ways has two rows.
    """
    sequences, log_weights = _strings(population)
    tokens, lengths = np.asarray(sequences.tokens), np.asarray(sequences.length)
    if tokens.ndim != 2:
        raise ValueError(f"expected one population with tokens [N, T], got {tokens.shape}; {PICK}")
    weights = _normalised(log_weights)
    merged: dict[tuple[tuple[int, ...], bool], tuple[float, int]] = {}
    for i in np.flatnonzero(~np.isneginf(log_weights)):
        string = tuple(tokens[i, : lengths[i]].tolist()), bool(lengths[i] < tokens.shape[1])
        weight, copies = merged.get(string, (0.0, 0))
        merged[string] = weight + weights[i], copies + 1
    rows = [(tokenizer.decode(list(ids)), w, n, ended) for (ids, ended), (w, n) in merged.items()]
    return sorted(rows, key=lambda row: -row[1])


def texts(result: Any, tokenizer: Any) -> list[Row]:
    """Every row of a result as (text, weight), in the result's own order.

    Row i is string i of `result.sequences`, the dead ones too, with weight 0; of chains all draws
    [S, C], draw after draw.  Weights are normalised; of a choice they are its scores.

    Args:
        result: one result of a sampler, as in `merge`.
        tokenizer: anything with decode(ids) -> str.

    Raises:
        ValueError: if the result is of several prompts.
    """
    sequences, log_weights = _strings(result)
    if np.ndim(sequences.tokens) != 2:
        shape = np.shape(sequences.tokens)
        raise ValueError(f"expected one result with tokens [N, T], got {shape}; {PICK}")
    weights = log_weights if hasattr(result, "scores") else _normalised(log_weights)
    known: dict[tuple[int, ...], str] = {}
    rows = []
    for ids, length, weight in zip(*_arrays(sequences), weights, strict=True):
        string = tuple(ids[:length].tolist())
        if string not in known:
            known[string] = tokenizer.decode(list(string))
        rows.append(Row(known[string], float(weight)))
    return rows


def _arrays(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(sequences.tokens), np.asarray(sequences.length)


def _normalised(log_weights: np.ndarray) -> np.ndarray:
    """softmax; zeros if all are dead."""
    most = log_weights.max(initial=-np.inf)
    weights = np.exp(log_weights - (0.0 if np.isneginf(most) else most))
    return weights / (weights.sum() or 1.0)


def _strings(population: Any) -> tuple[Sequences, np.ndarray]:
    """Its strings [N] and log-weights [N]."""
    if hasattr(population, "scores"):
        sequences, log_weights = population.sequences, population.scores
    elif hasattr(population, "draws"):
        sequences, log_weights = weighted_rows(population)
        if not isinstance(sequences, Sequences):
            raise ValueError(
                f"expected draws with `sequences`, got {list(population.draws)}; keep them by"
                " `collect`, or decode where the chains are: tok.decode(out.sequences)"
            )
    else:
        sequences = population.sequences
        log_weights = getattr(population, "log_weights", np.zeros(sequences.length.shape))
    return sequences, np.asarray(log_weights, np.float64)


def table(population: Any, tokenizer: Any, *, top: int = 10) -> Table:
    """The `top` heaviest strings of a population, duplicates merged, with weight bars.

    Shows itself in a notebook; in a script `print` it (`rich.print` has colours).  A string cut by
    the horizon ends in an ellipsis. Arguments and errors as in `merge`.
    """
    rows = merge(population, tokenizer)
    caption = _caption(population)
    view = Table(caption=caption, caption_justify="left", title_justify="left")
    name = "exp(score)" if hasattr(population, "scores") else "weight"
    view.add_column(name, justify="right", no_wrap=True)
    view.add_column("", no_wrap=True)
    view.add_column("copies", justify="right", no_wrap=True)
    view.add_column("string", overflow="fold")
    for text, weight, copies, ended in rows[:top]:
        bar = "█" * max(1, round(16 * weight / rows[0][1]))
        shown = Text(text.replace("\n", "↵"))
        if not ended:
            shown.append("…", "dim")
        view.add_row(f"{weight:.3f}", Text(bar, style="cyan"), str(copies), shown)
    if rows[top:]:
        weight, copies = sum(row[1] for row in rows[top:]), sum(row[2] for row in rows[top:])
        view.add_row(f"{weight:.3f}", "", str(copies), Text(f"({len(rows) - top} more)", "dim"))
    if not rows:
        view.add_row(
            "0",
            "",
            str(len(_strings(population)[1])),
            Text("all particles are dead", "red"),
        )
    return view


def _caption(population: Any) -> str | None:
    if hasattr(population, "scores"):
        return f"best score = {float(np.asarray(population.scores).max()):.3f}"
    log_z, health = getattr(population, "log_z", None), getattr(population, "health", None)
    if log_z is None:
        return None
    said = "" if health is None or health.ok else f"\n{health}"
    return f"log Z = {float(jax.device_get(log_z)):.3f}{said}"
