"""Simulations with posterior draws: compiled or one by one, what is left out, what is refused."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortized.calibration import joint
from amortized.calibration.joint import Joint
from tests.helpers import TraceCounter


def simulate(key: Any) -> Any:
    """Sites by name, one of them whole numbers."""
    keys = jax.random.split(key, 3)
    theta = {"mu": jax.random.normal(keys[0]), "w": jax.random.normal(keys[1], (2,))}
    return theta, {"y": theta["w"] + jax.random.normal(keys[2], (2,)), "n": jnp.int32(3)}


def sampler(key: Any, x: Any, num_samples: int) -> Any:
    mu_key, w_key = jax.random.split(key)
    w = x["y"] / 2 + 0.5**0.5 * jax.random.normal(w_key, (num_samples, 2))
    return {"mu": jax.random.normal(mu_key, (num_samples,)), "w": w}


@functools.cache
def drawn(num: int, batch_size: int = 8) -> Joint:
    return joint.draw(
        jax.random.key(3),
        simulate,
        sampler,
        num_simulations=num,
        num_samples=5,
        batch_size=batch_size,
    )


def test_batches_prefixes_and_single_calls_agree():
    few, many = drawn(11), drawn(20, batch_size=6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[:11], rtol=1e-6, atol=1e-7),
        (few.theta, few.x, few.draws),
        (many.theta, many.x, many.draws),
    )
    one = joint.draw_each(
        jax.random.key(3),
        simulate,
        jax.jit(sampler, static_argnums=2),
        num_simulations=3,
        num_samples=5,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[:3], 1e-6, 1e-7), one.draws, few.draws
    )
    assert (few.num_simulations, few.num_samples, few.left_out) == (11, 5, {})
    assert repr(few).startswith("Joint(") and "num_samples=5" in repr(few)


def test_the_program_is_compiled_once():
    counter = TraceCounter(simulate)
    for num in (20, 33):
        joint.draw(
            jax.random.key(0), counter, sampler, num_simulations=num, num_samples=5, batch_size=8
        )
    assert counter.count == 1


def test_numbers_have_the_names_of_their_sites():
    of = joint.coordinates(drawn(11))
    assert of.names == ("mu", "w[0]", "w[1]")
    assert of.truth.shape == (11, 3) and of.draws.shape == (11, 5, 3)
    plain = Joint(np.zeros((3, 2)), np.zeros(3), np.zeros((3, 4, 2)))
    assert joint.coordinates(plain).names == ("theta[0]", "theta[1]")


def test_quantities_see_theta_and_x():
    them = drawn(11)
    of = joint.evaluate(
        them, lambda theta, x: {"sum": theta["w"].sum() + x["y"][0], "mu": theta["mu"]}
    )
    assert of.names == ("mu", "sum")
    np.testing.assert_allclose(of.truth[:, 0], them.theta["mu"])
    expected = them.draws["w"].sum(-1) + them.x["y"][:, None, 0]
    np.testing.assert_allclose(of.draws[..., 1], expected, rtol=1e-5)


def test_what_is_not_finite_is_counted_by_name_and_left_out():
    theta, x, draws = np.zeros((6, 2)), np.ones((6, 3)), np.zeros((6, 4, 2))
    x[1, 2], draws[1, 0, 0], draws[4, 3, 1] = np.nan, np.inf, np.nan
    with pytest.warns(UserWarning, match=r"2 of 6 simulations .*\(x: 1, draws: 2\).*left out"):
        them = Joint(theta, x, draws)
    assert them.num_simulations == 4 and them.left_out == {"x": 1, "draws": 2}
    assert np.isfinite(them.draws).all() and np.isfinite(them.x).all()
    with pytest.raises(ValueError, match="got none in 6"):
        Joint(theta, np.full((6, 3), np.nan), draws)


def test_a_simulator_of_nan_is_said():
    def broken(key: Any) -> Any:
        theta = jax.random.normal(key, (2,))
        return theta, jnp.where(theta[0] > 0, theta, jnp.nan)

    def prior(key: Any, x: Any, num_samples: int) -> Any:
        return jax.random.normal(key, (num_samples, 2))

    with pytest.warns(UserWarning, match="NaN or infinite"):
        them = joint.draw(
            jax.random.key(0), broken, prior, num_simulations=40, num_samples=2, batch_size=40
        )
    assert them.num_simulations + them.left_out["x"] == 40


@pytest.mark.parametrize(
    ("theta", "x", "draws"),
    [
        ((5, 2), (5, 3), (5, 2)),  # one draw for each, without its axis
        ((5, 2), (4, 3), (5, 7, 2)),
        ((5, 2), (5, 3), (7, 5, 2)),
        ((5, 2), (5, 3), (5, 7, 3)),
        ((5, 2), (5, 3), (5, 0, 2)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(theta: Any, x: Any, draws: Any):
    with pytest.raises(ValueError, match=r"expected theta \[N, ...\], x \[N, ...\], and draws"):
        Joint(np.zeros(theta), np.zeros(x), np.zeros(draws))


@pytest.mark.bad_input
def test_other_bad_input():
    how = {"num_simulations": 4, "num_samples": 3}
    with pytest.raises(ValueError, match="num_simulations to be a whole number"):
        joint.draw(jax.random.key(0), simulate, sampler, **how | {"num_simulations": 0})
    with pytest.raises(ValueError, match="sampler to be a function of"):
        joint.draw(jax.random.key(0), simulate, lambda key, x: x, **how)  # pyright: ignore
    with pytest.raises(ValueError, match="key of JAX"):
        joint.draw(0, simulate, sampler, **how)  # pyright: ignore
    them = drawn(11)
    with pytest.raises(ValueError, match="numbers \\[\\] by name"):
        joint.evaluate(them, lambda theta, x: {"w": theta["w"]})
    with pytest.raises(ValueError, match="'bad', which is NaN"):
        joint.evaluate(them, lambda theta, x: {"bad": jnp.sqrt(-1 - theta["mu"] ** 2)})
