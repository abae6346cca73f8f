"""Resamplers against those of the package `particles`, given the same uniforms: the same
ancestors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from particles import resampling as peer

from samplers import resampling
from tests.samplers.test_resampling import SCHEMES, WEIGHTS, draw, log_weights


@pytest.fixture
def uniforms(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes `particles` use the given uniforms: those of `rand` one call after another, and sorted
    ones.
    """

    def use(*calls: Any, ordered: Any = None) -> None:
        queue = [np.asarray(u, np.float64) for u in calls]
        rand = lambda size: queue.pop(0)[:size]  # noqa: E731
        monkeypatch.setattr(peer.random, "rand", rand)
        if ordered is not None:
            monkeypatch.setattr(
                peer, "uniform_spacings", lambda num: np.sort(np.asarray(ordered, np.float64)[:num])
            )

    return use


PEER_WEIGHTS = [WEIGHTS, np.random.default_rng(5).dirichlet(np.full(40, 0.4))]


@pytest.mark.parametrize("weights", PEER_WEIGHTS, ids=len)
@pytest.mark.parametrize("seed", range(5))
def test_the_same_ancestors_as_particles(
    seed: int, weights: np.ndarray, uniforms: Callable[..., None]
):
    key, num = jax.random.key(100 + seed), len(weights)
    ours = {
        name: np.sort(draw(resampler, key, log_weights(weights), num))
        for name, resampler in SCHEMES.items()
    }
    u = np.asarray(jax.random.uniform(key, (num,)))

    uniforms(u)
    np.testing.assert_array_equal(ours["stratified"], peer.stratified(weights, len(weights)))
    uniforms(np.asarray(jax.random.uniform(key, ()))[None])
    np.testing.assert_array_equal(ours["systematic"], peer.systematic(weights, len(weights)))
    uniforms(ordered=u)
    np.testing.assert_array_equal(ours["multinomial"], peer.multinomial(weights, len(weights)))
    certain = int(np.floor(num * weights + 1e-9).sum())
    uniforms(ordered=u[certain:])
    np.testing.assert_array_equal(ours["residual"], np.sort(peer.residual(weights, len(weights))))


def test_the_comparison_with_particles_can_fail(uniforms: Callable[..., None]):
    key, weights = jax.random.key(100), PEER_WEIGHTS[1]
    uniforms(jax.random.uniform(jax.random.key(101), (len(weights),)))
    assert (
        np.asarray(draw(resampling.stratified, key, log_weights(weights), 40))
        != peer.stratified(weights, len(weights))
    ).any()


def _ssp(weights: np.ndarray) -> np.ndarray:
    """SSP of `particles` as Python: its compiled form has uniforms of its own."""
    return inspect.unwrap(peer.ssp)(weights, len(weights))


@pytest.mark.parametrize("seed", range(10))
def test_ssp_and_killing_are_those_of_particles(seed: int, uniforms: Callable[..., None]):
    weights = PEER_WEIGHTS[1]
    key, num = jax.random.key(200 + seed), len(weights)
    uniforms(jax.random.uniform(key, (num - 1,)))
    ours = draw(resampling.ssp, key, log_weights(weights), num)
    np.testing.assert_array_equal(ours, _ssp(weights))

    keep_key, draw_key = jax.random.split(key)
    keep = np.asarray(jax.random.uniform(keep_key, (num,)))
    killed = keep * weights.max() >= weights
    uniforms(keep, ordered=np.asarray(jax.random.uniform(draw_key, (num,)))[killed])
    ours, theirs = (
        np.asarray(draw(resampling.killing, key, log_weights(weights), num)),
        peer.killing(weights, len(weights)),
    )
    np.testing.assert_array_equal(ours[~killed], theirs[~killed])
    np.testing.assert_array_equal(np.sort(ours[killed]), np.sort(theirs[killed]))
