"""The models against closed forms, without the benchmark's data."""

from __future__ import annotations

import hashlib
import math
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jaxtyping import Array, PRNGKeyArray
from numpyro import handlers
from numpyro.infer import Predictive

from experiments.posterior_tasks import TASKS, gaussians, glm, odes, slcp, two_moons
from experiments.posterior_tasks import task as task_module
from models import download

THETA_SLCP = [0.7, -2.9, -1.0, -0.9, 0.6]


@pytest.mark.parametrize("name", TASKS)
def test_simulations_have_the_named_shapes_and_a_density(name: str):
    task = TASKS[name]
    predictive = Predictive(task.model, num_samples=20, parallel=True)
    draws = jax.eval_shape(lambda key: predictive(key), jax.random.key(0))
    assert draws["theta"].shape == (20, task.dim_theta) and draws["x"].shape == (20, task.dim_x)
    density = jax.eval_shape(jax.vmap(task.log_density), draws["theta"], draws["x"])
    assert density.shape == (20,) and density.dtype == jnp.zeros(()).dtype


def test_gaussians_are_their_closed_forms():
    theta, x = np.linspace(-0.9, 0.8, 10), np.linspace(0.5, -0.7, 10)

    @jax.jit
    def densities(theta: Array, x: Array) -> Array:
        found = [
            gaussians.GAUSSIAN_LINEAR.log_density(theta, x),
            gaussians.GAUSSIAN_LINEAR_UNIFORM.log_density(theta, x),
            gaussians.GAUSSIAN_LINEAR_UNIFORM.log_density(theta - 0.2, x),
            gaussians.GAUSSIAN_MIXTURE.log_density(theta[:2], x[:2]),
        ]
        return jnp.stack(found)

    normal = scipy.stats.norm(0, math.sqrt(0.1)).logpdf
    noise = normal(x - theta).sum()
    parts = [scipy.stats.norm(theta[:2], scale).pdf(x[:2]).prod() for scale in (1.0, 0.1)]
    expected = [
        noise + normal(theta).sum(),
        noise - 10 * math.log(2),
        -math.inf,
        math.log(sum(parts) / 2 / 400),
    ]
    np.testing.assert_allclose(densities(jnp.asarray(theta), jnp.asarray(x)), expected, atol=1e-4)


CENTER = np.array([0.2, -0.1], np.float32)


@jax.jit
def crescent(x: Array) -> tuple[Array, Array, Array]:
    """Density, gradient and distance from the center at points x; a jit of its own."""
    law = two_moons.Crescent(jnp.asarray(CENTER))
    value, gradient = jax.vmap(jax.value_and_grad(law.log_prob))(x)
    return jnp.exp(value), gradient, jnp.linalg.norm(x - CENTER, axis=-1)


def test_a_crescent_has_mass_one_and_the_radius_of_its_draws():
    side = np.linspace(-0.17, 0.17, 1501)
    points = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    density, gradient, radius = (np.asarray(a) for a in crescent(jnp.asarray(points + CENTER)))
    density = density * (side[1] - side[0]) ** 2
    assert density.sum() == pytest.approx(1, abs=1e-3)
    assert density @ radius == pytest.approx(0.1, abs=1e-4)
    # Without the Jacobian 1 / r the mass is another, and the mean radius that of r N(r), 0.1010.
    bare = density * radius
    assert bare.sum() == pytest.approx(0.1, abs=1e-3)
    assert bare @ radius / bare.sum() == pytest.approx(0.101, abs=1e-4)
    left = points[:, 0] < 0
    assert (density[left] == 0).all() and (gradient[left] == 0).all()


def test_draws_of_a_crescent():
    sample = jax.jit(lambda key: two_moons.Crescent(jnp.asarray(CENTER)).sample(key, (20_000,)))
    x, y = (np.asarray(sample(jax.random.key(0))) - CENTER).T
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    assert (x > 0).all() and scipy.stats.kstest((r - 0.1) / 0.01, "norm").pvalue > 1e-6
    assert scipy.stats.kstest(angle / math.pi + 0.5, "uniform").pvalue > 1e-6


