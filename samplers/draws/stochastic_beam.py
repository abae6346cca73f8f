"""Stochastic beam search: k different strings, an exact sample without replacement, in one beam of
width k + 1.

Every string x has a key G_x = log q(x) + Gumbel; the k strings of the greatest keys are a sample
without replacement from q, in the order drawn.  The greatest key below a prefix is again Gumbel,
located at log q(prefix), so keys can be drawn from the root downwards: the children's keys are G_c
= log q(c) + Gumbel, conditioned on max_c G_c being the parent's.  A beam that keeps the k + 1
greatest keys loses none of the strings sought (arXiv 1903.06059).

Here q is the target's locally normalised law: each token from p^alpha times the factors that the
potential knows in advance, normalised.  For a plain language model q = p.  Otherwise the importance
weights gamma / q keep LAW 1.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from ppl.checks import check_count
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from ppl.target import Target

from ..base import Cost, Guarantee, Particles, bank
from ..diagnostics import ess
from ..registry import sampler
from ..resampling import log_inclusion
from ..results import Trace, Weighted
from ..strings import costs, growing
from ..strings.growing import Growing
from ..strings.proposals import as_proposal, locally_optimal

PROPOSAL = as_proposal(locally_optimal)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Beam:
    """B = k + 1 prefixes and whole strings, greatest key first; every leaf has B first.

    `nodes` are random keys, one for each place in the tree of strings: a string's key depends on
    the string and not on the beam that holds it, so a wider beam starts with the same strings.
    `score` is its perturbed log-probability G, -inf in rows that hold nothing; `log_q` and
    `log_gamma` are those of the prefix; active `strings` go on.
    """

    strings: Growing
    nodes: Key[Array, " B"]
    score: Float[Array, " B"]
    log_q: Float[Array, " B"]
    log_gamma: Float[Array, " B"]


def init(key: PRNGKeyArray, target: Target, num_samples: int) -> Beam:
    """The empty prefix, and `num_samples` rows that hold nothing."""
    root_key, node_key = jax.random.split(key)
    size = num_samples + 1
    first = jnp.arange(size) == 0
    only = jnp.where(first, jnp.float32(0), -jnp.inf)
    return Beam(
        strings=dataclasses.replace(growing.start(target, PROPOSAL, size), active=first),
        nodes=jax.random.split(node_key, size),
        score=only + jax.random.gumbel(root_key, dtype=jnp.float32),
        log_q=only,
        log_gamma=only,
    )


def step(target: Target, beam: Beam) -> tuple[Beam, Int[Array, ""], Cost]:
    """One more token of every prefix in the beam; also how many laws and strings were invalid, and
    what it took.
    """
    x, logits = growing.forward(target, growing.fresh(beam.strings))
    draw_keys, node_keys = jax.vmap(jax.random.split, out_axes=1)(beam.nodes)
    scores, log_q = children(draw_keys, target, beam, logits)
    seen = _invalid_laws(target, x, logits)
    parent, token, score = best(beam, scores)
    grows, stuck = token >= 0, x.active[parent] & (token < 0)
    # Scalars of the chosen pairs first: the rows of a cache are moved once, those of logits never.
    log_q = beam.log_q[parent] + jnp.where(token < 0, 0.0, log_q[parent, token])
    log_p = logits[parent, token] - jax.nn.logsumexp(logits, axis=1)[parent]
    x = growing.reorder(target, PROPOSAL, dataclasses.replace(x, logits=None), parent)
    strings, log_phi = growing.take(target, PROPOSAL, growing.fresh(x), token, grows)

    dw = target.log_prob_factor(log_p) + log_phi
    invalid = strings.invalid | (grows & jnp.isnan(dw))
    dw = jnp.where(grows, jnp.where(jnp.isnan(dw), -jnp.inf, dw), jnp.where(stuck, -jnp.inf, 0.0))
    log_gamma = jnp.where(score > -jnp.inf, beam.log_gamma[parent] + dw, -jnp.inf)
    # A string of density 0 keeps its row and key: without it the threshold of the others would be
    # another.
    strings = dataclasses.replace(strings, active=grows & strings.active & (log_gamma > -jnp.inf))
    nodes = jax.vmap(jax.random.fold_in)(node_keys[parent], jnp.where(grows, token, target.lm.eos))
    grown = Beam(strings, nodes, score, log_q, log_gamma)
    seen += (invalid & (score > -jnp.inf)).sum(dtype=jnp.int32)
    return grown, seen, costs.of_choice(target, beam.strings, strings, grows)


def _invalid_laws(target: Target, x: Growing, logits: Float[Array, "B V"]) -> Int[Array, ""]:
    """Of how many prefixes the law has NaN or +inf in it."""
    _, wrong = PROPOSAL.checked(target, logits, x.potential, x.proposal)
    return (x.active & (x.invalid | wrong)).sum(dtype=jnp.int32)


def children(
    keys: Key[Array, " B"], target: Target, beam: Beam, logits: Float[Array, "B V"]
) -> tuple[Float[Array, "B V"], Float[Array, "B V"]]:
    """The key of every child [B, V], and log q of its token [B, V]; -inf below prefixes that do not
    go on.

    With Z = max_c G_c, the keys given that their maximum is T are -log(e^-T - e^-Z + e^-G_c); in a
    form that neither overflows nor cancels, T - max(0, v) - log(1 + e^-|v|) with v = T - G_c +
    log(1 - e^(G_c - Z)).
    """
    active = beam.strings.active
    law = locally_optimal(target, logits, beam.strings.potential)
    law = jnp.where(active[:, None], law, -jnp.inf)
    total = jax.nn.logsumexp(law, axis=1, keepdims=True)
    log_q = law - jnp.where(jnp.isneginf(total), 0.0, total)
    # Not the default mode of `gumbel`: its largest value, 16.6, is met often among the tokens of a
    # real vocabulary.
    draw = functools.partial(jax.random.gumbel, shape=law.shape[1:], dtype=law.dtype, mode="high")
    free = beam.log_q[:, None] + log_q + jax.vmap(draw)(keys)
    top = jnp.max(free, axis=1, keepdims=True)
    possible = free > -jnp.inf
    gap = jnp.where(possible, free - top, -1.0)
    score = jnp.where(active, beam.score, 0.0)[:, None]
    v = score - jnp.where(possible, free, 0.0) + jax.nn.log1mexp(-gap)
    return jnp.where(
        possible, score - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v))), -jnp.inf
    ), log_q


def best(
    beam: Beam, scores: Float[Array, "B V"]
) -> tuple[Int[Array, " B"], Int[Array, " B"], Float[Array, " B"]]:
    """The B greatest keys among the children and the strings that have ended: parent, token (-1 for
    itself) and key.

    A prefix without children (nothing has positive probability) stands for itself as well.
    """
    size = scores.shape[0]
    itself = jnp.where(beam.strings.active & (scores > -jnp.inf).any(1), -jnp.inf, beam.score)
    # Row by row first: only the B best children of a prefix can be among the B best of all.
    kept, token = jax.lax.top_k(scores, min(size, scores.shape[1]))
    kept = jnp.concatenate([itself[:, None], kept], axis=1)
    token = jnp.concatenate([jnp.full((size, 1), -1, jnp.int32), token], axis=1)
    score, index = jax.lax.top_k(kept.ravel(), size)
    token = jnp.where(score > -jnp.inf, token.ravel()[index], -1)
    return index // kept.shape[1], token, score


def result(
    target: Target, beam: Beam, num_invalid: Int[Array, ""], rounds: Int[Array, ""], cost: Cost
) -> Weighted:
    """The first k strings of a beam, weighed by the key of the last."""
    num, found = beam.score.shape[0] - 1, beam.strings.sequences
    present = beam.score[:num] > -jnp.inf
    log_included = log_inclusion(beam.log_q[:num], beam.score[num])
    log_weights = jnp.where(present, beam.log_gamma[:num] - log_included + jnp.log(num), -jnp.inf)
    tokens = jnp.where(present[:, None], found.tokens[:num], target.lm.eos)
    x = Sequences(tokens, jnp.where(present, found.length[:num], 0))
    p = bank(Particles(x, log_weights.astype(jnp.float32), jnp.float32(0)))
    trace = Trace(ess=ess(p.log_weights)[None], log_z=p.log_z[None], resampled=jnp.zeros(1, bool))
    return Weighted(
        samples=x,
        log_weights=p.log_weights,
        log_z=p.log_z,
        log_z_std_error=jnp.float32(jnp.inf),
        num_invalid=num_invalid,
        rounds=rounds,
        cost=cost,
        trace=trace,
        log_q=jnp.where(present, beam.log_q[:num], -jnp.inf),
    )


@sampler(Guarantee.EXACT, proof="tests/samplers/draws/test_stochastic_beam.py")
def run(key: PRNGKeyArray, target: Target, *, num_samples: int = 32) -> Weighted:
    """`num_samples` different strings, drawn without replacement and weighed for gamma (LAW 1), in
    one jit.

        sum_i gamma(x_i) / P_i f(x_i),   P_i = 1 - exp(-q(x_i) / e^kappa)

    with kappa the key of the first string left out is unbiased for sum_x gamma(x) f(x).  If there
    are at most k strings of positive probability all are found, P_i = 1 and the sum is exact; the
    rows left over have weight -inf.  For a plain language model this is a sample without
    replacement from p; a power or a potential is sampled from its locally normalised law q and
    weighed by gamma / q, which is exact too, but varies with how far q is from gamma.  A larger k
    starts with the same strings.

    Args:
        key: typed key.
        target: any target; best where the potential knows its factors in advance (`lookahead`).
        num_samples: k.

    Returns:
        `Weighted` with k different strings in the order of drawing; the first is an exact draw
        from q.  Rows beyond the number of strings are empty, with `log_weights` and `log_q` -inf.
        `num_invalid` and `cost` are of k + 1 rows, `rounds` counts tokens; one run does not tell
        its standard error.

    Raises:
        ValueError: if `num_samples` < 1.

    Kool, van Hoof and Welling (arXiv 1903.06059).
    """
    check_count("num_samples", num_samples)
    return _run(key, target, num_samples)


@functools.partial(jax.jit, static_argnums=2)
def _run(key: PRNGKeyArray, target: Target, num_samples: int) -> Weighted:
    def advance(carry: tuple) -> tuple:
        beam, num_invalid, rounds, cost = carry
        beam, invalid, spent = step(target, beam)
        return beam, num_invalid + invalid, rounds + 1, cost + spent

    prompt = costs.prompt(target, PROPOSAL)
    first = advance((init(key, target, num_samples), jnp.int32(0), jnp.int32(0), prompt))
    return result(target, *jax.lax.while_loop(lambda c: c[0].strings.active.any(), advance, first))
