"""The comparison of particle filtering with search: its worlds are what they say, its verdict can
go either way.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import grid
from experiments.particle_filtering import __main__ as particle_filtering
from experiments.particle_filtering import report as process_reward_report
from experiments.particle_filtering import tabular_world
from experiments.particle_filtering.__main__ import Config
from experiments.particle_filtering.arithmetic_world import Checker, vote
from experiments.particle_filtering.methods import Measured
from experiments.particle_filtering.report import Cell
from experiments.showing import saving
from experiments.sums import answer, is_easy, solution


def test_the_calibrated_reward_is_the_probability_of_being_right(monkeypatch: pytest.MonkeyPatch):
    """By enumeration of all solutions of at most five tokens, grouped by what their steps look
    like.
    """
    horizon, needed, hidden = 5, 2, 0.2
    monkeypatch.setattr(tabular_world, "MAX_TOKENS", horizon)
    among = np.array([[0.5, 0.3, 0.1, 0.1], [0.6, 0.1, 0.2, 0.1], [0.4, 0.2, 0.1, 0.3]])
    table = tabular_world._table(among, hidden, needed)
    share = {0: 1 - hidden, 2: hidden, 3: 1.0, 4: 1.0, 5: 1.0}  # of a look's tokens
    total: dict[tuple, float] = {}
    right: dict[tuple, float] = {}
    for length in range(1, horizon + 1):
        for tokens in itertools.product(share, repeat=length):
            if 5 in tokens[:-1] or (length < horizon and tokens[-1] != 5):
                continue
            looks = tuple(int(tabular_world.LOOK[v]) for v in tokens)
            p = np.prod(
                [
                    among[a, b] * share[v]
                    for a, b, v in zip((0, *looks[:-1]), looks, tokens, strict=True)
                ]
            )
            value = sum(int(tabular_world.MOVE[v]) for v in tokens) % tabular_world.VALUES
            is_right = value == 0 and looks.count(0) >= needed
            for used in range(length + 1):
                total[looks[:used]] = total.get(looks[:used], 0.0) + p
                right[looks[:used]] = right.get(looks[:used], 0.0) + p * is_right
    assert abs(total[()] - 1) < 1e-9
    move = {0: 0, 1: 1, 2: -1, 3: 0}
    for looks, mass in total.items():
        visible = sum(move[look] for look in looks) % tabular_world.VALUES
        found = table[len(looks), looks.count(0), visible, looks[-1] if looks else 0]
        assert abs(found - right[looks] / mass) < 1e-6, looks


@pytest.mark.slow
def test_both_rewards_agree_on_finished_solutions():
    problem = tabular_world.problems(0, 1)
    problem = dataclasses.replace(problem, table=problem.table[0], needed=problem.needed[0])
    tokens = np.full((3, tabular_world.MAX_TOKENS), tabular_world.EOS)
    tokens[:, :4] = [[0, 0, 3, 0], [0, 0, 0, 5], [3, 0, 0, 5]]
    args = jnp.asarray(tokens), jnp.full(3, 4)
    calm, sure = problem.reward(*args, 0.0), problem.reward(*args, 1.0)
    np.testing.assert_allclose(calm[1:], sure[1:], atol=1e-6)
    assert abs(calm[0] - sure[0]) > 1e-3
    # The noise is a function of the text, and has the law that it says.
    looks = jnp.asarray(np.random.default_rng(0).integers(1, 5, (4000, 8)))
    noise = tabular_world._noise(jnp.unique(looks, axis=0))
    np.testing.assert_array_equal(noise, tabular_world._noise(jnp.unique(looks, axis=0)))
    assert abs(float(noise.mean())) < 0.08 and abs(float(noise.std()) - 1) < 0.06


def test_solutions_answers_and_votes():
    assert solution("5 + 9 - 20") == ["5 + 9 = 14", "14 - 20 = -6"]
    assert answer("5 + 9 = 14\n14 - 20 = -6\n") == "-6"
    assert answer("5 + 9 = 14\nso it is 3") is None and answer("") is None
    assert vote(["1", "2", "2", None], np.log([0.5, 0.3, 0.3, 9.0])) == "2"
    assert vote(["1", None], np.array([-np.inf, 0.0])) is None
    assert is_easy("2 + 6 - 3") and not is_easy("2 - 6 + 5")


def test_the_checker_knows_right_from_wrong_up_to_its_noise():
    check = Checker(0.0, "5 + 9 - 7")
    whole, part, wrong = (
        check("5 + 9 = 14\n14 - 7 = 7"),
        check("5 + 9 = 14\n"),
        check("5 + 9 = 13\n"),
    )
    assert whole > part > 0.5 > wrong
    noisy = Checker(2.0, "5 + 9 - 7")
    assert noisy("5 + 9 = 14\n") == noisy("5 + 9 = 14\n") != check("5 + 9 = 14\n")


def cells(method: str, accuracies: list[float], reward: str = "calibrated") -> list[Cell]:
    nums = [2**k for k in range(len(accuracies))]
    return [
        Cell(reward, method, method, n, a, 0.005, 10.0 * n, 10.0, n, 0.1)
        for n, a in zip(nums, accuracies, strict=True)
    ]


@pytest.mark.parametrize(
    ("filtering", "word"),
    [
        ([0.3, 0.72, 0.8, 0.9, 0.95], "holds here"),
        ([0.2, 0.3, 0.4, 0.5, 0.71], "does not hold here"),
    ],
)
def test_the_verdict_on_scaling(filtering: list[float], word: str):
    both = cells("DVTS", [0.2, 0.3, 0.4, 0.5, 0.7]) + cells("PF exact", filtering)
    [line] = process_reward_report.verdict(both)
    assert line.startswith("calibrated reward: PF exact needs") and line.endswith(word)


def test_the_budget_ratio_is_read_off_the_curves():
    """The other's best accuracy is 0.7 with 160 tokens; ours has it halfway between 20 and 40 in
    the logarithm.
    """
    ours, theirs = cells("PF exact", [0.3, 0.6, 0.8]), cells("DVTS", [0.2, 0.3, 0.4, 0.5, 0.7])
    ratio, low, high = process_reward_report.budget_ratio(ours, theirs, np.random.default_rng(0))
    assert abs(ratio - 160 / (20 * 2**0.5)) < 1e-4 and low < ratio < high


@pytest.mark.parametrize(
    ("gain", "word"), [(0.1, "better"), (-0.1, "worse"), (0.0, "no difference of two errors")]
)
def test_the_verdict_on_annealing(gain: float, word: str):
    plain, annealed = [0.3, 0.4, 0.5], [0.3 + gain, 0.4 + gain, 0.5 + gain]
    both = cells("PF exact each step", plain) + cells("ePF exact", annealed)
    assert any(line.endswith(word) for line in process_reward_report.verdict(both))


def _load(path: Path, config: Config) -> list[Cell]:
    return grid.load(path, config, Cell, ("nums", "families", "rewards"))


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = Config(nums=(1, 2), families=("PF exact", "DVTS"), rewards=("calibrated",))
    asked: list[tuple[str, int]] = []

    def measure(key: Any, family: str, num: int, reward: str) -> dict[str, Measured]:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((family, num))
        return {family: Measured(0.5, 0.01, 10.0 * num, 3.0, 4.0)}

    monkeypatch.setattr(particle_filtering, "_measure", lambda config: measure)
    monkeypatch.setitem(particle_filtering.WORLDS, "tabular", (config, config))
    console, path = Console(quiet=True), tmp_path / saving.RESULTS
    with pytest.raises(KeyboardInterrupt):
        particle_filtering.run(config, [], tmp_path, console)
    kept = _load(path, config)
    assert [(cell.family, cell.num) for cell in kept] == asked and len(kept) == 3
    asked.clear()
    particle_filtering.run(config, kept, tmp_path, console)
    assert asked == [("DVTS", 2)]
    document = json.loads(path.read_text())
    assert document["config"]["nums"] == [1, 2] and {"versions", "device", "key"} <= set(document)
    # More of the same goes on from there; another configuration starts anew.
    assert _load(path, dataclasses.replace(config, nums=(1, 2, 4))) != []
    assert _load(path, dataclasses.replace(config, seed=1)) == []
    process_reward_report.show(console, kept)
    process_reward_report.draw(kept).savefig(tmp_path / "figure.png")
    assert "| PF exact | 1 | 0.500 ± 0.010 |" in process_reward_report.markdown(kept)


@pytest.mark.slow
def test_the_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert particle_filtering.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "the claim of 4 to 16 times" in capsys.readouterr().out
    assert (tmp_path / "tabular" / "figure.png").stat().st_size > 10_000
