"""Early rejection spares tokens and changes nothing, with soft potentials and laws of the cut that
favour long strings; and rows of parallel tempering know their rungs after swaps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ppl
from ppl.exact import enumerate_strings
from ppl.rows import take_rows
from samplers import base, kernels
from samplers.mcmc import parallel_tempering, suffix
from samplers.results import moved
from samplers.strings import cuts, proposals, regeneration
from samplers.testing import check_kernel
from tests.helpers import MAX_TOKENS
from tests.samplers.chains import chi_square_z, suffix_chain
from tests.samplers.problems import plain, score_arrays, target_of


def favours_long(cut: Any, length: Any, horizon: Any) -> Any:
    """c(r | n): e^(3 (n - T)) to 1 for the beginning against every other place.

    So a string cut at its beginning gains by becoming longer, which a bound must foresee.
    """
    cut, length, horizon = jnp.broadcast_arrays(cut, length, horizon)
    positions = jnp.minimum(length + 1, horizon)
    log_first = 3.0 * (length - MAX_TOKENS)
    log_c = jnp.where(cut == 0, log_first, 0.0) - jnp.log(jnp.exp(log_first) + positions - 1)
    return jnp.where(cut < positions, log_c, -jnp.inf)


def soft() -> Any:
    """p^2.5 and a score of every prefix: what is paid on the way may be taken back."""
    return plain("table") ** 2.5 * ppl.step_scores(score_arrays, ppl.Steps(every=1))


def most(target: Any) -> float:
    """The greatest log Phi of all strings."""
    x = enumerate_strings(target).sequences
    return float(np.asarray(target.log_potential(x.tokens, x.length)).max())


def started(target: Any, how: Any, num: int) -> Any:
    exact = enumerate_strings(target)
    rows = np.random.default_rng(0).choice(len(exact.probs), num, p=exact.probs)
    return regeneration.score(target, how.proposal, take_rows(exact.sequences, jnp.asarray(rows)))


def test_with_a_soft_potential_it_changes_the_cost_and_nothing_else():
    """The tightest bound there is: one a little lower would reject what is to be accepted."""
    target = soft()
    how = suffix.method(target, cut=favours_long, log_phi_max=most(target))
    x, key = started(target, how, 4000), jax.random.key(1)

    def run(early: bool) -> Any:
        chosen = dataclasses.replace(how, early_rejection=early)
        return suffix.moves(key, target, chosen, x, cuts.whole(target, 2))

    (found, info), (all_drawn, full) = run(True), run(False)
    np.testing.assert_array_equal(found.sequences.tokens, all_drawn.sequences.tokens)
    np.testing.assert_array_equal(info.accepted, full.accepted)
    early = np.asarray(info.details["rejected_early"])
    assert early.sum() > 200 and not (early & np.asarray(full.accepted)).any()
    # What is said of them is a bound, and what was spared is the cost.
    assert (np.asarray(info.log_ratio) >= np.asarray(full.log_ratio) - 1e-3)[early].all()
    np.testing.assert_array_equal(np.asarray(info.tokens)[~early], np.asarray(full.tokens)[~early])
    assert int(info.cost.tokens) == int(info.tokens.sum()) < int(full.cost.tokens)


def test_the_bound_of_a_whole_string():
    """A, and how far its Phi is below the greatest there is."""
    target = soft()
    how = suffix.method(target, cut=favours_long, log_phi_max=2.0)
    x = started(target, how, 4000)
    y = take_rows(x, jnp.arange(4000)[::-1])
    lengths, horizon = (x.sequences.length, y.sequences.length), jnp.full(4000, MAX_TOKENS)
    cut = jnp.minimum(jnp.minimum(*lengths), MAX_TOKENS - 1)

    @jax.jit
    def bound_and_ratio() -> Any:
        before, after = (favours_long(cut, n, horizon) for n in lengths)
        state = target.potential.init(4000)
        bound = suffix.log_ratio_bound(target, how, x, y, state, cut, after - before)
        return bound, suffix.log_ratio(target, how.cut, x, y, cut, horizon)

    bound, ratio = bound_and_ratio()
    room = 2.0 - target.log_potential(y.sequences.tokens, y.sequences.length)
    np.testing.assert_allclose(bound, ratio + room, atol=1e-4)


def test_the_moves_are_those_of_the_matrix():
    """Jitted, with a cut law, a soft potential and early rejection at once."""
    target = soft()
    options = {"cut": favours_long, "log_phi_max": most(target)}
    chain = suffix_chain(target, cut=favours_long)
    assert chain.bias <= 1e-12 and chain.imbalance <= 1e-12
    counts = check_kernel(suffix.kernel(target, **options), target, key=jax.random.key(3))
    assert abs(chi_square_z(counts, chain.matrix)) < 5
    assert chi_square_z(counts, suffix_chain(target).matrix) > 10


# Parallel tempering.

POWERS = (0.4, 1.1, 2.0)


def test_rows_know_their_rung_after_every_step():
    """log q of what is kept is that of a fresh look at the rung where the row now is."""
    target = plain("table") ** 2.0 * ppl.reward(score_arrays)
    kernel = parallel_tempering.kernel(target, POWERS)
    exact = enumerate_strings(target)
    rows = np.random.default_rng(0).choice(len(exact.probs), 40, p=exact.probs)
    state = kernel.init(take_rows(exact.sequences, jnp.asarray(rows)))
    ladder, swapped = jnp.asarray(POWERS, jnp.float32), 0
    for seed in range(3):
        state, info = kernel.step(jax.random.key(seed), state)
        swapped += int(info.details["swapped"].sum())
        here = parallel_tempering.at_rungs(target, ladder, state.rung)
        proposal = proposals.Powered(ladder, lookahead=True)
        fresh = regeneration.score(here, proposal, state.rows.sequences)
        np.testing.assert_allclose(state.rows.log_q, fresh.log_q, atol=1e-5)
        np.testing.assert_array_equal(np.sort(state.rung, axis=1), np.tile(range(3), (40, 1)))
        np.testing.assert_array_equal(info.details["rung"], state.rung)
    assert swapped > 20 and (np.asarray(state.rung) != np.arange(3)).any()


def told(key: Any, target: Any, x: Any) -> Any:
    """A step that stays, and says for what power it was made."""
    stays = jnp.zeros(x.log_p.shape[0], bool)
    return x, moved(~stays, changed=stays, details={"alpha": target.alpha})


def test_replicas_move_at_the_powers_of_their_rungs():
    """What the replicas' kernel is made for, in the order of the rungs, is the ladder; also after
    swaps.
    """
    target = plain("table") ** 2.0
    exact = enumerate_strings(target)
    rows = np.random.default_rng(0).choice(len(exact.probs), 60, p=exact.probs)

    def make(target: Any, proposal: Any) -> base.Kernel:
        return base.Kernel(lambda x: x, base.holding(told, target))

    kernel = parallel_tempering.kernel(target, POWERS, make=make)
    ladder = jnp.asarray(POWERS, jnp.float32)
    starts = take_rows(exact.sequences, jnp.asarray(rows))
    state = parallel_tempering.init(target, ladder, starts)  # 20 chains of three strings
    for seed in range(2):
        before = np.asarray(state.rung)
        state, info = kernel.step(jax.random.key(seed), state)
        np.testing.assert_allclose(info.details["alpha"], np.tile(ladder, (20, 1)))
    assert (before != np.arange(3)).any()


def test_a_sweep_sees_the_swaps_before_it():
    """Three replicas with fixed log p, from a rung order that is none of the rows': all outcomes'
    probabilities by hand.
    """
    log_prob, rung, ladder = np.array([-1.0, -3.0, -1.8]), np.array([2, 0, 1]), np.array(POWERS)
    law: dict[tuple, float] = {}
    for first in (False, True):
        for second in (False, True):
            replica, chance = list(np.argsort(rung)), 1.0
            for k, swap in enumerate((first, second)):
                low, high = replica[k], replica[k + 1]
                gain = (ladder[k + 1] - ladder[k]) * (log_prob[low] - log_prob[high])
                accept = min(1.0, np.exp(gain))
                chance *= accept if swap else 1 - accept
                if swap:
                    replica[k], replica[k + 1] = high, low
            after = tuple(np.argsort(replica).tolist())
            law[after] = law.get(after, 0.0) + chance
    num = 20_000
    tile = [jnp.tile(jnp.asarray(x), (num, 1)) for x in (log_prob.astype(np.float32), rung)]
    found, _, swapped = parallel_tempering.sweep(
        jax.random.split(jax.random.key(0), num),
        jnp.asarray(ladder, jnp.float32),
        tile[0],
        tile[1].astype(jnp.int32),
    )
    for after, chance in law.items():
        share = float((np.asarray(found) == after).all(1).mean())
        assert abs(share - chance) <= 5 * np.sqrt(chance * (1 - chance) / num) + 1e-9
    assert len([chance for chance in law.values() if chance > 0.05]) >= 3
    assert 0.05 < float(swapped.mean()) < 0.95


def test_a_move_and_its_acceptance_have_keys_of_their_own():
    """A move that draws y uniformly from [0, 1) and is to be taken with probability 1/2: were draw
    and acceptance from one key, only small ones would be taken.
    """

    def sample(key: Any, x: Any) -> Any:
        y = jax.vmap(lambda own: jax.random.uniform(own))(jax.random.split(key, x.shape[0]))
        return y, jnp.log(0.5) + 0.0 * y

    num = 20_000
    y, info = kernels.mh(base.Move(sample)).step(jax.random.key(0), jnp.full(num, -1.0))
    taken = np.asarray(y)[np.asarray(info.accepted)]
    assert abs(taken.mean() - 0.5) < 5 * np.sqrt(1 / 12 / len(taken))
    assert abs(float(info.acceptance) - 0.5) < 5 * 0.5 / np.sqrt(num)


def test_the_moves_of_a_plan_have_keys_of_their_own():
    """Two chains' first and second cuts are independent: all pairs of cuts, as often as they
    should be."""
    target = target_of("table", "plain") * ppl.min_tokens(MAX_TOKENS)
    how = suffix.method(target)
    x = started(target, how, 8000)
    _, info = suffix.moves(jax.random.key(2), target, how, x, cuts.whole(target, 2))
    cut = np.asarray(info.details["cut"])
    pairs = np.bincount(cut[:, 0] * MAX_TOKENS + cut[:, 1], minlength=MAX_TOKENS**2)
    expected = 8000 / MAX_TOKENS**2
    assert (np.abs(pairs - expected) < 5 * np.sqrt(expected)).all()
    # The tokens too: the same cut twice does not give the same draw twice.
    again = (cut[:, 0] == cut[:, 1]) & np.asarray(info.accepted).all(1)
    assert again.sum() > 200 and np.asarray(info.changed)[again, 1].mean() > 0.3
