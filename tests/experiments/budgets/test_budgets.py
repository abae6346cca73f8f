"""The bake-off at equal budgets: its numbers have the expectations that laws say, its verdicts can
go either way, and what was drawn is kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import models
from experiments import grid
from experiments.budgets import __main__ as budgets
from experiments.budgets import methods, report, steps, texts, worlds
from experiments.budgets.__main__ import Config
from experiments.budgets.banks import Bank
from experiments.budgets.report import Cell
from experiments.budgets.worlds import WORLDS, World
from samplers.search import allocation, coverage, stopping
from tests.experiments import shallow

SMALL = Config(
    worlds=("mode",), parts=("choices",), budgets=(32,), num_prompts=4, num_draws=8, num_orders=2
)


def z_of(found: np.ndarray, truth: np.ndarray) -> float:
    """Of the mean over prompts, whose draws are independent; the error is that of draws alone."""
    gap = found - truth
    error = gap.std(ddof=1) / len(gap) ** 0.5
    assert error < 0.03  # less than the faults that it is to find
    return float(abs(gap.mean()) / error)


def alike(probs: list[float], num_prompts: int) -> World:
    """The same prompt again and again."""
    rows = np.tile(np.array(probs), (num_prompts, 1))
    return World(rows, np.tile(np.linspace(0.8, 0.1, len(probs)), (num_prompts, 1)))


@pytest.mark.parametrize("name", list(WORLDS))
def test_worlds_are_what_they_say(name: str):
    rng = np.random.default_rng(0)
    world = WORLDS[name](rng, 200)
    np.testing.assert_allclose(world.probs.sum(1), 1)
    bank = world.bank(rng, 64)
    assert z_of(bank.correct.mean(1), world.p) < 5
    assert z_of(bank.mean_length / 10, np.full(200, 0.75)) < 5
    mode = world.probs.argmax(1)
    assert {"mode": (mode == 0).all(), "popular error": (mode == 1).all(), "mixed": True}[name]
    # Equal answers score alike, and are right together.
    row = np.flatnonzero(bank.correct.any(1))[0]
    for answer in np.unique(bank.answer[row]):
        same = bank.answer[row] == answer
        assert (
            len(np.unique(bank.scores[row][same])) == len(np.unique(bank.correct[row][same])) == 1
        )
        assert bank.is_right[row, answer] == bank.correct[row][same][0]


@pytest.mark.parametrize(
    "name",
    ["mode", *(pytest.param(name, marks=pytest.mark.slow) for name in ("popular error", "mixed"))],
)
def test_choices_have_their_exact_laws(name: str):
    """Every method with a law, at three of 64 draws of 128 prompts: two votes would be one."""
    rng = np.random.default_rng(1)
    world = WORLDS[name](rng, 128)
    found = methods.choices(jax.random.key(2), world.bank(rng, 64), 3, 8)
    checked = {}
    for method, of in found.items():
        truth = worlds.exact(world, method, 3)
        if truth is not None:
            checked[method] = z_of(of.accuracy, truth)
    assert max(checked.values()) < 5, checked
    assert {"single draw", "best of n", "pass@n", "soft best of n"} <= set(checked)
    assert ("majority" in checked) == (name != "popular error")
    assert found["majority"].reward_calls == 0 and found["best of n"].reward_calls == 3
    assert found["best of majority"].reward_calls <= 3


def test_choices_from_all_draws_are_counted_by_hand():
    """One draw fewer would tie: the right answer (.8) once against .3 twice, and the other way."""
    answer = np.array([[0, 1, 1], [0, 1, 0]])
    scores = np.where(answer == 0, 0.8, 0.3)
    bank = Bank(answer, answer == 0, scores, np.array([[2, 4, 6], [3, 3, 3]]))
    found = methods.choices(jax.random.key(0), bank, 3, 16)
    said = {name: of.accuracy.tolist() for name, of in found.items()}
    assert said["majority"] == said["majority of bests"] == [0, 1]
    assert said["weighted vote"] == said["best of majority"] == [1, 1]
    np.testing.assert_allclose(said["best of n"], [1, 1], rtol=1e-6)
    np.testing.assert_allclose(found["majority"].tokens, [12, 9])
    assert found["majority"].depth == pytest.approx((6 + 3) / 2)
    assert found["single draw"].depth == pytest.approx((4 + 3) / 2)
    assert found["best of majority"].reward_calls == 3


def test_rules_have_the_laws_of_the_lattice():
    """Also in what they cost: draws times the mean length of a string."""
    probs, cap = [0.5, 0.3, 0.2], 12
    bank = alike(probs, 128).bank(np.random.default_rng(3), 16)
    found = methods.stops(jax.random.key(4), bank, cap, 8)
    for name in ("beta .95", "window 5", "doubling .75"):
        law = stopping.lattice(methods.RULES[name], probs, cap)
        assert z_of(found[name].accuracy, np.full(128, law.answer[0])) < 5, name
        assert z_of(found[name].tokens / 100, np.full(128, 7.5 * law.mean_draws / 100)) < 5, name
        assert found[name].depth == pytest.approx(found[name].tokens.mean())


def test_a_plan_is_worth_the_mean_over_all_subsets():
    rng = np.random.default_rng(5)
    correct = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
    length = rng.integers(1, 9, (3, 4))
    bank = Bank(np.zeros((3, 4), int), correct, correct.astype(float), length)
    draws = np.array([2, 3, 0])
    found = methods._planned(bank, draws, np.arange(4), 0)
    solved, longest = np.zeros(3), np.zeros(3)
    for i, num in enumerate(draws):
        subsets = [list(rows) for rows in itertools.combinations(range(4), num)]
        solved[i] = np.mean([correct[i][rows].any() for rows in subsets])
        longest[i] = np.mean([length[i][rows].max(initial=0) for rows in subsets])
    np.testing.assert_allclose(found.accuracy, solved, atol=1e-6)
    assert found.depth == pytest.approx(longest.mean(), rel=1e-5)
    np.testing.assert_allclose(found.tokens, draws * length.mean(1))


def test_allocations_have_their_expectations_and_spend_alike():
    """Of plans made from the true rates; what a pilot and a checker are worth by hand."""
    rng = np.random.default_rng(6)
    world, num = WORLDS["mixed"](rng, 64), 8
    found = methods.allocations(rng, world.bank(rng, 64), num, 2, world.p)
    known = coverage.Known(p=world.p)
    plan = allocation.greedy(known, 64 * num, most=64)
    assert z_of(found["uniform"].accuracy, known.coverage(num)) < 5
    assert z_of(found["greedy, p known"].accuracy, known.coverage(plan)) < 5
    assert {found[name].reward_calls for name in ("uniform", "greedy", "IAS")} == {num}
    # Prompts that are alike: after four draws each, the unsolved ones share the other four.
    same = alike([0.25, 0.75], 64)
    [of] = [
        methods.allocations(rng, same.bank(rng, 64), num, 8)[name] for name in ["unsolved alike"]
    ]
    missed, spread = 0.75**4, np.arange(1, 61)
    mean = 4 / missed  # draws for each unsolved prompt, about: their number varies
    assert spread[0] < mean < spread[-1]
    assert of.accuracy.mean() == pytest.approx(1 - missed * 0.75**mean, abs=0.03)


def test_what_is_shared_out_is_the_budget_and_no_more_than_there_is():
    weights = np.array([1000.0, 3.0, 1.0, 0.0])
    np.testing.assert_array_equal(methods._shared_out(weights, 40, 16), [16, 16, 8, 0])
    np.testing.assert_array_equal(methods._shared_out(weights, 100, 16), [16, 16, 16, 0])
    assert methods._shared_out(np.zeros(3), 5, 4).sum() == 0


def test_budgets_that_hold_no_string_or_more_than_were_drawn():
    rng = np.random.default_rng(7)
    bank = alike([0.6, 0.4], 4).bank(rng, 8)
    for part, budget, why in (("choices", 3, "no string fits"), ("stopping", 999, "> 8 draws")):
        [cell] = budgets.measured(SMALL, "mode", part, budget, bank)
        assert cell.accuracies == [] and cell.why.endswith(why)
    few = budgets.stepwise(FewSteps(), 3)  # pyright: ignore[reportArgumentType]
    assert [cell.why for cell in few] == ["no string fits"]


class FewSteps:
    """A world of steps whose strings are longer than any budget."""

    def strings(self, budget: int) -> int:
        return 0


def test_a_run_without_a_budget_for_one_string_says_so(tmp_path: Path):
    config, console = dataclasses.replace(SMALL, budgets=(2, 3)), Console(quiet=True)
    with pytest.raises(ValueError, match="expected a budget that holds a string, got 3 tokens"):
        budgets.run(config, [], tmp_path, console)
    with pytest.raises(SystemExit):
        budgets.main(["--budgets", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        budgets.main(["--draws", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):  # a world and a task
        budgets.main(["--tasks", "mode,countdown", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="expected tasks of chain_sum, .* for a model, got mode"):
        budgets.main(["--tasks", "mode", "--model", "smollm2-135m", "--out", str(tmp_path)])


def test_a_run_goes_on_and_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    console, cells = Console(quiet=True), list[Cell]()
    budgets.run(SMALL, cells, tmp_path, console)
    more = dataclasses.replace(SMALL, budgets=(3, 32), parts=("choices", "allocation"))
    kept = grid.load(tmp_path / "results.json", more, Cell, budgets.WHICH)
    assert kept == cells and len(kept) == 8 and cells[0].num == 4
    budgets.run(more, kept, tmp_path, console)
    assert [c for c in kept if c.part == "choices" and c.budget == 32] == cells
    text = report.markdown(kept)
    assert "| majority |  | 0." in text and "no string fits" in text
    assert "| best of n falls with n |" not in text  # there is one budget only
    report.draw(kept).savefig(tmp_path / "figure.png")
    report.show(Console(width=200), kept)
    assert "no string fits" in capsys.readouterr().out


def cell(method: str, budget: int, accuracies: list[float], part: str = "choices") -> Cell:
    tokens = [float(budget)] * len(accuracies)
    return Cell("w", part, method, budget, budget // 8, accuracies, tokens, 0.0, 8.0)


@pytest.mark.parametrize(("loss", "word"), [(0.2, "yes"), (-0.2, "no"), (0.0, "undecided")])
def test_verdicts_go_by_differences_on_the_same_prompts(loss: float, word: str):
    base, jitter = [0.3, 0.5, 0.7, 0.4], [0.01, -0.01, 0.01, -0.01]
    fallen = [a - loss + e for a, e in zip(base, jitter, strict=True)]
    both = [cell("best of n", 16, base), cell("best of n", 64, fallen)]
    columns, [(claim, said)] = report.verdicts(both)
    assert columns == ["claim", "w"] and claim == "best of n falls with n"
    assert said.startswith(f"{word}, {loss:+.3f} ± 0.005")


@pytest.mark.parametrize(
    ("change", "tokens", "word"),
    [(0.0, 32, "yes"), (-0.1, 32, "no"), (-0.02, 32, "undecided"), (0.1, 64, "no, 0% saved")],
)
def test_a_rule_saves_draws_if_it_loses_little(change: float, tokens: int, word: str):
    base, jitter = [0.3, 0.5, 0.7, 0.4], [0.01, -0.01, 0.01, -0.01]
    ours = cell("r", 64, [a + change + e for a, e in zip(base, jitter, strict=True)], "stopping")
    ours = dataclasses.replace(ours, tokens=[float(tokens)] * 4)
    _, rows = report.verdicts([cell(methods.ALL, 64, base, "stopping"), ours])
    [said] = [row[1] for row in rows if row[0] == "r saves draws at equal accuracy"]
    assert said.startswith(word) and said.endswith("50% saved" if tokens == 32 else "0% saved")


def test_the_bootstrap_is_over_prompts():
    values = np.random.default_rng(8).random(50)
    assert report.std_error(values) == pytest.approx(values.std() / 50**0.5, rel=0.06)


def test_draws_are_kept_for_the_same_question_only(tmp_path: Path):
    path, about = tmp_path / "draws.npz", {"model": "m", "seed": 0, "num_draws": 2}
    rows = np.array([[1, 2], [3, 0]]), np.array([2, 1])
    texts.Drawn(path, about).add("sums", *rows)
    again = texts.Drawn(path, about)
    again.add("sums", *rows)
    again.add("words", *rows)
    kept = texts.Drawn(path, about).strings
    assert {task: len(prompts) for task, prompts in kept.items()} == {"sums": 2, "words": 1}
    np.testing.assert_array_equal(kept["sums"][1][0], rows[0])
    assert texts.Drawn(path, about | {"seed": 1}).strings == {}
    path.write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(ValueError, match="draws of an earlier run"):
        texts.Drawn(path, about)


def test_the_verifier_errs_about_one_wrong_answer_in_five():
    wrong = [texts.verdict("1 + 1", str(i), False) for i in range(1000)]
    assert abs(np.mean(np.array(wrong) > texts.verdict("1 + 1", "2", True)) - 0.2) < 0.06
    assert wrong[3] == texts.verdict("1 + 1", "3", False) != texts.verdict("1 + 2", "3", False)


@pytest.mark.slow
def test_steps_are_at_their_budget():
    world = steps.World(0, 2, 4)
    num = world.strings(80)
    assert num % 4 == 0 and abs(world.mean_length - 80 / num) < world.mean_length
    found = world.found(num)
    assert {"majority", "PF exact", "DVTS"} <= set(found)
    assert found["majority"].tokens.mean() == pytest.approx(num * world.mean_length, rel=0.3)


@pytest.mark.slow
def test_the_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert budgets.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "greedy beats uniform" in capsys.readouterr().out
    assert (tmp_path / "tabular" / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_quick_run_of_a_model_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(models, "load", shallow.load)
    argv = ["--quick", "--tasks", "countdown", "--out", str(tmp_path)]
    assert budgets.main(argv) == 0
    folder = tmp_path / "smollm2-135m"
    before = (folder / "draws.npz").read_bytes()
    document = json.loads((folder / "results.json").read_text())
    assert {c["world"] for c in document["cells"]} == {"countdown"}
    assert budgets.main(argv) == 0
    assert (folder / "draws.npz").read_bytes() == before
