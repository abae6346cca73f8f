"""Ancestral sampling: exact, equally weighted draws from a language model."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
from jaxtyping import Array, Key, PRNGKeyArray

from ppl.checks import check_count
from ppl.target import Target, check_plain

from ..base import Cost, Guarantee, holding
from ..registry import sampler
from ..results import Draws
from ..strings import costs, growing
from ..strings.prompts import run_each
from ..strings.proposals import Proposal, as_proposal, bootstrap


@sampler(Guarantee.EXACT, proof="tests/samplers/draws/test_ancestral.py")
def run(
    key: PRNGKeyArray,
    target: Target | Sequence[Target],
    *,
    num_samples: int = 32,
    batch_size: int | None = None,
) -> Draws:
    """`num_samples` independent draws from p(x | prompt), in one jit; `log_q` is `log_prob`.

    Args:
        key: typed key.
        target: p, or a list of them over one model (`lm.given_each`), drawn from side by side as in
            `smc.run`; then every leaf of the result has the list's axis first.
        num_samples: N, of each.
        batch_size: of a list, rows that go through the model at a time (`prompts.together`).

    Raises:
        ValueError: if a target has a power or a potential (it has no exact draw), `num_samples`
            < 1, or the targets of a list do not suit each other (`prompts.stack`).
    """
    check_count("num_samples", num_samples)
    each = [target] if isinstance(target, Target) else target
    for one in each:
        check_plain(one, "; use importance.run or smc.run")
    one = holding(_run, num=num_samples)
    return run_each(key, one, target, num_rows=num_samples, batch_size=batch_size)


@functools.partial(jax.jit, static_argnames="num")
def _run(key: PRNGKeyArray, target: Target, *, num: int) -> Draws:
    x, cost = grown(key, target, as_proposal(bootstrap), num)
    return Draws(samples=x.sequences, log_prob=x.log_prob, log_q=x.log_prob, cost=cost)


def grown(
    key: PRNGKeyArray, target: Target, proposal: Proposal, num: int
) -> tuple[growing.Growing, Cost]:
    """`num` whole strings, drawn by a proposal, and what they took; a longer horizon keeps their
    beginnings, and more of them the first.
    """
    keys = jax.random.split(key, target.max_tokens)

    def keys_of(x: growing.Growing) -> Key[Array, " N"]:
        return jax.random.split(keys[x.drawn.max()], num)

    x = growing.complete(keys_of, target, proposal, growing.start(target, proposal, num))
    return x, costs.prompt(target, proposal) + costs.of_round(target, proposal, x)
