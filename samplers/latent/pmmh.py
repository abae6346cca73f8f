"""Particle marginal Metropolis-Hastings: a chain over parameters whose likelihood is only
estimated, and yet exact.

For pi(theta) proportional to prior(theta) Z(theta), where a sampler run at theta gives Z-hat with
E[Z-hat] = Z(theta): propose theta' from q, run the sampler at theta', and accept with probability

    min(1, prior(theta') Z-hat' q(theta | theta') / (prior(theta) Z-hat q(theta' | theta)))

with the Z-hat of the present theta kept from when it was accepted (estimated anew, the chain would
have another law). It is Metropolis-Hastings on (theta, all variables u of a run), with invariant
law prior(theta) m(u | theta) Z-hat(u), of which theta's marginal is pi.  Andrieu, Doucet and
Holenstein (2010); Andrieu and Roberts (2009).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.checks import check_count
from ppl.pytrees import as_pytree, register_dataclass
from ppl.rows import where_rows

from ..base import Cost, Guarantee, Kernel, Move, X, each_chain, holding
from ..kernels import accept
from ..registry import sampler
from ..results import MoveInfo, Weighted, changed_rows
from .laws import Law, batched, draw, log_prob_of

LogEvidence = Callable[[PRNGKeyArray, X], Any]
"""(key, one theta) -> log Z-hat with E[Z-hat] = Z(theta): a sampler collapsed to its evidence, -inf
if all died.

