"""Tempered SMC against conjugate models whose evidence and posterior are known in closed form."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

from samplers import base, population, resampling
from samplers.latent import plans, posterior, rejuvenation, tempered
from tests.helpers import TraceCounter, assert_z
from tests.samplers.problems import applied

# --- conjugate linear regression: weights ~ N(0, 1.5^2), noise 0.6 ---

DESIGN = np.array([[1.0, 0.3], [1.0, -1.2], [1.0, 2.0], [1.0, 0.7], [1.0, 1.5]])
SEEN = np.array([0.4, -1.9, 2.6, 1.5, 1.4])
PRIOR_SCALE, NOISE = 1.5, 0.6
LADDER = (0.03, 0.15, 0.45, 1.0)


def regression(design: Any, seen: Any) -> None:
    weights = numpyro.sample("weights", dist.Normal(0.0, PRIOR_SCALE).expand([2]).to_event(1))
    mean = numpyro.deterministic("mean", design @ weights)
    with numpyro.plate("data", len(seen)):
        numpyro.sample("seen", dist.Normal(mean, NOISE), obs=seen)


def conjugate(beta: float = 1.0) -> tuple[float, np.ndarray, np.ndarray]:
    """log Z_beta, mean and covariance of pi_beta = prior likelihood^beta / Z_beta; at 1 the
    posterior's; float64.
    """
    noise = NOISE**2 / beta
    covariance = np.linalg.inv(DESIGN.T @ DESIGN / noise + np.eye(2) / PRIOR_SCALE**2)
    marginal = PRIOR_SCALE**2 * DESIGN @ DESIGN.T + noise * np.eye(len(SEEN))
    log_z = -0.5 * (
        SEEN @ np.linalg.solve(marginal, SEEN) + np.log(np.linalg.det(2 * np.pi * marginal))
    )
    # A normal density to the power beta is one of variance noise, up to this factor.
    log_z += 0.5 * len(SEEN) * (np.log(2 * np.pi * noise) - beta * np.log(2 * np.pi * NOISE**2))
    return float(log_z), covariance @ DESIGN.T @ SEEN / noise, covariance


def walk(log_density: Any, beta: Any) -> Any:
    """A random walk whose steps shrink with beta: a fixed kernel."""
    scale = 0.9 / jnp.sqrt(1 + 8 * beta)
    return blackjax.additive_step_random_walk(
        log_density, lambda key, position: scale * jax.random.normal(key, position.shape)
    )


def leapfrog(log_density: Any, beta: Any) -> Any:
    return blackjax.hmc(log_density, 0.35 / jnp.sqrt(1 + 8 * beta), jnp.ones(2), 4)


CHOICES: dict[str, dict[str, Any]] = {
    "random walk": {"kernel": walk, "num_steps": 2},
    "waste-free": {"kernel": walk, "num_steps": 3, "waste_free": True},
    "always select, multinomial": {
        "kernel": walk,
        "num_steps": 1,
        "threshold": 1.1,
        "resampler": resampling.multinomial,
    },
    "HMC": {"kernel": leapfrog, "num_steps": 1},
}


def check_unbiased(options: dict[str, Any], *, num: int = 10_000, resolution: float = 0.02) -> None:
    """E[Z-hat] = Z, and E[Z-hat mean_i w_i f(x_i)] = Z E[f | data] for the weights, by z-tests."""
    log_z, mean, _ = conjugate()

    def one(key: Any) -> tuple[Any, Any]:
        found = tempered.run(
            key, regression, DESIGN, SEEN, num_particles=16, **{"ladder": LADDER, **options}
        )
        ratio = jnp.exp(found.log_z - log_z)
        return ratio, ratio * jnp.mean(
            jnp.exp(found.log_weights)[:, None] * found.samples["weights"], 0
        )

    ratio, moment = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num))
    assert_z(ratio, 1.0, resolution=resolution)
    for axis in range(2):
        assert_z(moment[:, axis], mean[axis], resolution=2 * resolution)


FAST = ("random walk",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CHOICES]
)
def test_a_fixed_ladder_and_kernel_are_unbiased(name: str):
    check_unbiased(CHOICES[name])


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"kernel": rejuvenation.hmc()}, marks=pytest.mark.slow),
        pytest.param({"waste_free": True, "num_steps": 15}, marks=pytest.mark.slow),
        pytest.param({"ess_fraction": 0.9, "num_steps": 3}, marks=pytest.mark.slow),
    ],
    ids=["random walk", "hmc", "waste-free", "small steps"],
)
def test_adaptive_matches_the_conjugate_posterior(options: dict[str, Any]):
    log_z, mean, covariance = conjugate()
    found = tempered.adaptive(
        jax.random.key(1), regression, DESIGN, SEEN, num_particles=8000, **options
    )
    assert abs(found.log_z - log_z) < 0.15
    assert abs(found.log_z - log_z) < 5 * found.log_z_std_error
    weights = np.exp(np.asarray(found.log_weights, np.float64)) / 8000
    x = np.asarray(found.samples["weights"], np.float64)
    np.testing.assert_allclose(weights @ x, mean, atol=0.04)
    centred = x - weights @ x
    np.testing.assert_allclose((weights[:, None] * centred).T @ centred, covariance, atol=0.01)
    np.testing.assert_allclose(found.samples["mean"], x @ DESIGN.T, atol=1e-4)
    stages = int(found.rounds)
    betas = np.asarray(found.trace.beta)
    assert (
        betas[stages - 1] == 1.0
        and (np.diff(betas[:stages]) > 0).all()
        and stages < 100
        and not found.details["cut"]
    )
    fraction = options.get("ess_fraction", 0.5)
    np.testing.assert_allclose(found.trace.ess[: stages - 1], fraction * 8000, rtol=0.01)
    assert found.trace.ess[stages - 1] >= fraction * 8000 * 0.99
    assert ((found.trace.acceptance[:stages] > 0.1) & (found.trace.acceptance[:stages] < 1)).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.9])
def test_bisection_against_brute_force(sign: int, fraction: float):
    """Log likelihoods with one long tail: for the wrong sign the answer differs by far."""
    rng = np.random.default_rng(0)
    log_weights = rng.normal(size=400)
    likelihood = sign * rng.exponential(size=400) * 30

    def size(delta: float) -> float:
        w = np.exp(log_weights + delta * likelihood - (log_weights + delta * likelihood).max())
        return w.sum() ** 2 / (w**2).sum()

    grid = np.linspace(0, 0.8, 80_001)
    enough = np.array([size(delta) >= fraction * size(0) for delta in grid[::20]])
    brute = grid[::20][enough.argmin() - 1]
    arrays = (jnp.asarray(log_weights, jnp.float32), jnp.asarray(likelihood, jnp.float32))
    found = plans.next_beta(*arrays, jnp.float32(0.2), fraction)
    assert abs(float(found) - 0.2 - brute) < 4e-4
    wrong = plans.next_beta(arrays[0], -arrays[1], jnp.float32(0.2), fraction)
    assert abs(float(wrong - found)) > 0.1 * brute


def test_next_beta_is_exactly_one_where_the_ess_allows_it_and_always_moves():
    log_weights = jnp.zeros(4)
    assert (
        plans.next_beta(log_weights, jnp.array([0.1, 0.2, 0.0, 0.3]), jnp.float32(0.3), 0.5) == 1.0
    )
    half_dead = jnp.array([-jnp.inf, -jnp.inf, -jnp.inf, -1.0])  # no beta > 0 keeps an ESS of two
    assert plans.next_beta(log_weights, half_dead, jnp.float32(0), 0.5) == 1.0
    steep = jnp.array([0.0, -1e12, -2e12, -3e12])
    found = plans.next_beta(log_weights, steep, jnp.float32(0), 0.5)
    assert 0 < found < 1e-10
    assert plans.next_beta(log_weights, steep, jnp.float32(0.5), 0.5) > 0.5
    assert plans.next_beta(log_weights, jnp.full(4, -jnp.inf), jnp.float32(0), 0.5) == 1.0


# --- constrained and hierarchical sites ---


def precision(seen: Any) -> None:
    """Gamma prior on the precision of normal data: conjugate, skewed, and with a Jacobian to
    forget.
    """
    tau = numpyro.sample("tau", dist.Gamma(2.0, 1.5))
    numpyro.sample("seen", dist.Normal(0.0, 1 / jnp.sqrt(tau)), obs=seen)


def precision_truth() -> tuple[float, float]:
    from scipy.special import gammaln

    shape, rate = 2 + len(SEEN) / 2, 1.5 + (SEEN**2).sum() / 2
    log_z = (
        gammaln(shape)
        - gammaln(2)
        + 2 * np.log(1.5)
        - shape * np.log(rate)
        - len(SEEN) / 2 * np.log(2 * np.pi)
    )
    return float(log_z), shape / rate


def check_precision(resampler: Any = resampling.systematic) -> None:
    log_z, mean = precision_truth()
    found = tempered.adaptive(
        jax.random.key(2), precision, SEEN, num_particles=8000, num_steps=10, resampler=resampler
    )
    assert abs(found.log_z - log_z) < 5 * found.log_z_std_error < 0.2
    tau = found.samples["tau"]
    assert (tau > 0).all()
    assert abs(jnp.mean(jnp.exp(found.log_weights) * tau) - mean) < 0.03


def test_constrained_sites_carry_their_jacobian():
    check_precision()


def test_the_split_adds_up_to_numpyros_potential():
    """log prior + log likelihood = -potential_energy, for dependent, scaled, masked, simplex and
    factor sites.
    """

    def model(data: Any, flag: bool = False) -> None:
        assert flag
        scale = numpyro.sample("scale", dist.HalfNormal(2.0))
        share = numpyro.sample("share", dist.Dirichlet(jnp.array([1.0, 2.0, 0.7])))
        bounded = numpyro.sample("bounded", dist.Uniform(-scale, 3.0))
        with (
            numpyro.plate("data", 4),
            handlers.scale(scale=1.7),
            handlers.mask(mask=jnp.array([1, 0, 1, 1], bool)),
        ):
            numpyro.sample("data_", dist.Normal(bounded + share[0], scale), obs=data)
        numpyro.factor("tilt", -0.5 * share[1])

    data = jnp.array([0.3, 9.0, -1.0, 2.0])
    of = posterior.density(model, data, flag=True)
    z = of.sample_prior(jax.random.key(3))
    names = sorted(["scale", "share", "bounded"])
    split = {"bounded": z[:1].reshape(()), "scale": z[1], "share": z[2:]}
    assert names == sorted(split)
    energy = numpyro.infer.util.potential_energy(model, (data,), {"flag": True}, split)
    np.testing.assert_allclose(of.log_prior(z) + of.log_likelihood(z), -energy, rtol=1e-5)
    found = of.constrain(z)
    expected = dist.Normal(found["bounded"] + found["share"][0], found["scale"]).log_prob(data)
    truth = 1.7 * (expected.sum() - expected[1]) - 0.5 * found["share"][1]
    np.testing.assert_allclose(of.log_likelihood(z), truth, rtol=1e-5)


# --- pieces ---


@pytest.mark.parametrize("beta", [1.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_tempering_as_a_move_is_annealed_importance_sampling(beta: float):
    """The combinator alone, without selection, is unbiased as well, for Z_beta wherever its ladder
    ends.
    """
    log_z, mean, _ = conjugate(beta)
    of = posterior.density(regression, jnp.asarray(DESIGN), jnp.asarray(SEEN))

    def kernel(beta: Any) -> base.Move:
        return rejuvenation.rejuvenate(
            rejuvenation.chains(walk(of.at(beta), beta)), of.log_likelihood, 2
        )

    @jax.jit
    def annealed(key: Any) -> base.Particles:
        start_key, key = jax.random.split(key)
        ladder = beta * jnp.linspace(0, 1, 21)[1:] ** 2
        return applied(
            key, tempered.init(start_key, of, 20_000), tempered.tempering(ladder, kernel)
        )

    p = annealed(jax.random.key(4))
    ratio = np.exp(np.asarray(p.log_weights, np.float64) - log_z)
    assert_z(ratio, 1.0, resolution=0.03)
    for axis in range(2):
        assert_z(ratio * np.asarray(p.state.position[:, axis]), mean[axis], resolution=0.06)


@pytest.mark.slow
def test_annealed_smc_finds_every_z_of_a_conjugate_path():
    """log Z_beta, mean and covariance at every stage of one run, as selections bank it."""
    of = posterior.density(regression, jnp.asarray(DESIGN), jnp.asarray(SEEN))
    betas = np.linspace(0, 1, 13) ** 2

    @jax.jit
    def stage(
        key: Any, p: base.Particles, beta: Any, delta: Any
    ) -> tuple[base.Particles, base.Particles]:
        p = applied(key, p, tempered.reweigh(delta))
        kernel = rejuvenation.chains(walk(of.at(beta), beta))
        move = rejuvenation.rejuvenate(kernel, of.log_likelihood, 8)
        return base.bank(p), tempered.step(key, population.start(p), move).particles

    init_key, key = jax.random.split(jax.random.key(8))
    p = tempered.init(init_key, of, 20_000)
    for before, beta in zip(betas[:-1], betas[1:], strict=True):
        key, stage_key = jax.random.split(key)
        weighed, p = stage(stage_key, p, jnp.float32(beta), jnp.float32(beta - before))
        log_z, mean, covariance = conjugate(beta)
        assert abs(weighed.log_z - log_z) < 0.05
        weights = np.exp(np.asarray(weighed.log_weights, np.float64)) / 20_000
        x = np.asarray(weighed.state.position, np.float64)
        np.testing.assert_allclose(weights @ x, mean, atol=0.05)
        np.testing.assert_allclose(
            (weights[:, None] * (x - mean)).T @ (x - mean), covariance, atol=0.05
        )


def test_run_counts_its_cost_and_compiles_once():
    counter = TraceCounter(walk)

    def kernel(log_density: Any, beta: Any) -> Any:
        return counter(log_density, beta)

    options: dict[str, Any] = {
        "ladder": LADDER,
        "kernel": kernel,
        "num_particles": 20,
        "num_steps": 3,
    }
    found = tempered.run(jax.random.key(5), regression, DESIGN, SEEN, **options)
    traces = counter.count
    again = tempered.run(
        jax.random.key(5), regression, DESIGN, SEEN + 1, **{**options, "ladder": [0.1, 0.2, 0.3, 1]}
    )
    assert counter.count == traces and found.log_z != again.log_z
    # 20 from the prior; in each of 4 stages every chain starts, takes 3 steps, and its end is
    # weighed.
    assert (int(found.cost.tokens), int(found.cost.forwards), int(found.cost.potential_calls)) == (
        0,
        12,
        420,
    )
    np.testing.assert_allclose(found.trace.beta, LADDER)
    assert found.rounds == 4 and not found.details["cut"]
    waste_free = tempered.run(
        jax.random.key(5), regression, DESIGN, SEEN, **options, waste_free=True
    )
    # 5 chains: their starts, then 3 steps and as many weighed positions.
    assert int(waste_free.cost.potential_calls) == 20 + 4 * 5 * (1 + 3 + 3)


@pytest.mark.slow
def test_too_few_stages_are_flagged_and_still_reach_the_posterior():
    found = tempered.adaptive(
        jax.random.key(6),
        regression,
        DESIGN,
        SEEN,
        num_particles=400,
        max_stages=2,
        ess_fraction=0.8,
    )
    assert found.details["cut"] and found.rounds == 2 and found.trace.beta[-1] == 1
    assert abs(found.log_z - conjugate()[0]) < 1


@pytest.mark.parametrize("waste_free", [pytest.param(False, marks=pytest.mark.slow), True])
def test_impossible_data_and_nan_likelihoods(waste_free: bool):
    def impossible(low: Any) -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("cut", jnp.where(x > low, 0.0, -jnp.inf))
        numpyro.factor("nan", jnp.where(x > 40.0, 0.0, jnp.where(low > 40, jnp.nan, 0.0)))

    options: dict[str, Any] = {
        "num_particles": 24,
        "num_steps": 3,
        "waste_free": waste_free,
        "max_stages": 5,
    }
    nothing = tempered.adaptive(jax.random.key(7), impossible, jnp.array(30.0), **options)
    assert (
        nothing.log_z == -jnp.inf
        and (nothing.log_weights == -jnp.inf).all()
        and nothing.num_invalid == 0
    )
    half = tempered.adaptive(jax.random.key(7), impossible, jnp.array(0.0), **options)
    assert half.rounds == 1 and abs(half.log_z - np.log(0.5)) < 0.5
    assert jnp.isfinite(half.samples["x"]).all()
    invalid = tempered.adaptive(jax.random.key(7), impossible, jnp.array(41.0), **options)
    assert invalid.log_z == -jnp.inf and invalid.num_invalid == 24


# --- planted faults ---


def weights_kept(patch: pytest.MonkeyPatch) -> None:
    def resample(key: Any, p: Any, *args: Any) -> Any:
        after, ancestors = base.resample(key, p, *args)
        kept = jnp.where(args[1], p.log_weights[ancestors], after.log_weights)
        return dataclasses.replace(after, log_weights=kept), ancestors

    patch.setattr(population, "resample", resample)


def kernel_of_the_posterior(patch: pytest.MonkeyPatch) -> None:
    """Every stage is rejuvenated towards beta = 1."""
    at = posterior.Density.at
    patch.setattr(posterior.Density, "at", lambda self, beta: at(self, jnp.ones_like(beta)))


def stale_likelihood(patch: pytest.MonkeyPatch) -> None:
    """Particles move, and are weighed where they were."""
    rejuvenate = rejuvenation.rejuvenate

    def stale(*args: Any) -> base.Move:
        def sample(key: Any, x: Any) -> Any:
            y, dw = rejuvenate(*args).sample(key, x)
            return dataclasses.replace(y, log_likelihood=x.log_likelihood), dw

        return base.Move(sample)

    patch.setattr(tempered, "rejuvenate", stale)


def jacobian_forgotten(patch: pytest.MonkeyPatch) -> None:
    class Flat:
        def __init__(self, support: Any):
            self.bijection = dist.biject_to(support)
            self.inv = self.bijection.inv

        def __call__(self, z: Any) -> Any:
            return self.bijection(z)

        def log_abs_det_jacobian(self, z: Any, value: Any) -> Any:
            return jnp.zeros(())

    patch.setattr(posterior, "biject_to", Flat)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "weights kept after selecting": (weights_kept, "random walk"),
    "likelihoods are stale": (stale_likelihood, "random walk"),
    "the kernel leaves the posterior invariant": (kernel_of_the_posterior, "waste-free"),
}
LANES = [
    pytest.param(name, marks=pytest.mark.slow if name in list(FAULTS)[1:] else ())
    for name in FAULTS
]


@pytest.mark.parametrize("name", LANES)
def test_a_planted_fault_fails(name: str, monkeypatch: pytest.MonkeyPatch):
    plant, which = FAULTS[name]
    plant(monkeypatch)
    fresh = functools.partial(resampling.systematic)  # a new static argument, hence a new trace
    with pytest.raises(AssertionError, match="z = "):
        check_unbiased({**CHOICES[which], "resampler": fresh}, resolution=jnp.inf)


@pytest.mark.slow
def test_a_forgotten_jacobian_fails(monkeypatch: pytest.MonkeyPatch):
    jacobian_forgotten(monkeypatch)
    with pytest.raises(AssertionError):
        check_precision(functools.partial(resampling.systematic))


# --- bad input ---


def unseen() -> None:
    numpyro.sample("x", dist.Normal(0.0, 1.0))


def nothing_latent() -> None:
    numpyro.sample("x", dist.Normal(0.0, 1.0), obs=1.0)


def discrete() -> None:
    k = numpyro.sample("k", dist.Categorical(jnp.array([0.4, 0.6])))
    numpyro.sample("x", dist.Normal(k, 1.0), obs=1.0)


def run(model: Any = regression, args: tuple = (DESIGN, SEEN), **changes: Any) -> Callable[[], Any]:
    options = {"ladder": LADDER, "kernel": walk, "num_particles": 8, **changes}
    return lambda: tempered.run(jax.random.key(0), model, *args, **options)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "ladder falls": (
        run(ladder=[0.5, 0.2, 1.0]),
        r"increases strictly .* got \[0.5, 0.2, 1.0\]; leave the prior's 0",
    ),
    "ladder stops early": (run(ladder=[0.2, 0.99]), "to exactly 1, got"),
    "ladder starts at 0": (run(ladder=[0.0, 1.0]), "leave the prior's 0 out"),
    "ladder goes past 1": (run(ladder=[0.5, 1.0, 1.5]), "to exactly 1"),
    "ladder empty": (run(ladder=[]), "expected a ladder"),
    "ladder of two axes": (run(ladder=[[0.5, 1.0]]), "expected a ladder"),
    "nothing observed": (
        run(unseen, ()),
        r"latent and observed sites, got latent \['x'\] and observed \[\]; observe",
    ),
    "nothing latent": (run(nothing_latent, ()), r"got latent \[\] and observed \['x'\]"),
    "discrete site": (
        run(discrete, ()),
        r"continuous latent sites, got discrete \['k'\]; sum them out",
    ),
    "no particles": (run(num_particles=0), "expected num_particles"),
    "no steps": (run(num_steps=0), "expected num_steps"),
    "waste-free does not divide": (
        run(waste_free=True, num_steps=2),
        r"multiple of num_steps \+ 1 = 3 .* got 8; .*=9",
    ),
    "ess": (
        lambda: tempered.adaptive(jax.random.key(0), regression, DESIGN, SEEN, ess_fraction=1.0),
        r"expected ess_fraction in \(0, 1\), got 1.0",
    ),
    "no stages": (
        lambda: tempered.adaptive(jax.random.key(0), regression, DESIGN, SEEN, max_stages=0),
        "expected max_stages",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
