"""What log Z really is: bounds by a beam of prefixes, for powers of at least 1 and factors of at
most 1.

Every string below a prefix x has gamma <= p(.)^alpha, and sum_y p(y | x)^alpha <= 1 over its
continuations y.  So a beam that keeps the B heaviest prefixes of every length, sums gamma over the
strings that end in it, and adds up p(x)^alpha of the prefixes that it drops, bounds Z on both
sides.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ppl.pytrees import register_dataclass
from ppl.target import Target
from samplers.strings import growing
from samplers.strings.growing import Growing
from samplers.strings.proposals import as_proposal, bootstrap, locally_optimal

PROPOSAL = as_proposal(bootstrap)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Beam:
    """B prefixes with log gamma [B], -inf in rows that hold nothing; log of what has ended, and of
    a bound of what was dropped.
    """

    prefixes: Growing
    log_gamma: Float[Array, " B"]
    found: Float[Array, ""]
    dropped: Float[Array, ""]


@functools.partial(jax.jit, static_argnums=1)
def bounds(target: Target, width: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """log Z from below, and from above, by a beam of `width` prefixes.

    Args:
        target: p^alpha Phi with alpha >= 1, and a Phi whose factors are at most 1 and all known in
            advance (`lookahead`).

    Raises:
        ValueError: when traced, if the potential knows nothing in advance.
    """
    start = growing.start(target, PROPOSAL, width)
    if target.tilted and target.potential.lookahead(start.potential) is None:
        raise ValueError("expected a potential with a look-ahead, such as ppl.regex, got another")
    only = jnp.where(jnp.arange(width) == 0, jnp.float32(0), -jnp.inf)
    nothing = jnp.float32(-jnp.inf)
    # The first token takes no pass but the prompt's.
    beam = _longer(target, jnp.bool_(target.max_tokens == 1), Beam(start, only, nothing, nothing))

    def one(carry: tuple[Array, Beam]) -> tuple[Array, Beam]:
        t, beam = carry
        return t + 1, _longer(target, t == target.max_tokens - 1, beam)

    def going(carry: tuple[Array, Beam]) -> Array:
        t, beam = carry
        return (t < target.max_tokens) & (beam.log_gamma > -jnp.inf).any()

    _, beam = jax.lax.while_loop(going, one, (jnp.int32(1), beam))
    return beam.found, jnp.logaddexp(beam.found, beam.dropped)


def _longer(target: Target, last: Array, beam: Beam) -> Beam:
    """The heaviest prefixes that are a token longer."""
    x, logits = growing.forward(target, beam.prefixes)
    law = locally_optimal(target, jax.nn.log_softmax(logits), x.potential)
    scores = beam.log_gamma[:, None] + law
    ended = jax.nn.logsumexp(scores[:, target.lm.eos])
    scores = scores.at[:, target.lm.eos].set(-jnp.inf)
    # Only the B best children of a prefix can be among the B best of all.
    kept, token = jax.lax.top_k(scores, min(scores.shape))
    log_gamma, index = jax.lax.top_k(kept.ravel(), scores.shape[0])
    parent, token = index // kept.shape[1], token.ravel()[index]
    everything = jax.nn.logsumexp(scores)
    rest = -jnp.expm1(jnp.minimum(jax.nn.logsumexp(log_gamma) - everything, 0.0))
    lost = jnp.where(rest > 0, everything + jnp.log(jnp.where(rest > 0, rest, 1.0)), -jnp.inf)

    x = growing.reorder(target, PROPOSAL, dataclasses.replace(x, logits=None), parent)
    alive = log_gamma > -jnp.inf
    x, _ = growing.take(target, PROPOSAL, x, token, alive, cut=False)
    # What stands at the horizon has ended too, if the potential accepts it there.
    final = jax.lax.cond(
        last,
        lambda: jax.nn.logsumexp(log_gamma + target.potential.final(x.potential)),
        lambda: jnp.float32(-jnp.inf),
    )
    found = functools.reduce(jnp.logaddexp, (beam.found, ended, final))
    return Beam(x, log_gamma, found, jnp.logaddexp(beam.dropped, lost))
