"""What a training step costs: a GFlowNet step on a LoRA guide, over the passes of the model that it
cannot do without.

    python -m experiments.bench.training

Both take turns in one process, compiled; `lora_step` is the median over rounds of the ratio within
a round.

    lora_step    a step of `amortized.fit`: 8 strings of 24 tokens drawn from the guide, rewarded by
                 the frozen model and scored under the guide, the loss `vargrad`, its gradient, Adam
    floor        a prompt of about 32 tokens read, 23 steps of the guide for 8 rows with the choice
                 of every token, one frozen pass over the strings, and one forward and backward pass
                 of the guide over them; the prompt is read once, where the step also reads it for
                 the frozen model and for the gradient
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import models
import ppl
from amortized import training
from amortized.strings import gflownet, guide, prefix_rewards
from amortized.strings.guide import Guide
from ppl.draw import categorical
from ppl.lm import LM, Prefix
from ppl.target import Target

from .. import compilation
from . import turns
from .smc_overhead import newness

NUM, MAX_TOKENS, RATE = 8, 24, 1e-5
PROMPT = (
    "The lighthouse keeper had not seen a ship for forty days. On the morning of the forty-first he"
    " climbed the stairs,"
    " lit his pipe, and"
)


def target_of(lm: LM, example: dict[str, jax.Array]) -> Target:
    """The model's own law after the prompt, tilted by a reward that costs nothing."""
    return law_of(lm, example) ** 1 * ppl.reward(newness)


def law_of(lm: LM, example: dict[str, jax.Array]) -> Target:
    """A model's law after the prompt."""
    return Target(lm, lm.read(example["tokens"], example["length"]), MAX_TOKENS)


def runs(lm: LM, tokenizer: Any) -> turns.Runs:
    """Label -> a function of a key that makes one step; the first is the floor."""
    prefix = lm.prefill(tokenizer.encode(PROMPT))
    # Strings end with the least probable token, so that all of them have 24.
    lm = dataclasses.replace(lm, eos=int(prefix.logits.argmin()))
    learner = guide.lora(jax.random.key(1), lm)
    return {
        "floor": lambda key: floor(key, learner, lm, prefix),
        "lora_step": Step(learner, lm, prefix),
    }


class Step:
    """The step that `fit.run` compiles, without what a run does once; each call makes
    the next one.
    """

    def __init__(self, learner: Guide, lm: LM, prefix: Prefix) -> None:
        examples = {"tokens": prefix.tokens[None], "length": prefix.length[None]}
        task = gflownet.Task(lm, examples, target_of, law_of)
        own = gflownet.training(
            learner, task, num=NUM, behaviour=gflownet.on_policy, rewards=prefix_rewards.at_the_end
        )
        optimizer = optax.adam(RATE)
        # The step updates its state in place, so it needs its own.
        params, fixed = eqx.partition(jax.tree.map(jnp.copy, own.params), eqx.is_inexact_array)
        self._how = training.Method(jax.random.key(0), own.draw, own.loss, fixed, optimizer)
        self._state = training.initial(self._how, params, own.data)
        self._made = 0

    def __call__(self, key: jax.Array) -> dict[str, jax.Array]:
        made = np.int32(self._made)
        self._state, rows = training.steps((self._how, made, np.int32(1)), self._state)
        self._made += 1
        return rows


@jax.jit
def floor(key: jax.Array, learner: Guide, lm: LM, prefix: Prefix) -> tuple[Any, ...]:
    """The passes of a step and nothing between them."""
    given = learner.lm.read(prefix.tokens, prefix.length)
    tokens = _draw(key, learner.lm, given)

    def score(params: Any) -> jax.Array:
        return _log_prob(dataclasses.replace(learner, params=params).lm, given, tokens)

    return tokens, _log_prob(lm, prefix, tokens), jax.value_and_grad(score)(learner.params)


def _draw(key: jax.Array, lm: LM, prefix: Prefix) -> jax.Array:
    keys = jax.random.split(key, (MAX_TOKENS, NUM))

    def body(carry: tuple, keys: jax.Array) -> tuple[tuple, jax.Array]:
        cache, token = carry
        cache, logits = lm.step(prefix, cache, token)
        token, _ = categorical(keys, logits)
        return (cache, token), token

    first, _ = categorical(keys[0], jnp.broadcast_to(prefix.logits, (NUM, lm.vocab_size)))
    rest = jax.lax.scan(body, (lm.init(prefix, NUM, MAX_TOKENS), first), keys[1:])[1]
    return jnp.concatenate([first[None], rest]).T


def _log_prob(lm: LM, prefix: Prefix, tokens: jax.Array) -> jax.Array:
    """Of all tokens but the first, summed."""
    log_probs = jax.nn.log_softmax(lm.extend(prefix, tokens[:, :-1]))
    return jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=2).sum()


def main() -> None:
    """Print a table and, last, one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.training")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    compilation.use_cache()
    times = turns.measure(runs(*models.load(args.model)), args.rounds, lambda out: 1)
    turns.report(
        "training", times, f"{args.model}, N = {NUM}, {MAX_TOKENS} tokens, {args.rounds} rounds"
    )


if __name__ == "__main__":
    main()
