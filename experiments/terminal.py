"""What a decoding shows in the terminal: progress while it runs, and its result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

import ppl
from ppl.table import merge
from ppl.target import Target

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
    constraint = config.regex if config.regex is not None else "a JSON schema" if config.json_schema is not None else ""
    lines = [("model", config.model), ("prompt", f"{config.prompt}  ({int(target.prefix.length)} tokens)")]
    lines += [("target", f"p(x | prompt){power}" + (" · 1[x matches]" if constraint else ""))]
    lines += [("matches", constraint)] if constraint else []
    lines += [("method", f"{config.method}, N = {config.num_particles}, at most {config.max_tokens} tokens")]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in lines:
        grid.add_row(name, Text(value))
    console.print(grid)
    console.print()


class Progress:
    """The population after each step: a live view in a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, config: Config, tokenizer: Any) -> None:
        self.console, self.config, self.tokenizer = console, config, tokenizer
        waiting = Text("first step (a new shape compiles once, and is kept) ...", "dim")
        self.live = Live(waiting, console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def show(self, population: Population) -> None:
        """Called after every step."""
        if population.steps is None:
            return
        if self.live:
            self.live.update(self._view(population), refresh=True)
        else:
            top = merge(population, self.tokenizer)[:1]
            heaviest = f"  {top[0][1]:.2f} {_one_line(top[0][0])!r}" if top else "  all dead"
            self.console.print(
                self._numbers(population).plain + heaviest, markup=False, highlight=False, soft_wrap=True
            )

    def _numbers(self, population: Population) -> Text:
        steps, num = population.steps, self.config.num_particles
        assert steps is not None
        done, ess = len(steps.ess), float(steps.ess[-1])
        filled = round(BAR * ess / num)
        text = Text.assemble(
            (f"step {done:>3}/{self.config.max_tokens}", "bold"),
            f"  growing {int(steps.active[-1]):>3}/{num}  ESS ",
            ("█" * filled, "cyan"),
            ("░" * (BAR - filled), "dim"),
            f" {ess:5.1f}  log Z {float(steps.log_z[-1]):8.3f}",
        )
        return text.append("  resampled" if steps.resampled[-1] else "", "yellow")

    def _view(self, population: Population) -> RenderableType:
        rows = merge(population, self.tokenizer)
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", no_wrap=True, width=5)
        grid.add_column(no_wrap=True, width=10)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        for text, weight, _, ended in rows[:TOP]:
            shown = Text(_one_line(text)).append("" if ended else " ▌", "cyan blink")
            grid.add_row(f"{weight:.2f}", Text("█" * max(1, round(10 * weight)), "cyan"), shown)
        if len(rows) > TOP:
            grid.add_row("", "", Text(f"({len(rows) - TOP} more)", "dim"))
        return Group(self._numbers(population), grid)


def report(console: Console, run: Run) -> None:
    """Weighted strings, evidence, diagnostics, cost and flags."""
    p = run.population
    if run.interrupted:
        console.print(f"interrupted after step {p.sequences.tokens.shape[1]}: unfinished strings", style="yellow")
    console.print(_comparison(run, console.width) if run.comparison else ppl.table(p, _Texts(run)))
    console.print()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan", no_wrap=True)
    grid.add_column()
    for name, value in facts(run):
        grid.add_row(name, value)
    console.print(grid)
    for warning in flags(run):
        console.print(warning, style="bold red", highlight=False)


class _Texts:
    """The strings that a run has decoded already, as a tokenizer for `ppl.table`."""

    def __init__(self, run: Run) -> None:
        x = run.population.sequences
        self.texts = {tuple(x.tokens[i, : x.length[i]].tolist()): text for i, text in enumerate(run.texts)}

    def decode(self, ids: list[int]) -> str:
        return self.texts[tuple(ids)]


def facts(run: Run) -> list[tuple[str, str]]:
    """Name and value of every number that describes a run."""
    p, cost, seconds = run.population, run.population.cost, run.seconds
    rows = []
    if p.log_z is not None and p.log_z_std_error is not None:
        error = "" if math.isnan(p.log_z_std_error) else f" ± {p.log_z_std_error:.2f}"
        rows.append(("log Z", f"{p.log_z:.3f}{error}"))
        rows.append(("ESS", f"{p.ess:.1f} of {len(p.log_weights)}"))
    if p.steps is not None:
        rows.append(("resampled", f"after {int(p.steps.resampled.sum())} of {len(p.steps.ess)} tokens"))
    calls = f", {cost['potential_calls']:,} potential calls" if cost["potential_calls"] else ""
    rows.append(("cost", f"{cost['tokens']:,} tokens in {cost['forwards']:,} forward passes{calls}"))
    working = seconds["total"] - seconds["compiling"]
    per_token = 1000 / max(cost["tokens"], 1)
    rows.append(("time", f"{working:.1f} s, and {seconds['compiling']:.1f} s of compilation"))
    rows.append(("per token", f"{working * per_token:.1f} ms, {seconds['total'] * per_token:.1f} ms with compilation"))
    return rows


def flags(run: Run) -> list[str]:
    """What a reader must know before believing the numbers."""
    p, found = run.population, []
    if p.all_dead:
        found.append("All strings are dead: none has positive density.  More particles or tokens, or a looser target.")
    if p.num_invalid:
        found.append(f"{p.num_invalid} strings were dropped because a potential gave NaN or +inf.")
    if p.log_z_std_error is not None and p.log_z_std_error > 0.8:
        found.append(
            "The standard error of log Z is close to the most it can show: few independent lineages are left."
            "  More particles give a better estimate."
        )
    return found


def _comparison(run: Run, width: int) -> Table:
    """The heaviest strings with their share under the target and under each baseline."""
    p = run.population
    target = [(text, weight) for text, weight, _, _ in merge(p, _Texts(run))]
    columns = {"posterior": target, **run.comparison}
    shares: dict[str, dict[str, float]] = {}
    for name, rows in columns.items():
        for text, share in rows:
            of = shares.setdefault(text, {})
            of[name] = of.get(name, 0.0) + share
    # The heaviest of the target, then the most frequent of each baseline.
    shown = dict.fromkeys(text for rows, top in zip(columns.values(), (8, 4, 3), strict=True) for text, _ in rows[:top])
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
    rest = [f"{sum(share for text, share in rows if text not in shown):.3f}" for rows in columns.values()]
    view.add_row(*rest, Text(f"({len(shares) - len(shown)} more)", "dim"), style="dim")
    return view


def _shorten(text: str, most: int) -> str:
    """`text` in at most `most` characters, with an ellipsis at the end if it is cut."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _one_line(text: str) -> str:
    return text.replace("\n", "↵")
