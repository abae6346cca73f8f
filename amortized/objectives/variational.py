"""Variational objectives for a guide q, as functions of log q of N drawn strings and their
log-weights.

A string's log-weight is log w = log gamma - log q, with gamma the target's density.  Gradients pass
through log q only: strings are discrete, so nothing passes through a draw, and weights are treated
as numbers wherever they multiply. Strings with log w = NaN or +inf are left out, those of weight
zero wherever log w itself would count; `flags` counts both.

    reverse_kl     KL(q || p) = -E_q log w + log Z, by score functions,
                   leave-one-out baseline                                     1401.4082, 1906.02769
    forward_kl     KL(p || q), by self-normalised weights; wake-phi of
                   wake-sleep                                                 1406.2751
    sleep          -log q of strings that the model itself drew; sleep-phi
    vimco          the importance-weighted bound with K draws, by score
                   functions                                                  1602.06725
    iwae           that bound's value, log mean w                             1509.00519

Every function takes groups [N] (None: one group), the prompt of each string, and averages over the
groups: baselines, normalisers and bounds are within a group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Groups = Int[Array, " N"] | None


def flags(log_weights: Float[Array, " N"]) -> dict[str, Int[Array, ""]]:
    """How many strings have weight zero (`dead`), and NaN or infinity (`invalid`)."""
    dead = jnp.isneginf(log_weights)
    return {
        "dead": dead.sum(dtype=jnp.int32),
        "invalid": (~dead & ~jnp.isfinite(log_weights)).sum(dtype=jnp.int32),
    }


def reverse_kl(
    log_q: Float[Array, " N"], log_weights: Float[Array, " N"], groups: Groups = None
) -> Float[Array, ""]:
    """A loss whose expected gradient on draws of q is grad KL(q || p): REINFORCE with a
    leave-one-out baseline.

        sum_i (b_i - log w_i) grad log q_i,    b_i = mean of log w over the others of the group

    averaged over the group's B strings: the gradient of `balance.vargrad` times B / (B - 1).  A
    string alone has no baseline and is left out.  KL is infinite where q draws strings of weight
    zero; they are left out too.
    """
    log_q, log_weights, valid, groups = _checked(log_q, log_weights, groups)
    num, total = _sums(groups, valid, log_weights)
    baseline = (total - log_weights) / jnp.maximum(num - 1, 1)
    signal = jnp.where(num > 1, baseline - log_weights, 0.0)
    return _over_groups(signal * log_q / jnp.maximum(num, 1), valid, groups)


def forward_kl(
    log_q: Float[Array, " N"], log_weights: Float[Array, " N"], groups: Groups = None
) -> Float[Array, ""]:
    """-sum_i softmax(log w)_i log q_i: KL(p || q) up to a constant, consistent as the group grows.

    The strings may come from anywhere whose density the weights know: the guide itself (wake-phi),
    SMC, a buffer with weights.  With a model's log p(x, z) in place of log q it is wake-theta.
    """
    log_q, log_weights, valid, groups = _checked(log_q, log_weights, groups)
    share = jnp.where(valid, jnp.exp(log_weights - _log_sum(log_weights, valid, groups)), 0.0)
    return -_over_groups(share * log_q, valid, groups)


def sleep(log_q: Float[Array, " N"]) -> Float[Array, ""]:
    """-mean log q of strings drawn from the model together with what they explain."""
    return -log_q.mean()


def iwae(log_weights: Float[Array, " N"], groups: Groups = None) -> Float[Array, ""]:
    """log mean_i w_i, at most log Z in expectation: strings of weight zero count, NaN and infinity
    do not.

    A number without a gradient: `vimco` learns q from it, `forward_kl` the model.
    """
    dead = jnp.isneginf(log_weights)
    _, log_weights, valid, groups = _checked(jnp.zeros_like(log_weights), log_weights, groups)
    num, _ = _sums(groups, valid | dead, log_weights)
    bound = _log_sum(log_weights, valid, groups) - jnp.log(jnp.maximum(num, 1))
    return _over_groups(bound / jnp.maximum(num, 1), valid | dead, groups)


def vimco(
    log_q: Float[Array, " N"], log_weights: Float[Array, " N"], groups: Groups = None
) -> Float[Array, ""]:
    """A loss whose expected gradient on draws of q is that of -E log mean_i w_i.

        sum_i ( L_{-i} - L + softmax(log w)_i ) grad log q_i

    L is the group's bound, and L_{-i} the same with w_i replaced by the geometric mean of the other
    positive weights; a string without any such other is left out.  Strings of weight zero count: q
    learns not to draw them.
    """
    dead = jnp.isneginf(log_weights) & jnp.isfinite(log_q)
    _, log_weights, valid, groups = _checked(log_q, log_weights, groups)
    num, total = _sums(groups, valid, log_weights)
    log_sum = _log_sum(log_weights, valid, groups)
    num_others = num - valid
    others = (total - log_weights) / jnp.maximum(num_others, 1)
    log_sum = jnp.where(num > 0, log_sum, 0.0)
    share = jnp.where(valid, jnp.exp(log_weights - log_sum), 0.0)
    change = jnp.logaddexp(jnp.log1p(-jnp.minimum(share, 1.0)), others - log_sum)
    signal = jnp.where(num_others > 0, change + share, 0.0)
    return _over_groups(signal * log_q, valid | dead, groups)


def _checked(
    log_q: Array, log_weights: Array, groups: Groups
) -> tuple[Array, Array, Bool[Array, " N"], Array]:
    """Finite values, the weights' gradient stopped, which strings are valid, and the groups."""
    log_weights = jax.lax.stop_gradient(log_weights)
    valid = jnp.isfinite(log_weights) & jnp.isfinite(log_q)
    groups = jnp.zeros(log_q.shape[0], jnp.int32) if groups is None else groups
    return (
        jnp.where(jnp.isfinite(log_q), log_q, 0.0),
        jnp.where(valid, log_weights, 0.0),
        valid,
        groups,
    )


def _sums(groups: Array, valid: Array, values: Array) -> tuple[Array, Array]:
    """Number and sum of the valid values in each string's group [N]."""
    num = groups.shape[0]
    count = jax.ops.segment_sum(valid.astype(values.dtype), groups, num)
    return count[groups], jax.ops.segment_sum(jnp.where(valid, values, 0.0), groups, num)[groups]


def _log_sum(log_weights: Array, valid: Array, groups: Array) -> Array:
    """log of the sum of weights in each string's group [N]; -inf without any."""
    num = groups.shape[0]
    masked = jnp.where(valid, log_weights, -jnp.inf)
    top = jax.ops.segment_max(masked, groups, num)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return (top + jnp.log(jax.ops.segment_sum(jnp.exp(masked - top[groups]), groups, num)))[groups]


def _over_groups(values: Array, valid: Array, groups: Array) -> Array:
    """The sum within groups, averaged over the groups that have a valid string."""
    num = jax.ops.segment_max(valid.astype(values.dtype), groups, groups.shape[0])
    return jnp.where(valid, values, 0.0).sum() / jnp.maximum(
        jnp.where(jnp.isfinite(num), num, 0.0).sum(), 1.0
    )
