"""Sums with a latent rationale: the worked examples are right, a tiny run trains, resumes, and
shows what it found.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from experiments.latent_arithmetic import __main__ as latent_arithmetic
from experiments.latent_arithmetic import report as latent_report
from experiments.latent_arithmetic import world as latent_world
from experiments.latent_arithmetic.report import BASE, GFLOWNET, SUPERVISED, Cell


def cell(method: str, terms: int, right: list[float], log_likelihood: float = -2.0) -> Cell:
    accuracies = {name: right for name in latent_report.ACCURACIES}
    shares = {"log_likelihood": [log_likelihood] * len(right), "ess": [0.5] * len(right)}
    return Cell(method, terms, terms == 3, **accuracies, **shares, training_seconds=1.0)


def test_questions_and_their_solutions():
    text = latent_world.prompt("9 - 3 - 2")
    assert text.endswith("Answer: 5\nSum: 9 - 3 - 2\nSteps:") and text.count("Sum:") == 3
    assert latent_world.rationale("9 - 3 - 2") == " 9 - 3 = 6, 6 - 2 = 4"
    assert latent_world.result("9 - 3 - 2") == 4 and latent_world.answer(4) == "Answer: 4\n"


def test_sums_differ_and_stay_within_ten_answers():
    pytest.importorskip("reasoning_gym")
    for terms in (3, 4):
        found = latent_world.expressions(terms, 20, seed=0)
        assert len(set(found)) == 20 and not set(found) & set(latent_world.SHOTS)
        assert all(
            len(e.split()) == 2 * terms - 1 and eval(e) == latent_world.result(e) in range(10)
            for e in found
        )


def test_what_is_shown():
    right = [0.0, 1.0, 0.0, 0.0]
    cells = [
        cell(BASE, 3, right),
        cell(GFLOWNET, 3, [1.0, 1.0, 1.0, 1.0], -1.0),
        cell(BASE, 4, right),
    ]
    [line] = latent_report.verdict(cells)
    assert line.startswith(
        "3 terms, as trained: GFlowNet against base: sampled accuracy +0.75 ± 0.25, more"
    )
    assert "log p(y | x) +1.00 ± 0.00, more" in line
    text = latent_report.markdown(cells)
    assert "| 4 terms, longer | base | 0.25 ± 0.25 |" in text and text.count("\n") == 7
    latent_report.show(Console(quiet=True), cells)
    assert len(latent_report.draw(cells).axes) == 4


@pytest.mark.slow
def test_a_tiny_run_goes_on(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With the tiny model; a part of the results and the checkpoints are kept, and the rest comes
    out as before.
    """
    pytest.importorskip("reasoning_gym")
    arguments = ["--quick", "--model", str(model), "--out", str(tmp_path)]
    assert latent_arithmetic.main(arguments) == 0
    path = tmp_path / "results.json"
    document = json.loads(path.read_text())
    made = [(c["method"], c["num_terms"]) for c in document["cells"]]
    assert made == [(m, n) for m in (BASE, SUPERVISED, GFLOWNET) for n in (3, 4)]
    assert {"config", "versions", "device", "key"} <= set(document)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "GFlowNet against supervised" in (tmp_path / "table.md").read_text()
    first = document["cells"]
    path.write_text(json.dumps(document | {"cells": first[:-1]}))
    capsys.readouterr()
    assert latent_arithmetic.main(arguments) == 0
    assert "5 results of an earlier run" in capsys.readouterr().out
    again = json.loads(path.read_text())["cells"]
    for row in (first[-1], again[-1]):
        row.pop("training_seconds")
    assert again[-1] == first[-1] and again[:-1] == first[:-1]
