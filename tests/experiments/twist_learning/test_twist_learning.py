"""The twist experiment at its smallest: what it measures, keeps and shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console

from experiments import grid
from experiments.twist_learning import __main__ as twist_learning
from experiments.twist_learning import report as twist_report
from experiments.twist_learning.__main__ import Config, Setting
from experiments.twist_learning.report import NONE, Cell

TINY = Config(table=Setting(("CTL",), (0, 300), (2,), 200, 32))


def cell(objective: str, steps: int, lower: float, upper: float, num: int = 2) -> Cell:
    return Cell("table", objective, steps, num, lower, 0.01, upper, 0.02, 0.5, 1.0)


def test_what_is_shown():
    cells = [
        cell(NONE, 0, 0.0, 1.0),
        cell("CTL", 0, 0.0, 1.0),
        cell("CTL", 100, 0.45, 0.55),
        cell("DPG", 100, -1.0, 1.0),
    ]
    first, worse = twist_report.verdict(cells)
    assert "[0.000, 1.000], with that of CTL within [0.450, 0.550]; log Z is 0.500" in first
    assert worse == "table, N = 2: no gain from DPG"
    assert (
        "CTL",
        "100",
        "2",
        "0.450 ± 0.010",
        "0.550 ± 0.020",
        "0.100",
        "0.100",
    ) in twist_report.rows(cells, "table")
    assert twist_report.markdown(cells).count("\n") == 8
    assert len(twist_report.draw(cells).axes) == 2


@pytest.mark.slow
def test_a_tiny_run_tightens_both_bounds_and_is_kept(tmp_path: Path):
    cells: list[Cell] = []
    path = tmp_path / "results.json"
    twist_learning.run(TINY, cells, tmp_path, Console(quiet=True))
    plain, start, learned = cells
    assert [c.steps for c in cells] == [0, 0, 300] and learned.log_z is not None
    assert (
        plain.lower < learned.lower < learned.log_z + 0.05
        and plain.upper > learned.upper > learned.log_z - 0.05
    )
    assert learned.gap < 0.3 * plain.gap
    again = grid.load(path, TINY, Cell, ())
    assert [dataclasses.asdict(c) for c in again] == [dataclasses.asdict(c) for c in cells]
    twist_learning.run(TINY, again, tmp_path, Console(quiet=True))
    assert len(again) == 3
