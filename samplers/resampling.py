"""Resampling schemes: (key, log_weights[N], num) -> ancestors[num], with E[copies of i] = num *
W_i.

Two draw without replacement, `optimal` and `gumbel_top_k`; their draws do not weigh the same, so
they return (ancestors, log_weights) with E[mean_j exp(v_j) f(a_j)] = sum_i W_i f(i).
`conditional_multinomial` pins its last slot and is for conditional SMC only.

All are safe for float32: a cumulative sum that ends below 1 is rescaled, a particle of weight zero
is never chosen, and an all-dead population keeps its order.
Survey: Douc, Cappe and Moulines (2005); Gerber, Chopin and Whiteley (2019).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.showing import shown

from .diagnostics import normalise


def multinomial(key: PRNGKeyArray, log_weights: Float[Array, " N"], num: int) -> Int[Array, " M"]:
    """Independent draws: u_j uniform."""
    return _invert(normalise(log_weights), _uniform(key, num))


def stratified(key: PRNGKeyArray, log_weights: Float[Array, " N"], num: int) -> Int[Array, " M"]:
    """One draw in each of `num` equal strata: u_j = (j + U_j) / num."""
    return _invert(
        normalise(log_weights), (jnp.arange(num, dtype=jnp.int32) + _uniform(key, num)) / num
    )


def systematic(key: PRNGKeyArray, log_weights: Float[Array, " N"], num: int) -> Int[Array, " M"]:
    """One uniform for all: u_j = (j + U) / num; copies of i are floor or ceil of num * W_i."""
    return _invert(normalise(log_weights), (jnp.arange(num, dtype=jnp.int32) + _uniform(key)) / num)


def residual(key: PRNGKeyArray, log_weights: Float[Array, " N"], num: int) -> Int[Array, " M"]:
    """floor(num * W_i) copies of i, and independent draws for the rest."""
    expected = normalise(log_weights) * num
    copies = jnp.floor(expected).astype(jnp.int32)
    kept = jnp.sum(copies, dtype=jnp.int32)
    slots = jnp.arange(num, dtype=jnp.int32)
    sure = jnp.minimum(
        jnp.searchsorted(jnp.cumsum(copies), slots, side="right"), log_weights.shape[0] - 1
    )
    rest = _invert(expected - copies, _uniform(key, num))
    return jnp.where(slots < kept, sure, rest).astype(jnp.int32)


def ssp(key: PRNGKeyArray, log_weights: Float[Array, " N"], num: int) -> Int[Array, " M"]:
    """Srinivasan sampling process: floor or ceil of num * W_i copies of i, and consistent in every
    order of particles.

    The fractional parts of two particles play against each other until one of them is 0 or 1: of
    x_i, x_j either i gains min(x_j, 1 - x_i) from j, or j gains min(x_i, 1 - x_j) from i, with
    probabilities that keep both means.  O(N), one particle after another.  Gerber, Chopin and
    Whiteley (2019).
    """
    size = log_weights.shape[0]
    expected = normalise(log_weights) * num
    whole = jnp.floor(expected)
    # Beyond the last particle stands one of fraction 0, so that the loop can always name the next.
    fractions = jnp.append(expected - whole, jnp.float32(0))

    def player(i: Int[Array, ""]) -> _Player:
        return _Player(i, fractions[i])

    start = player(jnp.int32(0)), player(jnp.int32(min(1, size)))
    newcomers = jnp.arange(2, size + 1, dtype=jnp.int32)
    (a, b), (left, wins) = jax.lax.scan(
        lambda players, inputs: _duel(*players, inputs[0], player(inputs[1])),
        start,
        (_uniform(key, size - 1), newcomers),
    )
    copies = whole.astype(jnp.int32).at[left].add(wins.astype(jnp.int32))
    # The last one has 0 or 1 but for rounding: what the others leave over.
    last = _either(a.index == size, b, a)
    spare = (last.fraction > 0) & (copies.sum(dtype=jnp.int32) < num)
    return _slots(copies.at[last.index].add(spare.astype(jnp.int32)), num)


class _Player(NamedTuple):
    """A particle and what is left of its fraction."""

    index: Int[Array, ""]
    fraction: Float[Array, ""]


def _either(condition: Bool[Array, ""], a: _Player, b: _Player) -> _Player:
    return _Player(*(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True)))


def _duel(
    a: _Player, b: _Player, u: Float[Array, ""], newcomer: _Player
) -> tuple[tuple[_Player, _Player], tuple[Int[Array, ""], Bool[Array, ""]]]:
    """One of two gains what the other loses; who is at 0 or 1 then leaves, and the newcomer takes
    the place.

    Returns the two that stay, and who left and whether with a copy.
    """
    gain_a = jnp.minimum(b.fraction, 1 - a.fraction)
    gain_b = jnp.minimum(a.fraction, 1 - b.fraction)
    b_gains = u * (gain_a + gain_b) < gain_a
    gain = jnp.where(b_gains, gain_b, gain_a)
    winner, loser = _either(b_gains, b, a), _either(b_gains, a, b)
    empty = loser.fraction < 1 - winner.fraction  # else the winner is at 1
    after = (
        _either(empty, winner._replace(fraction=winner.fraction + gain), newcomer),
        _either(empty, newcomer, loser._replace(fraction=loser.fraction - gain)),
    )
    return after, (jnp.where(empty, loser.index, winner.index), ~empty)


def _slots(copies: Int[Array, " N"], num: int) -> Int[Array, " M"]:
    """Particles in their order, as often as `copies` says.

    If rounding has lost or made a copy, the last living particle gets one more, or the last copy is
    left out.
    """
    size, living, slots = copies.shape[0], copies > 0, jnp.arange(num, dtype=jnp.int32)
    found = jnp.searchsorted(jnp.cumsum(copies), slots, side="right")
    found = jnp.minimum(found, size - 1 - jnp.argmax(living[::-1]))
    return jnp.where(living.any(), found, slots % size).astype(jnp.int32)


def killing(key: PRNGKeyArray, log_weights: Float[Array, " N"], num: int) -> Int[Array, " N"]:
    """Keep i with probability W_i / max W, otherwise draw its slot anew from W.

    E[copies of i] = W_i / max W + W_i sum_j (1 - W_j / max W) = N W_i.  That is exact only because
    the probability of keeping is proportional to W_i and the redraw is from all of W, the kept ones
    among them; and only for num = N. The slots are independent, so no count varies more than
    multinomially, and less where weights are nearly equal.

    Raises:
        ValueError: if num is not N.
    """
    if num != log_weights.shape[0]:
        raise ValueError(
            f"expected as many slots as particles, got {num} slots for {log_weights.shape[0]}"
            " particles; killing"
            " decides slot by slot whether a particle stays, use resampling.ssp to change their"
            " number"
        )
    weights = normalise(log_weights)
    keep_key, draw_key = jax.random.split(key)
    keep = _uniform(keep_key, num) * jnp.max(weights) < weights
    return jnp.where(
        keep, jnp.arange(num, dtype=jnp.int32), _invert(weights, _uniform(draw_key, num))
    ).astype(jnp.int32)


def conditional_multinomial(
    key: PRNGKeyArray, log_weights: Float[Array, " N"], num: int
) -> Int[Array, " M"]:
    """Multinomial, except that the last slot keeps the last particle: ancestors[num - 1] = N - 1
    (conditional SMC).

    The other slots draw from all N, the pinned one among them.  E[copies of i] = (num - 1) W_i +
    1{i = N - 1}: by itself it is no unbiased scheme.  The pinned particle is kept even if it is
    dead.  Andrieu, Doucet and Holenstein (2010).
    """
    return multinomial(key, log_weights, num).at[-1].set(log_weights.shape[0] - 1)


def pinned_multinomial(
    key: PRNGKeyArray, log_probs: Float[Array, " N"], num: int
) -> Int[Array, " M"]:
    """Conditional multinomial; a reference of weight zero must not come back to life and takes a
    living ancestor.
    """
    ancestors = conditional_multinomial(key, log_probs, num)
    return jnp.where(jnp.isneginf(log_probs[-1]), ancestors.at[-1].set(ancestors[0]), ancestors)


def optimal(
    key: PRNGKeyArray, log_weights: Float[Array, " N"], num: int
) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    """Without replacement: the heaviest particles keep their weights, systematic draws from the
    rest weigh 1 / c each.

    c solves sum_i min(1, c W_i) = num, exactly: i is among those drawn with probability min(1, c
    W_i), and the new weights max(W_i, 1 / c) sum to 1.  Of all unbiased schemes that leave num
    particles, the least sum of variances of the weights.  With num or fewer living particles all
    are kept with their weights, and slots that are left over have log-weight -inf; so it is for num
    < N.  Fearnhead and Clifford (2003).
    """
    log_share = log_weights - _log_total(log_weights)
    chosen = kept_or_drawn(key, log_share, jnp.full(1, -jnp.inf, jnp.float32), num)
    log_new = jnp.where(chosen.kept, log_share[chosen.index], -chosen.log_c)
    return _fill(chosen.index, log_new, log_share)


@shown
class Chosen(NamedTuple):
    """What `kept_or_drawn` chose.

    index [num]: of a particle, or, from N on, of a part of the rest.  kept [num]: it had
    probability 1; a particle drawn had c W, and stands for 1 / c.  present [num]: slots that are
    not are left over.  log_c [].
    """

    index: Int[Array, " M"]
    kept: Bool[Array, " M"]
    present: Bool[Array, " M"]
    log_c: Float[Array, ""]


def kept_or_drawn(
    key: PRNGKeyArray, log_weights: Float[Array, " N"], log_rest: Float[Array, " K"], num: int
) -> Chosen:
    """The choice of `optimal`, beside a rest in K parts that is too fine to be listed: each draw
    that falls on a part stands for something inside of it, of which none weighs more than 1 / c.

    c solves sum_i min(1, c W_i) + c sum_k R_k = num.
    """
    size = log_weights.shape[0]
    order = jnp.argsort(-log_weights)
    heaviest_kept, log_c = _threshold(log_weights[order], num, jax.nn.logsumexp(log_rest))
    kept = jnp.zeros(size, bool).at[order].set(jnp.arange(size) < heaviest_kept)

    points = (jnp.arange(num, dtype=jnp.int32) + _uniform(key)) / jnp.maximum(
        num - heaviest_kept, 1
    )
    # What can be drawn is scaled to itself: beside the heaviest particle all of it may vanish in
    # float32.
    others = jnp.concatenate([jnp.where(kept, -jnp.inf, log_weights), log_rest])
    drawn = _invert(normalise(others), points)
    # Slots: the kept ones in their order, then the draws.
    ranked = jnp.resize(jnp.argsort(~kept), (num,)).astype(jnp.int32)
    first = jnp.arange(num, dtype=jnp.int32) < heaviest_kept
    index = jnp.where(first, ranked, jnp.roll(drawn, heaviest_kept))
    return Chosen(index, first, first | (others > -jnp.inf).any(), log_c)


def log_scale(
    log_weights: Float[Array, " N"], log_rest: Float[Array, ""], num: int
) -> Float[Array, ""]:
    """log c of `kept_or_drawn`: sum_i min(1, c W_i) + c R = num; not finite if all have room."""
    return _threshold(jnp.sort(log_weights, descending=True), num, log_rest)[1]


def gumbel_top_k(
    key: PRNGKeyArray, log_weights: Float[Array, " N"], num: int
) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    """Without replacement: particles in the order of their keys log W_i + Gumbel_i, the first `num`
    of them.

    The law is that of drawing one after another from what is left of W.  With kappa the (num +
    1)-th key, particle i weighs W_i / P(its key > kappa), P = 1 - exp(-W_i / e^kappa): unbiased,
    though the weights need not sum to 1.  With num or fewer living particles all are kept with
    their weights, and slots that are left over have log-weight -inf. arXiv 1903.06059; Duffield,
    Lund and Thorup (2007).
    """
    size = log_weights.shape[0]
    log_share = log_weights - _log_total(log_weights)
    # Not the default mode: its largest value is 16.6, met too often among many particles.
    keys = log_share + jax.random.gumbel(key, (size,), jnp.float32, mode="high")
    keys = jnp.append(keys, jnp.full(max(num + 1 - size, 0), -jnp.inf, jnp.float32))
    top, ancestors = jax.lax.top_k(keys, num + 1)
    ancestors = jnp.minimum(ancestors[:num], size - 1)
    log_new = log_share[ancestors] - log_inclusion(log_share[ancestors], top[num])
    return _fill(ancestors, log_new, log_share)


def log_inclusion(log_probs: Float[Array, " M"], log_kappa: Float[Array, ""]) -> Float[Array, " M"]:
    """log P(log p + Gumbel > log kappa) = log(1 - exp(-p / kappa)): inclusion probabilities of
    Gumbel top-k.
    """
    log_ratio = jnp.where(jnp.isneginf(log_kappa), jnp.inf, log_probs - log_kappa)
    # A small ratio is its own probability; exp of it would lose digits and at last be 0.
    return jnp.where(
        log_ratio < -15, log_ratio, jnp.log(-jnp.expm1(-jnp.exp(jnp.maximum(log_ratio, -20.0))))
    )


def _uniform(key: PRNGKeyArray, *shape: int) -> Float[Array, "*shape"]:
    return jax.random.uniform(key, shape, jnp.float32)


def _log_total(log_weights: Float[Array, " N"]) -> Float[Array, ""]:
    """log sum_i w_i; 0 for an all-dead population, whose log-weights then stay -inf."""
    total = jax.nn.logsumexp(log_weights)
    return jnp.where(jnp.isneginf(total), 0.0, total)


def _threshold(
    falling: Float[Array, " N"], num: int, log_rest: float | Float[Array, ""] = -jnp.inf
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """How many of the heaviest particles are kept, and log c; `falling` are log-weights in falling
    order, beside a rest that is drawn from in any case.

    The smallest A for which c = (num - A) / (R + sum_{i > A} W_(i)) gives c W_(A+1) <= 1.  The tail
    starts behind the A kept particles: with the last of those in it, c is too small and the new
    weights sum to more than 1.
    """
    size = falling.shape[0]
    log_tail = jnp.logaddexp(jax.lax.cumlogsumexp(falling, reverse=True), log_rest)
    log_slots = jnp.log(jnp.maximum(num - jnp.arange(size, dtype=jnp.int32), 0).astype(jnp.float32))
    smallest = jnp.argmax(log_slots + falling <= log_tail)
    living = jnp.sum(falling > -jnp.inf, dtype=jnp.int32)
    # At num - 1 it always holds, but for rounding.
    whole = (living <= num) & jnp.isneginf(log_rest)
    heaviest_kept = jnp.where(whole, living, jnp.minimum(smallest, num - 1))
    at = jnp.minimum(heaviest_kept, size - 1)
    return heaviest_kept, log_slots[at] - log_tail[at]


def _fill(
    ancestors: Int[Array, " M"], log_new: Float[Array, " M"], log_share: Float[Array, " N"]
) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    """Ancestors and log-weights from their new shares; slots beyond the living ones repeat the
    first with weight 0.
    """
    num, living = ancestors.shape[0], jnp.sum(log_share > -jnp.inf, dtype=jnp.int32)
    slots = jnp.arange(num, dtype=jnp.int32)
    spare = slots >= living
    ancestors = jnp.where(spare, ancestors[0], ancestors)
    log_weights = jnp.where(spare, -jnp.inf, log_new + jnp.log(num))
    return jnp.where(living > 0, ancestors, slots % log_share.shape[0]).astype(
        jnp.int32
    ), log_weights


def _invert(weights: Float[Array, " N"], points: Float[Array, " M"]) -> Int[Array, " M"]:
    """The particle in whose stretch of the cumulative weights each point in [0, 1) falls."""
    num = weights.shape[0]
    # A parallel cumulative sum need not be monotone in float32, and a weight of zero must not widen
    # it.
    cumulative = jax.lax.cummax(jnp.where(weights > 0, jnp.cumsum(weights), 0.0))
    total = cumulative[-1]
    # Rounding can push a point onto the total: the last particle of positive weight is the greatest
    # legal answer.
    last = num - 1 - jnp.argmax(weights[::-1] > 0)
    found = jnp.searchsorted(cumulative, points * total, side="right")
    in_order = jnp.arange(points.shape[0], dtype=jnp.int32) % num
    return jnp.where(total > 0, jnp.minimum(found, last), in_order).astype(jnp.int32)
