"""Smoothing: paths given all observations, from the populations that a particle filter kept."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from ppl.checks import check_count
from ppl.pytrees import as_pytree
from ppl.rows import take_rows

from ..base import Guarantee, X
from ..diagnostics import trace_back
from ..registry import sampler
from ..results import History
from .filtering import StateSpace
from .laws import batched, log_prob_of


def trajectories(history: History) -> X:
    """Whole paths [T, N, ...] of a filter's last particles by their genealogy, weighted by
    `history.log_weights[-1]`.

    They obey LAW 1 for p(x_0..x_{T-1}, y_0..y_{T-1}), at no cost; but early states coalesce to few
    values as T grows, where `backward_sample` keeps them apart.
    """
    slots = trace_back(history.ancestors)
    return jax.tree.map(
        lambda leaf: jax.vmap(lambda row, slot: row[slot])(leaf, slots), history.drawn
    )


@sampler(Guarantee.CONSISTENT, proof="tests/samplers/latent/test_filtering.py")
def backward_sample(key: PRNGKeyArray, model: StateSpace, history: History, num: int) -> X:
    """Draw `num` smoothing paths [T, num, ...] from a filter's history by backward simulation
    (FFBSi; Godsill, Doucet and West 2004).

    From the last population by weight, then back in time slot i with probability in proportion to

        W_t^i p(x_{t+1} | x_t^i)

    so all N particles of each time are candidates, not only survivors.  Equally weighted;
    consistent as N grows, not unbiased.  Every draw costs O(N) transition densities per time: O(num
    N T) in all, and num * N floats of memory. The transition needs a density: a deterministic
    component makes every path its own ancestor's only.

    Raises:
        ValueError: if `num` < 1.
    """
    check_count("num", num)
    return _backward(key, StateSpace(*map(as_pytree, model)), history, num=num)


@functools.partial(jax.jit, static_argnames="num")
def _backward(key: Any, model: StateSpace, history: History, *, num: int) -> X:
    times, size = history.log_weights.shape
    keys = jax.random.split(key, times)
    last = jax.random.categorical(keys[-1], history.log_weights[-1], shape=(num,)).astype(jnp.int32)
    end = jax.tree.map(lambda leaf: leaf[-1][last], history.drawn)

    def back(after: X, inputs: tuple) -> tuple[X, X]:
        t, step_key, x, log_weights = inputs
        law = batched("transition", model.transition(t + 1, x), size)

        def log_backward(one: X) -> Array:
            return log_weights + log_prob_of(
                law, jax.tree.map(lambda v: jnp.broadcast_to(v, (size, *v.shape)), one)
            )

        chosen = jax.random.categorical(step_key, jax.vmap(log_backward)(after), axis=1).astype(
            jnp.int32
        )
        before = take_rows(x, chosen)
        return before, before

    earlier = jax.tree.map(lambda leaf: leaf[:-1], (history.drawn, history.log_weights))
    inputs = (jnp.arange(times - 1, dtype=jnp.int32), keys[:-1], *earlier)
    _, paths = jax.lax.scan(back, end, inputs, reverse=True)
    return jax.tree.map(lambda rows, row: jnp.concatenate([rows, row[None]]), paths, end)
