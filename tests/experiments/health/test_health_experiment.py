"""Which runs are right, flagged or silently wrong; and what log Z really is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import ppl
from experiments import grid
from experiments.health import __main__ as experiment
from experiments.health import report
from experiments.health.reference import bounds
from experiments.health.report import REFERENCE, Cell, Counts
from tests.samplers.problems import gamma, plain, target_of

CELLS = [
    # The upper bound decides nothing, and a run found more than the long one.
    Cell("date", 4.0, REFERENCE, [-46.8, -36.9, -46.9], [], [-47.0], [], [9.0]),
    Cell(
        "date",
        4.0,
        "default",
        log_z=[-46.0, -45.6, -46.9, -50.0, -51.0, -42.0],
        error=[0.1, 0.5, 0.1, 1.0, 0.1, 0.2],
        floor=[-46.5, -47.0, -48.0, -51.0, -52.0, -46.0],
        words=["", "doubt", "", "doubt", "", ""],
        seconds=[2.0] * 6,
    ),
]


def test_runs_are_counted():
    log_z = report.truth(CELLS, "date", 4.0)
    assert log_z == -46.0
    # Off by 0, 0.4, 0.9, 4, 5 and 4 nats; the second and the fourth are flagged.
    assert report.counts(CELLS[1], log_z) == Counts(3, 1, 1, 2, 5.0)
    assert Counts(1, 2, 3, 4, 0.5) + Counts(1, 1, 1, 1, 2.0) == Counts(2, 3, 4, 5, 2.0)
    [line] = report.verdict(CELLS)
    assert "alpha = 4, default: 4 of 6 right or flagged (3 right), at most 5.0 nats off" in line


def test_a_tight_bound_is_the_truth():
    tight = dataclasses.replace(CELLS[0], log_z=[-46.8, -46.75, -44.0])
    assert report.truth([tight], "date", 4.0) == -46.8


def test_cells_are_shown(tmp_path: Path):
    console = Console(record=True, width=140)
    report.show(console, CELLS)
    assert "of -46.0" in console.export_text()
    assert "| date | 4 | default |" in report.markdown(CELLS)
    report.draw(CELLS).savefig(tmp_path / "figure.png")


@pytest.mark.parametrize("problem", ["regex", "must_end"])
def test_log_z_is_between_its_bounds(problem: str):
    """By brute force; a beam that holds every prefix is exact, at the horizon too."""
    model = "markov" if problem == "regex" else "table"
    truth = np.log(sum(gamma(model, problem).values()))
    for width, most in ((3, np.inf), (300, 1e-5)):
        lower, upper = (float(x) for x in bounds(target_of(model, problem), width))
        assert truth - most - 1e-5 <= lower <= truth + 1e-5
        assert truth - 1e-5 <= upper <= truth + most + 1e-5
    assert lower < upper + 1e-5


def test_a_potential_without_a_look_ahead_is_refused():
    scores = ppl.step_scores(lambda tokens, length: -0.1 * length, ppl.Steps(every=1))
    with pytest.raises(ValueError, match="expected a potential with a look-ahead"):
        bounds(plain("hmm") * scores, 4)


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = ["--quick", "--model", str(model), "--out", str(tmp_path)]
    assert experiment.main(command) == 0
    cells = grid.load(
        tmp_path / "results.json",
        dataclasses.replace(experiment.QUICK, model=str(model)),
        Cell,
        experiment.EXPERIMENT.which,
    )
    ways = {(c.alpha, c.method) for c in cells}
    assert ways == {(a, m) for a in (4.0, 1.0) for m in (REFERENCE, "default", "independent")} - {
        (1.0, "independent")
    }
    for c in cells:
        if c.method != REFERENCE:
            assert len(c.log_z) == len(c.words) == len(c.seconds) == 2
            assert max(c.floor) <= report.truth(cells, c.target, c.alpha) + 1e-4
    monkeypatch.setattr(experiment, "measured", None)  # nothing is measured twice
    assert experiment.main(command) == 0
