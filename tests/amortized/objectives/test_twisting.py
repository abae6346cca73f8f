"""Twist objectives: gradients by enumeration, what they learn against the optimal twist, tighter
bounds on log Z.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from amortized import fit
from amortized.objectives import twisting
from amortized.objectives.twisting import CTL, DPG, FUDGE, SIXO, SoftQ
from amortized.strings import guide, twists
from ppl import exact
from ppl.ancestral import ancestral
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.target import Target
from ppl.twists import twisted
from samplers.smc import bounds
from tests.amortized.strings.test_twists import (
    ALL,
    STRINGS,
    optimal_values,
    random_values,
    row_of,
    table,
)
from tests.helpers import EOS, MAX_TOKENS, VOCAB_SIZE
from tests.samplers.problems import target_of

TABLE = guide.full(table(jnp.zeros_like(random_values(0))))


def whole_batch(target: Target) -> twists.Batch:
    """All strings, the positive ones weighted by gamma."""
    log_gamma = target.log_density(ALL.tokens, ALL.length)
    return twists.Batch(ALL, log_gamma, ALL, jnp.float32(0), jnp.float32(1), jnp.int32(0))


def divergences(values: Any, target: Target, knows_end: bool) -> Any:
    """sum_t KL(sigma_t | pi_t) + KL(sigma | q), from the definitions; `knows_end`: Phi bans token
    2, and knows it.
    """
    with jax.ensure_compile_time_eval():
        log_gamma = np.asarray(target.log_density(ALL.tokens, ALL.length), np.float64)
        log_p = np.asarray(
            target.log_prob_factor(target.token_log_probs(ALL.tokens, ALL.length)), np.float64
        )
        model = target.log_prob_factor(jax.nn.log_softmax(_model_logits(target)))
    sigma, total = np.exp(log_gamma - np.logaddexp.reduce(log_gamma)), 0.0
    for t in range(1, MAX_TOKENS):
        shares: dict[Any, float] = {}
        # log pi without psi, whether it counts, where log psi is
        rows: dict[Any, tuple[float, float, int, int]] = {}
        for i, string in enumerate(STRINGS):
            grows = len(string) >= t
            state = string[:t] if grows else (*string, EOS)
            if knows_end and 2 in state:
                continue
            shares[state] = shares.get(state, 0.0) + sigma[i]
            if grows:
                rows[state] = log_p[i, :t].sum(), 1.0, row_of(string[: t - 1]), string[t - 1]
            else:
                rows[state] = log_gamma[i], 0.0, 0, 0
        base, grows, row, token = (np.array(column) for column in zip(*rows.values(), strict=True))
        log_pi = jnp.asarray(base, jnp.float32) + grows * values[row.astype(int), token.astype(int)]
        p = np.array(list(shares.values()))
        living = p > 0
        total += (p[living] * (np.log(p[living]) - log_pi[living])).sum() + jax.nn.logsumexp(log_pi)
    living = sigma > 0
    rows = np.array(
        [[row_of(s[:t]) if t <= len(s) else 0 for t in range(MAX_TOKENS)] for s in STRINGS]
    )[living]
    law = (scaled := model[living]) + values[rows]
    if knows_end:
        law = law.at[:, :, EOS].set(scaled[:, :, EOS]).at[:, :, 2].set(-jnp.inf)
    log_q = jnp.take_along_axis(jax.nn.log_softmax(law), ALL.tokens[living][:, :, None], axis=2)[
        :, :, 0
    ]
    written = np.arange(MAX_TOKENS) <= np.asarray(ALL.length)[living][:, None]
    return (
        total
        + (sigma[living] * (np.log(sigma[living]) - jnp.where(written, log_q, 0.0).sum(1))).sum()
    )


def _model_logits(target: Target) -> Any:
    first = jnp.broadcast_to(target.prefix.logits, (len(STRINGS), 1, VOCAB_SIZE))
    return jnp.concatenate([first, target.lm.extend(target.prefix, ALL.tokens[:, :-1])], axis=1)


@pytest.mark.parametrize("problem", ["reward", pytest.param("banned", marks=pytest.mark.slow)])
def test_the_gradient_of_ctl_is_that_of_the_divergences(
    problem: str, monkeypatch: pytest.MonkeyPatch
):
    """In expectation: every string is drawn from q as often as q says."""
    target, values = target_of("table", problem), random_values(5)
    weigh = twisting.log_weights_so_far

    def weigh_all(s: Any) -> Any:
        return weigh(s) + s.log_q.sum(1, keepdims=True)

    monkeypatch.setattr(twisting, "log_weights_so_far", weigh_all)
    loss = twists.Loss(target, TABLE, CTL())
    batch = whole_batch(target)
    got = jax.jit(jax.grad(lambda v: loss(v, jax.random.key(0), batch)[0] * MAX_TOKENS))(values)
    want = jax.jit(jax.grad(lambda v: divergences(v, target, problem == "banned")))(values)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want).max() > 0.1


CASES = [
    (CTL, "reward"),
    (DPG, "reward"),
    (SIXO, "reward"),
    (FUDGE, "must_end"),
    (SoftQ, "reward"),
]
NUM_STEPS = 1500


def learned(objective: Any, problem: str) -> jax.Array:
    """A table that starts at psi = 1, from SMC's own strings; exact ones for the constraint."""
    target = target_of("table", problem)
    pool = exact_draws(target, 40_000) if problem == "must_end" else None
    numbers = {"num_positive": 64, "num_negative": 64}
    training = twists.training(TABLE, target, objective(), exact=pool, **numbers)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-2, NUM_STEPS))
    options = {"optimizer": optimizer, "num_steps": NUM_STEPS, "progress": False}
    out = fit.run(jax.random.key(7), training, **options)
    assert (out.skipped, out.stopped) == (0, "")
    return out.params