def test_two_corners_share_a_crescent():
    theta = np.array([[0.3, 0.5], [-0.5, -0.3]], np.float32)
    found = jax.jit(two_moons.center)(theta)
    expected = np.array([0.25 - 0.8 * math.sqrt(0.5), 0.2 * math.sqrt(0.5)])
    assert np.allclose(found, expected)


def test_the_statistic_of_a_train_has_its_mass():
    theta = np.linspace(-1.0, 1.2, 10, dtype=np.float32)
    logits = glm.design().astype(np.float64) @ theta
    spikes = np.random.default_rng(0).random(100) < 0.4
    exact = scipy.stats.bernoulli(1 / (1 + np.exp(-logits))).logpmf(spikes).sum()
    smooth = scipy.stats.multivariate_normal(np.zeros(10), np.linalg.inv(glm.precision()))

    @jax.jit
    def both(theta: Array, statistic: Array, train: Array) -> tuple[Array, Array]:
        return (
            glm.BERNOULLI_GLM.log_density(theta, statistic),
            glm.BERNOULLI_GLM_RAW.log_density(theta, train),
        )

    found = both(jnp.asarray(theta), spikes @ glm.design(), spikes.astype(np.float32))
    np.testing.assert_allclose(found, exact + smooth.logpdf(theta), atol=2e-3)


def test_a_filter_sees_the_past_and_the_prior_wants_it_smooth():
    x = glm.design()
    assert (x[:, 0] == 1).all() and (x[3:, 4] == x[:-3, 1]).all() and (x[:3, 4] == 0).all()
    offset, *taps = np.random.default_rng(0).normal(size=10)
    padded = [0, 0, *taps]
    bends = [
        (1 + math.sqrt(i / 9)) * padded[i + 2] - 2 * padded[i + 1] + padded[i] for i in range(9)
    ]
    theta = np.array([offset, *taps])
    exact = offset**2 / 2 + np.square(bends).sum()
    assert theta @ glm.precision() @ theta == pytest.approx(exact, rel=1e-5)


@jax.jit
def four(theta: Array, x: Array) -> Array:
    return slcp.points(theta).log_prob(x)


@pytest.mark.parametrize("theta", [THETA_SLCP, [0.0, 1.0, 0.03, -2.0, 3.0]])
def test_four_points_are_gaussian(theta: list[float]):
    m, s, rho = np.array(theta[:2]), np.array(theta[2:4]) ** 2, np.tanh(theta[4])
    cov = np.array([[s[0] ** 2, rho * s.prod()], [rho * s.prod(), s[1] ** 2]]) + 1e-6 * np.eye(2)
    x = m + np.random.default_rng(0).normal(size=(4, 2)) @ np.linalg.cholesky(cov).T
    exact = scipy.stats.multivariate_normal(m, cov).logpdf(x).sum()
    found = [
        four(np.array(theta, np.float32) * np.array(signs, np.float32), x.reshape(-1))
        for signs in ([1, 1, 1, 1, 1], [1, 1, -1, 1, 1], [1, 1, 1, -1, 1])
    ]
    np.testing.assert_allclose(found, exact, atol=0.02)


def test_distractors_say_nothing_and_hide_the_points():
    def draw(key: PRNGKeyArray) -> tuple[Array, Array]:
        law = slcp.Distracted(jnp.array(THETA_SLCP))
        x = law.sample(key, (4000,))
        return x, law.log_prob(x[0])

    x, log_prob = jax.jit(draw)(jax.random.key(0))
    places = np.argsort(slcp.noise().order)
    points, noise = np.asarray(x)[:, places[:8]], np.asarray(x)[:, places[8:]]
    assert log_prob == pytest.approx(float(four(np.float32(THETA_SLCP), points[0])), abs=1e-4)
    assert abs(points[:, 0].mean() - 0.7) < 5 / math.sqrt(4000)
    # A coordinate of the noise is a mixture of Student laws with two degrees of freedom.
    of, scale = slcp.noise(), np.sqrt(np.square(slcp.noise().scale_tril).sum(-1))
    for share in (0.1, 0.5):
        below = scipy.stats.t(2, of.loc, scale).cdf(np.quantile(noise, share, axis=0)).mean(0)
        assert np.abs(below - share).max() < 5 * math.sqrt(share * (1 - share) / 4000)


