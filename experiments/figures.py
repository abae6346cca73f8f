"""The picture of a decoding: the genealogy of its strings, ESS and evidence over the steps, the heaviest strings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from .saving import Run, Steps

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
OTHER, DEAD, INK = "#6b7785", "#d9dde2", "#1f2933"
TOP = 12
MARKS = {"masked": "share if masked token by token", "model alone": "share of the model alone"}
STYLE = {"fontsize": 8, "color": INK}


def draw(run: Run) -> Figure:
    """The figure of a run: genealogy, ESS, log Z and the heaviest strings; only the strings if no steps were kept."""
    merged = heaviest(run)
    colors = {text: PALETTE[i] if i < len(PALETTE) else OTHER for i, (text, _) in enumerate(merged)}
    steps = run.population.steps
    if steps is None:
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        _strings(figure.subplots(), run, merged, colors)
    else:
        figure = Figure(figsize=(13, 9), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=(1.75, 1))
        _genealogy(figure.add_subfigure(grid[0]).subplots(), run, steps, colors)
        left, middle, right = figure.add_subfigure(grid[1]).subplots(1, 3, width_ratios=(1, 1, 1.6))
        _ess(left, run, steps)
        _log_z(middle, run, steps)
        _strings(right, run, merged, colors)
    power = "" if run.config.alpha == 1 else f"^{run.config.alpha:g}"
    title = textwrap.shorten(run.config.prompt.replace("$", r"\$"), 110, placeholder=" ...")
    figure.suptitle(f"{title}\n", fontsize=13, color=INK, fontweight="bold", x=0.01, ha="left")
    constraint = "" if run.config.regex is None and run.config.json_schema is None else " × constraint"
    subtitle = f"{run.config.model}, p{power}{constraint}, {run.config.method}, N = {run.config.num_particles}"
    figure.text(0.01, 0.91 if steps is None else 0.957, subtitle, **STYLE)
    return figure


def heaviest(run: Run) -> list[tuple[str, float]]:
    """Distinct strings of positive weight with their total weight, heaviest first."""
    total: dict[str, float] = {}
    for text, weight in zip(run.texts, run.population.weights, strict=True):
        if weight > 0:
            total[text] = total.get(text, 0.0) + float(weight)
    return sorted(total.items(), key=lambda row: -row[1])


def parents(steps: Steps) -> Int[np.ndarray, "T N"]:
    """[t, i]: which slot of step t - 1 slot i of step t continues; row 0 holds i itself."""
    first = np.arange(steps.history_ancestors.shape[1])[None]
    return np.concatenate([first, steps.history_ancestors[:-1]])


def descendant_weights(steps: Steps, weights: Float[np.ndarray, " N"]) -> Float[np.ndarray, "T N"]:
    """[t, i]: the total final weight of all that descends from slot i of step t."""
    of_parent = parents(steps)
    total = np.zeros(of_parent.shape)
    total[-1] = weights
    for t in range(len(total) - 1, 0, -1):
        np.add.at(total[t - 1], of_parent[t], total[t])
    return total


def survivors(steps: Steps, alive: Bool[np.ndarray, " N"]) -> Bool[np.ndarray, "T N"]:
    """[t, i]: whether slot i of step t has a living descendant at the end."""
    return descendant_weights(steps, alive.astype(float)) > 0


def _axes(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa5b1")
    axes.tick_params(labelsize=8, colors=INK)


def _token_axis(axes: Axes, horizon: int, most: int = 12) -> None:
    axes.set_xlabel("token", **STYLE)
    axes.set_xticks(np.arange(1, horizon + 1, max(1, -(-horizon // most))))


def _resampling(axes: Axes, steps: Steps) -> None:
    for t in np.flatnonzero(steps.resampled):
        axes.axvline(t + 1.5, color="#e69f00", linewidth=1, linestyle=(0, (2, 2)), zorder=0)


def _ess(axes: Axes, run: Run, steps: Steps) -> None:
    num, x = len(run.population.log_weights), np.arange(1, len(steps.ess) + 1)
    _axes(axes, "effective sample size (dotted: resampled)")
    _resampling(axes, steps)
    if run.config.method == "smc":
        axes.axhline(num / 2, color="#9aa5b1", linewidth=0.8)
        axes.annotate("N / 2", (1, num / 2), (0, -9), textcoords="offset points", fontsize=7, color="#7b8794")
    axes.plot(x, steps.ess, color=PALETTE[0], marker="o", markersize=3.5, linewidth=1.5)
    axes.set_ylim(0, num * 1.06)
    _token_axis(axes, len(x))


def _log_z(axes: Axes, run: Run, steps: Steps) -> None:
    p, x = run.population, np.arange(1, len(steps.log_z) + 1)
    error = 0.0 if p.log_z_std_error is None or np.isnan(p.log_z_std_error) else p.log_z_std_error
    value = "none" if p.log_z is None else f"{p.log_z:.2f}" + (f" ± {error:.2f}" if error else "")
    _axes(axes, f"log Z, running estimate ({value})")
    _resampling(axes, steps)
    finite = np.isfinite(steps.log_z)
    axes.plot(x[finite], steps.log_z[finite], color=PALETTE[2], marker="o", markersize=3.5, linewidth=1.5)
    if finite.any() and finite[-1]:
        axes.errorbar(x[-1], steps.log_z[-1], yerr=error, color=PALETTE[2], capsize=3, linewidth=1.2)
    _token_axis(axes, len(x))


def _strings(axes: Axes, run: Run, merged: list[tuple[str, float]], colors: dict[str, str]) -> None:
    _axes(axes, "heaviest strings")
    if not merged:
        axes.text(0.5, 0.5, "all strings are dead", ha="center", va="center", color="#b00020")
        axes.set_axis_off()
        return
    names = dict.fromkeys([text for text, _ in merged[: TOP if not run.comparison else 8]])
    masked = run.comparison.get("masked", [])
    names |= dict.fromkeys(text for text, _ in masked[:4])
    weight, y = dict(merged), np.arange(len(names))
    axes.barh(y, [weight.get(t, 0.0) for t in names], color=[colors.get(t, OTHER) for t in names], height=0.3)
    for k, text in enumerate(names):
        axes.annotate(_abridged(text, 80) or "(empty)", (0, k - 0.22), (2, 0), textcoords="offset points", **STYLE)
    for marker, (name, rows) in zip("Do", run.comparison.items(), strict=False):
        at = [(share, k) for k, text in enumerate(names) for other, share in rows if other == text]
        if at:
            axes.scatter(
                *zip(*at, strict=True), marker=marker, s=26, color=INK, edgecolor="white", label=MARKS[name], zorder=3
            )
            axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.set_yticks([])
    axes.set_ylim(max(len(names), 6) - 0.5, -0.8)
    axes.set_xlim(0, None)
    axes.set_xlabel("probability", **STYLE)


def _abridged(text: str, most: int) -> str:
    """Text in at most `most` characters: its beginning and its end, where strings of one population differ."""
    text = text.replace("\n", "↵")
    tail = (most - 3) * 2 // 3
    return _visible(text if len(text) <= most else f"{text[: most - 3 - tail]} … {text[-tail:]}")


def _visible(text: str) -> str:
    """Text in one line, with no mathematics in it for matplotlib."""
    return text.replace("\n", "↵").replace("$", r"\$")


def _genealogy(axes: Axes, run: Run, steps: Steps, colors: dict[str, str]) -> None:
    """Slots over steps: every line is a string, coloured by the heaviest string that became of it, grey if none did."""
    _axes(axes, "genealogy: grey lineages died out, width is the weight of what became of a lineage")
    _resampling(axes, steps)
    weights = run.population.weights
    kept, heavy, of_parent = survivors(steps, weights > 0), descendant_weights(steps, weights), parents(steps)
    color = _lineage_colors(run, steps, colors)
    horizon, num = kept.shape
    for t, i in np.ndindex(horizon, num):
        start = (0.5 if t == 0 else t, of_parent[t, i])
        style: dict[str, Any] = (
            {"edgecolor": color[t][i], "linewidth": 0.7 + 5 * np.sqrt(heavy[t, i]), "zorder": 2}
            if kept[t, i]
            else {"edgecolor": DEAD, "linewidth": 0.9, "zorder": 1}
        )
        axes.add_patch(PathPatch(_curve(start, (t + 1, i)), facecolor="none", capstyle="round", **style))
    _label(axes, run, steps, kept)
    _label_ends(axes, run, color[-1], horizon + 0.15)
    dead = np.argwhere(np.isneginf(steps.history_log_weights))
    axes.scatter(dead[:, 0] + 1, dead[:, 1], marker="x", s=14, color="#b00020", linewidths=0.8, zorder=3)
    axes.set_xlim(0.4, horizon + 0.15)
    axes.set_ylim(num - 0.3, -0.7)
    axes.set_ylabel("particle", **STYLE)
    _token_axis(axes, horizon, most=32)


def _curve(start: tuple[float, float], end: tuple[float, float]) -> Path:
    """From one step's slot to the next one's, level at both ends."""
    middle = (start[0] + end[0]) / 2
    points = [start, (middle, start[1]), (middle, end[1]), end]
    return Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])


def _lineage_colors(run: Run, steps: Steps, colors: dict[str, str]) -> list[list[str]]:
    """[t][i]: the colour of the string that weighs most among the descendants of slot i of step t."""
    texts, weights = np.asarray(run.texts), run.population.weights
    named = [text for text in colors if colors[text] != OTHER]
    shares = [descendant_weights(steps, np.where(texts == text, weights, 0.0)) for text in named]
    shares.append(descendant_weights(steps, np.where(np.isin(texts, named), 0.0, weights)))
    shades = [*(colors[text] for text in named), OTHER]
    return [[shades[k] for k in row] for row in np.argmax(shares, axis=0)]


def _label(axes: Axes, run: Run, steps: Steps, kept: Bool[np.ndarray, "T N"]) -> None:
    """Every token's text, once for neighbouring slots that hold one string; where there is room."""
    horizon, num = kept.shape
    longest = np.percentile([len(piece) for piece in run.pieces.values()], 90)
    size = min(9.0, 250 / num, 1300 / (horizon * max(longest, 1.0)))
    if size < 4:
        return
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for t, slot, token, alive in _runs(steps, kept):
        piece = _visible(run.pieces.get(token, "").replace(" ", "·"))
        if piece:
            shade = INK if alive else "#9aa5b1"
            at = (t + 1, slot)
            axes.annotate(piece, at, fontsize=size, color=shade, ha="center", va="center", bbox=box, zorder=4)


