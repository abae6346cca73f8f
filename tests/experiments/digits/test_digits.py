"""The table and pictures of the digits, and the command that makes them, on made-up digits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments.digits import __main__ as command
from experiments.digits import report, world
from experiments.digits.report import Cell


def made_up() -> tuple[np.ndarray, np.ndarray]:
    """Ten blots, with noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 10
    shapes = rng.uniform(0, 1, (10, world.PIXELS)) ** 3
    return rng.binomial(world.POINTS, shapes[labels]).astype(np.float32), labels


def test_the_command_makes_table_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(world, "digits", made_up)
    run = ["--quick", "--methods", "AEVB", "--out", str(tmp_path)]
    assert command.main(run) == 0
    # A second time nothing is left to do.
    monkeypatch.setattr(command, "measure", None)
    assert command.main(run) == 0
    cells = [Cell(**cell) for cell in json.loads((tmp_path / "results.json").read_text())["cells"]]
    assert [cell.method for cell in cells] == ["AEVB"]
    for cell in cells:
        assert np.mean(cell.gap) > 0 and np.isfinite(cell.elbo).all()
        assert np.shape(cell.drawn) == (32, 64) and np.max(cell.drawn) <= world.POINTS
    assert "| AEVB |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_verdict_compares_the_same_pictures():
    noise = np.random.default_rng(1).normal(0, 10, 50)
    pictures = [[0.0] * 64] * 8
    parts = {"latents": [[0.0, 0.0]], "labels": [1], "originals": pictures}
    parts |= {"reconstructed": pictures, "drawn": pictures, "apart": 0.0, "seconds": 1.0}
    bounds = {"a": noise, "b": noise - 1, "c": noise + np.random.default_rng(2).normal(0, 3, 50)}
    cells = [Cell(name, (b - 1).tolist(), b.tolist(), **parts) for name, b in bounds.items()]
    lines = report.verdict(cells[:2])
    assert lines == ["the best model of new pictures: a", "b: -1.0 ± 0.0 nats from it, less"]
    assert "undecided" in report.verdict(cells)[1]
    console = Console(record=True, width=120)
    report.show(console, cells)
    assert "1.00 ± 0.00" in console.export_text()


@pytest.mark.slow
def test_the_digits_are_those_of_scikit_learn():
    try:
        pictures, labels = world.digits()
    except ConnectionError as error:
        pytest.skip(f"the wheel cannot be fetched: {error}")
    assert pictures.shape == (1797, 64) and pictures.max() == world.POINTS
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
