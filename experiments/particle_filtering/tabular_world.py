"""A world of small problems where truth is known: chains of steps with slips, some of which no
reward model can see.

A solution is a string of steps: sound ones, slips, repairs, and at last an answer token, after
which it ends.  A slip moves the running value by one (mod 11), a repair moves it back; the value at
the end is the answer, and 0 is correct. It takes as many sound steps as the problem needs; with
fewer there is no answer.  Some slips look like sound steps: the process reward knows only what
steps look like.  From that, the probability that a solution will end correctly is computed exactly
(`Problems.reward`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

import ppl
from models import tabular
from ppl.pytrees import register_dataclass
from ppl.target import Target

from .methods import FAMILIES, Measured, Task

SOUND, EOS, HIDDEN_SLIP, SLIP, REPAIR, ANSWER = range(6)
LOOKS, VALUES = 4, 11  # kinds of step that the reward tells apart: sound, slip, repair, answer
LOOK = np.array([0, 3, 0, 1, 2, 3])
MOVE = np.array([0, 0, 1, 1, -1, 0])
MAX_TOKENS = 20
STEPS = ppl.Steps(every=2)
SHARPENING, NOISE = 3.0, 1.5


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Problems:
    """Problems [P]: transition [P, 6, 6] is the language model's, table [P, T+1, T+1, 11, 4] the
    probability that a solution ends correctly, by tokens used, steps that look sound, visible moves
    and last look; needed [P] steps."""

    transition: Float[Array, "*P 6 6"]
    table: Float[Array, "*P used sound value 4"]
    needed: Int[Array, " *P"]

    def model(self) -> Target:
        """The language model of one problem."""
        return tabular.markov(self.transition, eos=EOS).given([SOUND], max_tokens=MAX_TOKENS)

    def reward(
        self,
        tokens: Int[Array, "N T"],
        length: Int[Array, " N"],
        overconfident: Float[Array, ""] | float,
    ) -> Float[Array, " N"]:
        """The process reward of one problem: calibrated (0), P(correct | looks so far), or
        overconfident (1).

        The overconfident one judges early prefixes by (1 + 3 w) (log-odds + 1.5 w noise), w the
        share of tokens that are still to come; of finished solutions both say the same, so the
        exact target is the same.
        """
        written = jnp.arange(MAX_TOKENS) < length[:, None]
        looks = jnp.asarray(LOOK)[tokens]
        sound = (written & (looks == 0)).sum(1)
        visible = jnp.where(written & (looks != 0), jnp.asarray(MOVE)[tokens], 0).sum(1) % VALUES
        last = jnp.take_along_axis(looks, jnp.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
        r = self.table[length, sound, visible, jnp.where(length > 0, last, 0)]
        to_come = overconfident * jnp.where(last == LOOK[ANSWER], 0.0, 1 - length / MAX_TOKENS)
        log_odds = jnp.log(r) - jnp.log1p(-r)
        noisy = (1 + SHARPENING * to_come) * (
            log_odds + NOISE * to_come * _noise(jnp.where(written, looks + 1, 0))
        )
        return jnp.where(to_come > 0, jax.nn.sigmoid(noisy), r)

    def answers(self, tokens: Int[Array, "N T"], length: Int[Array, " N"]) -> Int[Array, " N"]:
        """What each solution of one problem answers; 0 is correct, 11 is no answer."""
        written = jnp.arange(MAX_TOKENS) < length[:, None]
        value = jnp.where(written, jnp.asarray(MOVE)[tokens], 0).sum(1) % VALUES
        return jnp.where(
            (written & (jnp.asarray(LOOK)[tokens] == 0)).sum(1) >= self.needed, value, VALUES
        )


def _noise(looks: Int[Array, "N T"]) -> Float[Array, " N"]:
    """A standard normal number for every sequence of looks, always the same: a hash, not a draw."""
    code = jnp.zeros(looks.shape[0], jnp.uint32)
    for column in looks.T.astype(jnp.uint32):
        code = (code ^ (column + jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
        code = code ^ (code >> 15)
    uniform = (code >> 8).astype(jnp.float32) / (1 << 24) + 0.5 / (1 << 24)
    return jnp.sqrt(2.0) * jax.scipy.special.erfinv(2 * uniform - 1)


def problems(seed: int, num: int) -> Problems:
    """`num` problems of varied difficulty."""
    rng = np.random.default_rng(seed)
    transition, table, needed = (
        np.stack(leaf) for leaf in zip(*(_problem(rng) for _ in range(num)), strict=True)
    )
    return Problems(
        jnp.asarray(transition, jnp.float32), jnp.asarray(table, jnp.float32), jnp.asarray(needed)
    )


def _problem(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
    needed, hidden = int(rng.integers(4, 8)), rng.uniform(0.02, 0.08)
    base = np.array([0.74, 0.12, 0.05, 0.09])
    among = np.stack(
        [rng.dirichlet(25 * base) for _ in range(LOOKS - 1)]
    )  # the next look, by the last one
    transition = np.zeros((6, 6))
    for token, look in enumerate(LOOK):
        if look == LOOK[ANSWER]:
            transition[token, EOS] = 1
        else:
            sound, slip, repair, answer = among[look]
            transition[token] = [sound * (1 - hidden), 0, sound * hidden, slip, repair, answer]
    return transition, _table(among, hidden, needed), needed


def _table(among: np.ndarray, hidden: float, needed: int) -> np.ndarray:
    """P(correct | looks): the value function of (tokens used, sound steps, value, look), averaged
    over hidden slips.
    """
    counts = np.arange(MAX_TOKENS + 1)
    correct = (counts >= needed)[:, None] * (np.arange(VALUES) == 0)
    value = np.zeros((MAX_TOKENS + 1, MAX_TOKENS + 1, VALUES, LOOKS))
    value[MAX_TOKENS] = correct[..., None]
    value[..., LOOK[ANSWER]] = correct
    for used in range(MAX_TOKENS - 1, -1, -1):
        then = value[used + 1]
        more = then[np.minimum(counts + 1, MAX_TOKENS), :, 0]  # one more sound step
        after = np.stack(
            [
                (1 - hidden) * more + hidden * np.roll(more, -1, axis=1),
                np.roll(then[..., 1], -1, axis=1),
                np.roll(then[..., 2], 1, axis=1),
                then[..., 3],
            ]
        )
        value[used, ..., : LOOKS - 1] = np.einsum("ln,nsv->svl", among, after)
    slips = np.zeros(
        (MAX_TOKENS + 1, VALUES)
    )  # P(hidden slips = k mod 11), by steps that look sound
    slips[0, 0] = 1
    for sound in range(MAX_TOKENS):
        slips[sound + 1] = (1 - hidden) * slips[sound] + hidden * np.roll(slips[sound], 1)
    shifted = np.stack(
        [np.roll(value, -k, axis=2) for k in range(VALUES)]
    )  # [k, used, sound, visible, look]
    return np.clip(np.einsum("sk,kusvl->usvl", slips, shifted), 0.0, 1.0)


def cell(
    key: PRNGKeyArray, family: str, num: int, problems: Problems, replicas: int, overconfident: bool
) -> dict[str, Measured]:
    """Accuracy and cost of a family's methods at N = `num`, over all problems and `replicas` runs
    of each.
    """
    args = (jax.random.split(key, problems.table.shape[0]), problems, jnp.float32(overconfident))
    correct, spent = jax.device_get(simulate(*args, family, num, replicas))
    found = {}
    for name, right in correct.items():
        # Problems are fixed; only runs are random.
        variance = right.var(1, ddof=1).mean() / right.size
        found[name] = Measured(
            float(right.mean()), float(np.sqrt(variance)), *(float(v) for v in spent[name])
        )
    return found


@functools.partial(jax.jit, static_argnames=("family", "num", "replicas"))
def simulate(
    keys: Any, problems: Problems, overconfident: Any, family: str, num: int, replicas: int
) -> Any:
    """Of each method of a family, whether each problem's replicas are right [P, R], and what a run
    costs [3] on average: tokens, sequential passes, calls of the reward.
    """

    def one(key: Any, problem: Problems) -> Any:
        reward = jax.tree_util.Partial(_reward, problem, overconfident)
        task = Task(problem.model(), reward, STEPS, STEPS.max_rounds(MAX_TOKENS))
        out = FAMILIES[family](key, task, num)
        said = jax.nn.one_hot(
            problem.answers(out.sequences.tokens, out.sequences.length), VALUES, axis=0, dtype=bool
        )
        correct, spent = {}, {}
        for name, votes in out.votes.items():
            count = jax.nn.logsumexp(jnp.where(said, votes, -jnp.inf), axis=1)
            correct[name] = (jnp.argmax(count) == 0) & ~jnp.isneginf(count.max())
            calls = out.reward_calls if name != "majority" else 0
            spent[name] = jnp.stack(
                [jnp.float32(v) for v in (out.cost.tokens, out.cost.forwards, calls)]
            )
        return correct, spent

    def of_problem(args: tuple) -> Any:
        key, problem = args
        return jax.vmap(lambda k: one(k, problem))(jax.random.split(key, replicas))

    correct, spent = jax.lax.map(of_problem, (keys, problems))
    return correct, jax.tree.map(lambda v: v.mean((0, 1)), spent)


def _reward(problem: Problems, overconfident: Any, tokens: Any, length: Any) -> Any:
    return problem.reward(tokens, length, overconfident)
