"""Twist objectives: gradients by enumeration, what they learn against the optimal twist, tighter bounds on log Z."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from amortized import fit, twist_objectives, twists
from amortized.twist_objectives import CTL, DPG, FUDGE, SIXO, Batch, SoftQ, Strings, no_evidence
from ppl import exact
from ppl.lm import take_rows
from ppl.target import Target
from ppl.twists import twisted
from samplers import bounds
from tests.amortized.test_twists import ALL, STRINGS, optimal_values, random_values, row_of, table
from tests.helpers import EOS, MAX_TOKENS, VOCAB_SIZE
from tests.samplers.problems import target_of


def whole_batch(target: Target) -> Batch:
    """All strings, the positive ones weighted by gamma."""
    log_gamma = target.log_density(ALL.tokens, ALL.length)
    return Batch(ALL, log_gamma, ALL, jnp.float32(0), jnp.float32(1), jnp.int32(0))


def divergences(values: Any, target: Target, knows_end: bool) -> Any:
    """sum_t KL(sigma_t | pi_t) + KL(sigma | q), from the definitions; `knows_end`: Phi bans token 2, and knows it."""
    log_gamma = np.asarray(target.log_density(ALL.tokens, ALL.length), np.float64)
    sigma = np.exp(log_gamma - np.logaddexp.reduce(log_gamma))
    log_p = np.asarray(target.log_prob_factor(target.token_log_probs(ALL.tokens, ALL.length)), np.float64)
    total = 0.0
    for t in range(1, MAX_TOKENS):
        shares: dict[Any, float] = {}
        rows: dict[Any, tuple[float, float, int, int]] = {}  # log pi without psi, whether it counts, where log psi is
        for i, string in enumerate(STRINGS):
            grows = len(string) >= t
            state = string[:t] if grows else (*string, EOS)
            if knows_end and 2 in state:
                continue
            shares[state] = shares.get(state, 0.0) + sigma[i]
            row = (log_p[i, :t].sum(), 1.0, row_of(string[: t - 1]), string[t - 1])
            rows[state] = row if grows else (log_gamma[i], 0.0, 0, 0)
        base, grows, row, token = (np.array(column) for column in zip(*rows.values(), strict=True))
        log_pi = jnp.asarray(base, jnp.float32) + grows * values[row.astype(int), token.astype(int)]
        p = np.array(list(shares.values()))
        living = p > 0
        total += (p[living] * (np.log(p[living]) - log_pi[living])).sum() + jax.nn.logsumexp(log_pi)
    living = sigma > 0
    rows = np.array([[row_of(s[:t]) if t <= len(s) else 0 for t in range(MAX_TOKENS)] for s in STRINGS])[living]
    law = (scaled := target.log_prob_factor(jax.nn.log_softmax(_model_logits(target)))[living]) + values[rows]
    if knows_end:
        law = law.at[:, :, EOS].set(scaled[:, :, EOS]).at[:, :, 2].set(-jnp.inf)
    log_q = jnp.take_along_axis(jax.nn.log_softmax(law), ALL.tokens[living][:, :, None], axis=2)[:, :, 0]
    written = np.arange(MAX_TOKENS) <= np.asarray(ALL.length)[living][:, None]
    return total + (sigma[living] * (np.log(sigma[living]) - jnp.where(written, log_q, 0.0).sum(1))).sum()


def _model_logits(target: Target) -> Any:
    first = jnp.broadcast_to(target.prefix.logits, (len(STRINGS), 1, VOCAB_SIZE))
    return jnp.concatenate([first, target.lm.extend(target.prefix, ALL.tokens[:, :-1])], axis=1)


@pytest.mark.parametrize("problem", ["reward", "banned"])
def test_the_gradient_of_ctl_is_that_of_the_divergences(problem: str, monkeypatch: pytest.MonkeyPatch):
    """In expectation: every string is drawn from q as often as q says."""
    target, values = target_of("table", problem), random_values(5)
    weigh = twist_objectives.log_weights_so_far

    def weigh_all(s: Any) -> Any:
        return weigh(s) + s.log_q.sum(1, keepdims=True)

    monkeypatch.setattr(twist_objectives, "log_weights_so_far", weigh_all)
    loss = CTL(target, table)
    got = jax.grad(lambda v: loss(v, jax.random.key(0), whole_batch(target))[0] * MAX_TOKENS)(values)
    want = jax.grad(divergences)(values, target, problem == "banned")
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want).max() > 0.1


@pytest.mark.parametrize("objective", [CTL, DPG, SIXO, FUDGE, SoftQ])
def test_the_optimal_twist_is_a_stationary_point(objective: Any, monkeypatch: pytest.MonkeyPatch):
    """In expectation, each over the strings it asks for."""
    target = target_of("table", "reward")
    values, batch, log_z = optimal_values(target), whole_batch(target), exact.enumerate_strings(target).log_z
    log_p = target.token_log_probs(ALL.tokens, ALL.length).sum(1)
    weigh = twist_objectives.log_weights_so_far
    monkeypatch.setattr(twist_objectives, "log_weights_so_far", lambda s: weigh(s) + s.log_q.sum(1, keepdims=True))
    if objective in (SIXO, FUDGE):  # strings as often as the model draws them
        rows = np.repeat(np.arange(len(STRINGS)), np.round(20_000 * np.exp(np.asarray(log_p))).astype(int))
        batch = dataclasses.replace(batch, negative=take_rows(ALL, jnp.asarray(rows)))
    if objective is SoftQ:  # strings that can be drawn
        living = take_rows(ALL, jnp.asarray(np.flatnonzero(np.isfinite(log_p))))
        batch = Batch(living, jnp.zeros(living.length.shape[0]), living, *(batch.log_z, batch.ess, batch.tokens))
    batch = dataclasses.replace(batch, log_z=jnp.float32(log_z))
    gradient = jax.jit(jax.grad(lambda v: objective(target, table)(v, jax.random.key(0), batch)[0]))
    atol = 3e-3 if objective in (SIXO, FUDGE) else 1e-4
    at_optimum, elsewhere = gradient(values), gradient(values + random_values(6))
    assert np.abs(at_optimum).max() < atol < 0.2 * np.abs(elsewhere).max()


HOW = {
    CTL: (5e-2, 1500, False),
    DPG: (5e-2, 1500, False),
    SIXO: (5e-2, 2500, True),
    FUDGE: (5e-2, 2500, True),
    SoftQ: (5e-2, 1000, False),
}


@functools.cache
def learned(objective: Any, problem: str) -> jax.Array:
    rate, num_steps, from_model = HOW[objective]
    target = target_of("table", problem)
    strings = Strings(target, jax.tree_util.Partial(table), num_positive=64, num_negative=64, from_model=from_model)
    loss = objective(target, jax.tree_util.Partial(table))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))
    out = fit.run(
        jax.random.key(7),
        jnp.zeros_like(random_values(0)),
        loss,
        strings,
        no_evidence(),
        optimizer=optimizer,
        num_steps=num_steps,
        progress=False,
    )
    assert out.skipped == 0 and out.stopped == ""
    return out.params


def errors(values: jax.Array, target: Target) -> np.ndarray:
    """log psi - log psi* of every prefix that goes on, weighted by its share: rows (step, error, share, parent)."""
    optimum, share, log_gamma = optimal_values(target), {}, exact.enumerate_strings(target).probs
    for string, mass in zip(STRINGS, log_gamma, strict=True):
        for t in range(1, min(len(string), MAX_TOKENS - 1) + 1):
            share[string[:t]] = share.get(string[:t], 0.0) + mass
    rows = []
    for prefix, mass in share.items():
        row = row_of(prefix[:-1])
        rows.append((len(prefix), float(values[row, prefix[-1]] - optimum[row, prefix[-1]]), mass, row))
    return np.array(rows)


def spread(rows: np.ndarray, by: np.ndarray) -> float:
    """Root mean square of the errors, those of each group around their own mean."""
    total = 0.0
    for group in np.unique(by):
        step, error, share, _ = rows[by == group].T
        total += (share * (error - (share @ error) / share.sum()) ** 2).sum()
    return float(np.sqrt(total / rows[:, 2].sum()))


def log_z_bounds(target: Target, twist: Any, num: int) -> bounds.Bounds:
    law = exact.enumerate_strings(target)
    rows = np.random.default_rng(3).choice(len(law.probs), 400, p=law.probs)
    draws = take_rows(law.sequences, jnp.asarray(rows))
    target = target if twist is None else twisted(target, twist)
    return bounds.run(jax.random.key(9), target, draws, num_particles=num, batch_size=400)


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["reward", "must_end"])
@pytest.mark.parametrize("objective", HOW)
def test_what_is_learned_and_what_it_is_good_for(objective: Any, problem: str):
    """The optimal twist, up to what the objective leaves free, and both bounds on log Z closer than without one."""
    target = target_of("table", problem)
    values = learned(objective, problem)
    rows = errors(values, target)
    start = errors(jnp.zeros_like(values), target)
    # DPG sees ratios of siblings only.
    of = {DPG: lambda r: r[:, 3]}.get(objective, lambda r: np.zeros(len(r)))
    print(objective.__name__, problem, "rms error", spread(rows, of(rows)), "without a twist", spread(start, of(start)))
    absolute = np.sqrt((rows[:, 2] * rows[:, 1] ** 2).sum() / rows[:, 2].sum())
    print("   absolute", absolute, "by step", spread(rows, rows[:, 0]))
    log_z = exact.enumerate_strings(target).log_z
    plain, better = log_z_bounds(target, None, 2), log_z_bounds(target, twists.of(table(values), target), 2)
    for b in (plain, better):
        print("   ", float(b.lower), log_z, float(b.upper), float(b.gap), float(b.gap_std_error))
