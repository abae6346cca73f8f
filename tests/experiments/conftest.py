"""Fixtures of the experiments' tests."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import ppl
from experiments import compilation
from samplers import smc
from tests import helpers

from . import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny chat model."""
    return tiny.write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def rounds() -> list[smc.Result]:
    """A run in steps of text, after each round: ragged rounds, dead particles, strings that end at different times."""

    def score(tokens: jax.Array, length: jax.Array) -> jax.Array:
        return jnp.where((tokens[:, 1] == 3) & (length > 1), -jnp.inf, 0.3 * length)

    steps = ppl.Steps(delimiters=jnp.array([3]))
    target = helpers.markov().given(helpers.PROMPT, max_tokens=10) * ppl.step_scores(score, steps)
    return list(smc.iterate(jax.random.key(0), target, num_particles=16, steps=steps, history=True))


@pytest.fixture(autouse=True)
def _compiled_where_the_session_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands choose a compilation cache for the whole process; in tests the session's own stays."""
    monkeypatch.setattr(compilation, "use_cache", lambda: None)
