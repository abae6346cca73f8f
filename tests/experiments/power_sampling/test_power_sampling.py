"""The comparison at one budget: its tasks are scored as the dataset does, its numbers are what they
say.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import models
from experiments import grid
from experiments.power_sampling import __main__ as power_sampling
from experiments.power_sampling import report as power_report
from experiments.power_sampling import tasks as reasoning_tasks
from experiments.power_sampling.__main__ import Config
from experiments.power_sampling.methods import FACTOR, NUM, moves_per_block
from experiments.power_sampling.report import Cell, pass_at
from experiments.power_sampling.tasks import EXAMPLES, KINDS
from samplers.mcmc import power
from samplers.strings import cuts
from tests.experiments import shallow
from tests.samplers.chains import wordy


def cell(
    method: str, alpha: float, accuracy: list[float], task: str = "sums", log_prob: float = -3.0
) -> Cell:
    num = len(accuracy)
    passes = [[a] * NUM for a in accuracy]
    rest = {name: [1.0] * num for name in ("vote", "distinct", "tokens", "forwards")}
    return Cell(
        task,
        method,
        alpha,
        accuracy,
        pass_at=passes,
        log_prob=[log_prob] * num,
        seconds=1.0,
        **rest,
    )


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    """By listing them; and one value of the reference (10 answers, 3 right, k = 4)."""
    right = np.array([1, 0, 0, 1, 0, 1])
    for k in range(1, 7):
        share = np.mean([right[list(rows)].any() for rows in itertools.combinations(range(6), k)])
        assert pass_at(k, 3, 6) == pytest.approx(share)
    assert pass_at(4, 0, 6) == 0 and pass_at(4, 6, 6) == 1


@pytest.mark.parametrize("name", list(KINDS))
def test_worked_solutions_are_right_and_others_are_not(name: str):
    pytest.importorskip("reasoning_gym")
    import reasoning_gym

    kind, (first, second) = KINDS[name], reasoning_tasks.problems(name, 2, seed=3)
    made = reasoning_gym.create_dataset(kind.dataset, size=EXAMPLES + 2, seed=3, **kind.options)
    said = kind.read(kind.solution(made[EXAMPLES]))
    assert said is not None and first.score(said) == 1 and second.score(said) < 1
    assert kind.read("") is None and kind.read(" \n") is None
    assert (
        kind.solution(made[0]) in first.prompt
        and kind.solution(made[EXAMPLES]) not in first.prompt.split("\n")[-1]
    )
    assert first.prompt.endswith("assistant\n") and first.prompt != second.prompt


@pytest.mark.parametrize("said", ["9**9", "7//1", "x+1", "__import__('os')", "(1).real", "1e9"])
def test_what_is_no_expression_is_never_scored(said: str):
    """What scores them evaluates a text."""
    assert KINDS["countdown"].read(said) is None


@pytest.mark.slow
def test_moves_draw_the_tokens_that_they_may():
    """Chains over long strings: within a tenth of FACTOR times a string's tokens."""
    horizon = 24
    moves, cut = moves_per_block(horizon, FACTOR), cuts.uniform_in_length
    p = wordy(p_eos=0.001).given([1], max_tokens=horizon)
    out = power.run(
        jax.random.key(0),
        p**2,
        num_chains=64,
        block_size=8,
        moves_per_block=moves,
        cut=cut,
        early_rejection=False,
    )
    assert float(out.cost.tokens) == pytest.approx(64 * FACTOR * horizon, rel=0.1)


@pytest.mark.parametrize(("gain", "word"), [(0.2, "more"), (-0.2, "less"), (0.0, "undecided")])
def test_the_verdict_goes_by_differences_on_the_same_problems(gain: float, word: str):
    """Problems differ more than methods do: only the paired difference decides."""
    base = [0.3, 0.5, 0.7, 0.4]
    jitter = [0.01, -0.01, 0.01, -0.01]
    cells = [
        cell("base sampling", 1.0, base),
        cell("power MH", 4.0, [a + gain + e for a, e in zip(base, jitter, strict=True)]),
    ]
    [line, *_] = power_report.verdict(cells)
    assert line.endswith(word) and "more accurate than the base model" in line
    # Not run on the same problems: nothing is said.
    assert power_report.verdict([cells[0], cell("power MH", 4.0, base[:2])]) == []


def test_what_is_shown_and_kept(tmp_path: Path):
    cells = [
        cell("base sampling", 1.0, [0.2, 0.4]),
        cell("power MH", 4.0, [0.25, 0.5]),
        cell("power MH", 4.0, [1.0, 0.5], task="words", log_prob=-1.0),
    ]
    text = power_report.markdown(cells)
    assert (
        "| sums | base sampling | 1 | 0.30 ± 0.10 |" in text
        and "| all tasks | power MH | 4 | 0.56 ± 0.16 |" in text
    )
    power_report.show(Console(quiet=True), cells)
    power_report.draw(cells).savefig(tmp_path / "figure.png")
    config = Config(num_problems=2)
    grid.save(tmp_path / "results.json", config, cells)
    assert grid.load(tmp_path / "results.json", config, Cell, ("tasks",)) == cells
    assert grid.load(tmp_path / "results.json", Config(num_problems=3), Cell, ("tasks",)) == []


@pytest.mark.slow
def test_the_quick_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(models, "load", shallow.load)
    assert power_sampling.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "more accurate than the base model?" in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert power_sampling.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "5 results of an earlier run" in capsys.readouterr().out
