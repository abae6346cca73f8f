"""Strings that branch where they are uncertain: LAW 1, whatever the threshold, and faults that it
sees.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samplers.smc import branching
from samplers.strings import growing
from tests.helpers import as_strings
from tests.samplers.problems import check_law, gamma, mass, plain, target_of

THRESHOLDS = {"power": (0.0, 0.8, 9.0), "product": (0.0, 1.15, 9.0)}
"""All branch as long as there is room; some do; nobody does."""
ROOTS, NUM = 2, 6


def law_holds(model: str, problem: str, runs: int) -> None:
    target = target_of(model, problem)
    keys = jax.random.split(jax.random.key(4), runs * 3)
    rows = jnp.tile(jnp.asarray(THRESHOLDS[problem], jnp.float32), runs)

    def one(key: Any, threshold: Any) -> Any:
        # Not the jitted run itself: it would not see what a test has planted.
        how = {"num_roots": ROOTS, "num": NUM}
        out = branching.whole.__wrapped__(key, target, threshold, **how)
        assert out.details is not None
        return mass(out), out.details["branched"].sum()

    found, branched = jax.jit(jax.vmap(one))(keys, rows)
    branched = np.asarray(branched).reshape(runs, -1)
    assert (branched[:, 0] == NUM - ROOTS).any() and not branched[:, 2].any()
    assert 0 < branched[:, 1].mean() < branched[:, 0].mean()
    for i in range(3):
        check_law(np.asarray(found, np.float64)[i::3], gamma(model, problem), resolution=0.03)


def test_law_1():
    law_holds("table", "power", 1000)


@pytest.mark.slow
def test_law_1_where_factors_are_not_known_before():
    law_holds("hmm", "product", 3000)


def keep_weights(*args: Any) -> Any:
    parent, new, halved = split(*args)
    return parent, new, jnp.zeros_like(halved)


def take_the_likeliest(keys: Any, target: Any, proposal: Any, x: Any, moving: Any) -> Any:
    """A new string takes the likeliest token, as if it had drawn it."""
    new = (x.read == 0) & (x.passes > 0)
    likeliest = jnp.argmax(x.logits, axis=1).astype(jnp.int32)
    here = jnp.arange(target.max_tokens) == x.sequences.length[:, None]
    tokens = jnp.where(here, likeliest[:, None], x.sequences.tokens)
    length = jnp.full_like(likeliest, target.max_tokens)
    follow = growing.Follow(new, type(x.sequences)(tokens, length))
    return token(keys, target, proposal, x, moving, follow)


split, token = branching.split, growing.token


@pytest.mark.slow
def test_the_standard_error_is_that_of_independent_roots():
    p = plain("table")
    found = branching.run(jax.random.key(0), p, num_roots=4, num_particles=8, threshold=0.0)
    assert float(found.log_z_std_error) < 1e-6 and abs(float(found.log_z)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["weights", "tokens"])
def test_a_planted_fault_fails(fault: str, monkeypatch: pytest.MonkeyPatch):
    if fault == "weights":
        monkeypatch.setattr(branching, "split", keep_weights)
    else:
        monkeypatch.setattr(growing, "token", take_the_likeliest)
    with pytest.raises(AssertionError, match="z = "):
        law_holds("table", "power", 2000)


def test_the_heaviest_branch_first():
    log_weights = jnp.log(jnp.array([0.5, 2.0, 0.0, 1.0, 0.0, 3.0]))
    wanted = jnp.array([True, True, False, True, False, False])
    parent, new, halved = branching.split(log_weights, wanted)
    np.testing.assert_array_equal(parent, [0, 1, 1, 3, 3, 5])
    np.testing.assert_array_equal(new, [False, False, True, False, True, False])
    np.testing.assert_array_equal(halved, [False, True, True, True, True, False])
    nobody = branching.split(log_weights, jnp.zeros(6, bool))
    np.testing.assert_array_equal(nobody[0], np.arange(6))
    assert not nobody[1].any() and not nobody[2].any()


def test_entropy():
    law = jnp.log(jnp.array([[0.5, 0.25, 0.25, 0.0], [3.0, 0, 0, 0], [0, 0, 0, 0]]))
    np.testing.assert_allclose(branching.entropy(law), [1.5 * np.log(2), 0, 0], atol=1e-6)


@pytest.mark.slow
def test_branches_share_their_tokens_and_what_they_are():
    """A string's past is drawn once, and counted once; of p the weights add to one."""
    p = plain("table")
    out = branching.run(jax.random.key(1), p, num_roots=1, num_particles=8, threshold=0.0)
    living = np.asarray(out.log_weights) > -np.inf
    strings = as_strings(out.sequences.tokens, out.sequences.length)
    prefixes = {x[:t] for x, lives in zip(strings, living, strict=True) if lives for t in (1, 2)}
    assert int(out.cost.tokens) < 8 * 4 and len(prefixes) <= 2 + 4
    assert out.num_roots is not None and int(out.num_roots) == 1 and abs(float(out.log_z)) < 1e-6
    assert np.isinf(out.log_z_std_error)  # a single root knows nothing of its spread
    density = np.asarray(p.log_density(out.sequences.tokens, out.sequences.length))
    np.testing.assert_allclose(np.asarray(out.log_prob)[living], density[living], atol=1e-4)


def test_bad_input():
    with pytest.raises(ValueError, match="room for 5 roots, got num_particles=4; pass num_p"):
        branching.run(jax.random.key(0), plain("hmm"), num_roots=5, num_particles=4)
