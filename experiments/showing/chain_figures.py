"""Pictures of chains: traces, acceptance by cut, running R-hat, and replicas on their way through a
ladder.

Every function but `draw` draws on `axes`, or on new ones, which a notebook shows; `draw` puts
together what a run has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Num
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from samplers.mcmc import diagnostics as chain_diagnostics
from samplers.results import Chains, MoveInfo

from .chain_report import label, title
from .figures import INK, OTHER, STYLE, styled_axes
from .lineages import PALETTE

AXIS = "#9aa5b1"
MIXED = 1.01
"""R-hat below which chains are taken to have mixed."""
POINTS = 60


def draw(result: Chains) -> Figure:
    """Traces of what a run kept as one number per chain and draw, and running R-hat; where the run
    has them, acceptance by cut, and the way of the first chain's replicas.

    Raises:
        ValueError: if there are fewer than four draws.
    """
    found = chain_diagnostics.quantities(result.draws)
    with_cut = _cuts(result) is not None
    rungs = result.draws.get("rung")
    below = 1 + with_cut + (rungs is not None)
    figure = Figure(figsize=(12, 2.1 * len(found) + 3.2), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(2.1 * len(found), 3.2))
    top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    for axes, (name, x) in zip(
        np.ravel(top.subplots(len(found), 1, sharex=True)), found.items(), strict=True
    ):
        trace(x, label(name), axes=axes)
        axes.label_outer()
    others = iter(np.ravel(bottom.subplots(1, below)))
    r_hat(result, axes=next(others))
    if with_cut:
        acceptance_by_cut(result, axes=next(others))
    if rungs is not None:
        replicas(rungs, axes=next(others))
    figure.suptitle(title(result), fontsize=11, color=INK, fontweight="bold", x=0.01, ha="left")
    return figure


def trace(x: Num[np.ndarray, "S C"], name: str = "", *, axes: Axes | None = None) -> Axes:
    """The draws of every chain in a colour of its own, and at the right how often each value came
    in all of them.
    """
    x = np.asarray(x)
    num_draws, num_chains = x.shape
    axes = styled_axes(axes, name)
    # Many chains let each other through.
    alpha, at = float(np.clip(6 / num_chains, 0.15, 0.8)), np.arange(1, num_draws + 1)
    for c in range(num_chains):
        colour = PALETTE[c % len(PALETTE)]
        axes.plot(at, x[:, c], color=colour, linewidth=0.8, alpha=alpha, drawstyle="steps-post")
    axes.set_xlim(1, num_draws)
    axes.set_xlabel("draw", **STYLE)
    side = axes.inset_axes((1.01, 0, 0.09, 1), sharey=axes)
    values = x[np.isfinite(x)]
    if values.size:
        whole = np.issubdtype(x.dtype, np.integer) and np.ptp(values) <= 60
        bins = np.arange(values.min() - 0.5, values.max() + 1) if whole else 40
        side.hist(values, bins=bins, orientation="horizontal", color=OTHER, alpha=0.5)
    side.set_axis_off()
    return axes


def r_hat(result: Chains, *, axes: Axes | None = None) -> Axes:
    """Split R-hat of log p, of the length and of whatever else was kept, from the first draws on.

    Raises:
        ValueError: if there are fewer than four draws.
    """
    axes = styled_axes(axes, f"running R-hat (line: {MIXED})")
    found, most = chain_diagnostics.quantities(result.draws), MIXED
    ends = np.unique(
        np.geomspace(min(8, result.num_samples), result.num_samples, POINTS).astype(int)
    )
    for colour, (name, x) in zip(PALETTE, found.items(), strict=False):
        values = np.array([chain_diagnostics.split_r_hat(x[:end]) for end in ends])
        shown = np.where(np.isfinite(values), values, np.nan)
        text = label(name) + ("" if np.isfinite(values[-1]) else " (unknown: no chain moved)")
        axes.plot(ends, shown, color=colour, linewidth=1.5, label=text)
        most = max(most, np.nanmax(shown, initial=1.0))
    axes.axhline(MIXED, color=AXIS, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xscale("log")
    # A first value far away would leave no room for those that matter.
    axes.set_ylim(0.98, float(np.clip(most * 1.02, 1.05, 2.0)))
    axes.set_xlabel("draws", **STYLE)
    axes.legend(fontsize=8, frameon=False)
    return axes


def acceptance_by_cut(result: Chains, *, axes: Axes | None = None) -> Axes:
    """Share of accepted moves by where they cut the string, with standard errors; grey: how many
    moves there were.

    Raises:
        ValueError: if the run kept no cuts.
    """
    info, cut = result.info, _cuts(result)
    if cut is None:
        raise ValueError(
            "expected a run whose info is a MoveInfo with `cut` in its details, got one without;"
            " run suffix moves"
        )
    max_tokens = result.draws["sequences"].tokens.shape[2]
    rate, count = chain_diagnostics.acceptance_by_cut(info.accepted, cut, max_tokens, info.proposed)
    axes = styled_axes(axes, "acceptance by cut (grey: moves made)")
    behind = axes.twinx()
    behind.bar(np.arange(max_tokens), count, width=1.0, color="#e7eaee")
    behind.set_ylim(0, max(count.max(), 1) * 2.5)
    behind.set_axis_off()
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    # As if one more had been accepted and one more rejected: none of three is not certainly none.
    share = (rate * count + 1) / (count + 2)
    error = np.sqrt(share * (1 - share) / (count + 2))
    axes.errorbar(
        np.arange(max_tokens),
        rate,
        yerr=error,
        fmt="o",
        markersize=3.5,
        linewidth=1,
        color=PALETTE[0],
    )
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(-0.8, max_tokens - 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("cut (token)", **STYLE)
    return axes


def _cuts(result: Chains) -> Int[np.ndarray, "..."] | None:
    """Where each move cut its string, if the kernel has cuts."""
    info = result.info
    return (info.details or {}).get("cut") if isinstance(info, MoveInfo) else None


def replicas(
    rungs: Int[np.ndarray, "S C K"],
    *,
    chain: int = 0,
    most: int = 60,
    names: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """The way of one chain's replicas through the ladder, over the last draws; at the right swaps
    per draw.

    The title counts the round trips of all chains, over all draws.

    Args:
        rungs: [s, c, k] is the rung of replica k, 0 the hottest.
        chain: whose replicas are drawn.
        most: draws that are shown.
        names: of the rungs, hottest first, e.g. their alphas.

    Raises:
        ValueError: unless every row of `rungs` holds each rung once.
    """
    rungs = np.asarray(rungs)
    swaps = chain_diagnostics.swap_acceptance(rungs)
    trips = int(chain_diagnostics.round_trips(rungs).sum())
    num_draws, num_chains, num_rungs = rungs.shape
    first = max(num_draws - most, 0)
    axes = styled_axes(
        axes, f"replicas of chain {chain}; {trips} round trips in {num_chains} chains"
    )
    for k in range(num_rungs):
        at = np.arange(first, num_draws) + 1
        axes.plot(
            at, rungs[first:, chain, k], color=PALETTE[k % len(PALETTE)], linewidth=1.3, alpha=0.9
        )
    for k, rate in enumerate(swaps):
        axes.annotate(
            f" {rate:.2f}", (1, k + 0.5), xycoords=("axes fraction", "data"), va="center", **STYLE
        )
    axes.set_yticks(np.arange(num_rungs), names or [str(k) for k in range(num_rungs)])
    axes.set_ylim(-0.15, num_rungs - 0.85)
    axes.set_xlim(first + 1, num_draws)
    axes.set_ylabel("rung", **STYLE)
    axes.set_xlabel("draw (at the right: swaps per draw)", **STYLE)
    return axes
