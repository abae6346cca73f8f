"""All that can be asked of a sampler's simulations at once: one table with p-values, one figure.

them = joint.draw(key, simulate, sampler, num_simulations=1000, num_samples=199)
out = report.run(key, them)
print(out)
out.plot().savefig("calibration.png")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray
from matplotlib.figure import Figure
from rich import box

from ppl.showing import shown
from ppl.table import Table, Tabled

from . import coverage, pictures, sbc, tarp, uniform
from .c2st import Accuracy
from .coverage import Coverage
from .joint import Joint, Quantity
from .sbc import Ranks

LEVEL = 0.01
"""The corrected p-value from which on something speaks against a sampler."""
NUMBERS = ("found", "p", "corrected")
ACROSS, MOST = 4, 24
"""Histograms in a row of the figure, and in all."""


@shown
class Line(NamedTuple):
    """A test: what was asked, of what, its statistic in words, and its p-value, by itself and
    corrected for all tests of the report.
    """

    check: str
    name: str
    statistic: str
    p_value: float
    adjusted: float


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Tabled):
    """What speaks against a sampler; `print` shows the table, and so does a notebook.

    Attributes:
        num_simulations, num_samples: N and S.
        left_out: simulations that were not finite, by what was not.
        ranks: of coordinates, and of quantities if there were some.
        coverages: of central intervals, TARP, and regions of highest density if there is a density.
        accuracy: of classifiers, if given.
        lines: all tests.
    """

    num_simulations: int
    num_samples: int
    left_out: dict[str, int]
    ranks: tuple[Ranks, ...]
    coverages: tuple[Coverage, ...]
    accuracy: Accuracy | None
    lines: tuple[Line, ...]

    @property
    def p_value(self) -> float:
        """Of all tests together."""
        return min(line.adjusted for line in self.lines)

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the sampler at 1 %, all tests together."""
        return self.p_value >= LEVEL

    @property
    def table(self) -> Table:
        """All tests, and what they say together."""
        view = Table(box=box.SIMPLE_HEAD, caption=self._words(), caption_justify="left")
        for name in ("check", "of", "found", "p", "corrected", ""):
            view.add_column(name, justify="right" if name in NUMBERS else "left")
        for line in self.lines:
            off = "off" if line.adjusted < LEVEL else ""
            numbers = brief(line.p_value), brief(line.adjusted)
            view.add_row(line.check, line.name, line.statistic, *numbers, off)
        return view

    def _words(self) -> str:
        off = sum(line.adjusted < LEVEL for line in self.lines)
        verdict = (
            "Nothing speaks against the sampler"
            if self.ok
            else f"{off} of {len(self.lines)} tests speak against the sampler"
        )
        lost = ", ".join(f"{name}: {count}" for name, count in self.left_out.items())
        return (
            f"{verdict} (N = {self.num_simulations:,}, S = {self.num_samples}; corrected p"
            f" {brief(self.p_value)})."
            + (f" Simulations left out, not finite: {lost}." if lost else "")
        )

    def plot(self) -> Figure:
        """Histograms of ranks, and under them coverage less alpha, with the bands of chance."""
        shown = [(ranks, k) for ranks in self.ranks for k in range(len(ranks.names))][:MOST]
        rows, across = -(-len(shown) // ACROSS), min(ACROSS, len(shown))
        figure = Figure(figsize=(12, 2.1 * rows + 3.6), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=(2.1 * rows, 3.2))
        upper = figure.add_subfigure(grid[0]).subplots(rows, across, squeeze=False)
        lower = figure.add_subfigure(grid[1]).subplots(1, len(self.coverages), squeeze=False)
        for axes, (ranks, k) in zip(upper.flat, shown, strict=False):
            pictures.histogram(axes, ranks, k)
        for axes in upper.flat[len(shown) :]:
            axes.set_axis_off()
        for axes, found in zip(lower.flat, self.coverages, strict=True):
            pictures.curves(axes, found)
        figure.suptitle(self._words(), fontsize=10, color=pictures.INK, x=0.01, ha="left")
        return figure


def brief(p_value: float) -> str:
    """A p-value in few characters."""
    return f"{p_value:.2g}" if p_value >= 1e-3 else f"{p_value:.0e}" if p_value > 1e-9 else "< 1e-9"


def run(
    key: PRNGKeyArray,
    joint: Joint,
    *,
    quantities: Quantity | None = None,
    log_prob: Callable[[Any, Any], Any] | None = None,
    accuracy: Accuracy | None = None,
) -> Report:
    """SBC, coverage and TARP of a sampler's simulations; p-values corrected for all of them.

    Args:
        key: typed key.
        joint: simulations with posterior draws.
        quantities: as in `sbc.run`, besides the coordinates.
        log_prob: as in `coverage.highest_density`, where the sampler has a density.
        accuracy: as of `c2st.run`, where there are reference posteriors.

    Raises:
        ValueError: as in `sbc.run` and `coverage.highest_density`.
    """
    keys = jax.random.split(key, 5)
    ranks = [sbc.run(keys[0], joint)]
    if quantities is not None:
        ranks.append(sbc.run(keys[1], joint, quantities=quantities))
    coverages = [coverage.central(keys[2], joint)]
    if log_prob is not None:
        coverages.append(coverage.highest_density(keys[3], joint, log_prob))
    coverages.append(tarp.run(keys[4], joint))
    found = list(_lines(ranks, coverages, accuracy))
    adjusted = uniform.holm(np.array([p for *_, p in found]))
    return Report(
        joint.num_simulations,
        joint.num_samples,
        joint.left_out,
        tuple(ranks),
        tuple(coverages),
        accuracy,
        tuple(Line(*line, float(p)) for line, p in zip(found, adjusted, strict=True)),
    )


def _lines(
    ranks: list[Ranks], coverages: list[Coverage], accuracy: Accuracy | None
) -> Iterator[tuple[str, str, str, float]]:
    """All tests, their p-values not corrected."""
    for out in ranks:
        freedom = len(out.bins.probabilities) - 1
        for name, found, p in zip(out.names, out.statistic, out.p_values, strict=True):
            yield "ranks", name, f"chi2({freedom}) {found:.1f}", float(p)
    for out in coverages:
        excess = out.excess
        for k, name in enumerate(out.names):
            side = " too wide" if excess[k] > 0 else " too sure"
            words = f"{out.statistic[k]:.3f}" + (side if out.p_values[k] < LEVEL else "")
            yield out.kind, name, words, float(out.p_values[k])
    if accuracy is not None:
        shares = np.atleast_1d(accuracy.accuracy)
        for k, p in enumerate(np.atleast_1d(accuracy.p_values)):
            yield "C2ST", f"observation {k}", f"accuracy {shares[k]:.3f}", float(p)
