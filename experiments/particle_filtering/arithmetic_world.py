"""A world of arithmetic: a language model adds step by step, a checker of adjustable noise is the
process reward.

Problems are chain sums of reasoning-gym (for example 5 + 9 - 7).  After a few worked examples the
model writes one step on each line (5 + 9 = 14, then 14 - 7 = 7); the answer is what the last line
says.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

import models
import ppl
from models.tokenizer import Tokenizer
from ppl.lm import LM, Cache, LMFunctions, Prefix

from ..sums import answer, is_easy, solution
from .methods import FAMILIES, Measured, Outcome, Task

MAX_TOKENS, PAD_TO, TERMS = 24, 256, 3
TEMPERATURE = 0.6  # of the language model itself: what all methods draw from, and what they tilt
STRENGTH = 3.0
EXAMPLES = ("5 + 9 + 7", "4 - 1 + 8", "2 + 6 - 3", "7 + 8 - 5", "9 - 3 - 2", "1 + 4 + 6")


def prompt(expression: str) -> str:
    """The worked examples and the problem, as a conversation."""
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}"
    shots = [turn.format(shot, "\n".join(solution(shot))) + "<|im_end|>\n" for shot in EXAMPLES]
    return "".join(shots) + turn.format(expression, "")


# Compared by identity: one for all problems, so that nothing is compiled again.
@dataclasses.dataclass(eq=False)
class Checker:
    """The probability that a solution so far is right: log-odds 3 for a whole right solution, less
    for a part of it, -3 after a wrong line, and normal noise, which is always the same for the same
    text.

    `expression` is set before a problem is run, and only then.
    """

    noise: float
    expression: str = ""

    def __call__(self, text: str) -> float:
        right = solution(self.expression)
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        is_right = lines == right[: len(lines)]
        seed = zlib.crc32(f"{self.expression}\n{text.strip()}".encode())
        log_odds = STRENGTH * (len(lines) / len(right) if is_right else -1.0)
        log_odds += self.noise * np.random.default_rng(seed).normal()
        return float(1 / (1 + np.exp(-log_odds)))


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Problems (expression, answer) for one model, and their checker."""

    lm: LM
    tokenizer: Tokenizer
    steps: ppl.Steps
    problems: tuple[tuple[str, str], ...]
    checker: Checker

    @classmethod
    def make(cls, model: str, num: int, noise: float, seed: int) -> Tasks:
        """Load the model and draw the problems.

        Raises:
            ImportError: without the package reasoning-gym.
        """
        try:
            import reasoning_gym
        except ImportError as error:
            raise ImportError(
                "expected the package reasoning-gym for the arithmetic world, got none installed;"
                " run"
                " `pip install 'tiltlm[tasks]'`, or choose --world tabular"
            ) from error
        options = {"min_terms": TERMS, "max_terms": TERMS, "min_digits": 1, "max_digits": 1}
        made = reasoning_gym.create_dataset("chain_sum", size=100 * num, seed=seed + 1, **options)
        pairs = dict((item["metadata"]["expression"], item["answer"]) for item in made)
        problems = tuple(
            pair for pair in pairs.items() if is_easy(pair[0]) and pair[0] not in EXAMPLES
        )[:num]
        lm, tokenizer = models.load(model)
        breaks = [
            i
            for i in range(lm.vocab_size)
            if i != lm.eos and tokenizer.decode([i]).strip(" ").startswith("\n")
        ]
        steps = ppl.Steps(delimiters=jnp.asarray(breaks))
        return cls(tempered(lm, TEMPERATURE), tokenizer, steps, problems, Checker(noise))

    def cell(self, key: PRNGKeyArray, family: str, num: int) -> dict[str, Measured]:
        """Accuracy and cost of a family's methods at N = `num`, over all problems."""
        right: dict[str, list[bool]] = {}
        spent: dict[str, list[tuple[float, ...]]] = {}
        reward = ppl.python(self.checker, self.tokenizer)
        keys = jax.random.split(key, len(self.problems))
        for problem_key, (expression, truth) in zip(keys, self.problems, strict=True):
            self.checker.expression = expression
            p = self.lm.given(
                self.tokenizer.encode(prompt(expression)), max_tokens=MAX_TOKENS, pad_to=PAD_TO
            )
            # Everything is on the host, and no callback is left to come, before the next problem is
            # set.
            out: Outcome = jax.device_get(
                FAMILIES[family](problem_key, Task(p, reward, self.steps, TERMS), num)
            )
            answers = [
                answer(self.tokenizer.decode(row[:length]))
                for row, length in zip(out.sequences.tokens, out.sequences.length, strict=True)
            ]
            for name, votes in out.votes.items():
                right.setdefault(name, []).append(vote(answers, np.asarray(votes)) == truth)
                calls = float(out.reward_calls) if name != "majority" else 0.0
                spent.setdefault(name, []).append(
                    (float(out.cost.tokens), float(out.cost.forwards), calls)
                )
        return {
            name: Measured(
                float(np.mean(found)),
                float(np.std(found, ddof=1) / np.sqrt(len(found))),
                *np.mean(spent[name], axis=0).tolist(),
            )
            for name, found in right.items()
        }


def vote(answers: list[str | None], log_votes: Float[np.ndarray, " N"]) -> str | None:
    """The answer with the most votes, the first of equals; None if nobody votes for one."""
    count: dict[str, float] = {}
    for said, log_vote in zip(answers, log_votes, strict=True):
        if said is not None and log_vote > -np.inf:
            count[said] = count.get(said, 0.0) + float(np.exp(log_vote))
    return max(count, key=lambda said: count[said], default=None)


def tempered(lm: LM, temperature: float) -> LM:
    """The language model whose next-token law is softmax(logits / temperature)."""
    static = (lm.functions, lm.static, temperature)
    functions = LMFunctions(_prefill, _init, _step, _truncate, _reorder)
    return dataclasses.replace(lm, static=static, functions=functions)


def _prefill(
    static: Any, params: Any, tokens: Int[Array, " S"], length: Int[Array, ""]
) -> tuple[Any, Array]:
    functions, inner, temperature = static
    data, logits = functions.prefill(inner, params, tokens, length)
    return data, logits / temperature


def _init(static: Any, params: Any, prefix: Prefix, num: int, max_tokens: int) -> Cache:
    functions, inner, _ = static
    return functions.init(inner, params, prefix, num, max_tokens)


def _step(
    static: Any, params: Any, prefix: Prefix, cache: Cache, token: Int[Array, " N"]
) -> tuple[Cache, Array]:
    functions, inner, temperature = static
    cache, logits = functions.step(inner, params, prefix, cache, token)
    return cache, logits / temperature


def _truncate(static: Any, params: Any, cache: Cache, length: Int[Array, " N"]) -> Cache:
    functions, inner, _ = static
    return functions.truncate(inner, params, cache, length)


def _reorder(static: Any, params: Any, cache: Cache, ancestors: Int[Array, " N"]) -> Cache:
    functions, inner, _ = static
    return functions.reorder(inner, params, cache, ancestors)
