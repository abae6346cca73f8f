"""Fractured sampling: answers to a thought that is cut off at several depths (arXiv 2505.12992).

    out = fractured.run(key, p, tok.encode("</think>"), depths=[64, 128, 256], num_thoughts=16)
    correct.reshape(16, 3, 4)                             # [thought, depth, answer]

n thoughts are drawn, and where each of them is cut off at one of H depths, m answers: all of them
branches of one cache.  An answer at depth h has the law of `thinking.run(within=h)`, that of the
intervention, but answers to one thought are dependent: given the thought, those of one depth are
independent, and between depths the thoughts are beginnings of each other.  So n is the sample size,
and not n H m; `samplers.search.clusters` has the estimates and their standard errors.  It costs

    B = n C_think + n H m C_answer        tokens, for n H m (C_think + C_answer) of separate strings

where the closing tokens count as the answer's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from ppl.checks import check_counts
from ppl.rows import anywhere
from ppl.target import Target, check_plain
from ppl.thinking import Closing, closed

from ..base import Guarantee
from ..registry import sampler
from ..results import Draws
from ..strings import costs, growing, regeneration
from .thinking import Forced


@sampler(Guarantee.EXACT, proof="tests/samplers/draws/test_fractured.py")
def run(
    key: PRNGKeyArray,
    target: Target,
    close: Sequence[int],
    *,
    depths: Sequence[int],
    num_thoughts: int = 16,
    num_samples: int = 4,
) -> Draws:
    """What the model says to each of n thoughts, cut off at each of H depths, m times, in one jit.

    EXACT: every row has the law of `thinking.run` at its depth, whose log-probability is `log_q`.
    A thought that is closed, or a string that ends, before a depth is left as it is; of the
    first m answers are drawn all the same.  A branch reads its last token again, and no other.

    Args:
        key: typed key.
        target: a language model p.
        close: token ids that close a thought.
        depths: H increasing numbers of tokens of thought.
        num_thoughts: n.
        num_samples: m, for each thought and depth.

    Returns:
        `Draws` of n H m rows, those of a thought together, and in these those of a depth.
        `details`: `thought` [n H m] tokens of thought before the cut; `closed` [n H m];
        `thinking` and `answering`, the two parts of the cost, whose sum with the prompt's is it.

    Raises:
        ValueError: unless the depths increase from at least 1, and as `thinking.run` does.
    """
    check_counts(num_thoughts=num_thoughts, num_samples=num_samples)
    check_plain(target, "; to condition on short thoughts, multiply by ppl.closed and use smc.run")
    _check_depths(depths)
    checked = closed(close, within=max(depths)).within(target.space)
    where = jnp.asarray(depths, jnp.int32)
    return _run(key, target, checked.automaton, where, num=num_thoughts, each=num_samples)


def _check_depths(depths: Sequence[int]) -> None:
    whole = [type(depth) is int for depth in depths]
    if not whole or not all(whole) or depths[0] < 1 or list(depths) != sorted(set(depths)):
        raise ValueError(
            f"expected depths as increasing whole numbers from 1, got {depths!r}; pass"
            " depths=[64, 128, 256]"
        )


@functools.partial(jax.jit, static_argnames=("num", "each"))
def _run(
    key: PRNGKeyArray,
    target: Target,
    automaton: Closing,
    depths: Int[Array, " H"],
    *,
    num: int,
    each: int,
) -> Draws:
    think_key, answer_key = jax.random.split(key)
    thought = _thought(think_key, target, Forced(automaton, depths[-1]), num)
    size, per = len(depths), len(depths) * each
    rows = jnp.repeat(jnp.arange(num, dtype=jnp.int32), per)
    depth = jnp.tile(jnp.repeat(depths, each), num)
    length, going = thought.sequences.length[rows], thought.active[rows]
    # A string that had ended later than here goes on: its end was not drawn yet.
    going = going | (length >= depth)
    branch = regeneration.rows_of(target, regeneration.drawn(thought), rows)
    branch = regeneration.truncated(target, branch, depth)

    proposal = Forced(automaton, depth)
    x = regeneration.start(target, proposal, branch, going)
    # Thought by thought, so that more of them keep the answers of the first.
    keys = jax.vmap(lambda key: jax.random.split(key, (size, each)))(
        jax.random.split(answer_key, num)
    )
    x = growing.complete(regeneration.keys_at(keys.ravel()), target, proposal, x)
    answer, prompt = regeneration.drawn(x), costs.prompt(target, proposal)
    thinking, answering = (costs.of_round(target, proposal, y) for y in (thought, x))
    return Draws(
        samples=answer.sequences,
        log_prob=answer.log_p.sum(1),
        log_q=answer.log_q.sum(1),
        cost=prompt + thinking + answering,
        details={
            "thought": jnp.minimum(length, depth),
            "closed": automaton.closed(x.proposal),
            "thinking": thinking,
            "answering": answering,
        },
    )


def _thought(key: PRNGKeyArray, target: Target, proposal: Forced, num: int) -> growing.Growing:
    """`num` strings until they have ended (not active), are closed, or as long as is allowed."""
    keys_of = regeneration.keys_at(jax.random.split(key, num))
    nothing = regeneration.no_strings(target, proposal, num)
    x = regeneration.start(target, proposal, nothing, jnp.ones(num, bool))
    logits = jnp.broadcast_to(target.prefix.logits, (num, target.lm.vocab_size))

    def moving(x: growing.Growing) -> Bool[Array, " N"]:
        open_ = ~proposal.automaton.closed(x.proposal)
        return x.active & open_ & (x.sequences.length < proposal.most)

    def more(x: growing.Growing) -> growing.Growing:
        return growing.token(keys_of(x), target, proposal, x, moving(x))[0]

    # The first token takes no pass but the prompt's, and so is another program.
    x = more(dataclasses.replace(x, logits=logits))
    return jax.lax.while_loop(lambda x: anywhere(moving(x)), more, x)
