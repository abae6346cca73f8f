"""What a run of chains shows in a terminal or a notebook: a bar while it runs, and a table of how
well it mixed.

with chain_report.bar(Console()) as watch:
    out = chains.run(key, kernel, x, num_samples=1000, watch=watch)
Console().print(chain_report.table(out))
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from samplers.mcmc import diagnostics as chain_diagnostics
from samplers.results import Chains, MoveInfo


@contextlib.contextmanager
def bar(console: Console) -> Iterator[Callable[[Chains, int], None]]:
    """A bar, as the `watch` of `chains.run`; it shows acceptance, and R-hat of log p once there are
    draws enough.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
    )
    columns = (
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[found]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=None, found="")

        def watch(result: Chains, total: int) -> None:
            what = "warm-up" if result.num_samples == 0 else "sampling"
            progress.update(
                task, description=what, completed=result.steps, total=total, found=_found(result)
            )

        yield watch


def _found(result: Chains) -> str:
    log_prob = result.draws.get("log_prob")
    parts = _rates(result) if result.num_samples else []
    if log_prob is not None and len(log_prob) >= 4:
        parts.append(f"R-hat {chain_diagnostics.split_r_hat(log_prob):.3f}")
    return "  ".join(parts)


def _rates(result: Chains) -> list[str]:
    """How often moves were accepted, and how often the chain is elsewhere after a step."""
    rate, changed = acceptance(result), getattr(result.info, "changed", None)
    rates = [] if rate is None else [f"acceptance {rate:.2f}"]
    return rates + ([] if changed is None else [f"changed {np.mean(changed):.2f}"])


def acceptance(result: Chains) -> float | None:
    """Mean acceptance of what was proposed; None where the kernel does not say what it accepted,
    NaN where nothing was proposed.
    """
    rate = getattr(result.info, "acceptance_rate", None)  # blackjax
    if rate is not None:
        return float(np.mean(rate))
    if not isinstance(result.info, MoveInfo):
        return None
    return float(result.info.acceptance) if np.any(result.info.proposed) else np.nan


def table(result: Chains | Mapping[str, Any]) -> Table:
    """Mean, standard error, effective samples and R-hat of log p, the length and whatever else was
    kept as one number.

    Args:
        result: of `chains.run`, or quantities [S, C] by name.

    Raises:
        ValueError: if there are fewer than four draws.
    """
    is_run = isinstance(result, Chains)
    rows = chain_diagnostics.summary(
        chain_diagnostics.quantities(result.draws) if is_run else result
    )
    view = Table(caption=title(result) if is_run else None, caption_justify="left")
    view.add_column("")
    for name in ("mean", "± error", "sd", "ESS", "R-hat"):
        view.add_column(name, justify="right", no_wrap=True)
    noted = any(row.note for row in rows)
    if noted:
        view.add_column("")
    for row in rows:
        numbers = (
            f"{row.mean:.4g}",
            f"{row.mcse:.2g}",
            f"{row.sd:.3g}",
            f"{row.ess:.0f}",
            f"{row.r_hat:.3f}",
        )
        note = [row.note] if noted else []
        view.add_row(label(row.name), *numbers, *note, style="yellow" if row.note else "")
    return view


def title(result: Chains) -> str:
    """How many chains, draws and steps, and how many moves were accepted."""
    num_chains = next(iter(chain_diagnostics.quantities(result.draws).values())).shape[1]
    parts = [f"{num_chains} chains, {result.num_samples} draws"]
    parts += [f"every {result.thin} steps"] * (result.thin > 1) + [
        f"after {result.warmup} steps"
    ] * (result.warmup > 0)
    parts += _rates(result)
    parts += [] if result.cost is None else [f"{int(result.cost.tokens):,} tokens"]
    return ", ".join(parts + ["interrupted"] * result.interrupted)


def label(name: str) -> str:
    """The name of a quantity as people write it."""
    return {"log_prob": "log p", "log_z": "log Z"}.get(name, name.replace("_", " "))
