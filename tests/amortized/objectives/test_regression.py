"""The gradients of the regression losses are those of the divergences they are named for (arXiv
2410.02596).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortized.objectives import regression

STATES = 6


def divergences(p: jax.Array, q: jax.Array) -> dict[str, jax.Array]:
    forward, chi_square = (p * jnp.log(p / q)).sum(), (q**2 / p).sum() - 1
    return {
        "half_square": (q * jnp.log(q / p)).sum(),
        "square": 2 * (q * jnp.log(q / p)).sum(),
        "linex 1": forward,
        "linex 1/2": 4 * (1 - jnp.sqrt(p * q).sum()),
        "cosh": forward + chi_square / 2,
        "wrong sign": chi_square / 2,
    }


LOSSES: dict[str, Callable] = {
    "half_square": regression.half_square,
    "square": regression.square,
    "linex 1": regression.linex(1),
    "linex 1/2": regression.linex(0.5),
    "cosh": regression.cosh,
    "wrong sign": lambda t: regression.linex(1)(-t),
}


def test_expected_gradients_are_those_of_divergences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logits, target = (
            jnp.asarray(rng.normal(size=STATES)),
            jax.nn.softmax(jnp.asarray(rng.normal(size=STATES))),
        )
        log_q = jax.nn.log_softmax

        @jax.jit
        def gradients(logits):
            q = jax.lax.stop_gradient(jax.nn.softmax(logits))
            exact = jax.jacobian(lambda x: divergences(target, jax.nn.softmax(x)))(logits)
            ours = {
                n: jax.grad(lambda x, g=g: (q * g(jnp.log(target) - log_q(x))).sum())(logits)
                for n, g in LOSSES.items()
            }
            return ours, exact

        ours, exact = gradients(logits)
    for name in LOSSES:
        np.testing.assert_allclose(ours[name], exact[name], atol=1e-12, err_msg=name)
    # Linex(1) of the other sign, as in libraries whose residual is log model - log target, is
    # another divergence.
    assert np.abs(np.asarray(ours["wrong sign"] - exact["linex 1"])).max() > 0.05


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_zero_at_zero_and_finite_far_away(name: str):
    t = jnp.asarray([0.0, 1e-3, -500.0, 500.0])
    value, slope = jax.vmap(jax.value_and_grad(LOSSES[name]))(t)
    assert value[0] == 0 and slope[0] == 0
    assert np.isfinite(np.asarray(value)).all() and np.isfinite(np.asarray(slope) ** 2).all()
    assert (np.asarray(slope[1:]) != 0).all(), "a residual that large must still have a gradient"


@pytest.mark.bad_input
def test_linex_needs_a_slope():
    with pytest.raises(ValueError, match="half_square"):
        regression.linex(0)
