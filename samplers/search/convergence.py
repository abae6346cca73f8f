"""Thoughts that stop when their answer no longer changes (answer convergence, arXiv 2506.02536).

    out = convergence.run(key, p, tok.encode("</think>"), steps, num=3, answer_tokens=16)

After every step of thought the closing tokens are put on a branch of the cache and the likeliest
answer is decoded there; when the last m such answers are the same, the branch is kept, and else it
is dropped and the thought goes on.  Every such look is paid: it costs as many tokens as the
closing and the answer have, so that steps should be long beside answers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_counts
from ppl.potential import State, log_mask
from ppl.pytrees import register_dataclass
from ppl.rows import anywhere, where_rows
from ppl.steps import Steps
from ppl.target import Target, check_plain
from ppl.thinking import Closing, Thought, closed

from ..base import Cost, Guarantee, spent
from ..draws.thinking import Forced
from ..registry import sampler
from ..results import Draws
from ..strings import costs, extending, growing, regeneration
from ..strings.growing import Growing


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Asked(Forced):
    """Closing tokens at once, and then the likeliest ones."""

    def law(
        self, target: Target, logits: Float[Array, "N V"], potential: State, state: Thought
    ) -> Float[Array, "N V"]:
        likeliest = jnp.argmax(logits, axis=1)[:, None] == jnp.arange(logits.shape[1])
        given = super().law(target, logits, potential, state)
        return jnp.where(self.due(state)[:, None], given, log_mask(likeliest))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Thinking:
    """N thoughts.

    x: the strings.  thinks: which are still being thought, neither closed nor ended.  answer
    [N, A]: what was last answered, EOS after it.  agreed: how many answers in a row were that.
    looks: how many there were.  thought: tokens of thought.  cost; looking, the part of the looks.
    """

    x: Growing
    thinks: Bool[Array, " N"]
    answer: Int[Array, "N A"]
    agreed: Int[Array, " N"]
    looks: Int[Array, " N"]
    thought: Int[Array, " N"]
    cost: Cost
    looking: Cost


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_convergence.py")
def run(
    key: PRNGKeyArray,
    p: Target,
    close: Sequence[int],
    steps: Steps,
    *,
    num: int = 3,
    answer_tokens: int = 16,
    num_samples: int = 1,
) -> Draws:
    """`num_samples` strings, of thoughts that are closed as soon as the last `num` answers agree.

    Thoughts that the model closes go on as its own; where no answers agree before only the closing
    and an answer have room, the thought is closed by force, as by `thinking.run`.  Two answers
    agree if their tokens do; one without tokens agrees with none.  What is longer than an answer
    that is looked at is drawn.  There is no target.

    Args:
        key: typed key.
        p: a language model.
        close: token ids that close a thought.
        steps: where to look: steps of thought.
        num: m, answers in a row.
        answer_tokens: A, the most tokens of an answer that is looked at.
        num_samples: N, independent ones.

    Returns:
        `Draws`.  `details`: `converged` [N]; `thought` [N] tokens of thought, closing left out;
        `looks` [N]; `looking`, the part of the cost that looks took, those that were kept too.

    Raises:
        ValueError: if p has a power or a potential, a count is below 1, an id is outside the
            vocabulary or is EOS, or max_tokens has no room for a thought, closing and answer.
    """
    check_counts(num=num, answer_tokens=answer_tokens, num_samples=num_samples)
    check_plain(p, ", for a thought that is cut off has no other density")
    most = p.max_tokens - len(close) - answer_tokens
    if most < 1:
        raise ValueError(
            f"expected room for a thought, {len(close)} closing tokens and {answer_tokens} of an"
            f" answer, got max_tokens={p.max_tokens}; raise it, or lower answer_tokens"
        )
    automaton = closed(close, within=most).within(p.space).automaton
    sizes = (num_samples, answer_tokens)
    return _run(key, p, steps.within(p.space), automaton, jnp.int32(num), sizes)


@functools.partial(jax.jit, static_argnames="sizes")
def _run(
    key: PRNGKeyArray,
    p: Target,
    steps: Steps,
    automaton: Closing,
    num: Int[Array, ""],
    sizes: tuple[int, int],
) -> Draws:
    think_key, end_key = jax.random.split(key)
    own = Forced(automaton, jnp.int32(p.max_tokens - automaton.num - sizes[1]))

    def one(r: Array, s: _Thinking) -> tuple[Array, _Thinking]:
        return r + 1, _look(p, own, num, _think(jax.random.fold_in(think_key, r), p, own, steps, s))

    s = _start(p, own, sizes)
    _, s = jax.lax.while_loop(
        lambda carry: anywhere(carry[1].thinks), lambda carry: one(*carry), one(jnp.int32(0), s)
    )
    keys = regeneration.keys_at(jax.random.split(end_key, sizes[0]))
    y = growing.complete(keys, p, own, growing.fresh(s.x))
    return Draws(
        samples=y.sequences,
        log_prob=y.log_prob,
        cost=spent(s.cost, costs.of_round(p, own, y)),
        details={
            "converged": s.agreed >= num,
            "thought": s.thought,
            "looks": s.looks,
            "looking": s.looking,
        },
    )


def _start(p: Target, own: Forced, sizes: tuple[int, int]) -> _Thinking:
    num, answer_tokens = sizes
    nothing = jnp.zeros(num, jnp.int32)
    return _Thinking(
        # Later strings have no logits, and one pass more keeps one program.
        x=dataclasses.replace(growing.start(p, own, num), logits=None),
        thinks=jnp.ones(num, bool),
        answer=jnp.full((num, answer_tokens), p.lm.eos, jnp.int32),
        agreed=nothing,
        looks=nothing,
        thought=nothing,
        cost=costs.prompt(p, own),
        looking=Cost(),
    )


def _think(key: PRNGKeyArray, p: Target, own: Forced, steps: Steps, s: _Thinking) -> _Thinking:
    """A step of thought more of all that are thought about."""
    before = dataclasses.replace(s.x, active=s.thinks)
    x, _ = extending.extend(p, own, steps).sample(key, before)
    # Not what the move says: a token that is forced may have probability 0.
    goes_on, length = _goes_on(p, before, x), x.sequences.length
    thinks = s.thinks & goes_on & ~own.automaton.closed(x.proposal)
    return dataclasses.replace(
        s,
        x=dataclasses.replace(x, active=jnp.where(s.thinks, goes_on, s.x.active)),
        thinks=thinks,
        thought=jnp.where(thinks, jnp.minimum(length, own.most), s.thought),
        cost=spent(s.cost, costs.of_round(p, own, x)),
    )


def _look(p: Target, own: Forced, num: Int[Array, ""], s: _Thinking) -> _Thinking:
    """The answers of thoughts that have room for one, which are over where enough of them agree."""
    asked = Asked(own.automaton, jnp.int32(0))
    length, matched = s.x.sequences.length, s.x.proposal.matched
    looks = s.thinks & (length <= own.most)
    start = length + own.automaton.num - matched
    branch = dataclasses.replace(growing.fresh(s.x), active=looks)
    # Nothing is drawn here, and so no key is used.
    keys = jax.random.split(jax.random.key(0), looks.shape[0])
    size = s.answer.shape[1]
    y = growing.complete(lambda _: keys, p, asked, branch, start + size)

    place = start[:, None] + jnp.arange(size, dtype=jnp.int32)
    tokens = jnp.take_along_axis(y.sequences.tokens, jnp.minimum(place, p.max_tokens - 1), axis=1)
    answer = jnp.where(looks[:, None], tokens, s.answer)
    said = (answer != p.lm.eos).any(axis=1)
    same = said & (answer == s.answer).all(axis=1)
    agreed = jnp.where(looks, jnp.where(same, s.agreed + 1, said.astype(jnp.int32)), s.agreed)
    over = looks & (agreed >= num)
    more = costs.of_round(p, asked, y)
    return dataclasses.replace(
        s,
        x=_kept(p, s.x, y, over),
        thinks=s.thinks & ~over,
        answer=answer,
        agreed=agreed,
        looks=s.looks + looks,
        cost=spent(s.cost, more),
        looking=spent(s.looking, more),
    )


def _goes_on(p: Target, before: Growing, x: Growing) -> Bool[Array, " N"]:
    """Which strings have not ended: all that was drawn is in them, and there is room."""
    length = x.sequences.length
    return (length - before.sequences.length == x.drawn) & (length < p.max_tokens)


def _kept(p: Target, x: Growing, y: Growing, rows: Bool[Array, " N"]) -> Growing:
    """The strings, whose branches `y` are kept in the rows `rows`, and dropped elsewhere."""
    names = ("sequences", "log_prob", "proposal")
    parts = [{name: getattr(z, name) for name in names} for z in (y, x)]
    kept = dataclasses.replace(x, **where_rows(rows, *parts))
    # Of one cache: to drop a branch is to forget its tokens.
    cache = p.lm.truncate(y.cache, jnp.maximum(kept.sequences.length - 1, 0))
    active = jnp.where(rows, _goes_on(p, x, y), x.active)
    return dataclasses.replace(kept, cache=cache, active=active)
