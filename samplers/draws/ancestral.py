"""Ancestral sampling: exact, equally weighted draws from a language model."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Key, PRNGKeyArray

from ppl.checks import check_count
from ppl.target import Target

from ..base import Guarantee
from ..registry import sampler
from ..results import Draws
from ..strings import growing
from ..strings.proposals import as_proposal, bootstrap


@sampler(Guarantee.EXACT, proof="tests/samplers/draws/test_ancestral.py")
def run(key: PRNGKeyArray, target: Target, *, num_samples: int = 32) -> Draws:
    """`num_samples` independent draws from p(x | prompt), in one jit; `log_q` is `log_prob`.

    Raises:
        ValueError: if the target has a power or a potential (it has no exact draw), or
            `num_samples` < 1.
    """
    check_count("num_samples", num_samples)
    if not target.is_language_model:
        raise ValueError(
            "expected a plain language model, got a target with a power or a potential; use"
            " importance.run or smc.run"
        )
    return _run(key, target, num_samples)


@functools.partial(jax.jit, static_argnums=2)
def _run(key: PRNGKeyArray, target: Target, num: int) -> Draws:
    keys, proposal = jax.random.split(key, target.max_tokens), as_proposal(bootstrap)

    def keys_of(x: growing.Growing) -> Key[Array, " N"]:
        return jax.random.split(keys[x.drawn.max()], num)

    x = growing.complete(keys_of, target, proposal, growing.start(target, proposal, num))
    return Draws(
        samples=x.sequences,
        log_prob=x.log_prob,
        log_q=x.log_prob,
        cost=growing.cost(target, proposal, x),
    )
