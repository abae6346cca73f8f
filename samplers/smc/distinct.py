"""SMC whose particles are all different: the most promising continuations are kept, the rest are
drawn without replacement.  What `smc.run` does where the target has a power.

A sharp law sends independent particles the same way: at alpha = 4 all of 32 take the likeliest
first token, have equal weights and a full effective sample size, and know one string.  Here every
round looks at all pairs of a prefix i and a next token v, of weight

    W_iv = W_i p(v | x_i)^alpha Phi(v | x_i)          Phi as far as it is known in advance

and keeps pair (i, v) with a probability pi_iv, sum pi = N, and then the weight W_iv / pi_iv.  No
two particles are equal but by chance among very light tokens, and with at most N strings of
positive density Z is exact.  Whatever pi is, this is unbiased.  Here

    pi_iv = min(1, c V_i p(v | x_i)^alpha Phi(v | x_i))          V_i = max(c1 W_i, c2 R_i)

c1 such that the weights W fill half of the slots, by min(1, c1 W_iv), and c2 such that R fills the
other half.  W alone gives the weights that vary least of all now (Fearnhead and Clifford 2003;
`resampling.optimal`), a beam search whose law is known.  But W has no eye for what comes: a famous
date begins with a token that is as unlikely as all of its rest is certain, and W has dropped it
by then.  R_i is what a prefix has earned of late, its weight with evidence that fades,

    log R_iv = (log R_i) / 2 + log p(v | x_i)^alpha Phi(v | x_i)

so that those that go on well are kept until they have made up for it.  A string that has ended
keeps its R.

The standard error is that of drawing independently with these probabilities,

    sum_t sum_e (1 - pi_te) S_te^2

S_te the share of the final weight that descends from slot e of round t: 0 as long as all that
matters has been kept for certain, and 1 or more where all hangs on what had hardly a chance.  It
does not know of what was dropped.  That, if it had done as well for its V as the pairs that were
kept did on average, would have been the share

    max_t D_t mean_e( S_te / v_te )          D_t the sum of V dropped in round t, v_te = V / pi of e

of Z: the `details` have it as `dropped`, and from 0.2 on `diagnostics.health` warns of it.

Measured with SmolLM2 at N = 32 (`experiments.health`: six targets, ten keys each), runs whose log Z
is within a nat, those that are not and are flagged, and those that are not and look well:

    alpha                                          4               2
    here                                       58   2  0       52   8  0
    independent particles                      15  42  3       34  23  3

By W alone a famous date is 6 nats low at alpha = 4, and one in ten of its runs looks well; choosing
by flatter weights (W p^(beta - alpha)), other proposals (p^beta, beta < alpha) and raised exponents
(`power_smc`) do not find it either.  A run takes about half as long again as with independent
particles.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_count
from ppl.draw import categorical
from ppl.pytrees import register_dataclass
from ppl.rows import anywhere, log_normalised
from ppl.showing import shown
from ppl.target import Target

from .. import population
from ..base import Guarantee, Particles, bank, dead, holding
from ..calling import heeding, public
from ..diagnostics import normalise
from ..population import Run
from ..registry import sampler
from ..resampling import Chosen, kept_or_drawn, log_scale
from ..results import Weighted
from ..strings import costs, growing
from ..strings.growing import Growing
from ..strings.prompts import run_each
from ..strings.proposals import as_proposal, locally_optimal

PROPOSAL = as_proposal(locally_optimal)
ITSELF = -1
"""In the place of a token: a string that has ended goes on as it is."""
LISTED = 256
"""The most tokens of a prefix that are looked at one by one.  With more particles than that a token
beyond may come twice, which its weight knows."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """N pairs that were chosen: parents [N], tokens [N] (`ITSELF` for none), and log pi [N] of each
    (of a token beyond `LISTED` the log of how often it is expected).

    Slots that are left over are not `present`.  dropped [N]: V (see the module) of all pairs that
    were not chosen, over V / pi of this one.
    """

    parent: Int[Array, " N"]
    token: Int[Array, " N"]
    log_included: Float[Array, " N"]
    present: Bool[Array, " N"]
    dropped: Float[Array, " N"]


def init(target: Target, num_particles: int, *, history: bool = False) -> Run:
    """The empty string, which has all the weight, and N - 1 slots that hold nothing."""
    first = jnp.arange(num_particles) == 0
    x = dataclasses.replace(growing.start(target, PROPOSAL, num_particles), active=first)
    log_weights = jnp.where(first, jnp.log(jnp.float32(num_particles)), -jnp.inf)
    slots = jnp.arange(num_particles, dtype=jnp.int32)
    run = population.start(
        Particles(x, log_weights, jnp.float32(0)),
        target.max_tokens,
        genealogy=history,
        active=jnp.int32(0),
        parents=slots,
        included=jnp.ones(num_particles, jnp.float32),
        dropped=jnp.zeros(num_particles, jnp.float32),
        recent=jnp.where(first, jnp.float32(0), -jnp.inf),
        **({"drawn": jnp.full((num_particles, 1), -1, jnp.int32)} if history else {}),
    )
    return population.spend(run, costs.prompt(target, PROPOSAL))


def step(key: PRNGKeyArray, target: Target, run: Run) -> Run:
    """One more token for all strings: choose N pairs of a prefix and a token, and weigh them."""
    p = bank(run.particles)
    x, logits = growing.forward(target, growing.fresh(p.state))
    law, wrong = PROPOSAL.checked(target, log_normalised(logits), x.potential, x.proposal)
    assert law is not None
    invalid = x.active & (x.invalid | wrong)
    # Before the first round the last row, which is as the run began.
    recent = jnp.where(dead(p.log_weights), -jnp.inf, run.rows["recent"][run.rounds - 1])
    recent = jnp.where(x.active, recent / 2, recent)
    law = jnp.where(x.active[:, None], law, -jnp.inf)
    pairs = choose(key, p.log_weights, recent, law, x.active)
    # A run that is over, beside other prompts' runs, keeps its rows where they are.
    slots = jnp.arange(x.active.shape[0], dtype=jnp.int32)
    pairs = dataclasses.replace(pairs, parent=jnp.where(run.going, pairs.parent, slots))
    grows = pairs.token >= 0
    # Scalars of the chosen pairs first: the rows of a cache are moved once, those of logits never.
    log_p = (
        logits[pairs.parent, jnp.maximum(pairs.token, 0)]
        - jax.nn.logsumexp(logits, axis=1)[pairs.parent]
    )
    x = growing.reorder(target, PROPOSAL, dataclasses.replace(x, logits=None), pairs.parent)
    x, log_phi = growing.take(target, PROPOSAL, growing.fresh(x), pairs.token, grows)

    dw = jnp.where(grows, target.log_prob_factor(log_p) + log_phi, 0.0)
    chosen = jnp.where(pairs.present, p.log_weights[pairs.parent] - pairs.log_included, -jnp.inf)
    run = dataclasses.replace(
        run,
        particles=Particles(x, chosen, p.log_z),
        num_invalid=run.num_invalid + invalid.sum(dtype=jnp.int32),
    )
    x = _added(x, log_p, dw, grows)
    run = population.moved(run, x, dw, x.invalid)
    run = population.note(run, recent=recent[pairs.parent] + dw)
    return population.end(_noted(run, pairs, grows), costs.of_choice(target, p.state, x, grows))


def _added(x: Growing, log_p: Array, dw: Array, grows: Bool[Array, " N"]) -> Growing:
    """The strings, which know the densities of their new tokens; what has none does not go on."""
    return dataclasses.replace(
        x,
        active=grows & x.active & (dw > -jnp.inf),
        log_prob=x.log_prob + jnp.where(grows, log_p, 0.0),
        log_density=x.log_density + dw,
    )


def _noted(run: Run, pairs: Pairs, grows: Bool[Array, " N"]) -> Run:
    """The run with what is to be known of the round."""
    slots = jnp.arange(grows.shape[0], dtype=jnp.int32)
    return population.note(
        population.record(run),
        resampled=(pairs.log_included < 0).any(),
        # The first generation has no ancestors, as elsewhere.
        ancestors=jnp.where(run.rounds == 0, slots, pairs.parent),
        parents=pairs.parent,
        included=jnp.minimum(jnp.exp(pairs.log_included), 1.0),
        dropped=pairs.dropped,
        active=run.particles.state.active.sum(dtype=jnp.int32),
        drawn=jnp.where(grows, pairs.token, -1)[:, None],
    )


def choose(
    key: PRNGKeyArray,
    log_weights: Float[Array, " N"],
    recent: Float[Array, " N"],
    law: Float[Array, "N V"],
    active: Bool[Array, " N"],
) -> Pairs:
    """N pairs of a prefix and a token, each with probability pi (see the module), of prefixes with
    log W and log R = `recent`; strings that are not active stand for themselves.

    Only the N likeliest tokens of a prefix can be kept for certain.  They are looked at one by one
    (at most `LISTED` of them), and the others of a prefix together: a draw that falls on these
    draws one of them.
    """
    num = log_weights.shape[0]
    choose_key, draw_key = jax.random.split(key)
    top, tokens = jax.lax.top_k(law, min(num, law.shape[1], LISTED))
    light = jnp.put_along_axis(law, tokens, -jnp.inf, axis=1, inplace=False)
    factors = Factors(
        jnp.concatenate([jnp.where(active, -jnp.inf, 0.0)[:, None], top], axis=1),
        jax.nn.logsumexp(light, axis=1),
    )
    token_of = jnp.concatenate(
        [jnp.full((num, 1), ITSELF, jnp.int32), tokens.astype(jnp.int32)], axis=1
    )
    value = promise(log_weights, recent, factors)
    chosen = kept_or_drawn(choose_key, *factors.of(value), num)

    among_light = chosen.index >= token_of.size
    parent = jnp.where(among_light, chosen.index - token_of.size, chosen.index // token_of.shape[1])
    token = token_of.ravel()[jnp.minimum(chosen.index, token_of.size - 1)]
    drawn = jax.lax.cond(
        anywhere(among_light),
        lambda: categorical(jax.random.split(draw_key, num), light[parent])[0],
        lambda: token,
    )
    token = jnp.where(among_light, drawn, token)
    own = jnp.where(token == ITSELF, 0.0, law[parent, jnp.maximum(token, 0)])
    certain = chosen.kept | ~chosen.present
    log_included = jnp.where(certain, 0.0, chosen.log_c + value[parent] + own)
    over = _log_dropped(*factors.of(value), chosen) - (value[parent] + own) + log_included
    return Pairs(
        parent,
        jnp.where(chosen.present, token, ITSELF),
        log_included,
        chosen.present,
        jnp.where(chosen.present, jnp.exp(jnp.minimum(over, 80.0)), 0.0),
    )


@shown
class Factors(NamedTuple):
    """What pairs multiply their prefixes with: [N, L] of those that are looked at one by one, [N]
    of the rest of a prefix together.
    """

    single: Float[Array, "N L"]
    together: Float[Array, " N"]

    def of(self, log_prefixes: Float[Array, " N"]) -> tuple[Float[Array, " M"], Float[Array, " N"]]:
        """The logs of the pairs [N L], and of the rests, of prefixes with these."""
        return (log_prefixes[:, None] + self.single).ravel(), log_prefixes + self.together


def promise(
    log_weights: Float[Array, " N"], recent: Float[Array, " N"], factors: Factors
) -> Float[Array, " N"]:
    """log V = log max(c1 W, c2 R): each of the two fills its half of the slots."""
    num = log_weights.shape[0]

    def scaled(log_prefixes: Array, slots: int) -> Array:
        single, together = factors.of(log_prefixes)
        log_c = log_scale(single, jax.nn.logsumexp(together), slots)
        # Where all have room it does not matter.
        return log_prefixes + jnp.where(jnp.isfinite(log_c), log_c, 0.0)

    if num == 1:
        return log_weights
    return jnp.maximum(scaled(log_weights, num - num // 2), scaled(recent, num // 2))


def _log_dropped(
    single: Float[Array, " L"], together: Float[Array, " N"], chosen: Chosen
) -> Float[Array, ""]:
    """The log of the sum of all that was not chosen."""
    taken = jnp.where(chosen.present, chosen.index, single.size)
    others = single.at[taken].set(-jnp.inf, mode="drop")
    return jax.nn.logsumexp(jnp.append(others, together))


def uncertainty(
    log_weights: Float[Array, " N"],
    parents: Int[Array, "R N"],
    included: Float[Array, "R N"],
    dropped: Float[Array, "R N"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The standard error of log Z, infinite if all particles are dead, and for a single one; and
    what was dropped, as a share of Z (see the module).

    Args:
        log_weights: [N] of the final population.
        parents, included: [R, N] of every round, the pair's prefix and its probability pi.
        dropped: [R, N], V of all pairs dropped in the round over V / pi of each one chosen, 0 in
            slots that hold none.
    """

    def back(carry: tuple, row: tuple) -> tuple[tuple, None]:
        shares, variance, most = carry
        slots, probability, lost = row
        variance = variance + jnp.sum((1 - probability) * shares**2)
        # A slot whose future came to nothing counts, as one of what is to be expected.
        here = jnp.sum(shares * lost) / jnp.maximum((lost > 0).sum(), 1)
        below = jnp.zeros_like(shares).at[slots].add(shares)
        return (below, variance, jnp.maximum(most, here)), None

    start = normalise(log_weights), jnp.float32(0), jnp.float32(0)
    _, variance, most = jax.lax.scan(back, start, (parents, included, dropped), reverse=True)[0]
    known = (log_weights.shape[0] > 1) & ~dead(log_weights).all()
    return jnp.where(known, jnp.sqrt(variance), jnp.inf), most


