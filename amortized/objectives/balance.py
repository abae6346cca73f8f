"""Balance objectives: losses that are zero exactly where a sampler draws in proportion to a reward.

A trajectory s_0 -> ... -> s_n makes n moves and then stops in s_n, which earns R(s_n).  With a
forward policy P_F (its stop included), a backward policy P_B and state flows F, every stretch of it
should balance,

    log F(s_i) + sum_{i..j} log P_F  =  log F(s_j) + sum_{i..j} log P_B
    F(s_0) = Z,  F(stopped) = R

and each objective asks this of other stretches:

    tb             the whole trajectory, log Z a parameter                    2201.13259
    vargrad        the whole trajectory, log Z the mean of the others         2010.10436, 2302.05446
    relative_tb    the whole trajectory, against a prior                      2405.20971
    db             single steps, F a parameter                                2111.09266
    subtb          all stretches, weighted by lam^length                      2209.12782
    modified_db, modified_subtb
                   the same where every state can stop,
                   F = R / P_F(stop)                                          2202.13903, 2310.04363
    forward_looking
                   log F = a learned part + log R                             2302.01687

Strings are the case P_B = 1 (`strings`).  All are pure functions of arrays, differentiable, and
return the weighted mean over the batch.  A stretch with a reward of zero or NaN at an end, or with
an impossible move in it, is left out: it contributes neither a value nor a gradient, and `flags`
counts such trajectories.  So a loss of zero says nothing of them: a policy may spend any share of
itself on strings of reward zero, and be wrong at no loss.  Two remedies, of which `gflownet` takes
both: the policy's own law forbids what it can (`ppl.support`), and `floored` gives the rest a small
reward.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ppl.pytrees import register_dataclass

from .regression import FORBIDDEN, Loss, half_square, square

Scalar = float | int | Float[Array, ""]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectories:
    """N trajectories of at most L moves, scored under the current policies, never under the ones
    that drew them.

    log_pf [N, L]: log P_F(s_{i+1} | s_i) of the moves.  log_pb [N, L]: log P_B(s_i | s_{i+1}).
    log_stop [N, L+1]: log P_F(stop | s_i); 0 where there is no other way to go on.
    log_reward [N, L+1]: log R(s_i) of stopping in s_i, at its temperature; -inf where it cannot
    stop. length [N]: n, the number of moves; what stands beyond is ignored.
    weight [N]: how much a trajectory counts; 0 leaves it out.
    """

    log_pf: Float[Array, "N L"]
    log_pb: Float[Array, "N L"]
    log_stop: Float[Array, "N M"]
    log_reward: Float[Array, "N M"]
    length: Int[Array, " N"]
    weight: Float[Array, " N"]


def strings(
    log_q: Float[Array, "N T"],
    log_q_stop: Float[Array, "N T+1"],
    log_reward: Float[Array, "N T+1"],
    length: Int[Array, " N"],
    *,
    temperature: Scalar = 1.0,
    weight: Float[Array, " N"] | None = None,
) -> Trajectories:
    """Strings as trajectories: a move writes a token, and P_B = 1.

    Rewards are stored and passed untempered; here, and only here, they become R^(1 / temperature).
    A string of T tokens is cut by the horizon and cannot go on, so log q(stop) there is 0 whatever
    the model says: were it scored, the loss could vanish for a wrong sampler.

    Args:
        log_q: log q of every token, under the current model.
        log_q_stop: log q(EOS) after i tokens, i = 0..T.
        log_reward: log R of the string that stops after i tokens.
        length: tokens before EOS.
        temperature: of the reward; a schedule's value is as good.
        weight: how much a string counts, 1 by default.
    """
    weight = jnp.ones(log_q.shape[0], log_q.dtype) if weight is None else weight
    return Trajectories(
        log_pf=log_q,
        log_pb=jnp.zeros_like(log_q),
        log_stop=log_q_stop.at[:, -1].set(0.0),
        log_reward=log_reward / temperature,
        length=length,
        weight=weight,
    )


def flags(x: Trajectories) -> dict[str, Int[Array, ""]]:
    """How many trajectories that count ended in a reward of zero (`dead`), NaN or infinity
    (`invalid`).
    """
    log_reward, counts = _last(x, x.log_reward), x.weight > 0
    dead = jnp.isneginf(log_reward)
    return {
        "dead": (counts & dead).sum(dtype=jnp.int32),
        "invalid": (counts & ~dead & ~jnp.isfinite(log_reward)).sum(dtype=jnp.int32),
    }


def log_z(x: Trajectories) -> Float[Array, ""]:
    """The batch's own log Z, the mean of log R + log P_B - log P_F, as a number without gradient;
    NaN where no reward is positive.
    """
    t, known = _whole(x)
    mass = jnp.where(known, x.weight, 0.0)
    mean = (mass * t).sum() / jnp.where(mass.sum() > 0, mass.sum(), 1.0)
    return jax.lax.stop_gradient(jnp.where(mass.sum() > 0, mean, jnp.nan))


def floored(x: Trajectories, log_prior: Float[Array, " N"]) -> Trajectories:
    """Trajectories of one target, in which those that end in a reward of zero have a small one,

        log R = log Z - 10 + log prior

    with the batch's own log Z.  So a policy learns not to draw them, and is wrong by a share of
    e^-10 at most, whatever the scale of the rewards.

    `log_prior` [N] is the log-probability of each under any normalised law, of strings the model's;
    one of -inf, or a batch without a positive reward, is left as it is.
    """
    own = jnp.arange(x.log_reward.shape[1]) == x.length[:, None]
    least = (log_z(x) - FORBIDDEN + log_prior)[:, None]
    zero = own & jnp.isneginf(x.log_reward) & jnp.isfinite(least)
    return dataclasses.replace(x, log_reward=jnp.where(zero, least, x.log_reward))


# Objectives.


def tb(
    x: Trajectories, log_z: Scalar | Float[Array, " N"], loss: Loss = square
) -> Float[Array, ""]:
    """Trajectory balance: g(log R + sum log P_B - log Z - sum log P_F).

    `log_z` is a parameter: [] for all, or [N], as in `log_z[prompt]`, one for every prompt.
    """
    t, known = _whole(x)
    t = t - log_z
    return _mean(jnp.where(known, loss(t), 0.0), known, x.weight)


def vargrad(x: Trajectories, groups: Int[Array, " N"] | None = None) -> Float[Array, ""]:
    """Half the variance of log P_F - log P_B - log R within each group; log Z needs no parameter.

    `groups` [N] in 0..N-1 names each trajectory's prompt; None: one for all.  On-policy, the
    expected gradient over batches of B is (B - 1) / B times that of KL(q || p).
    """
    t, known = _whole(x)
    num = t.shape[0]
    groups = jnp.zeros(num, jnp.int32) if groups is None else groups
    weight = jnp.where(known, x.weight, 0.0)
    mass = jax.ops.segment_sum(weight, groups, num)
    mean = jax.ops.segment_sum(weight * t, groups, num) / jnp.where(mass > 0, mass, 1.0)
    return _mean(half_square(jnp.where(known, t - mean[groups], 0.0)), known, x.weight)


def relative_tb(
    log_q: Float[Array, " N"],
    log_prior: Float[Array, " N"],
    log_reward: Float[Array, " N"],
    log_z: Scalar | Float[Array, " N"],
    beta: Scalar = 1.0,
    loss: Loss = half_square,
) -> Float[Array, ""]:
    """Relative trajectory balance: g(log prior + beta log r - log Z - log q), zero at q = prior
    r^beta / Z.

    The densities are those of whole trajectories; P_B cancels between prior and model.
    """
    log_target = jax.lax.stop_gradient(log_prior) + beta * log_reward
    known = jnp.isfinite(log_target) & jnp.isfinite(log_q)
    t = jnp.where(known, log_target, 0.0) - jnp.where(known, log_q, 0.0) - log_z
    return _mean(jnp.where(known, loss(t), 0.0), known, jnp.ones_like(log_q))


def db(x: Trajectories, log_flow: Float[Array, "N M"], loss: Loss = square) -> Float[Array, ""]:
    """Detailed balance: every step on its own, averaged over all steps of the batch.  log Z = log
    F(s_0).
    """
    return _steps(x, *_with_end(x, *_entries(x, log_flow)), loss)


def modified_db(
    x: Trajectories,
    log_flow: Float[Array, "N M"] | None = None,
    loss: Loss = square,
    log_z: Scalar | None = None,
) -> Float[Array, ""]:
    """Detailed balance with the flow implied by stopping; arguments as in `modified_subtb`."""
    return _steps(x, *_from_source(x, log_flow, log_z), loss)


def subtb(
    x: Trajectories, log_flow: Float[Array, "N M"], lam: float | int = 0.9
) -> Float[Array, ""]:
    """Sub-trajectory balance: sum_{i<j} lam^(j-i) r_ij^2 / sum_{i<j} lam^(j-i), sums over the
    batch, in O(n).
    """
    return _pairs(x, *_with_end(x, *_entries(x, log_flow)), lam)


def modified_subtb(
    x: Trajectories,
    lam: float | int = 1.0,
    log_flow: Float[Array, "N M"] | None = None,
    log_z: Scalar | None = None,
) -> Float[Array, ""]:
    """Sub-trajectory balance with F(s_i) = R(s_i) / P_F(stop | s_i), in O(n); nothing else is
    learned.

    At the optimum `implied_log_flow(x)[:, 0]` is log Z.  `log_flow` is the flow at states that
    cannot stop, as below a minimum length; without it they are left out, which is right only if the
    root can stop: trajectories that have nothing in common do not learn each other's share.  Where
    it cannot, `log_z` [] is what flows into the root, as before a first move that is sure; NaN, or
    None: nothing does.
    """
    return _pairs(x, *_from_source(x, log_flow, log_z), lam)


def implied_log_flow(
    x: Trajectories, otherwise: Float[Array, "N M"] | None = None
) -> Float[Array, "N M"]:
    """log R(s_i) - log P_F(stop | s_i); where it cannot stop `otherwise`, or NaN, which is left
    out.
    """
    stops = jnp.isfinite(x.log_reward) & jnp.isfinite(x.log_stop)
    implied = jnp.where(stops, x.log_reward, 0.0) - jnp.where(stops, x.log_stop, 0.0)
    return jnp.where(stops, implied, jnp.nan if otherwise is None else otherwise)


def forward_looking(x: Trajectories, log_residual: Float[Array, "N M"]) -> Float[Array, "N M"]:
    """The flow log F(s_i) = log F~(s_i) + log R(s_i), F~ learned, for `db` and `subtb`; F~ alone
    where R is zero.
    """
    return log_residual + jnp.where(jnp.isfinite(x.log_reward), x.log_reward, 0.0)


# With c_i = sum_{k<i} (log P_F - log P_B) - log F(s_i), the residual of the stretch i..j is c_i -
# c_j.

Entries = tuple[Float[Array, "N K"], Bool[Array, "N K"]]


def _moves(x: Trajectories) -> Entries:
    """sum_{k<i} (log P_F - log P_B) [N, L+1], and which are on the way and possible."""
    made = jnp.arange(x.log_pf.shape[1]) < x.length[:, None]
    possible = jnp.isfinite(x.log_pf) & jnp.isfinite(x.log_pb)
    step = jnp.where(made & possible, x.log_pf, 0.0) - jnp.where(made & possible, x.log_pb, 0.0)
    start = jnp.zeros_like(step[:, :1])
    total = jnp.concatenate([start, jnp.cumsum(step, axis=1)], axis=1)
    reached = jnp.cumprod(jnp.concatenate([start + 1, made & possible], axis=1), axis=1) > 0
    return total, reached


def _entries(x: Trajectories, log_flow: Array) -> Entries:
    total, reached = _moves(x)
    known = reached & jnp.isfinite(log_flow)
    return jnp.where(known, total - jnp.where(known, log_flow, 0.0), 0.0), known


def _from_source(x: Trajectories, log_flow: Array | None, log_z: Scalar | None) -> Entries:
    """The entries under the flow implied by stopping, after that of the source, if there is one."""
    c, known = _entries(x, implied_log_flow(x, log_flow))
    if log_z is None:
        return c, known
    source = jnp.broadcast_to(jnp.asarray(log_z, c.dtype), (c.shape[0], 1))
    flows = jnp.isfinite(source)
    c = jnp.concatenate([jnp.where(flows, -source, 0.0), c], axis=1)
    return c, jnp.concatenate([flows, known], axis=1)


def _end(x: Trajectories) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """The entry [N] of the stopped state, whose flow is R."""
    total, reached = _moves(x)
    log_stop, log_reward = _last(x, x.log_stop), _last(x, x.log_reward)
    known = _last(x, reached) & jnp.isfinite(log_stop) & jnp.isfinite(log_reward)
    return _last(x, total) + jnp.where(known, log_stop, 0.0) - jnp.where(
        known, log_reward, 0.0
    ), known


def _with_end(x: Trajectories, c: Array, known: Array) -> Entries:
    """The entries with that of the stopped state after the last."""
    end, end_known = _end(x)
    at_end = jnp.arange(c.shape[1] + 1) == x.length[:, None] + 1
    c, known = jnp.pad(c, ((0, 0), (0, 1))), jnp.pad(known, ((0, 0), (0, 1)))
    known = jnp.where(at_end, end_known[:, None], known)
    return jnp.where(at_end & known, end[:, None], c), known


def _whole(x: Trajectories) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """log R + log P_B - log P_F of the whole trajectory."""
    end, known = _end(x)
    return jnp.where(known, -end, 0.0), known


def _last(x: Trajectories, values: Array) -> Array:
    return jnp.take_along_axis(values, x.length[:, None], axis=1)[:, 0]


def _mean(total: Array, count: Array, weight: Array) -> Array:
    """sum of weight * total over sum of weight * count; 0 if nothing counts."""
    mass = (weight * count).sum()
    return (weight * total).sum() / jnp.where(mass > 0, mass, 1.0)


def _steps(x: Trajectories, c: Array, known: Array, loss: Loss) -> Array:
    both = known[:, :-1] & known[:, 1:]
    t = jnp.where(both, c[:, :-1] - c[:, 1:], 0.0)
    return _mean(jnp.where(both, loss(t), 0.0).sum(1), both.sum(1, dtype=jnp.int32), x.weight)


def _pairs(x: Trajectories, c: Array, known: Array, lam: float | int) -> Array:
    return _mean(*(_all_pairs(c, known) if lam == 1 else _near_pairs(c, known, lam)), x.weight)


def _all_pairs(
    c: Float[Array, "N K"], known: Bool[Array, "N K"]
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """sum_{i<j} (c_j - c_i)^2 = n sum (c - mean c)^2, and the number of pairs."""
    num = known.sum(1).astype(c.dtype)
    mean = c.sum(1) / jnp.maximum(num, 1)
    spread = jnp.where(known, c - mean[:, None], 0.0)
    return num * (spread**2).sum(1), num * (num - 1) / 2


def _near_pairs(
    c: Float[Array, "N K"], known: Bool[Array, "N K"], lam: float | int
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """sum_{i<j} lam^(j-i-1) (c_j - c_i)^2, and the same of 1, in one pass.

    The pass carries mass A, mean m and squared deviations S of the earlier entries under their
    weights, so that nothing large is subtracted: sum_i w_i (c_j - c_i)^2 = S + A (c_j - m)^2.
    """

    def step(carry: tuple, entry: tuple) -> tuple[tuple, None]:
        mass, mean, spread, total, norm = carry
        value, here = entry
        deviation = jnp.where(here, value - mean, 0.0)
        squared = mass * deviation**2
        total = total + jnp.where(here, spread + squared, 0.0)
        norm = norm + jnp.where(here, mass, 0.0)
        later = lam * mass + here
        # An entry that is not known leaves the mean where it is.
        share = here / jnp.where(later > 0, later, 1.0)
        return (
            later,
            mean + share * deviation,
            lam * (spread + share * squared),
            total,
            norm,
        ), None

    zeros = jnp.zeros_like(c[:, 0])
    carry, _ = jax.lax.scan(step, (zeros,) * 5, (c.T, known.T))
    return carry[3], carry[4]
