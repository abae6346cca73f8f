"""A run of SMC as one HTML page: its strings and weights, its ancestry, ESS and log Z, cost and
warnings.

    page = view.html(smc.run(key, target, history=True), tokenizer)    # shows itself in a notebook
    page.save("run.html")                                              # one file, no network

Pointing at a particle lights up where it comes from and what became of it, and shows its text and
its weight after every round.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from . import lineages, saving
from .lineages import PALETTE
from .page import HINT, PAGE, SCRIPT, STYLE
from .saving import Population
from .terminal import flags

OTHER, DEAD = len(PALETTE), -1
LEFT, TOP, ENDS, PANEL, GAP = 44, 22, 330, 66, 30
"""Pixels: margins of the genealogy, room for the strings at its end, height of a trace and the room
above it.
"""
CHARACTER = 6.1
"""Pixels that a character of a label takes, on average."""


@dataclasses.dataclass(frozen=True)
class View:
    """A self-contained HTML page; a notebook shows it in a frame of its own."""

    page: str = dataclasses.field(repr=False)
    height: int

    def save(self, path: str | Path) -> None:
        """Write the page."""
        Path(path).write_text(self.page, encoding="utf-8")

    def _repr_html_(self) -> str:
        # In a frame, neither style nor script can touch the notebook, nor the other way round.
        return (
            f'<iframe sandbox="allow-scripts" style="width:100%;height:{self.height}px;border:0" srcdoc="'
            f'{escape(self.page)}"></iframe>'
        )


def html(result: Any, tokenizer: Any, *, title: str = "") -> View:
    """The page of a run.

    Args:
        result: of `samplers.smc.run` or a relative of it; the ancestry is shown if it was run with
            history=True.
        tokenizer: anything with decode(ids) -> str.
        title: a heading.

    Raises:
        ValueError: if it is a list of populations.
    """
    p = saving.population(result)
    texts = saving.texts(p, tokenizer)
    width, height, body, data = _run(p, texts, tokenizer)
    head = escape(title or f"A run with {len(texts)} particles")
    page = PAGE.format(
        title=head,
        style=STYLE,
        facts="".join(
            f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(p)
        ),
        flags="".join(f"<p class=flag>{escape(text)}</p>" for text in _flags(p)),
        strings=_merged(p, texts) + _single(p, texts),
        run=f'<svg id="run" width="{width}" height="{height}" role="img" aria-label="genealogy">{body}</svg>',
        # Within a script element only "</script" and "<!--" could end the data.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        hint=HINT if data["rounds"] else "run it with history=True to see its ancestry",
        script=SCRIPT,
    )
    return View(page, int(np.clip(height + 420, 420, 900)))


def _facts(p: Population) -> Iterator[tuple[str, str]]:
    yield "particles", str(len(p.log_weights))
    if p.trace is not None:
        rounds, resampled = len(p.trace.ess), int(p.trace.resampled.sum())
        yield "rounds", f"{rounds}, resampled before {resampled}"
    if p.log_z is not None:
        error = p.log_z_std_error
        yield (
            "log Z",
            f"{p.log_z:.3f}" + ("" if error is None or np.isnan(error) else f" ± {error:.2f}"),
        )
    yield "ESS", f"{p.ess:.1f}"
    for name, count in p.cost.items():
        if count:
            yield name.replace("_", " "), f"{count:,}"


def _flags(p: Population) -> list[str]:
    dead = int(np.isneginf(p.log_weights).sum())
    some = (
        [f"{dead} of {len(p.log_weights)} particles are dead."] if dead and not p.all_dead else []
    )
    return some + flags(p)


# Strings.


def _merged(p: Population, texts: list[str]) -> str:
    """Equal strings in one row, heaviest first."""
    slots: dict[tuple[str, bool], list[int]] = {}
    for i, key in enumerate(zip(texts, p.ended.tolist(), strict=True)):
        slots.setdefault(key, []).append(i)
    order = sorted(slots.items(), key=lambda row: -p.weights[row[1]].sum())
    named = [text for text, _ in lineages.merged(texts, p.weights)]
    rows = []
    for (text, ended), of in order:
        weight = float(p.weights[of].sum())
        rank = min(named.index(text), OTHER) if weight > 0 else DEAD
        rows.append(_row(text, ended, weight, rank, of, f"{len(of)}"))
    return _table("merged", "copies", rows)


def _single(p: Population, texts: list[str]) -> str:
    """Every particle in a row of its own, heaviest first."""
    named = {text: min(k, OTHER) for k, (text, _) in enumerate(lineages.merged(texts, p.weights))}
    weights, ended, rows = p.weights.tolist(), p.ended.tolist(), []
    for i in np.argsort(-p.weights, kind="stable").tolist():
        rank = named[texts[i]] if weights[i] > 0 else DEAD
        rows.append(_row(texts[i], ended[i], weights[i], rank, [i], f"{i}"))
    return _table("single", "particle", rows)


def _row(text: str, ended: bool, weight: float, rank: int, slots: list[int], count: str) -> str:
    state = ' class="dead"' if rank == DEAD else ""
    shown = "dead" if rank == DEAD else f"{weight:.4f}" if weight >= 5e-5 else f"{weight:.0e}"
    cut = "" if ended else '<i title="no end token: cut, or growing still">…</i>'
    return (
        f'<tr{state} data-slots="{" ".join(map(str, slots))}"><td>{shown}</td>'
        f'<td><b class="k{_shade(rank)}" style="width:{120 * weight:.0f}px"></b></td><td>{count}</td>'
        f"<td class=text>{escape(text) or '<i>(empty)</i>'}{cut}</td></tr>"
    )


def _table(name: str, count: str, rows: list[str]) -> str:
    head = f"<tr><th>weight</th><th></th><th>{count}</th><th>string</th></tr>"
    return f'<table class="{name}"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _shade(rank: Any) -> str:
    return "x" if rank == DEAD else str(rank)


# The picture: genealogy, ESS and log Z above each other, a round a column.


def _run(p: Population, texts: list[str], tokenizer: Any) -> tuple[int, int, str, dict[str, Any]]:
    """Width, height and content of the picture, and what the script must know of it."""
    rounds = len(
        p.history.ancestors if p.history is not None else [] if p.trace is None else p.trace.ess
    )
    y, parts, data = TOP, [], {"rounds": 0}
    dx = 26.0
    if p.history is not None:
        said = lineages.pieces(np.asarray(p.history.drawn), tokenizer)
        longest = max(len(lineages.label(piece, 99)) for row in said for piece in row)
        dx = float(
            np.clip(14 + CHARACTER * longest, 26, 70 if p.history.drawn.shape[2] == 1 else 190)
        )
        dy = float(np.clip(960 / len(texts), 4, 16))
        parts.append(_genealogy(p, texts, said, dx, dy))
        data = _data(p, said, dx, dy)
        y += int(dy * len(texts))
    if p.trace is not None:
        x = LEFT + dx * (np.arange(rounds) + 0.5)
        for name, values, span in (
            ("ESS", p.trace.ess, (0.0, float(len(texts)))),
            ("log Z", p.trace.log_z, ()),
        ):
            parts.append(_trace(name, x, np.asarray(values, np.float64), y + GAP, span))
            y += GAP + PANEL
        lines = "".join(
            f"M{x[r] - dx / 2:.0f} {TOP}V{y}" for r in np.flatnonzero(p.trace.resampled)
        )
        parts.insert(
            0,
            f'<path class="resampled" d="{lines}"><title>resampled</title></path>' if lines else "",
        )
    ticks = range(1, rounds + 1, max(1, int(np.ceil(24 / dx))))
    parts += [
        f'<text class="tick" x="{LEFT + dx * (r - 0.5):.0f}" y="{TOP - 8}">{r}</text>'
        for r in ticks
    ]
    return (
        int(LEFT + dx * rounds + (ENDS if p.history is not None else 12)),
        y + 12,
        "".join(parts),
        data,
    )


def _data(p: Population, said: list[list[str]], dx: float, dy: float) -> dict[str, Any]:
    assert p.history is not None
    words = sorted({piece for row in said for piece in row})
    of = {word: k for k, word in enumerate(words)}
    weights = saving.normalise(np.asarray(p.history.log_weights, np.float64))
    trace = (
        None
        if p.trace is None
        else [[_short(v) for v in row] for row in (p.trace.ess, p.trace.log_z)]
    )
    return {
        "rounds": len(said),
        "particles": len(said[0]),
        "left": LEFT,
        "top": TOP,
        "dx": dx,
        "dy": dy,
        "ancestors": np.asarray(p.history.ancestors).tolist(),
        "weights": [[_short(w) for w in row] for row in weights],
        "words": words,
        "said": [[of[piece] for piece in row] for row in said],
        "trace": trace,
    }


def _short(value: float) -> float | str:
    """Four digits; JSON has no infinities."""
    return float(f"{value:.4g}") if np.isfinite(value) else str(float(value)).replace("inf", "∞")


def _genealogy(p: Population, texts: list[str], said: list[list[str]], dx: float, dy: float) -> str:
    """One line for each particle of each round, from its ancestor to itself; the dead and childless
    below.
    """
    assert p.history is not None
    ancestors, alive = np.asarray(p.history.ancestors), ~np.isneginf(p.history.log_weights)
    rank = lineages.ranks(ancestors, texts, p.weights, OTHER)
    heavy = lineages.descendant_weights(ancestors, p.weights)

    def at(i: Any) -> str:
        return f"{TOP + dy * (i + 0.5):.4g}"

    groups: dict[bool, list[str]] = {False: [], True: []}
    for r, i in np.ndindex(*ancestors.shape):
        start, end = LEFT + dx * max(r - 0.5, 0), LEFT + dx * (r + 0.5)
        middle, y, to = f"{(start + end) / 2:.4g}", at(ancestors[r, i]), at(i)
        d = (
            f"M{start:.4g} {y}H{end:.4g}"
            if y == to
            else f"M{start:.4g} {y}C{middle} {y} {middle} {to} {end:.4g} {to}"
        )
        thick = 1 if rank[r, i] == DEAD else 1 + min(5.0, dy / 2) * np.sqrt(heavy[r, i])
        line = f'<path id="p{r}_{i}" class="k{_shade(rank[r, i])}" stroke-width="{thick:.2g}" d="{d}"/>'
        groups[bool(rank[r, i] != DEAD)].append(line)
    crosses = "".join(
        f"M{LEFT + dx * (r + 0.5) - 3:.4g} {TOP + dy * (i + 0.5) - 3:.4g}l6 6m-6 0l6-6"
        for r, i in np.argwhere(~alive)
    )
    drawn = "".join(groups[False] + groups[True])
    labels = "".join(_labels(ancestors, said, rank, texts, p, dx, dy)) if dy >= 9 else ""
    return f'<g class="lines">{drawn}</g><path class="cross" d="{crosses}"/><g class="labels">{labels}</g>'


def _labels(
    ancestors: Any,
    said: list[list[str]],
    rank: Any,
    texts: list[str],
    p: Population,
    dx: float,
    dy: float,
) -> Iterator[str]:
    """What every round drew, once for neighbours with one string; and the strings at the end."""
    room = max(int((dx - 6) / CHARACTER), 3)
    for r, first, last in lineages.runs(ancestors, said, rank >= 0):
        word = lineages.label(said[r][first], room)
        x, y = LEFT + dx * (r + 0.5), TOP + dy * ((first + last) // 2 + 0.5)
        fate = "" if rank[r, first] >= 0 else ' class="lost"'
        if word:
            yield f'<text{fate} x="{x:.4g}" y="{y:.4g}">{escape(word)}</text>'
    first, x = 0, LEFT + dx * len(said) + 10
    for i in range(1, len(texts) + 1):
        if i == len(texts) or texts[i] != texts[first]:
            weight, y = p.weights[first:i].sum(), TOP + dy * ((first + i - 1) / 2 + 0.5)
            if weight >= 0.005:
                text = escape(f"{weight:.2f}  {lineages.abridged(texts[first], 44)}")
                yield f'<text class="end" x="{x:.4g}" y="{y:.4g}">{text}</text>'
            first = i


def _trace(
    name: str, x: np.ndarray, values: np.ndarray, top: float, span: tuple[float, ...]
) -> str:
    """A curve over the rounds, on an axis of the given span or its own; rounds without a number are
    left out.
    """
    finite = np.isfinite(values)
    low, high = span or (
        (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    )
    y = top + PANEL * (1 - (np.where(finite, values, low) - low) / max(high - low, 1e-9))
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b, ok in zip(x, y, finite, strict=True) if ok)
    ends = "".join(
        f'<text class="axis" x="{LEFT - 6}" y="{at:.4g}">{value:.4g}</text>'
        for value, at in ((high, top), (low, top + PANEL))
    )
    return (
        f'<text class="name" x="{LEFT}" y="{top - 9:.4g}">{name}</text>{ends}'
        f'<path class="frame" d="M{LEFT} {top:.4g}v{PANEL}H{x[-1] if len(x) else LEFT:.4g}"/>'
        f'<polyline class="curve" points="{points}"/>'
    )