def exact_draws(target: Target, num: int) -> Sequences:
    law = exact.enumerate_strings(target)
    return take_rows(
        law.sequences,
        jnp.asarray(np.random.default_rng(3).choice(len(law.probs), num, p=law.probs)),
    )


def error(values: jax.Array, target: Target, per_prefix: bool) -> float:
    """Root mean square of log psi - log psi* over prefixes of sigma that go on; per prefix, around
    siblings' mean.
    """
    optimum, shares = optimal_values(target), {}
    for string, mass in zip(STRINGS, exact.enumerate_strings(target).probs, strict=True):
        for t in range(1, min(len(string), MAX_TOKENS - 1) + 1):
            shares[string[:t]] = shares.get(string[:t], 0.0) + mass
    prefixes = [prefix for prefix, mass in shares.items() if mass > 0]
    share = np.array([shares[prefix] for prefix in prefixes])
    row = np.array([row_of(prefix[:-1]) for prefix in prefixes])
    token = np.array([prefix[-1] for prefix in prefixes])
    off = np.asarray(values - optimum)[row, token]
    if per_prefix:
        mean = np.bincount(row, share * off) / np.maximum(np.bincount(row, share), 1e-30)
        off = off - mean[row]
    return float(np.sqrt((share * off**2).sum() / share.sum()))


@functools.cache
def plain_bounds(problem: str) -> bounds.Bounds:
    return log_z_bounds(target_of("table", problem), problem)


def log_z_bounds(target: Target, problem: str) -> bounds.Bounds:
    draws = exact_draws(target_of("table", problem), 400)
    return bounds.run(jax.random.key(9), target, draws, num_particles=2, batch_size=400)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "problem"), CASES)
def test_what_is_learned_is_the_optimal_twist_and_tightens_both_bounds(
    objective: Any, problem: str
):
    """log psi* itself, also of CTL, for strings that end early fix its scale; of DPG up to a factor
    per prefix.
    """
    target = target_of("table", problem)
    values, per_prefix = learned(objective, problem), objective is DPG
    off, before = (
        error(values, target, per_prefix),
        error(jnp.zeros_like(values), target, per_prefix),
    )
    assert off < 0.05 and before > 4 * off, (off, before)
    plain, better = (
        plain_bounds(problem),
        log_z_bounds(twisted(target, twists.of(table(values), target)), problem),
    )
    log_z = exact.enumerate_strings(target).log_z
    assert log_z - plain.lower > 0.08 and plain.upper - log_z > 0.08
    for bound in (better.lower, better.upper):
        assert abs(bound - log_z) < 0.02, (off, before)


@functools.cache
def powered() -> tuple[Target, twists.Batch]:
    """p^1.6 Phi^1.6; the strings of p are its own draws, many."""
    target = target_of("table", "reward") ** 1.6
    drawn = ancestral(jax.random.key(2), Target(target.lm, target.prefix, MAX_TOKENS), 100_000)
    log_z = jnp.float32(exact.enumerate_strings(target).log_z)
    return target, dataclasses.replace(whole_batch(target), negative=drawn, log_z=log_z)


def steepness(objective: Any) -> float:
    """The largest component of the gradient at psi*."""
    target, batch = powered()
    loss = twists.Loss(target, TABLE, objective())
    gradient = jax.jit(jax.grad(lambda v, batch: loss(v, jax.random.key(0), batch)[0]))(
        optimal_values(target), batch
    )
    return float(jnp.abs(gradient).max())


@pytest.mark.parametrize("objective", [pytest.param(SIXO, marks=pytest.mark.slow), FUDGE])
def test_powers_of_the_model_belong_to_the_optimal_twist(
    objective: Any, monkeypatch: pytest.MonkeyPatch
):
    """At psi* of a powered target nothing pulls; where the power is left out, or turned round,
    something does.
    """
    assert steepness(objective) < 2e-3
    right = twists._log_power
    for wrong in (lambda *args: 0.0 * right(*args), lambda *args: -right(*args)):
        monkeypatch.setattr(twists, "_log_power", wrong)
        assert steepness(objective) > 8e-3


def test_a_batch_without_a_living_string_is_skipped():
    target = target_of("table", "banned")
    batch = dataclasses.replace(whole_batch(target), log_weights=jnp.full(len(STRINGS), -jnp.inf))
    loss = twists.Loss(target, TABLE, DPG())
    assert jnp.isnan(jax.jit(lambda v: loss(v, jax.random.key(0), batch)[0])(random_values(1)))
