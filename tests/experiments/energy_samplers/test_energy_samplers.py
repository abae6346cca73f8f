"""The constants of the energies, their exact draws, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.energy_samplers import __main__ as command
from experiments.energy_samplers import targets
from experiments.energy_samplers.targets import ENERGIES

KEY = jax.random.key(3)


def test_the_constants_are_the_integrals():
    x = np.linspace(-5, 5, 200_001)
    well = np.exp(-(x**4) + 6 * x**2 + x / 2)
    np.testing.assert_allclose(targets.LOG_Z_WELL, np.log(np.trapezoid(well, x)), atol=1e-6)
    np.testing.assert_allclose(ENERGIES["ManyWell"].log_z, 164.69568, atol=1e-5)
    grid = jnp.linspace(-13.0, 13.0, 521)
    points = jnp.stack(jnp.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    mass = jnp.exp(jax.vmap(ENERGIES["25GMM"].log_density)(points)).sum() * 0.05**2
    np.testing.assert_allclose(mass, 1.0, atol=1e-3)


@pytest.mark.parametrize("name", ENERGIES)
def test_exact_draws_are_of_the_energy(name: str):
    """Stein's identity, E[x s(x)] = -D for the score s, and coordinates on their own."""
    energy = ENERGIES[name]
    x = energy.draw(KEY, 20_000)
    score = jax.jit(jax.vmap(jax.grad(energy.log_density)))(x)
    each = np.asarray(x * score, np.float64) + 1
    z = each.mean(0) / (each.std(0) / len(each) ** 0.5)
    assert np.abs(z).max() < 5, z
    z = np.asarray(score, np.float64)
    assert np.abs(z.mean(0) / (z.std(0) / len(z) ** 0.5)).max() < 5


def test_modes_have_equal_shares():
    shares = targets.modes(ENERGIES["25GMM"].draw(KEY, 5_000))
    np.testing.assert_allclose(shares, 0.04, atol=0.015)


@pytest.mark.slow
def test_the_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "the tightest lower bound" in capsys.readouterr().out
    (cell,) = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert cell["modes"] is not None and (tmp_path / "figure.png").exists()
