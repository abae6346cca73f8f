"""Fixtures of the experiments' tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from experiments import compilation
from ppl.sequences import Sequences
from samplers import base, smc
from samplers.results import Chains, Weighted, moved
from tests import helpers

from . import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny chat model."""
    return tiny.write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def rounds() -> list[Weighted]:
    """A run in steps of text, after each round: ragged rounds, dead particles, strings that end at
    different times.
    """

    def score(tokens: jax.Array, length: jax.Array) -> jax.Array:
        return jnp.where((tokens[:, 1] == 3) & (length > 1), -jnp.inf, 0.3 * length)

    steps = ppl.Steps(delimiters=jnp.array([3]))
    target = helpers.markov().given(helpers.PROMPT, max_tokens=10) * ppl.step_scores(score, steps)
    return list(smc.iterate(jax.random.key(0), target, num_particles=16, steps=steps, history=True))


@pytest.fixture(scope="session")
def chain_run() -> Chains:
    """As if four chains had made suffix moves, two for each of sixty draws: numbers, and no chains
    behind them.
    """
    rng, shape = np.random.default_rng(0), (60, 2, 4)
    length = np.minimum(rng.poisson(3, (60, 4)), 6).astype(np.int32)
    tokens = np.where(
        np.arange(6) < length[..., None], rng.choice([0, 2, 3], (60, 4, 6)), helpers.EOS
    )
    strings = Sequences(tokens.astype(np.int32), length)  # pyright: ignore[reportArgumentType]
    cut = rng.integers(0, 6, shape)
    drawn = np.where(rng.random(shape) < 0.8, 6 - cut, 0)
    accepted = (rng.random(shape) < 0.2 + 0.1 * cut) & (drawn > 0)
    accepted, proposed, tokens = (jnp.asarray(x) for x in (accepted, drawn > 0, drawn))
    info = moved(accepted, changed=accepted, proposed=proposed, tokens=tokens, details={"cut": cut})
    info = jax.device_get(dataclasses.replace(info, cost=None))
    log_prob = (-1.3 * length + rng.normal(size=length.shape)).astype(np.float32)
    cost: Any = base.Cost(tokens=drawn.sum(), forwards=np.int64(120))
    draws = {"sequences": strings, "log_prob": log_prob}
    key = jax.random.key(0)
    return Chains(
        draws=draws, info=info, state=None, cost=cost, key=key, steps=125, thin=2, warmup=5
    )


@pytest.fixture(autouse=True)
def _compiled_where_the_session_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands choose a compilation cache for the whole process; in tests the session's own
    stays.
    """
    monkeypatch.setattr(compilation, "use_cache", lambda: None)
