"""What a decoding shows in the terminal: progress while it runs, and its result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

import ppl
from ppl.table import merge
from ppl.target import Target

from . import lineages
from .saving import Config, Population, Run

TOP = 5
TITLES = {
    "masked": "masked: every token drawn among those the constraint allows, weights ignored",
    "model alone": "model alone: neither power nor constraint",
}
BAR = 24


@contextlib.contextmanager
def doing(console: Console, what: str) -> Iterator[None]:
    """A spinner while something takes its time; nothing where there is no terminal."""
    if not console.is_terminal:
        yield
        return
    with console.status(f"[dim]{what} ...[/dim]"):
        yield


def introduce(console: Console, config: Config, target: Target) -> None:
    """The target in words."""
    power = "" if config.alpha == 1 else f"^{config.alpha:g}"
    constraint = (
        config.regex
        if config.regex is not None
        else "a JSON schema"
        if config.json_schema is not None
        else ""
    )
    lines = [
        ("model", config.model),
        ("prompt", f"{config.prompt}  ({int(target.prefix.length)} tokens)"),
    ]
    lines += [("target", f"p(x | prompt){power}" + (" · 1[x matches]" if constraint else ""))]
    lines += [("matches", constraint)] if constraint else []
    lines += [
        (
            "method",
            f"{config.method}, N = {config.num_particles}, at most {config.max_tokens} tokens",
        )
    ]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in lines:
        grid.add_row(name, Text(value))
    console.print(grid)
    console.print()


class Progress:
    """The population after each round: a live view in a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, config: Config, tokenizer: Any) -> None:
        self.console, self.config, self.tokenizer = console, config, tokenizer
        waiting = Text("first round (a new shape compiles once, and is kept) ...", "dim")
        self.live = Live(waiting, console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def show(self, population: Population) -> None:
        """Called after every round."""
        if self.live:
            self.live.update(self._view(population), refresh=True)
        else:
            top = _strings(population, self.tokenizer)[:1]
            heaviest = f"  {top[0][1]:.2f} {_one_line(top[0][0])!r}" if top else "  all dead"
            self.console.print(
                self._numbers(population).plain + heaviest,
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def _numbers(self, population: Population) -> Text:
        trace, num = population.trace, self.config.num_particles
        if trace is None or trace.active is None:  # chains, or independent draws
            return Text.assemble(
                (self._clock(population), "bold"), f"  {population.cost['tokens']:,} tokens drawn"
            )
        ess = float(trace.ess[-1])
        filled = round(BAR * ess / num)
        text = Text.assemble(
            (self._clock(population), "bold"),
            f"  growing {int(trace.active[-1]):>3}/{num}  ESS ",
            ("█" * filled, "cyan"),
            ("░" * (BAR - filled), "dim"),
            f" {ess:5.1f}  log Z {float(trace.log_z[-1]):8.3f}",
        )
        return text.append("  resampled before" if trace.resampled[-1] else "", "yellow")

    def _clock(self, population: Population) -> str:
        """How far the run has come: rounds are tokens, or steps of text, whose number is not known
        beforehand.
        """
        used = population.sequences.tokens.shape[1]
        done = used if population.trace is None else len(population.trace.ess)
        if self.config.steps_every is None and self.config.step_delimiter is None:
            return f"token {done:>3}/{self.config.max_tokens}"
        return f"step {done:>3}  token {used:>3}/{self.config.max_tokens}"

    def _view(self, population: Population) -> RenderableType:
        rows = _strings(population, self.tokenizer)
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", no_wrap=True, width=5)
        grid.add_column(no_wrap=True, width=10)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        for text, weight, ended in rows[:TOP]:
            shown = Text(_one_line(text)).append("" if ended else " ▌", "cyan blink")
            grid.add_row(f"{weight:.2f}", Text("█" * max(1, round(10 * weight)), "cyan"), shown)
        if len(rows) > TOP:
            grid.add_row("", "", Text(f"({len(rows) - TOP} more)", "dim"))
        return Group(self._numbers(population), grid)


def _strings(population: Population, tokenizer: Any) -> list[tuple[str, float, bool]]:
    """Distinct strings, heaviest first: (text, weight, ended)."""
    x = population.sequences
    rows = zip(np.asarray(x.tokens), np.asarray(x.length), population.ended, strict=True)
    strings = [(tuple(ids[:length].tolist()), bool(ended)) for ids, length, ended in rows]
    merged = lineages.merged(strings, population.weights)
    return [(tokenizer.decode(list(ids)), weight, ended) for (ids, ended), weight in merged]


def report(console: Console, run: Run) -> None:
    """Weighted strings, evidence, diagnostics, cost and flags."""
    p = run.population
    if run.interrupted:
        console.print(
            f"interrupted after token {p.sequences.tokens.shape[1]}: unfinished strings",
            style="yellow",
        )
    console.print(_comparison(run, console.width) if run.comparison else ppl.table(p, run))
    console.print()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan", no_wrap=True)
    grid.add_column()
    for name, value in facts(run):
        grid.add_row(name, value)
    console.print(grid)
    for warning in flags(run.population):
        console.print(warning, style="bold red", highlight=False)


def facts(run: Run) -> list[tuple[str, str]]:
    """Name and value of every number that describes a run."""
    p, cost, seconds = run.population, run.population.cost, run.seconds
    rows = []
    if p.log_z is not None and p.log_z_std_error is not None:
        error = "" if math.isnan(p.log_z_std_error) else f" ± {p.log_z_std_error:.2f}"
        rows.append(("log Z", f"{p.log_z:.3f}{error}"))
        rows.append(("ESS", f"{p.ess:.1f} of {len(p.log_weights)}"))
    if p.trace is not None:
        rounds = (
            "tokens"
            if run.config.steps_every is None and run.config.step_delimiter is None
            else "steps"
        )
        rows.append(
            ("resampled", f"before {int(p.trace.resampled.sum())} of {len(p.trace.ess)} {rounds}")
        )
    calls = f", {cost['potential_calls']:,} potential calls" if cost["potential_calls"] else ""
    rows.append(
        ("cost", f"{cost['tokens']:,} tokens in {cost['forwards']:,} forward passes{calls}")
    )
    working = seconds["total"] - seconds["compiling"]
    per_token = 1000 / max(cost["tokens"], 1)
    rows.append(("time", f"{working:.1f} s, and {seconds['compiling']:.1f} s of compilation"))
    rows.append(
        (
            "per token",
            f"{working * per_token:.1f} ms, {seconds['total'] * per_token:.1f} ms with compilation",
        )
    )
    return rows


def flags(p: Population) -> list[str]:
    """What a reader must know before believing the numbers."""
    return [f"{word[0].upper()}{word[1:]}." for word in p.health.words]


def _comparison(run: Run, width: int) -> Table:
    """The heaviest strings with their share under the target and under each baseline."""
    p = run.population
    target = [(text, weight) for text, weight, _, _ in merge(p, run)]
    columns = {"posterior": target, **run.comparison}
    shares = _shares(columns)
    # The heaviest of the target, then the most frequent of each baseline.
    shown = dict.fromkeys(
        text
        for rows, top in zip(columns.values(), (8, 4, 3), strict=True)
        for text, _ in rows[:top]
    )
    caption = f"{TITLES['masked']}; {TITLES['model alone']}"
    view = Table(caption=caption, caption_justify="left")
    for name in columns:
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column("string")
    # Rich would take the room that a long string wants from the numbers.
    room = max(width - sum(len(name) + 3 for name in columns) - 4, 20)
    for text in shown:
        cells = [shares[text].get(name) for name in columns]
        styles = ("bold cyan", "", "")
        view.add_row(
            *(
                Text("·", "dim") if cell is None else Text(f"{cell:.3f}", style)
                for cell, style in zip(cells, styles, strict=True)
            ),
            Text(_shorten(_one_line(text), room)),
        )
    rest = [
        f"{sum(share for text, share in rows if text not in shown):.3f}"
        for rows in columns.values()
    ]
    view.add_row(*rest, Text(f"({len(shares) - len(shown)} more)", "dim"), style="dim")
    return view


def _shares(columns: dict[str, list[tuple[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each string, under each name."""
    shares: dict[str, dict[str, float]] = {}
    for name, rows in columns.items():
        for text, share in rows:
            of = shares.setdefault(text, {})
            of[name] = of.get(name, 0.0) + share
    return shares


def _shorten(text: str, most: int) -> str:
    """`text` in at most `most` characters, with an ellipsis at the end if it is cut."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _one_line(text: str) -> str:
    return text.replace("\n", "↵")
