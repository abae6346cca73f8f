"""Training for selection: objectives of the best of k draws, from groups of n draws each.

    pass_k          E[highest reward of k draws], of which pass@k is that of rewards
                    0 and 1: unbiased for every k <= n                    2412.15287
    best_of_n       -log q of each group's best string: supervised learning of the
                    law of best-of-n.  With log p of the base model as the score
                    it is sharpening                                      2412.01951
    resampled       -log q of one string of each group, drawn by its weight: the
                    E-step of BoLT and what its M-step learns             2503.18866

Sharpening by rewards, max E_q[log p] - beta KL(q | p), has the solution p^(1 + 1 / beta): the
target `p ** (1 + 1 / beta)`, for which every sampler and objective is there.  BoLT's bound is
`variational.iwae`, and `variational.forward_kl` is the mean of `resampled` over its draws.

Every function takes groups [N] (None: one group), the prompt of each string, and averages over the
groups, as those of `variational` do.  Strings whose reward is NaN or infinite are left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_count

from .variational import Groups


def pass_k(
    log_q: Float[Array, " N"], rewards: Float[Array, " N"], k: int, groups: Groups = None
) -> Float[Array, ""]:
    """A loss whose expected gradient on draws of q is that of -E[highest reward of k draws]:
    -sum_i w_i log q_i with `pass_k_weights`.

    The loss is no estimate of that expectation, only its gradient is.  Groups of fewer than k
    strings that count are left out.

    Raises:
        ValueError: if k < 1.
    """
    known = jnp.isfinite(log_q) & jnp.isfinite(rewards)
    weights = pass_k_weights(jnp.where(known, rewards, jnp.nan), k, groups)
    enough = _sizes(groups, known) >= k
    return -_mean(weights * jnp.where(known, log_q, 0.0), known & enough, groups)


def pass_k_weights(
    rewards: Float[Array, " N"], k: int, groups: Groups = None
) -> Float[Array, " N"]:
    """What string i adds to the best of k: with u_i the mean of the highest reward over all sets of
    i and k - 1 others of its group of n, and b_i that of the k - 1 others alone,

        w_i = (k / n) (u_i - b_i),    E[sum_i w_i grad log q_i] = grad E[highest of k].

    b_i does not depend on i, so it takes no mean away, and noise.  Of the sorted rewards r_0 <= ...
    <= r_n-1 of a group,

        w_j = (k / n) sum_{l < j} (r_j - r_l) C(l, k - 2) / C(n - 1, k - 1)

    so no weight is negative, and the worst string's is 0.  With c correct of n, rewards 0 and 1, it
    is (k / n) C(n - c, k - 1) / C(n - 1, k - 1) for each correct one: 1 - (1 - p)^k is learned
    without knowing p.  For k = 1 there are no others to be the baseline, and the mean of all others
    takes its place.

    Args:
        rewards: those that are NaN or infinite are left out, with weight 0.
        k: static.
        groups: [N] any names from 0 to N - 1.  One of fewer than k strings has weights 0.

    Raises:
        ValueError: if k < 1.
    """
    check_count("k", k)
    rewards = jax.lax.stop_gradient(rewards)
    known = jnp.isfinite(rewards)
    size = _sizes(groups, known)
    num, safe = rewards.shape[0], jnp.where(known, rewards, 0.0)
    names = jnp.zeros(num, jnp.int32) if groups is None else groups
    total = jax.ops.segment_sum(safe, names, num)[names]
    others = jnp.maximum(size - 1, 1)
    # From the group's mean, which changes no difference, so that less cancels.
    centred = jnp.where(known, safe - total / jnp.maximum(size, 1), 0.0)
    if k == 1:
        weights = jnp.where(size > 1, centred * size / others, safe) / jnp.maximum(size, 1)
    else:
        # Those that are left out come last, in a group of their own.
        sorts = jnp.where(known, names, num)
        order = jnp.lexsort((centred, sorts))
        first = jnp.searchsorted(sorts[order], sorts[order])
        place = (jnp.arange(num) - first).astype(centred.dtype)
        share = _share(place, size[order], k)
        starts = place == 0
        above = centred[order] * _before(share, starts) - _before(share * centred[order], starts)
        weights = jnp.zeros_like(centred).at[order].set(above * k) / jnp.maximum(size, 1)
    return jnp.where(known & (size >= k), weights, 0.0)


def best_of_n(
    log_q: Float[Array, " N"], scores: Float[Array, " N"], groups: Groups = None
) -> Float[Array, ""]:
    """-log q of the string of each group with the highest score, the first of those that tie.

    The strings come from a model p that is kept: then the expected gradient is that of KL(best of n
    of p | q), and the optimum has the law `samplers.search.laws.best_of_n`.  With log p as the
    score the best is the likeliest, p's mode with probability 1 - (1 - p(mode))^n.
    """
    scores = jax.lax.stop_gradient(scores)
    known = jnp.isfinite(scores) & jnp.isfinite(log_q)
    return -_mean(jnp.where(_first_best(scores, known, groups), log_q, 0.0), known, groups)


def resampled(
    key: PRNGKeyArray,
    log_q: Float[Array, " N"],
    log_weights: Float[Array, " N"],
    groups: Groups = None,
) -> Float[Array, ""]:
    """-log q of one string of each group, drawn in proportion to exp(log_weights): what EM by
    bootstrapped latents learns (arXiv 2503.18866), with log w = log p(z, x) - log q(z | x) of N
    latent thoughts z.

    Consistent as the group grows; its mean over keys is `variational.forward_kl`, whose gradient is
    less noisy.  One string each is what a training of many steps can afford.
    """
    log_weights = jax.lax.stop_gradient(log_weights)
    known = jnp.isfinite(log_weights) & jnp.isfinite(log_q)
    noisy = log_weights + jax.random.gumbel(key, log_weights.shape, log_weights.dtype)
    return -_mean(jnp.where(_first_best(noisy, known, groups), log_q, 0.0), known, groups)


def _share(place: Array, size: Array, k: int) -> Array:
    """C(l, k - 2) / C(n - 1, k - 1) of place l in a group of n, as a product of ratios: float32's
    log-gamma would lose three digits.
    """
    i = jnp.arange(k - 2)
    ratios = (place[:, None] - i) / jnp.maximum(size[:, None] - 2 - i, 1)
    return (k - 1) / jnp.maximum(size - 1, 1) * jnp.prod(jnp.maximum(ratios, 0.0), axis=1)


def _before(values: Array, starts: Bool[Array, " N"]) -> Array:
    """Sums of what stands before in the same group, of rows sorted by groups; without the sums of
    other groups, which would cost digits.
    """

    def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.where(b[1], b[0], a[0] + b[0]), a[1] | b[1]

    sums, _ = jax.lax.associative_scan(add, (values, starts))
    return sums - values


def _first_best(scores: Array, known: Array, groups: Groups) -> Bool[Array, " N"]:
    """The string of the highest score in each group, one for each."""
    num = scores.shape[0]
    names = jnp.zeros(num, jnp.int32) if groups is None else groups
    masked = jnp.where(known, scores, -jnp.inf)
    best = known & (masked == jax.ops.segment_max(masked, names, num)[names])
    place = jnp.where(best, jnp.arange(num), num)
    return best & (place == jax.ops.segment_min(place, names, num)[names])


def _sizes(groups: Groups, known: Array) -> Int[Array, " N"]:
    """How many strings of its group count, for each string."""
    num = known.shape[0]
    names = jnp.zeros(num, jnp.int32) if groups is None else groups
    return jax.ops.segment_sum(known.astype(jnp.int32), names, num)[names]


def _mean(values: Array, counts: Array, groups: Groups) -> Float[Array, ""]:
    """The sum within groups, averaged over the groups that have a string that counts."""
    num = counts.shape[0]
    names = jnp.zeros(num, jnp.int32) if groups is None else groups
    some = jax.ops.segment_max(counts.astype(jnp.int32), names, num) > 0
    return jnp.where(counts, values, 0.0).sum() / jnp.maximum(some.sum(dtype=values.dtype), 1.0)
