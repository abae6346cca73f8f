"""The robustness report on linear Gaussian networks, where all that it says is known.

Of q = N(A x, S) the divergence of a change d is d' A' S^-1 A d / 2: at worst size^2 / 2 times the
largest eigenvalue, of a random direction size^2 / 2 times the mean one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortized import fit
from amortized.posteriors import flows, npe, robustness_report

from .problems import noisy, rate, with_law

KEY = jax.random.key(3)
RADII = (0.1, 0.4)
A, S = jnp.array([0.5, 0.2]), jnp.array([0.05, 0.08])
X = jnp.array([[0.3, -0.2], [0.0, 0.5], [-0.4, 0.1]])


def posterior(model, a=None, s=None):
    training = npe.training(
        KEY,
        model,
        latents=["rate" if model is rate else "theta"],
        observed=["x"],
        flow=flows.gaussian(),
    )
    network = training.params if a is None else with_law(training.params, a, s)
    return npe.posterior(fit.Fitted(network, network, {}, None, 0, ""))


@pytest.fixture(scope="module")
def out():
    networks = {
        "best": posterior(noisy, 0.5, 0.05),
        "sure": posterior(noisy, 0.5, 0.02),
        "uneven": posterior(noisy, A, S),
    }
    return robustness_report.run(KEY, networks, X, radii=RADII, num_simulations=2000)


def test_changes_do_what_the_formula_says(out):
    squares = np.square(RADII)
    laws = {"best": 0.25 / np.array([0.05, 0.05]), "uneven": np.asarray(A**2 / S)}
    laws["sure"] = 0.25 / np.array([0.02, 0.02])
    for line in out.lines:
        values = laws[line.name]
        worst, random = squares * values.max() / 2, squares * values.mean() / 2
        # Each is from 1,000 latents, whose log ratios have variance twice their mean.
        error = np.sqrt(2 * worst / 1000)[:, None]
        assert (abs(line.worst - worst[:, None]) < 5 * error + 0.01 * worst[:, None]).all()
        # Directions differ too, where they are not alike.
        spread = squares[:, None] * values.std() / 2
        assert (abs(line.random - random[:, None]) < 5 * (error + spread / 10**0.5)).all()
        np.testing.assert_allclose(line.fisher, values.sum(), rtol=5 * (2 / 1000) ** 0.5)
    uneven = out.lines[2]
    assert (uneven.worst > 1.3 * uneven.random).all()


def test_what_a_network_pays_is_its_loss_and_its_coverage(out):
    best, sure, uneven = out.lines
    for line, a, s in ((best, 0.5, 0.05), (sure, 0.5, 0.02), (uneven, A, S)):
        rest = 0.1 - 0.2 * a + 0.2 * a**2
        expected = jnp.sum(jnp.broadcast_to(jnp.log(2 * jnp.pi * s) / 2 + rest / (2 * s), (2,)))
        assert abs(line.losses.mean() - expected) < 5 * line.losses.std() / 2000**0.5
    assert best.coverage.p_value > 1e-3 > sure.coverage.p_value
    assert (sure.coverage.excess < 0).all()


def test_the_table_and_the_figure(out):
    text = str(out)
    words = " ".join(text.split())
    assert "too sure" in text and "of 3 observations" in words and "2,000 simulations" in words
    assert max(map(len, text.splitlines())) <= 80
    worst, random = out.lines[0].worst.mean(1), out.lines[0].random.mean(1)
    (row,) = (line.split() for line in text.splitlines() if line.split()[:1] == ["best"])
    assert row[:4] == ["best", "0.1", f"{worst[0]:.2g}", f"{random[0]:.2g}"]
    axes = out.plot().axes
    assert [a.get_title(loc="left").split("   ")[0] for a in axes][1:] == ["best", "sure", "uneven"]


@pytest.mark.bad_input
def test_bad_input():
    of_counts, of_numbers = {"n": posterior(rate)}, {"n": posterior(noisy, 0.5, 0.05)}
    with pytest.raises(ValueError, match="at least one network and one size"):
        robustness_report.run(KEY, of_numbers, X, radii=[])
    with pytest.raises(ValueError, match=r"discrete \['x'\]"):
        robustness_report.run(KEY, of_counts, jnp.arange(3), radii=RADII)
    with pytest.raises(ValueError, match="radius above 0"):
        robustness_report.run(KEY, of_numbers, X, radii=[0.0, 1.0])
    with pytest.raises(ValueError, match="with one B"):
        robustness_report.run(KEY, of_numbers, {"x": X, "y": X[:2]}, radii=RADII)
