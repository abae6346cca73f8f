"""Branching where the next token is uncertain (EAGer, arXiv 2510.11170), with weights that keep the
law.

    out = branching.run(key, p, num_roots=4, num_particles=32, threshold=2.0)

K strings start, in a population of N slots, and share their tokens with all that branch off later:
before a token whose law q has an entropy above the threshold,

    H(q) = - sum_v q(v) log q(v) > threshold        nats

a string of weight W becomes two of weight W / 2, which draw that token and all further ones
independently, as long as there is a free slot; the heaviest strings first.  Who branches depends on
what has been drawn and never on what will be, so LAW 1 holds at any threshold.  As published, the
children take the two likeliest tokens, and have no weights: that draws from no law, and
neither does a vote in which children count as much as the strings that did not branch.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_counts
from ppl.rows import log_normalised
from ppl.target import Target

from .. import base, population
from ..base import Guarantee, Particles, bank, dead
from ..diagnostics import normalise
from ..population import Run
from ..registry import sampler
from ..results import Weighted
from ..strings import costs, growing
from ..strings.proposals import as_proposal, locally_optimal

PROPOSAL = as_proposal(locally_optimal)


def init(target: Target, num_roots: int, num_particles: int) -> Run:
    """K empty strings, which share all the weight, and N - K free slots."""
    first = jnp.arange(num_particles) < num_roots
    x = dataclasses.replace(growing.start(target, PROPOSAL, num_particles), active=first)
    weight = jnp.log(jnp.float32(num_particles / num_roots))
    run = population.start(
        Particles(x, jnp.where(first, weight, -jnp.inf), jnp.float32(0)),
        target.max_tokens,
        active=jnp.int32(0),
        branched=jnp.int32(0),
    )
    return population.spend(run, costs.prompt(target, PROPOSAL))


def step(key: PRNGKeyArray, target: Target, threshold: Float[Array, ""], run: Run) -> Run:
    """One more token for all strings, before which those that are uncertain branch."""
    p = run.particles
    x, logits = growing.forward(target, growing.fresh(p.state))
    law, _ = PROPOSAL.checked(target, log_normalised(logits), x.potential, x.proposal)
    assert law is not None
    uncertain = x.active & ~dead(p.log_weights) & (entropy(law) > threshold) & run.going
    parent, new, halved = split(p.log_weights, uncertain)

    def branch(_: PRNGKeyArray, log_probs: Array, num: int) -> tuple[Array, Array]:
        shares = bank(p).log_weights[parent]
        return parent, shares - jnp.where(halved, jnp.log(jnp.float32(2)), 0.0)

    reorder = functools.partial(growing.reorder, target, PROPOSAL)
    p = Particles(x, p.log_weights, p.log_z)
    branch_key, token_key = jax.random.split(key)
    p, _ = base.resample(branch_key, p, branch, new.any(), reorder)
    # The pass was made for the string that branched, once.
    x = dataclasses.replace(p.state, read=jnp.where(new, 0, p.state.read))

    longer, added = growing.token(
        jax.random.split(token_key, x.active.shape[0]), target, PROPOSAL, x, x.active
    )
    dw = jnp.where(x.active, added.log_weight(target), 0.0)
    longer = dataclasses.replace(longer, active=longer.active & ~jnp.isneginf(dw))
    run = dataclasses.replace(run, particles=p, roots=run.roots[parent])
    run = population.record(population.moved(run, longer, dw, longer.invalid))
    run = population.note(
        run,
        active=longer.active.sum(dtype=jnp.int32),
        branched=new.sum(dtype=jnp.int32),
        resampled=new.any(),
    )
    return population.end(run, costs.of_round(target, PROPOSAL, longer))


def entropy(law: Float[Array, "N V"]) -> Float[Array, " N"]:
    """Entropies of unnormalised laws, in nats; 0 of one without mass."""
    log_q = log_normalised(law)
    return -jnp.where(log_q > -jnp.inf, jnp.exp(log_q) * log_q, 0.0).sum(1)


def split(
    log_weights: Float[Array, " N"], wanted: Bool[Array, " N"]
) -> tuple[Int[Array, " N"], Bool[Array, " N"], Bool[Array, " N"]]:
    """Which string every slot holds when those `wanted` have been split, the heaviest first, as far
    as there are free slots; which slots are new; and which have half of their string's weight.
    """
    slots = jnp.arange(log_weights.shape[0], dtype=jnp.int32)
    free = dead(log_weights)
    heaviest = jnp.argsort(jnp.where(wanted, -log_weights, jnp.inf)).astype(jnp.int32)
    place = jnp.cumsum(free, dtype=jnp.int32) - 1
    new = free & (place < wanted.sum(dtype=jnp.int32))
    parent = jnp.where(new, heaviest[jnp.maximum(place, 0)], slots)
    branched = jnp.zeros_like(free).at[jnp.where(new, parent, len(slots))].set(True, mode="drop")
    return parent, new, new | branched


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_branching.py")
def run(
    key: PRNGKeyArray,
    target: Target,
    *,
    num_roots: int = 4,
    num_particles: int = 32,
    threshold: float | Float[Array, ""] = 2.0,
) -> Weighted:
    """Strings of gamma(x) = p(x)^alpha Phi(x) that branch where they are uncertain, in one jit.

    Nothing is resampled: with a potential that does not know its factors in advance take `smc.run`.
    Estimates of p cost less than by independent strings as far as strings agree until they are
    uncertain; strings of one root are dependent, and `log_z_std_error` and `num_roots` know it.

    Args:
        key: typed key.
        target: a target.
        num_roots: K, strings to begin with.
        num_particles: N, the most strings.
        threshold: entropy in nats above which a string branches; published is 2.0 to 2.4.

    Returns:
        `Weighted`: strings that obey LAW 1; free slots have log-weight -inf.  Of a language model
        log_z is 0.  `details`: `branched` [R] strings that branched in each round.

    Raises:
        ValueError: unless 1 <= num_roots <= num_particles.
    """
    check_counts(num_roots=num_roots, num_particles=num_particles)
    if num_roots > num_particles:
        raise ValueError(
            f"expected room for {num_roots} roots, got num_particles={num_particles}; pass"
            f" num_particles={4 * num_roots}"
        )
    return whole(key, target, jnp.float32(threshold), num_roots=num_roots, num=num_particles)


@functools.partial(jax.jit, static_argnames=("num_roots", "num"))
def whole(
    key: PRNGKeyArray, target: Target, threshold: Float[Array, ""], *, num_roots: int, num: int
) -> Weighted:
    """All rounds of a run."""
    keys = jax.random.split(key, target.max_tokens)
    # The first token takes no pass but the prompt's, and so is another program.
    run = population.rounds(
        keys,
        step(keys[0], target, threshold, init(target, num_roots, num)),
        lambda key, run: step(key, target, threshold, run),
        lambda run: run.particles.state.active.any(),
    )
    x = run.particles.state
    out = population.result(
        run,
        x.sequences,
        log_prob=x.log_prob,
        log_q=x.log_q,
        log_density=x.log_density,
        details={"branched": run.rows["branched"]},
    )
    return dataclasses.replace(out, log_z_std_error=_std_error(out, run.roots, num_roots))


def _std_error(out: Weighted, roots: Int[Array, " N"], num_roots: int) -> Float[Array, ""]:
    """That of log Z-hat, from K independent roots: sqrt( sum_e (sum_{i from e} W_i - 1/K)^2 )."""
    if num_roots == 1:
        return jnp.float32(jnp.inf)
    shares = jnp.zeros_like(out.log_weights).at[roots].add(normalise(out.log_weights))
    error = jnp.sqrt(jnp.sum((shares[:num_roots] - 1 / num_roots) ** 2))
    return jnp.where(out.all_dead, jnp.inf, error)
