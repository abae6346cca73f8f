"""Pictures of ranks and of coverage, with the bands that chance allows.

Each draws on `axes`.  Bands are exact: 99 % for all bins of a histogram together, or for a whole
curve.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from .coverage import Coverage
from .sbc import Ranks

INK, BAND, BAR = "#1f2933", "#d9dde2", "#4c78a8"
CURVES = ("#4c78a8", "#e69f00", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#6b7785")
CHANCE = 0.01
"""How often a band does not hold what is right."""
STYLE = {"fontsize": 8, "color": INK}


def histogram(axes: Axes, out: Ranks, column: int) -> None:
    """Ranks of one quantity, in densities: 1 is uniform."""
    bins, num = out.bins, len(out.ranks)
    share = bins.probabilities
    tail = CHANCE / len(share) / 2
    low, high = (stats.binom.ppf(q, num, share) / (num * share) for q in (tail, 1 - tail))
    edges = bins.edges / (out.num_samples + 1)
    height = bins.counts[:, column] / (num * share)
    axes.stairs(high, edges, baseline=low, fill=True, color=BAND, zorder=0)
    axes.stairs(height, edges, fill=True, color=BAR, alpha=0.75)
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.15 * max(high.max(), height.max()))
    styled(axes, f"{out.names[column]}   p = {out.p_values[column]:.2g}", "rank / (S + 1)")


def curves(axes: Axes, out: Coverage) -> None:
    """Coverage less alpha, of all kinds of region, each with its bootstrap band: 0 is right; above
    the draws are spread too widely, below they are too sure.
    """
    alpha, num = np.linspace(0, 1, 101), len(out.levels)
    width = stats.kstwo.isf(CHANCE / len(out.names), num)
    axes.fill_between(alpha, -width, width, color=BAND, linewidth=0, zorder=0)
    axes.axhline(0, color=INK, linewidth=0.8)
    low, high = out.band(alpha)
    for k, name in enumerate(out.names):
        shade, found = CURVES[k % len(CURVES)], out.at(alpha)[:, k] - alpha
        axes.plot(alpha, found, color=shade, linewidth=1.4, label=name)
        axes.fill_between(
            alpha, low[:, k] - alpha, high[:, k] - alpha, color=shade, alpha=0.15, linewidth=0
        )
    if 1 < len(out.names) <= len(CURVES):
        axes.legend(fontsize=7, frameon=False, ncols=2)
    axes.set_xlim(0, 1)
    styled(axes, f"{out.kind}   p = {out.p_value:.2g}", "alpha")
    axes.set_ylabel("coverage - alpha", **STYLE)


def styled(axes: Axes, title: str, x: str) -> None:
    """Titles and frames alike in all pictures."""
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_xlabel(x, **STYLE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa5b1")
    axes.tick_params(labelsize=8, colors=INK)
