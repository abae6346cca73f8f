"""phi-decoding (arXiv 2503.13288): of the next steps those go on whose completions, drawn once and
forgotten again, are likelier than their parent's and agree with each other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_counts, check_function
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from ppl.steps import Steps
from ppl.target import Target, check_plain

from ..base import Cost, Guarantee, spent
from ..registry import sampler
from ..results import Choice
from ..strings import costs, extending, growing, regeneration
from ..strings.growing import Growing
from ..strings.proposals import Proposal, as_proposal, tempered

TOP_UP = 0.1
"""Temperature at which pruned steps are drawn back where too few are left."""
ROUNDING = 1e-5

Weigh = Callable[[Float[Array, " n"], Float[Array, " n"]], Float[Array, " n"]]
"""(advantages, alignments), -inf where nothing is, -> log-weights of n candidates."""

Align = Callable[[Sequences, Bool[Array, " n"], int], Float[Array, " n"]]
"""(strings, living, V) -> the share of living strings that each agrees with."""


def paper(advantage: Float[Array, " n"], alignment: Float[Array, " n"]) -> Float[Array, " n"]:
    """R = softmax(A / 0.6) + softmax(C / 0.6), weights exp(R / tau); tau is not said, 1 here."""
    return jax.nn.softmax(advantage / 0.6) + jax.nn.softmax(alignment / 0.6)


def code(advantage: Float[Array, " n"], alignment: Float[Array, " n"]) -> Float[Array, " n"]:
    """As public code has it: weights (softmax(A / 0.1) + softmax(C)) / 2."""
    return jnp.log((jax.nn.softmax(advantage / 0.1) + jax.nn.softmax(alignment)) / 2)


def clusters(
    x: Sequences, living: Bool[Array, " n"], vocab_size: int, *, num: int = 3
) -> Float[Array, " n"]:
    """The share of each string's cluster: `num` means of normalised TF-IDF counts of tokens.

    The first centres are far from each other: the first string, and then the one farthest from all
    centres before.
    """
    n, horizon = x.tokens.shape
    written = (jnp.arange(horizon) < x.length[:, None]) & living[:, None]
    rows = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None], (n, horizon))
    counts = jnp.zeros((n, vocab_size), jnp.float32).at[rows, x.tokens].add(written)
    rarity = jnp.log((1 + living.sum()) / (1 + (counts > 0).sum(0))) + 1
    points = counts * rarity
    points = points / jnp.maximum(jnp.linalg.norm(points, axis=1, keepdims=True), 1e-9)

    def distances(centres: Array) -> Array:
        return ((points[:, None] - centres[None]) ** 2).sum(-1)

    centres = points[jnp.argmax(living)][None]
    for _ in range(num - 1):
        far = jnp.where(living, distances(centres).min(1), -1.0)
        centres = jnp.concatenate([centres, points[jnp.argmax(far)][None]])

    def member(centres: Array) -> Array:
        nearest = distances(centres).argmin(1)
        return ((nearest[:, None] == jnp.arange(num)) & living[:, None]).astype(jnp.float32)

    def lloyd(_: Array, centres: Array) -> Array:
        of = member(centres)
        size = of.sum(0)[:, None]
        mean = jnp.matmul(of.T, points, precision="highest") / jnp.maximum(size, 1.0)
        return jnp.where(size > 0, mean, centres)

    of = member(jax.lax.fori_loop(0, 10, lloyd, centres))
    return (of * of.sum(0)).sum(1) / jnp.maximum(living.sum(), 1)


class _How(NamedTuple):
    """What is static."""

    num_beams: int
    width: int
    min_steps: int
    max_steps: int
    weigh: Weigh
    align: Align


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Beams:
    """M strings, F of each, the largest share of the last round, rounds, and what was spent."""

    x: Growing
    foresight: Float[Array, " M"]
    agreement: Float[Array, ""]
    rounds: Int[Array, ""]
    cost: Cost


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_phi_decoding.py")
def run(
    key: PRNGKeyArray,
    p: Target,
    steps: Steps,
    *,
    num_beams: int = 4,
    width: int = 4,
    min_steps: int = 4,
    max_steps: int = 8,
    temperature: float = 0.6,
    agreement: float = 0.7,
    weigh: Weigh = paper,
    align: Align = clusters,
) -> Choice:
    """phi-decoding: steps are drawn in proportion to the advantage of one completion of each and to
    how many completions agree with it; in one jit.

        s  mean log p of a step; steps with s < mean - standard deviation are dropped, or drawn back
           in proportion to exp(s / 0.1) where fewer than M are left
        F  mean log p of one completion;  A = F - F(parent), F = 0 of the empty string
        C  share of the completions in its cluster

    M candidates go on, drawn without replacement from `weigh(A, C)`.  A step that ends its string
    has no completion, F = s; strings that have ended stay candidates, A = 0.  After `min_steps`
    rounds it stops as soon as a cluster holds `agreement` of all; then every string is drawn to its
    end, and one is drawn by the same rule.  There is no target, and no reward is asked.

    Args:
        key: typed key.
        p: a language model.
        steps: where steps of text end.
        num_beams, width: M, and how many next steps each string draws.
        min_steps, max_steps: rounds before the end is drawn.
        temperature: of all draws.
        agreement: share at which there is nothing more to decide.
        weigh: `paper`, or `code` with agreement=0.69 for what public code does.
        align: `clusters`, or a function of yours.

    Returns:
        `Choice` of M strings: `scores` are their log-weights with Gumbel noise, so that the best is
        the draw.  `details`: `log_weights` [M], `rounds` [], `agreement` [] of the last round.

    Raises:
        ValueError: unless all counts are at least 1 and min_steps <= max_steps, temperature is
            above 0, and p has no power and no potential.
    """
    how = _How(num_beams, width, min_steps, max_steps, weigh, align)
    _check(p, how)
    proposal = as_proposal(tempered(temperature))
    return _run(key, p, proposal, steps.within(p.space), jnp.float32(agreement), how)


def _check(p: Target, how: _How) -> None:
    names = ("num_beams", "width", "min_steps", "max_steps")
    check_counts(**{name: getattr(how, name) for name in names})
    check_function("weigh", how.weigh, "advantage, alignment", f"{__name__}.paper")
    check_function("align", how.align, "x, living, vocab_size", f"{__name__}.clusters")
    if how.min_steps > how.max_steps:
        raise ValueError(
            f"expected min_steps of at most max_steps, got {how.min_steps} and {how.max_steps};"
            f" pass max_steps={how.min_steps}"
        )
    check_plain(p, ", which a search does not weigh; use smc.run, which does")


@functools.partial(jax.jit, static_argnames="how")
def _run(
    key: Any,
    p: Target,
    proposal: Proposal,
    steps: Steps,
    agreement: Float[Array, ""],
    how: _How,
) -> Choice:
    round_key, end_key, draw_key = jax.random.split(key, 3)

    def going(s: _Beams) -> Bool[Array, ""]:
        agreed = (s.rounds >= how.min_steps) & (s.agreement >= agreement)
        return s.x.active.any() & (s.rounds < how.max_steps) & ~agreed

    def one(s: _Beams) -> _Beams:
        return _round(jax.random.fold_in(round_key, s.rounds), p, proposal, steps, s, how)

    zeros = jnp.zeros(how.num_beams, jnp.float32)
    # Later strings have no logits, and one pass more keeps one program.
    x = dataclasses.replace(growing.start(p, proposal, how.num_beams), logits=None)
    start = _Beams(x, zeros, jnp.float32(0), jnp.int32(0), costs.prompt(p, proposal))
    s = jax.lax.while_loop(going, one, start)
    living = s.x.log_prob > -jnp.inf
    y, foresight = _completed(end_key, p, proposal, s.x, s.foresight)
    log_weights, _ = _weights(how, p, y, foresight - s.foresight, living)
    noise = jax.random.gumbel(draw_key, log_weights.shape, jnp.float32)
    return Choice(
        samples=y.sequences,
        scores=log_weights + noise,
        best=jnp.argmax(log_weights + noise).astype(jnp.int32),
        cost=spent(s.cost, costs.of_round(p, proposal, y)),
        log_prob=y.log_prob,
        details={"log_weights": log_weights, "rounds": s.rounds, "agreement": s.agreement},
    )


def _round(
    key: PRNGKeyArray, p: Target, proposal: Proposal, steps: Steps, s: _Beams, how: _How
) -> _Beams:
    step_key, end_key, draw_key = jax.random.split(key, 3)
    group = jnp.arange(how.num_beams * how.width, dtype=jnp.int32) // how.width
    before, parent = growing.reorder(p, proposal, s.x, group), s.foresight[group]
    x, kept, mean = _steps(step_key, p, proposal, steps, before, how)
    without = jnp.where(before.active, mean, parent)
    going = dataclasses.replace(x, active=x.active & kept)
    y, foresight = _completed(end_key, p, proposal, going, without)
    log_weights, share = _weights(how, p, y, foresight - parent, kept)
    noise = jax.random.gumbel(draw_key, log_weights.shape, jnp.float32)
    chosen = jax.lax.top_k(log_weights + noise, how.num_beams)[1]
    more = costs.of_round(p, proposal, x) + costs.of_round(p, proposal, y)
    after = growing.reorder(p, proposal, x, chosen)
    return _Beams(
        x=dataclasses.replace(after, active=after.active & kept[chosen]),
        foresight=foresight[chosen],
        agreement=jnp.where(kept, share, 0.0).max(),
        rounds=s.rounds + 1,
        cost=spent(s.cost, more),
    )


def _steps(
    key: PRNGKeyArray, p: Target, proposal: Proposal, steps: Steps, before: Growing, how: _How
) -> tuple[Growing, Bool[Array, " n"], Float[Array, " n"]]:
    """A step more of every string, which of them stay, and mean log p of the step."""
    step_key, prune_key = jax.random.split(key)
    x, _ = extending.extend(p, proposal, steps).sample(step_key, before)
    mean = (x.log_prob - before.log_prob) / jnp.maximum(x.drawn, 1)
    alive, ended = x.log_prob > -jnp.inf, ~before.active
    stays = prune(prune_key, jnp.where(ended, 0.0, mean), alive & ~ended, how.num_beams)
    # Of a string that has ended there is one, which no step can prune.
    first = jnp.arange(ended.shape[0], dtype=jnp.int32) % how.width == 0
    return x, stays | (alive & ended & first), mean


def prune(
    key: PRNGKeyArray, mean: Float[Array, " n"], alive: Bool[Array, " n"], num: int
) -> Bool[Array, " n"]:
    """Which steps stay: those of at least mean - standard deviation, and where these are fewer than
    `num`, others in proportion to exp(s / 0.1), without replacement.
    """
    total = jnp.maximum(alive.sum(), 1)
    centre = jnp.where(alive, mean, 0.0).sum() / total
    spread = jnp.sqrt(jnp.where(alive, (mean - centre) ** 2, 0.0).sum() / total)
    stays = alive & (mean >= centre - spread - ROUNDING)
    drawn = mean / TOP_UP + jax.random.gumbel(key, mean.shape, jnp.float32)
    rank = jnp.argsort(jnp.argsort(jnp.where(stays, -jnp.inf, jnp.where(alive, -drawn, jnp.inf))))
    return alive & (stays | (rank < num))


def _completed(
    key: PRNGKeyArray,
    p: Target,
    proposal: Proposal,
    x: Growing,
    without: Float[Array, " n"],
) -> tuple[Growing, Float[Array, " n"]]:
    """Active strings to their ends, and mean log p of what was drawn, or `without` any."""
    keys = regeneration.keys_at(jax.random.split(key, x.active.shape[0]))
    y = growing.complete(keys, p, proposal, growing.fresh(x))
    mean = (y.log_prob - x.log_prob) / jnp.maximum(y.drawn, 1)
    return y, jnp.where(y.drawn > 0, mean, without)


def _weights(
    how: _How, p: Target, y: Growing, advantage: Float[Array, " n"], kept: Bool[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Log-weights of the strings that were kept, and their alignments."""
    share = how.align(y.sequences, kept, p.lm.vocab_size)
    found = (jnp.where(kept, value, -jnp.inf) for value in (advantage, share))
    return jnp.where(kept, how.weigh(*found), -jnp.inf), share