def _label_ends(axes: Axes, run: Run, color: list[str], x: float) -> None:
    """At the right edge the finished strings with their weights, neighbours merged, light ones left out."""
    weights, first, num = run.population.weights, 0, len(run.texts)
    for i in range(1, num + 1):
        if i < num and run.texts[i] == run.texts[first]:
            continue
        total = float(weights[first:i].sum())
        if total >= 0.005:
            text = f" {total:.2f}  {_abridged(run.texts[first], 34)}"
            at = (x, (first + i - 1) / 2)
            axes.annotate(
                text, at, fontsize=min(8.0, 250 / num), color=color[first], va="center", annotation_clip=False
            )
        first = i


def _runs(steps: Steps, kept: Bool[np.ndarray, "T N"]) -> Iterator[tuple[int, int, int, bool]]:
    """(step, middle slot, token, kept) for every run of neighbouring slots with one string so far."""
    of_parent = parents(steps)
    strings: list[tuple[int, ...]] = [()] * kept.shape[1]
    for t, tokens in enumerate(steps.history_tokens.tolist()):
        strings = [(*strings[of_parent[t, i]], token) for i, token in enumerate(tokens)]
        first = 0
        for i in range(1, len(tokens) + 1):
            if i == len(tokens) or (strings[i], kept[t, i]) != (strings[first], kept[t, first]):
                yield t, (first + i - 1) // 2, tokens[first], bool(kept[t, first])
                first = i
