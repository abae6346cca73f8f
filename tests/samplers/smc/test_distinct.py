"""SMC with different particles: LAW 1, exact where all strings fit, an honest standard error."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from samplers import resampling, smc
from samplers.smc import distinct
from samplers.strings import proposals
from tests.helpers import EOS, MODELS, PROMPT
from tests.samplers import problems
from tests.samplers.problems import check_law, gamma, masses, target_of

NUM = 3
"""Fewer than tokens: some of these are drawn together, as light ones."""


def law_holds(model: str, problem: str, runs: int = 6000) -> None:
    target = target_of(model, problem)
    keys = jax.random.split(jax.random.key(1), runs)
    # Not the jitted run itself: it would not see what a test has planted.
    found = masses(lambda key: distinct.whole.__wrapped__(key, target, num_particles=NUM), keys)
    check_law(found, gamma(model, problem), resolution=0.01)


# A known power, an automaton, and factors that no look-ahead shows, with an end.
CASES = [("table", "power"), ("markov", "regex"), ("hmm", "product")]


@pytest.mark.parametrize(
    ("model", "problem"),
    [pytest.param(*case, marks=pytest.mark.slow if i else ()) for i, case in enumerate(CASES)],
)
def test_law_1(model: str, problem: str):
    law_holds(model, problem)


@pytest.mark.slow
def test_law_1_where_light_tokens_come_twice(monkeypatch: pytest.MonkeyPatch):
    """More particles than tokens that are looked at one by one."""
    monkeypatch.setattr(distinct, "LISTED", 1)
    law_holds("table", "power")


def forget_inclusion(pairs: distinct.Pairs) -> distinct.Pairs:
    return dataclasses.replace(pairs, log_included=jnp.zeros_like(pairs.log_included))


@pytest.mark.slow
def test_a_planted_fault_fails(monkeypatch: pytest.MonkeyPatch):
    choose = distinct.choose
    monkeypatch.setattr(distinct, "choose", lambda *args: forget_inclusion(choose(*args)))
    with pytest.raises(AssertionError, match="z = "):
        law_holds("table", "power", 1500)


@pytest.fixture(scope="module")
def every_string() -> Any:
    """More particles than strings."""
    target = target_of("table", "product")
    return target, distinct.run(jax.random.key(2), target, num_particles=120, history=True)


def test_where_all_strings_fit_it_is_exact(every_string: Any):
    target, out = every_string
    truth = gamma("table", "product")
    np.testing.assert_allclose(out.log_z, np.log(sum(truth.values())), atol=1e-5)
    assert float(out.log_z_std_error) == 0
    alive = out.log_weights > -jnp.inf
    assert int(alive.sum()) == len(truth)
    density = target.log_density(out.sequences.tokens, out.sequences.length)
    np.testing.assert_allclose(out.log_density[alive], density[alive], atol=1e-5)
    weights = np.exp(np.asarray(out.log_weights + out.log_z - np.log(120))[alive])
    np.testing.assert_allclose(weights, np.exp(density[alive]), rtol=1e-4)
    assert problems.code(np.asarray(out.sequences.tokens)[alive]).size == len(truth)


def test_the_standard_error_and_what_was_dropped_are_their_formulas():
    """By following every lineage back; exact small numbers."""
    parents = jnp.array([[0, 0, 0], [0, 0, 2], [1, 1, 2]])
    included = jnp.array([[1, 0.5, 0.25], [0.5, 1, 0.8], [1, 0.4, 1]])
    dropped = jnp.array([[0.1, 0.1, 0.0], [0.2, 4.0, 0.6], [0.3, 0.3, 0.3]])
    weights = jnp.array([0.2, 0.3, 0.5])
    # In round 2 the shares are the weights; in round 1 slot 1 has 0.2 + 0.3, and in round 0 slot 0.
    variance = 0.6 * 0.3**2 + 0.2 * 0.5**2 + 0.75 * 0.5**2
    most = max(0.3 / 3, (0.5 * 4 + 0.5 * 0.6) / 3, 0.5 * 0.1 / 2)
    found = distinct.uncertainty(jnp.log(weights), parents, included, dropped)
    np.testing.assert_allclose(found, [np.sqrt(variance), most], rtol=1e-5)
    dead = jnp.full(3, -jnp.inf)
    assert distinct.uncertainty(dead, parents, included, dropped)[0] == jnp.inf


def test_what_is_promised_and_what_is_dropped_are_their_formulas():
    """Two prefixes, of which one has ended, and two slots: one for the weights, one for what was
    earned of late.
    """
    log_weights, recent = jnp.log(jnp.array([1.0, 0.4])), jnp.log(jnp.array([0.5, 0.8]))
    law = jnp.log(jnp.array([[0.6, 0.3, 0.06, 0.04]]))
    law = jnp.concatenate([law, jnp.full((1, 4), -jnp.inf)])
    value = [max(1 / 1.4, 0.5 / 1.3), max(0.4 / 1.4, 0.8 / 1.3)]
    promised = {v: value[0] * weight for v, weight in enumerate([0.6, 0.3, 0.06, 0.04])}
    promised[distinct.ITSELF] = value[1]
    c = 2 / sum(promised.values())
    assert max(promised.values()) * c < 1
    choose, active = jax.jit(distinct.choose), jnp.array([True, False])
    for i in range(6):
        pairs = choose(jax.random.key(i), log_weights, recent, law, active)
        kept = np.array([promised[int(v)] for v in pairs.token])
        np.testing.assert_allclose(np.exp(pairs.log_included), c * kept, rtol=1e-5)
        over = (sum(promised.values()) - kept.sum()) / (kept / (c * kept))
        np.testing.assert_allclose(pairs.dropped, over, rtol=1e-4)


def test_what_begins_badly_and_goes_on_well_is_kept():
    """One of eight first tokens has probability .01 and a certain future, which is nearly all of Z;
    the others go on with seven tokens each: 50 pairs for 16 particles, of which that one weighs a
    twentieth of the others.
    """
    first = np.full(9, (1 - 0.01) / 7)
    first[[0, EOS]] = 0.01, 0.0
    spread = np.where(np.isin(np.arange(9), [0, EOS]), 0.0, 1 / 7)
    rows = [first if i == EOS else np.eye(9)[0] if i == 0 else spread for i in range(9)]
    target = tabular.markov(np.array(rows), eos=EOS).given([EOS], max_tokens=4) ** 4
    log_z = np.log(0.01**4 + 7 * first[2] ** 4 * 7.0 ** (-3 * 3))
    run = jax.vmap(lambda key: distinct.run(key, target, num_particles=16).log_z)
    np.testing.assert_allclose(run(jax.random.split(jax.random.key(0), 8)), log_z, atol=0.05)


def test_it_is_the_default_where_there_is_a_power_and_its_genealogy_spells_the_strings():
    target, key = target_of("hmm", "every_1"), jax.random.key(5)
    out = smc.run(key, target, num_particles=6, history=True)
    ours = distinct.run(key, target, num_particles=6, history=True)
    jax.tree.map(np.testing.assert_array_equal, out, ours)
    seen = list(smc.iterate(key, target, num_particles=6, history=True, steps=None))
    assert len(seen) == int(out.rounds) and out.trace.resampled.any()
    np.testing.assert_array_equal(out.sequences.tokens, seen[-1].sequences.tokens)
    np.testing.assert_allclose(out.log_z, seen[-1].log_z, rtol=1e-5)
    assert out.history is not None
    rows: list[list[int]] = [[] for _ in range(6)]
    for drawn, ancestors in zip(out.history.drawn, out.history.ancestors, strict=True):
        rows = [
            [*rows[int(a)], *(int(v) for v in new if v >= 0)]
            for a, new in zip(ancestors, drawn, strict=True)
        ]
    assert int(out.history.drawn.min()) == -1  # of strings that had ended
    rows = [[*row, *[EOS] * (4 - len(row))] for row in rows]
    alive = np.isfinite(np.asarray(out.log_weights))
    np.testing.assert_array_equal(np.asarray(out.sequences.tokens)[alive], np.array(rows)[alive])


def test_options_ask_for_independent_particles():
    p, given = problems.plain("hmm"), {"proposal": proposals.locally_optimal}
    for target, options in ((p, {}), (p**2, given), (p**2, {"threshold": 0.5})):
        assert smc.run(jax.random.key(3), target, num_particles=4, **options).num_roots is not None


def test_blocks_of_a_population_or_more_part_nothing():
    target, key = problems.plain("hmm") ** 2, jax.random.key(3)
    whole = smc.run(key, target, num_particles=4)
    out = smc.run(key, target, num_particles=4, block_size=64)
    np.testing.assert_array_equal(out.sequences.tokens, whole.sequences.tokens)
    assert out.num_roots is None
    assert smc.run(key, target, num_particles=4, block_size=2).num_roots is not None
    # Of a list, it is the rows of all runs together.
    together = smc.run(key, [target] * 3, num_particles=4, block_size=8)
    for i, one in enumerate(jax.random.split(key, 3)):
        alone = smc.run(one, target, num_particles=4)
        np.testing.assert_array_equal(together.sequences.tokens[i], alone.sequences.tokens)


@pytest.mark.slow
def test_a_list_of_targets_is_single_runs():
    plain = MODELS["hmm"]().given_each([(2, 0), (3,) * 20, (0,)], max_tokens=4)
    targets, key = [p**a for p, a in zip(plain, (1.7, 0.8, 1.0), strict=True)], jax.random.key(9)
    together = smc.run(key, targets, num_particles=6)
    for i, (one, target) in enumerate(zip(jax.random.split(key, 3), targets, strict=True)):
        single = smc.run(one, target, num_particles=6)
        np.testing.assert_array_equal(together.sequences.tokens[i], single.sequences.tokens)
        np.testing.assert_allclose(together.log_z[i], single.log_z, rtol=1e-5)


def test_a_factor_that_is_no_number_kills_its_string_only():
    """The law is that of a potential that forbids those strings."""

    def score(bad: Any, tokens: Any, length: Any) -> Any:
        return jnp.where((length >= 2) & (tokens[:, 0] == 3), bad, 0.3 * length)

    p, found = problems.plain("table") ** 1.5, []
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        target = p * ppl.reward(jax.tree_util.Partial(score, jnp.float32(bad)))
        found.append(distinct.run(jax.random.key(4), target, num_particles=120))
    assert int(found[0].num_invalid) > 0 and int(found[2].num_invalid) == 0
    for out in found[:2]:
        np.testing.assert_allclose(out.log_z, found[2].log_z, rtol=1e-5)
        assert not jnp.isnan(out.log_weights).any()


def test_all_particles_dead():
    """Token 2 cannot follow this prompt."""
    target = MODELS["markov"]().given(PROMPT, max_tokens=4) ** 2 * ppl.forced([2])
    out = smc.run(jax.random.key(14), target, num_particles=4)
    assert out.all_dead and (out.log_weights == -jnp.inf).all() and out.rounds == 1
    assert not jnp.isnan(out.log_z) and out.log_z_std_error == jnp.inf


def test_what_is_too_fine_to_be_listed_is_drawn_as_often_as_it_weighs():
    """E[slots on a part of the rest] = c R_k and E[on a particle] = min(1, c W_i), by integrating
    over the uniform on a grid.
    """
    weights, rest, num = np.array([0.5, 0.2, 0.02]), np.array([0.18, 0.1]), 4
    log_c = np.log(2 / 0.3)  # two are kept, and two slots are for the others
    chosen = jax.jit(
        jax.vmap(lambda key: resampling.kept_or_drawn(key, jnp.log(weights), jnp.log(rest), num))
    )(jax.random.split(jax.random.key(0), 4000))
    assert (chosen.kept.sum(1) == 2).all() and chosen.present.all()
    np.testing.assert_allclose(chosen.log_c, log_c, rtol=1e-5)
    counts = (chosen.index[..., None] == np.arange(5)).sum(1).mean(0)
    expected = np.concatenate([[1, 1], np.exp(log_c) * np.array([0.02, 0.18, 0.1])])
    np.testing.assert_allclose(counts, expected, atol=0.03)


@pytest.mark.bad_input
def test_num_particles_must_be_a_count():
    for run in (smc.run, lambda *a, **k: next(smc.iterate(*a, **k)), distinct.run):
        with pytest.raises(ValueError, match="expected num_particles to be a whole number"):
            run(jax.random.key(0), problems.plain("hmm") ** 2, num_particles=0)


@pytest.mark.bad_input
def test_a_language_model_is_no_target():
    for run in (distinct.run, lambda *a: next(distinct.iterate(*a))):
        with pytest.raises(ValueError, match="expected a target"):
            run(jax.random.key(0), MODELS["hmm"]())
