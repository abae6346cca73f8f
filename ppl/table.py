"""Weighted strings as a table: rich text in a terminal, HTML in a notebook."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from rich.table import Table
from rich.text import Text


def merge(population: Any, tokenizer: Any) -> list[tuple[str, float, int, bool]]:
    """A population's strings with duplicates merged, heaviest first: (text, weight, copies, ended
    by EOS).

    Args:
        population: anything with `sequences` [N] and `log_weights` [N], such as a result of
            `samplers.smc.run`.
        tokenizer: anything with decode(ids) -> str.

    Weights are normalised; dead particles are left out.  Strings are merged by their tokens: a text
    that was spelled in two ways has two rows.
    """
    tokens, lengths = (
        np.asarray(population.sequences.tokens),
        np.asarray(population.sequences.length),
    )
    if tokens.ndim != 2:
        raise ValueError(
            f"expected one population with tokens [N, T], got {tokens.shape}; pick one prompt's"
            " result, for example"
            " jax.tree.map(lambda leaf: leaf[0], out)"
        )
    log_weights = np.asarray(population.log_weights, np.float64)
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


def table(population: Any, tokenizer: Any, *, top: int = 10) -> Table:
    """The `top` heaviest strings of a population, duplicates merged, with weight bars.

    Shows itself in a notebook; in a terminal use `rich.print`.  A string cut by the horizon ends in
    an ellipsis. Arguments and errors as in `merge`.
    """
    rows = merge(population, tokenizer)
    log_z = getattr(population, "log_z", None)
    caption = None if log_z is None else f"log Z = {float(jax.device_get(log_z)):.3f}"
    view = Table(caption=caption, caption_justify="left", title_justify="left")
    view.add_column("weight", justify="right", no_wrap=True)
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
            str(len(np.asarray(population.log_weights))),
            Text("all particles are dead", "red"),
        )
    return view
