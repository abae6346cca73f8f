"""The sampler itself under enumeration: the library's own code runs once for every combination of
its random choices.

Draws are replaced by reading a tape, which also keeps the probability that the library's draw would
have had.  Loops are unrolled, with rounds masked that would not have run, so that all choices of
all runs are one batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl.exact import Enumeration, enumerate_strings
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.target import Target
from samplers import base, population, resampling, smc
from samplers.results import Weighted
from samplers.smc import conditional
from samplers.strings import extending, laws
from tests.samplers.problems import score_arrays

VOCAB_SIZE, EOS = 3, 1


def three_letters(max_tokens: int) -> Target:
    """p, asymmetric: 7 strings for two tokens, 15 for three."""
    lm = tabular.random_table(jax.random.key(5), VOCAB_SIZE, max_tokens + 1, eos=EOS)
    return lm.given((2, 0), max_tokens=max_tokens)


def small_target(max_tokens: int) -> Target:
    """p^1.3 and an asymmetric score of every prefix."""
    p = three_letters(max_tokens)
    return p**1.3 * ppl.step_scores(
        lambda tokens, length: 2 * score_arrays(tokens, length), ppl.Steps(every=1)
    )


@dataclasses.dataclass
class Tape:
    """What the draws of one run return: tokens [calls, N], ancestors [resamplings, N], the
    reference's [resamplings].

    The first `free` slots draw; what the tape holds for the others is not drawn.  `log_probs`
    gathers each draw's log-probability and the number of its alternatives.
    """

    tokens: Any
    ancestors: Any
    own: Any
    free: int
    log_probs: list[tuple[Any, int]] = dataclasses.field(default_factory=list)
    used: dict[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("tokens", "ancestors", "own"), 0)
    )

    def next(self, name: str) -> Any:
        self.used[name] += 1
        return getattr(self, name)[self.used[name] - 1]

    def categorical(self, keys: Any, log_weights: Any) -> tuple[Any, Any]:
        token, none = self.next("tokens"), jnp.isneginf(log_weights).all(1)
        log_q = jnp.take_along_axis(jax.nn.log_softmax(log_weights), token[:, None], axis=1)[:, 0]
        log_prob = jnp.where(none, -math.log(VOCAB_SIZE), log_q)[: self.free].sum()
        self.log_probs.append((log_prob, VOCAB_SIZE**self.free))
        return token, jnp.where(none, -jnp.inf, log_q)

    def multinomial(self, key: Any, log_weights: Any, num: int) -> Any:
        ancestors = self.next("ancestors")
        self.log_probs.append(
            (jax.nn.log_softmax(log_weights)[ancestors][: self.free].sum(), num**self.free)
        )
        return ancestors

    def ancestor(self, key: Any, log_weights: Any, num: int) -> Any:
        index = self.next("own")
        self.log_probs.append((jax.nn.log_softmax(log_weights)[index], log_weights.shape[0]))
        return index[None]

    def unroll(self, turns: int) -> Callable[..., Any]:
        """A `while_loop` of at most so many turns."""

        def while_loop(condition: Any, body: Any, carry: Any) -> Any:
            for _ in range(turns):
                go, before = condition(carry), len(self.log_probs)
                new = body(carry)
                carry = jax.tree.map(lambda a, b, go=go: jnp.where(go, a, b), new, carry)
                # What is not drawn has all its alternatives on tape; each gets an equal share of
                # the run.
                masked = [(jnp.where(go, p, -math.log(n)), n) for p, n in self.log_probs[before:]]
                self.log_probs[before:] = masked
            return carry

        return while_loop


class Module:
    """A module, some of whose names are others."""

    def __init__(self, module: Any, **names: Any):
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextlib.contextmanager
def inserted(tape: Tape, rounds: int, step_tokens: int, horizon: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        for module, turns in (
            (base, 1),
            (population, rounds - 1),
            (extending, step_tokens - 1),
            (conditional, horizon),
        ):
            patch.setattr(
                module, "jax", Module(jax, lax=Module(jax.lax, while_loop=tape.unroll(turns)))
            )
        patch.setattr(laws, "categorical", tape.categorical)
        patch.setattr(resampling, "multinomial", tape.multinomial)
        patch.setattr(conditional, "multinomial", tape.ancestor)
        yield


@dataclasses.dataclass
class Runs:
    """All runs: the reference each started from (0 without one), its probability given that, and
    what came out.
    """

    exact: Enumeration
    reference: np.ndarray
    probs: np.ndarray
    out: Weighted

    @property
    def weights(self) -> np.ndarray:
        """The law [runs, strings] of a draw from each run's final weights."""
        weights = np.exp(np.asarray(self.out.log_weights, np.float64))
        law = np.zeros((len(weights), len(self.exact.probs)))
        for i in range(weights.shape[1]):
            np.add.at(
                law,
                (np.arange(len(law)), self.exact.index(self.out.sequences.tokens[:, i])),
                weights[:, i],
            )
        return law / np.maximum(law.sum(1, keepdims=True), 1e-300)

    def kernel(self) -> np.ndarray:
        """K [strings, strings] of particle Gibbs."""
        matrix = np.zeros((len(self.exact.probs),) * 2)
        np.add.at(matrix, self.reference, self.probs[:, None] * self.weights)
        return matrix


