"""Thinking budgets by force: what a model says when its thought is cut off.

    out = thinking.run(key, p, tok.encode("</think>"), within=64)

Of every string at most `within` tokens are the model's own; if by then the thought is not closed,
the closing tokens are put there, or what is missing of them, and the model goes on.  That is an
intervention, not the model's law given that it thought so briefly, which is p * `ppl.closed`: of
the tokens that are put there, no probability counts.

    q(x) = prod_t p(x_t | x_<t)     over the tokens that the model drew

Budget forcing of Elastic Reasoning (arXiv 2505.05315).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_count
from ppl.potential import State, log_mask
from ppl.pytrees import register_dataclass
from ppl.target import Target, check_plain
from ppl.thinking import Closed, Closing, Thought, closed

from ..base import Guarantee
from ..registry import sampler
from ..results import Draws
from ..strings.laws import Proposal
from . import ancestral


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Forced(Proposal):
    """The model's own law, but for closing tokens that are due.

    most: the most tokens of thought, of all strings or of each [N].
    """

    automaton: Closing
    most: Int[Array, "*N"]

    @property
    def blind(self) -> bool:
        return True

    def init(self, target: Target, num: int) -> Thought:
        return self.automaton.start(num)

    def law(
        self, target: Target, logits: Float[Array, "N V"], potential: State, state: Thought
    ) -> Float[Array, "N V"]:
        due = self.due(state)[:, None]
        given = self.automaton.next(state)[:, None] == jnp.arange(logits.shape[1])
        return jnp.where(due, log_mask(given), logits)

    def due(self, state: Thought) -> Bool[Array, " N"]:
        """Which strings are given their next token [N]."""
        return ~self.automaton.closed(state) & (state.length >= self.most)

    def update(self, target: Target, state: Thought, token: Int[Array, " N"]) -> Thought:
        return self.automaton.after(state, token)


@sampler(Guarantee.EXACT, proof="tests/samplers/draws/test_thinking.py")
def run(
    key: PRNGKeyArray, target: Target, close: Sequence[int], *, within: int, num_samples: int = 32
) -> Draws:
    """`num_samples` independent draws of what the model says if its thought is cut off, in one jit.

    EXACT for the law of the intervention, whose log-probability is `log_q`; `log_prob` is the
    model's own of the same string.  A string that ends before is left as it is.

    Args:
        key: typed key.
        target: a language model p.
        close: token ids that close a thought.
        within: the most tokens of thought.
        num_samples: N.

    Raises:
        ValueError: if the target has a power or a potential, a count is below 1, an id is outside
            the vocabulary or is EOS, or max_tokens has no room for thought and closing tokens.
    """
    check_count("num_samples", num_samples)
    check_plain(target, "; to condition on short thoughts, multiply by ppl.closed and use smc.run")
    checked: Closed = closed(close, within=within).within(target.space)
    return _run(key, target, Forced(checked.automaton, jnp.int32(within)), num=num_samples)


@functools.partial(jax.jit, static_argnames="num")
def _run(key: PRNGKeyArray, target: Target, proposal: Forced, *, num: int) -> Draws:
    x, cost = ancestral.grown(key, target, proposal, num)
    closed = proposal.automaton.closed(x.proposal)
    return Draws(
        samples=x.sequences,
        log_prob=x.log_prob,
        log_q=x.log_q,
        cost=cost,
        details={"closed": closed},
    )
