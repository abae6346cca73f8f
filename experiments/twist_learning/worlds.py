"""What `twist_learning` learns twists for: problems with exact draws, so that log Z is bounded from
above.

table          a prefix table with a reward at the end: enumerated, so log Z is known
continuation   a language model fills a gap before a given text y: gamma(x) = p(x | prompt)
               p(y | prompt, x).  Here x and y were drawn together from the model, so x is one exact
               draw of the posterior given y
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

import models
import ppl
from amortized.strings import guide
from amortized.strings.guide import Guide
from models import heads, tabular
from ppl import exact
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.target import Target
from samplers.draws import ancestral

VOCAB_SIZE, MAX_TOKENS, EOS = 4, 6, 1
PROMPT = "Once upon a time, there was a little girl who loved to"
GAP, GIVEN, RANK = 6, 6, 16


@dataclasses.dataclass(frozen=True)
class World:
    """A target, a twist that is 1 everywhere, exact draws, and log Z if it is known.

    learning_rate: that suits the twist's parameters.
    """

    target: Target
    twist: Guide
    exact: Sequences
    log_z: float | None
    learning_rate: float


def table(key: PRNGKeyArray, num_exact: int) -> World:
    """Strings of at most 6 of 4 tokens; the reward wants two more 0 than 2, and an end on 3."""
    model_key, exact_key = jax.random.split(key)
    p = tabular.random_table(model_key, VOCAB_SIZE, MAX_TOKENS, eos=EOS).given(
        [0], max_tokens=MAX_TOKENS
    )
    target = p * ppl.reward(_log_reward)
    law = exact.enumerate_strings(target)
    rows = jax.random.categorical(exact_key, jnp.asarray(law.log_gamma), shape=(num_exact,))
    zeros = jnp.zeros((tabular.num_prefixes(VOCAB_SIZE, MAX_TOKENS), VOCAB_SIZE))
    twist = guide.full(tabular.table(zeros, eos=EOS))
    return World(target, twist, take_rows(law.sequences, rows), law.log_z, 5e-2)


def _log_reward(tokens: Int[Array, "N T"], length: Int[Array, " N"]) -> Float[Array, " N"]:
    written = jnp.arange(tokens.shape[1]) < length[:, None]
    surplus = (written & (tokens == 0)).sum(1) - (written & (tokens == 2)).sum(1)
    last = jnp.take_along_axis(tokens, jnp.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    return -1.5 * jnp.abs(surplus - 2) - 2.0 * ((length == 0) | (last != 3))


def continuation(key: PRNGKeyArray, model: str) -> World:
    """A gap of 6 tokens in a story, the 6 tokens after it given; the twist is a low-rank head on
    the model itself.
    """
    draw_key, head_key = jax.random.split(key)
    lm, tokenizer = models.load(model)
    ids = tokenizer.encode(PROMPT)
    p = lm.given(ids, max_tokens=GAP + GIVEN)
    told = ancestral.run(draw_key, p, num_samples=8).sequences
    # Without EOS in both parts, as the target has it: x is an exact draw of its own posterior given
    # y.
    whole = np.asarray(told.tokens)[int(np.argmax(np.asarray(told.length) == GAP + GIVEN))]
    p = lm.given(ids, max_tokens=GAP)
    target = p * ppl.min_tokens(GAP) * ppl.continuation(p, whole[GAP:].tolist())
    x = Sequences(jnp.asarray(whole[None, :GAP], jnp.int32), jnp.full(1, GAP, jnp.int32))
    return World(target, guide.head(lm, heads.low_rank(head_key, lm, RANK)), x, None, 3e-3)