Or (log Z-hat, rest): what else is to be kept of the run as long as theta is.  Or the run's result,
a `Weighted`: then the step says what its runs cost.
"""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """C chains.

    theta: [C, ...].  log_prior: [C] of theta.  log_z: [C] log Z-hat of theta's run; NaN while there
    was none.  rest: [C, ...] what else `log_evidence` gave, zeros while there was no run.
    """

    theta: X
    log_prior: Float[Array, " C"]
    log_z: Float[Array, " C"]
    rest: Any = None


@sampler(Guarantee.EXACT, proof="tests/samplers/latent/test_pmmh.py")
def kernel(log_evidence: LogEvidence, prior: Law, proposal: Move, *, batch_size: int = 1) -> Kernel:
    """Particle marginal Metropolis-Hastings: chains over theta that leave prior(theta) Z(theta) / Z
    invariant.

        def log_evidence(key, drift):
            return filtering.run(key, model(drift), observations, num_particles=100)

        step = pmmh.propose(lambda drift: dist.Normal(drift, 0.3))
        chain = pmmh.kernel(log_evidence, dist.Normal(0.0, 1.0), step)

    Exact for any number of particles behind `log_evidence`; how often chains move depends on it.  A
    standard deviation of log Z-hat between 1 and 1.7 is about best (Doucet, Pitt, Deligiannidis and
    Kohn 2015, arXiv 1210.1871).

    A start comes from no run: the first step of a chain estimates the evidence there, and does not
    move it.  That estimate has the law m(u | theta), not the invariant one, which the chain reaches
    as from any other start.  A start that is impossible is left for the first proposal that is not.

    Args:
        log_evidence: for one theta; with any sampler that obeys LAW 1, `filtering.run` or `smc.run`
            for example.  If it returns a path or string of the run too, drawn by weight, that and
            theta have the joint posterior as their law.
        prior: a NumPyro distribution of one theta, or a pytree of them.
        proposal: a move over theta [C, ...] whose weight is log q(theta | theta') - log q(theta' |
            theta), 0 if it is symmetric; see `propose`.
        batch_size: chains whose samplers run at a time.  As many as there are chains is fastest for
            small models; one at a time is right for a language model, whose caches are moved only
            when a population is resampled.

    Returns:
        `Kernel`: `init` takes theta of C chains, states are `State`, infos `MoveInfo`, in
            which a first step is accepted with log ratio +inf.

    Raises:
        ValueError: unless batch_size >= 1; when traced, for a prior whose batch shape is not ().
    """
    check_count("batch_size", batch_size)
    held = as_pytree(log_evidence), prior, as_pytree(proposal.sample)
    return Kernel(Partial(_start, held[0], prior), holding(_step, *held, batch_size=batch_size))


def _start(log_evidence: Any, prior: Law, theta: X) -> State:
    log_prior = log_prior_of(prior, theta)
    keys = jax.random.split(jax.random.key(0), log_prior.size)
    rest = jax.eval_shape(_estimated, log_evidence, keys, theta, batch_size=1)[1]
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    return State(theta, log_prior, jnp.full(log_prior.shape, jnp.nan, jnp.float32), nothing)


def _step(
    key: PRNGKeyArray, log_evidence: Any, prior: Law, propose: Any, x: State, *, batch_size: int
) -> tuple[State, MoveInfo]:
    """`kernels.mh` of the move, which says what the runs cost; `changed` means theta, and not the
    run that it has.
    """
    move_key, accept_key = jax.random.split(key)
    y, ratio, cost = _proposed(move_key, log_evidence, prior, propose, x, batch_size=batch_size)
    after, info = accept(accept_key, ratio, x, y)
    spent = {} if cost is None else {"cost": cost.total(), "tokens": cost.tokens}
    return after, dataclasses.replace(info, changed=changed_rows(x.theta, after.theta), **spent)


def particle_move(log_evidence: LogEvidence, prior: Law, proposal: Move, batch_size: int) -> Move:
    """The move over `State` that proposes theta' and runs the sampler there; its weight is the
    Hastings ratio.
    """
    held = as_pytree(log_evidence), prior, as_pytree(proposal.sample)
    return Move(holding(_weighed, *held, batch_size=batch_size))


def _weighed(key: PRNGKeyArray, *held: Any, batch_size: int) -> tuple[State, Float[Array, " C"]]:
    return _proposed(key, *held, batch_size=batch_size)[:2]


def _proposed(
    key: PRNGKeyArray, log_evidence: Any, prior: Law, propose: Any, x: State, *, batch_size: int
) -> tuple[State, Float[Array, " C"], Cost | None]:
    propose_key, run_key = jax.random.split(key)
    theta, log_back = propose(propose_key, x.theta)
    theta = where_rows(jnp.isnan(x.log_z), x.theta, theta)
    keys = jax.random.split(run_key, x.log_z.shape[0])
    log_z, rest, cost = _estimated(log_evidence, keys, theta, batch_size=batch_size)
    y = State(theta, log_prior_of(prior, theta), log_z, rest)
    return y, log_ratio(x, y, log_back), cost


@functools.partial(jax.jit, static_argnames="batch_size")
def _estimated(
    log_evidence: Any, keys: Any, theta: X, *, batch_size: int
) -> tuple[Array, Any, Cost | None]:
    """log Z-hat [C] at every theta, what else there is of the runs, and what they cost."""

    def one(chain: tuple[PRNGKeyArray, X]) -> tuple[Array, Any, Cost | None]:
        out, cost = log_evidence(*chain), None
        if isinstance(out, Weighted):
            out, cost = out.log_z, out.cost
        log_z, rest = out if isinstance(out, tuple) else (out, None)
        # What is not a number is no evidence.
        return jnp.where(log_z < jnp.inf, log_z, -jnp.inf).astype(jnp.float32), rest, cost

    return each_chain(one, (keys, theta), min(batch_size, keys.shape[0]))


def log_ratio(x: State, y: State, log_back: Float[Array, " C"]) -> Float[Array, " C"]:
    """The Hastings ratio of a move from x to y; `log_back` is log q(x | y) - log q(y | x).

    +inf where the evidence at x is not known, or x is impossible and y is not; -inf where y is
    impossible.
    """
    old, new = x.log_prior + x.log_z, y.log_prior + y.log_z + log_back
    gain = jnp.where(jnp.isneginf(old), jnp.inf, new - old)
    return jnp.where(jnp.isnan(x.log_z), jnp.inf, jnp.where(new > -jnp.inf, gain, -jnp.inf))


def propose(law: Callable[[X], Law]) -> Move:
    """The move to a draw from law(theta) [C], weighed by log q(theta | theta') - log q(theta' |
    theta).

        pmmh.propose(lambda scale: dist.LogNormal(jnp.log(scale), 0.2))

    Raises:
        ValueError: when traced, unless `law` returns NumPyro distributions of batch shape (C,) or
            ().
    """

    law = as_pytree(law)
    return Move(holding(_drawn_from, law), Partial(_log_back, law))


def _drawn_from(key: PRNGKeyArray, law: Any, x: X) -> tuple[X, Float[Array, " C"]]:
    drawn = draw(key, _laws(law, x))

    def alike(new: Array, old: Array) -> Array:
        """In the precision that a chain's theta was given in."""
        return new.astype(old.dtype) if new.dtype.kind == old.dtype.kind else new

    y = jax.tree.map(alike, drawn, x)
    return y, _log_back(law, key, x, y)


def _log_back(law: Any, key: PRNGKeyArray, x: X, y: X) -> Float[Array, " C"]:
    there, back = log_prob_of(_laws(law, x), y), log_prob_of(_laws(law, y), x)
    return jnp.where(jnp.isneginf(back), -jnp.inf, back - there)


def _laws(law: Any, x: X) -> Law:
    return batched("the law of a proposal", law(x), jax.tree.leaves(x)[0].shape[0])


def log_prior_of(prior: Law, theta: X) -> Float[Array, " C"]:
    """log prior(theta) [C]; -inf outside of its support."""
    return log_prob_of(batched("prior", prior, jax.tree.leaves(theta)[0].shape[0]), theta).astype(
        jnp.float32
    )