def test_an_epidemic_has_its_peak_and_finer_steps_change_nothing():
    days, num, steps = odes.EPIDEMIC

    @jax.jit
    @jax.vmap
    def solved(theta: Array) -> tuple[Array, Array, Array]:
        fine = odes.infected(theta, (days, num, 8 * steps))
        return odes.infected(theta), fine, odes.infected(theta, (0.05, 3200, 1)).max()

    theta = np.array([[0.4, 0.125], [1.5, 0.08], [0.25, 0.1]], np.float32)
    share, fine, greatest = (np.asarray(a) for a in solved(theta))
    noise = np.sqrt(fine * (1 - fine) / 1000 + 1e-6)
    assert (np.abs(share - fine) / noise).max() < 0.01
    # c = 1 - g / b there, and i - c - (g / b) log(1 - c) is constant.
    part = theta[:, 1] / theta[:, 0]
    np.testing.assert_allclose(greatest, 1 - part + part * np.log(part), atol=1e-4)


def test_predators_and_prey_keep_their_invariant():
    """d x - c log x + b y - a log y is constant."""
    spacing, num, steps = odes.HUNT

    @jax.jit
    @jax.vmap
    def solved(theta: Array) -> tuple[Array, Array]:
        return odes.populations(theta), odes.populations(theta, (spacing, num, 8 * steps))

    theta = np.array([[0.7, 0.1, 0.9, 0.12], [1.5, 0.02, 0.6, 0.05]], np.float32)
    u, fine = (np.asarray(a, np.float64) for a in solved(theta))
    assert np.abs(fine - u).max() < 1e-3
    a, b, c, d = theta.T[:, :, None]
    energy = d * np.exp(u[..., 0]) - c * u[..., 0] + b * np.exp(u[..., 1]) - a * u[..., 1]
    assert np.abs(energy - energy[:, :1]).max() < 2e-3


def test_prey_come_first():
    theta = np.array([0.7, 0.1, 0.9, 0.12], np.float32)

    def draw(key: PRNGKeyArray) -> Array:
        model = handlers.condition(odes.lotka_volterra, {"theta": theta})
        return handlers.trace(handlers.seed(model, key)).get_trace()["x"]["value"]

    x = np.asarray(jax.jit(draw)(jax.random.key(0)))
    assert abs(np.log(x[0] / 30)) < 0.5 and abs(np.log(x[10])) < 0.5


def test_tables_are_read_by_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path = tmp_path / "sbibm-1.1.0.whl"
    folder = "sbibm/tasks/bernoulli_glm/files/num_observation_3/"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(folder + "observation.csv", "a,b\n1.0,2.0\n")
        numbers = ",".join(str(i % 2) for i in range(100))
        archive.writestr(folder + "observation_raw.csv", f"head\n{numbers}\n")
    raw = path.read_bytes()
    source = download.WheelFile(
        "sbibm==1.1.0", len(raw), None, len(raw), hashlib.sha256(raw).hexdigest()
    )
    monkeypatch.setattr(task_module, "BENCHMARK", source)
    monkeypatch.setenv("TILTLM_CACHE", str(tmp_path))
    assert (TASKS["bernoulli_glm_raw"].observation(3) == np.arange(100) % 2).all()
    with pytest.raises(ValueError, match=r"expected a table \(1, 10\) in .*, got \(1, 2\)"):
        TASKS["bernoulli_glm"].observation(3)
    with pytest.raises(ValueError, match="expected the number of an observation, 1 to 10, got 0"):
        TASKS["bernoulli_glm"].observation(0)
