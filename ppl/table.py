"""Samples of strings as a table: rich text in a terminal, HTML in a notebook."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from rich.table import Table
from rich.text import Text

from .rows import weighted_rows
from .sequences import Sequences


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
        raise ValueError(
            f"expected one population with tokens [N, T], got {tokens.shape}; pick one prompt's"
            " result, for example"
            " jax.tree.map(lambda leaf: leaf[0], out)"
        )
    alive = np.flatnonzero(~np.isneginf(log_weights))
    if not alive.size:
        return []
    weights = np.exp(log_weights - log_weights[alive].max())
    weights /= weights.sum()
    merged: dict[tuple[tuple[int, ...], bool], tuple[float, int]] = {}
    for i in alive:
        string = tuple(tokens[i, : lengths[i]].tolist()), bool(lengths[i] < tokens.shape[1])
        weight, copies = merged.get(string, (0.0, 0))
        merged[string] = weight + weights[i], copies + 1
    rows = [(tokenizer.decode(list(ids)), w, n, ended) for (ids, ended), (w, n) in merged.items()]
    return sorted(rows, key=lambda row: -row[1])


def _strings(population: Any) -> tuple[Sequences, np.ndarray]:
    """Its strings [N] and log-weights [N]."""
    if hasattr(population, "scores"):
        sequences, log_weights = population.sequences, population.scores
    elif hasattr(population, "draws"):
        sequences, log_weights = weighted_rows(population)
    else:
        sequences = population.sequences
        log_weights = getattr(population, "log_weights", np.zeros(sequences.length.shape))
    return sequences, np.asarray(log_weights, np.float64)


def table(population: Any, tokenizer: Any, *, top: int = 10) -> Table:
    """The `top` heaviest strings of a population, duplicates merged, with weight bars.

    Shows itself in a notebook; in a terminal use `rich.print`.  A string cut by the horizon ends in
    an ellipsis. Arguments and errors as in `merge`.
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