def result(run: Run) -> Weighted:
    """The population of a run (finished or not), with all its evidence banked."""
    x, rows = run.particles.state, run.rows
    out = population.result(run, x.sequences, log_prob=x.log_prob, log_density=x.log_density)
    error, dropped = uncertainty(
        out.log_weights, rows["parents"], rows["included"], rows["dropped"]
    )
    details = {"dropped": dropped}
    return dataclasses.replace(out, log_z_std_error=error, num_roots=None, details=details)


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_distinct.py")
def run(
    key: PRNGKeyArray,
    target: Target | Sequence[Target],
    *,
    num_particles: int = 32,
    history: bool = False,
    batch_size: int | None = None,
) -> Weighted:
    """SMC for gamma(x) = p(x)^alpha Phi(x) with different particles, in one jit.

    Args:
        key: typed key.
        target: best where the potential knows its factors in advance (`lookahead`): others enter
            the weights after the choice.  A list is run as by `smc.run`.
        num_particles: N, the most strings that are kept.
        history: record the genealogy.
        batch_size: of a list, rows that go through the model at a time (`prompts.run_each`).

    Returns:
        `Weighted`: strings that obey LAW 1.  Where there are fewer than N, the rows left over have
            log-weight -inf.

    Raises:
        ValueError: if `num_particles` < 1, or as `prompts.run_each` does.
    """
    check_count("num_particles", num_particles)
    one = holding(whole, num_particles=num_particles, history=history)
    return run_each(key, one, target, num_rows=num_particles, batch_size=batch_size)


@public
def iterate(
    key: PRNGKeyArray, target: Target, *, num_particles: int = 32, history: bool = False
) -> Iterator[Weighted]:
    """`run`, one round at a time, as `smc.iterate`."""
    check_count("num_particles", num_particles)
    run = _init(target, num_particles, history)
    for r, round_key in enumerate(jax.random.split(key, target.max_tokens)):
        run = heeding(target, _step if r else _first, round_key, target, run)
        yield _result(run)
        if not run.particles.state.active.any():
            return


@functools.partial(jax.jit, static_argnames=("num_particles", "history"))
def whole(key: Any, target: Target, *, num_particles: int, history: bool = False) -> Weighted:
    """All rounds of a run of one target."""
    keys = jax.random.split(key, target.max_tokens)
    # The first token takes no pass but the prompt's, and so is another program.
    run = step(keys[0], target, init(target, num_particles, history=history))
    return result(
        population.rounds(
            keys,
            run,
            lambda key, run: step(key, target, run),
            lambda run: run.particles.state.active.any(),
        )
    )


_init = jax.jit(
    lambda target, num, history: init(target, num, history=history), static_argnums=(1, 2)
)
_result = jax.jit(result)
_first = jax.jit(step)
_step = jax.jit(step, donate_argnums=2)