def enumerate_runs(
    target: Target,
    *,
    thresholds: Sequence[float],
    num_particles: int = 2,
    pinned: bool = True,
    steps: Any = None,
    **options: Any,
) -> dict[float, Runs]:
    """Every run of conditional SMC on every string of positive density (or of SMC, if not
    `pinned`), by threshold.
    """
    exact, horizon = enumerate_strings(target), target.max_tokens
    every = 1 if steps is None else steps.every
    rounds = -(-horizon // every)
    free, resamplings, calls = num_particles - pinned, rounds - 1, rounds * every
    own = resamplings if options.get("ancestor_sampling") else 0
    sizes = [VOCAB_SIZE] * (calls * free) + [num_particles] * (resamplings * free + own)
    starts = np.flatnonzero(exact.probs > 0) if pinned else np.zeros(1, int)
    script = np.asarray(list(itertools.product(*map(range, sizes))), np.int32).reshape(
        -1, len(sizes)
    )
    rows = np.tile(script, (len(starts), 1))
    reference = np.repeat(starts, len(script))
    run_options = {"num_particles": num_particles, "steps": steps, **options}

    def one(row: Any, start: Sequences, threshold: Any) -> tuple[Any, Weighted]:
        tokens, ancestors, mine = jnp.split(row, [calls * free, (calls + resamplings) * free])
        slots = ((0, 0), (0, num_particles - free))
        tokens, ancestors = (jnp.pad(x.reshape(-1, free), slots) for x in (tokens, ancestors))
        tape = Tape(tokens, ancestors, mine, free)
        with inserted(tape, rounds, every, horizon):
            key = jax.random.key(0)
            if pinned:
                one_row = jax.tree.map(lambda leaf: leaf[None], start)
                out = conditional.run(key, target, one_row, threshold=threshold, **run_options)
            else:
                free_options = {"resampler": resampling.multinomial, **run_options}
                out = smc.run(key, target, threshold=threshold, **free_options)
        return sum((p for p, _ in tape.log_probs), jnp.float32(0)), out

    # One jit around all: `disable_jit` makes one program of what the library compiles in parts.
    every_run = jax.jit(jax.vmap(one, in_axes=(0, 0, None)))
    found = {}
    for threshold in thresholds:
        args = (
            jnp.asarray(rows),
            take_rows(exact.sequences, jnp.asarray(reference)),
            jnp.float32(threshold),
        )
        log_probs, out = every_run(*args)
        probs = np.exp(np.asarray(log_probs, np.float64))
        total = np.bincount(reference, probs)[starts]
        assert np.abs(total - 1).max() < 1e-5, f"the probabilities of all runs add up to {total}"
        # Which are probabilities of float32; what they lack to 1 is not the sampler's.
        found[threshold] = Runs(exact, reference, probs / np.repeat(total, len(script)), out)
    return found
