"""Pictures of a run: its genealogy, weights, ESS and evidence over the rounds, and its heaviest
strings.

Every function but `draw` takes the result of a sampler (`samplers.smc.run(..., history=True)`) and
draws on `axes`, or on new ones, which a notebook shows.  `draw` puts them together for a run of the
decode command.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from samplers.results import History, Trace

from . import lineages, saving
from .lineages import PALETTE
from .saving import Population, Run

OTHER, DEAD, INK, FATAL = "#6b7785", "#d9dde2", "#1f2933", "#b00020"
SHADES = (*PALETTE, OTHER, DEAD)
"""Colour of each rank of `lineages.ranks`; -1, no descendants, is the last."""
TOP = 12
MARKS = {"masked": "share if masked token by token", "model alone": "share of the model alone"}
STYLE = {"fontsize": 8, "color": INK}


def draw(run: Run) -> Figure:
    """The figure of a run: genealogy, ESS, log Z and the heaviest strings; only the strings if no
    rounds were kept.
    """
    p, config = run.population, run.config
    if p.history is None:
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        strings(p, run, comparison=run.comparison, axes=figure.subplots())
    else:
        figure = Figure(figsize=(13, 9), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=(1.75, 1))
        genealogy(p, run, axes=figure.add_subfigure(grid[0]).subplots())
        left, middle, right = figure.add_subfigure(grid[1]).subplots(1, 3, width_ratios=(1, 1, 1.6))
        ess(p, threshold=0.5 if config.method == "smc" else None, axes=left)
        log_z(p, axes=middle)
        strings(p, run, comparison=run.comparison, axes=right)
    power = "" if config.alpha == 1 else f"^{config.alpha:g}"
    title = textwrap.shorten(config.prompt.replace("$", r"\$"), 110, placeholder=" ...")
    figure.suptitle(f"{title}\n", fontsize=13, color=INK, fontweight="bold", x=0.01, ha="left")
    constraint = "" if config.regex is None and config.json_schema is None else " × constraint"
    subtitle = f"{config.model}, p{power}{constraint}, {config.method}, N = {config.num_particles}"
    figure.text(0.01, 0.91 if p.history is None else 0.957, subtitle, **STYLE)
    return figure


def ess(result: Any, *, threshold: float | None = None, axes: Axes | None = None) -> Axes:
    """Effective sample size after each round; `threshold` marks the share of N below which the run
    resampled.

    Raises:
        ValueError: if the result has no trace, as those of samplers that do not work in rounds.
    """
    p = saving.population(result)
    trace, axes = _trace(p), styled_axes(axes, "effective sample size (dotted: resampled)")
    num, x = len(p.log_weights), np.arange(1, len(trace.ess) + 1)
    _resampling(axes, p)
    if threshold is not None:
        axes.axhline(threshold * num, color="#9aa5b1", linewidth=0.8)
        name = "N / 2" if threshold == 0.5 else f"{threshold:g} N"
        axes.annotate(
            name,
            (1, threshold * num),
            (0, -9),
            textcoords="offset points",
            fontsize=7,
            color="#7b8794",
        )
    axes.plot(x, trace.ess, color=PALETTE[0], marker="o", markersize=3.5, linewidth=1.5)
    axes.set_ylim(0, num * 1.06)
    _round_axis(axes, p)
    return axes


def log_z(result: Any, *, axes: Axes | None = None) -> Axes:
    """The running estimate of log Z, and the standard error of the last one.

    Raises:
        ValueError: as in `ess`.
    """
    p = saving.population(result)
    trace = _trace(p)
    x, y, error = np.arange(1, len(trace.ess) + 1), np.asarray(trace.log_z), p.log_z_std_error
    error = 0.0 if error is None or np.isnan(error) else error
    value = "none" if p.log_z is None else f"{p.log_z:.2f}" + (f" ± {error:.2f}" if error else "")
    axes = styled_axes(axes, f"log Z, running estimate ({value})")
    _resampling(axes, p)
    finite = np.isfinite(y)
    axes.plot(x[finite], y[finite], color=PALETTE[2], marker="o", markersize=3.5, linewidth=1.5)
    if finite.any() and finite[-1]:
        axes.errorbar(x[-1], y[-1], yerr=error, color=PALETTE[2], capsize=3, linewidth=1.2)
    _round_axis(axes, p)
    return axes


def weights(result: Any, tokenizer: Any, *, axes: Axes | None = None) -> Axes:
    """Every particle's share of the weight after each round, along its lineage, in the colours of
    `genealogy`.

    Raises:
        ValueError: if the run kept no history.
    """
    p = saving.population(result)
    history, axes = (
        _history(p),
        styled_axes(axes, "weight after each round: grey lineages died out"),
    )
    _resampling(axes, p)
    share = saving.normalise(np.asarray(history.log_weights, np.float64))
    ancestors, rank = np.asarray(history.ancestors), _ranks(p, tokenizer)
    # A logarithmic axis has no room for the dead, and for little below a thousandth of an equal
    # share.
    floor = 1e-3 / share.shape[1]
    height = np.where(share > 0, np.maximum(share, floor), np.nan)
    for r, i in np.ndindex(*share.shape):
        # Resampling sets weights back: a lineage then starts anew.
        joined = r and not (p.trace is not None and p.trace.resampled[r])
        x, y = (
            ([r, r + 1], [height[r - 1, ancestors[r, i]], height[r, i]])
            if joined
            else ([r + 1], [height[r, i]])
        )
        axes.plot(
            x, y, color=SHADES[rank[r, i]], marker=".", linewidth=1, zorder=2 + (rank[r, i] >= 0)
        )
    axes.set_yscale("log")
    axes.set_ylim(floor / 1.5, 1.5)
    _round_axis(axes, p)
    return axes


def strings(
    result: Any,
    tokenizer: Any,
    *,
    comparison: Mapping[str, Sequence[tuple[str, float]]] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """The heaviest strings with their weights, and their shares under other ways to draw."""
    p, comparison = saving.population(result), comparison or {}
    axes, merged = (
        styled_axes(axes, "heaviest strings"),
        lineages.merged(saving.texts(p, tokenizer), p.weights),
    )
    if not merged:
        axes.text(0.5, 0.5, "all strings are dead", ha="center", va="center", color=FATAL)
        axes.set_axis_off()
        return axes
    names = dict.fromkeys([text for text, _ in merged[: 8 if comparison else TOP]])
    names |= dict.fromkeys(text for text, _ in comparison.get("masked", [])[:4])
    weight, y = dict(merged), np.arange(len(names))
    shade = {text: SHADES[min(k, len(PALETTE))] for k, (text, _) in enumerate(merged)}
    axes.barh(
        y,
        [weight.get(t, 0.0) for t in names],
        color=[shade.get(t, OTHER) for t in names],
        height=0.3,
    )
    for k, text in enumerate(names):
        shown = _plain(lineages.abridged(text, 80)) or "(empty)"
        axes.annotate(shown, (0, k - 0.22), (2, 0), textcoords="offset points", **STYLE)
    _shares(axes, list(names), comparison)
    axes.set_yticks([])
    axes.set_ylim(max(len(names), 6) - 0.5, -0.8)
    axes.set_xlim(0, None)
    axes.set_xlabel("probability", **STYLE)
    return axes


def _shares(
    axes: Axes, names: Sequence[str], comparison: Mapping[str, Sequence[tuple[str, float]]]
) -> None:
    """A mark for the share of each string under each other way to draw."""
    for marker, (name, rows) in zip("Do", comparison.items(), strict=False):
        at = [(share, k) for k, text in enumerate(names) for other, share in rows if other == text]
        if at:
            style = {"s": 26, "color": INK, "edgecolor": "white", "zorder": 3}
            axes.scatter(*zip(*at, strict=True), marker=marker, label=MARKS[name], **style)
            axes.legend(fontsize=8, frameon=False, loc="lower right")


def genealogy(
    result: Any, tokenizer: Any, *, pinned: int | None = None, axes: Axes | None = None
) -> Axes:
    """Slots over rounds: every line is a string, coloured by the heaviest string that became of it,
    grey if none did.

    Args:
        result: a run with its history.
        tokenizer: anything with decode(ids) -> str.
        pinned: the slot that followed a given string, marked by squares: -1 after
            `samplers.smc.conditional.run`.

    Raises:
        ValueError: if the run kept no history.
    """
    p = saving.population(result)
    history = _history(p)
    if axes is None:
        height = float(np.clip(0.24 * len(p.log_weights), 2.5, 9)) + 0.8
        _, axes = pyplot.subplots(figsize=(11, height), layout="constrained")
    styled_axes(
        axes, "genealogy: grey lineages died out, width is the weight of what became of a lineage"
    )
    _resampling(axes, p)
    ancestors, rank = np.asarray(history.ancestors), _ranks(p, tokenizer)
    heavy, horizon, num = lineages.descendant_weights(ancestors, p.weights), *ancestors.shape
    _curves(axes, ancestors, rank, heavy)
    _label(axes, history, tokenizer, rank >= 0)
    # The label of a step reaches half a round further than that of a token.
    right = horizon + (0.15 if history.drawn.shape[2] == 1 else 0.5)
    _label_ends(axes, saving.texts(p, tokenizer), p.weights, rank[-1], right)
    dead = np.argwhere(np.isneginf(history.log_weights))
    axes.scatter(
        dead[:, 0] + 1, dead[:, 1], marker="x", s=14, color=FATAL, linewidths=0.8, zorder=3
    )
    if pinned is not None:
        given, style = np.full(horizon, pinned % num), {"color": INK, "markersize": 3.5}
        axes.plot(np.arange(horizon) + 0.75, given, "s", zorder=5, label="pinned", **style)
    axes.set_xlim(0.4, right)
    axes.set_ylim(num - 0.3, -0.7)
    axes.set_ylabel("particle", **STYLE)
    _round_axis(axes, p, most=32)
    return axes


def _curves(axes: Axes, ancestors: np.ndarray, rank: np.ndarray, heavy: np.ndarray) -> None:
    """A curve from every slot to its ancestor; those that nothing became of are grey and thin."""
    for r, i in np.ndindex(*ancestors.shape):
        kept = rank[r, i] >= 0
        curve = _curve((r or 0.5, ancestors[r, i]), (r + 1, i))
        width, above = (0.7 + 5 * np.sqrt(heavy[r, i]), 2) if kept else (0.9, 1)
        style = {"edgecolor": SHADES[rank[r, i]], "linewidth": width, "zorder": above}
        axes.add_patch(PathPatch(curve, facecolor="none", capstyle="round", **style))


def _history(p: Population) -> History:
    if p.history is None:
        raise ValueError(
            "expected a run with its genealogy, got one without; run it with history=True"
        )
    return p.history


def _trace(p: Population) -> Trace:
    if p.trace is None:
        raise ValueError(
            "expected a run with a trace of its rounds, got one without; draw the result of smc.run"
        )
    return p.trace


def _ranks(p: Population, tokenizer: Any) -> Int[np.ndarray, "R N"]:
    ancestors = np.asarray(_history(p).ancestors)
    return lineages.ranks(ancestors, saving.texts(p, tokenizer), p.weights, len(PALETTE))


def styled_axes(axes: Axes | None, title: str) -> Axes:
    """`axes`, or new ones which a notebook shows, in the style of these pictures."""
    axes = pyplot.subplots(figsize=(5.5, 3), layout="constrained")[1] if axes is None else axes
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa5b1")
    axes.tick_params(labelsize=8, colors=INK)
    return axes


def _round_axis(axes: Axes, p: Population, most: int = 12) -> None:
    rounds = len(p.trace.ess if p.trace is not None else _history(p).ancestors)
    tokens = p.history is None or p.history.drawn.shape[2] == 1
    axes.set_xlabel("token" if tokens else "step", **STYLE)
    axes.set_xticks(np.arange(1, rounds + 1, max(1, -(-rounds // most))))


def _resampling(axes: Axes, p: Population) -> None:
    """A line between a round and the one that resampled before it drew."""
    for r in () if p.trace is None else np.flatnonzero(p.trace.resampled):
        axes.axvline(r + 0.5, color="#e69f00", linewidth=1, linestyle=(0, (2, 2)), zorder=0)


def _plain(text: str) -> str:
    """Text with no mathematics in it for matplotlib."""
    return text.replace("$", r"\$")


def _curve(start: tuple[Any, Any], end: tuple[Any, Any]) -> Path:
    """From one round's slot to the next one's, level at both ends."""
    middle = (start[0] + end[0]) / 2
    points = [start, (middle, start[1]), (middle, end[1]), end]
    return Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])


def _label(axes: Axes, history: History, tokenizer: Any, kept: Bool[np.ndarray, "R N"]) -> None:
    """What every round drew, once for neighbouring slots that hold one string; where
    there is room.
    """
    horizon, num = kept.shape
    # Letters of one point that fit beside each other: three quarters of the width are the
    # genealogy's.
    letters = 1.4 * 72 * axes.figure.bbox.width / axes.figure.dpi / horizon
    said, room = lineages.pieces(np.asarray(history.drawn), tokenizer), max(8, int(letters / 9))
    lengths = [min(len(piece), room) for row in said for piece in row if piece]
    # The longest words of a vocabulary may overlap their neighbours; steps of text would all.
    longest = np.percentile(lengths or [1], 90 if history.drawn.shape[2] == 1 else 100)
    size = min(9.0, 250 / num, letters / max(longest, 1.0))
    if size < 4:
        return
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for r, first, last in lineages.runs(np.asarray(history.ancestors), said, kept):
        piece = _plain(lineages.label(said[r][first], room))
        if piece:
            shade, at = INK if kept[r, first] else "#9aa5b1", (r + 1, (first + last) // 2)
            axes.annotate(
                piece, at, fontsize=size, color=shade, ha="center", va="center", bbox=box, zorder=4
            )


def _label_ends(axes: Axes, texts: list[str], share: Any, rank: Any, x: float) -> None:
    """At the right edge the finished strings with their weights, neighbours merged, light ones left
    out.
    """
    first, num = 0, len(texts)
    for i in range(1, num + 1):
        if i < num and texts[i] == texts[first]:
            continue
        total = float(share[first:i].sum())
        if total >= 0.005:
            text = f" {total:.2f}  {_plain(lineages.abridged(texts[first], 34))}"
            at, size = (x, (first + i - 1) / 2), min(8.0, 250 / num)
            axes.annotate(
                text,
                at,
                fontsize=size,
                color=SHADES[rank[first]],
                va="center",
                annotation_clip=False,
            )
        first = i
