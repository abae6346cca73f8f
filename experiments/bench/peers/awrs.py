r"""Decoding under a regular expression beside genlm-control's AWRS, at equal effective sample size.

The text is made of words of at most five letters, [,.] after words, single spaces between them:

    ([A-Za-z]{1,5}[,.]? )*([A-Za-z]{1,5}[,.]?)?

Every prefix of such a text is one, so that all sides can target the same law: the model's law of
the first 32 tokens, restricted to those that match (genlm-control by `terminate_when`, which asks
no EOS of the model).  The table's log Z lets one see that they do.  All sides have N = 16,
systematic resampling below N / 2, and the prompt to read.

    tiltlm               p * ppl.regex(...): the mask of all tokens, from the tables of a token
                         automaton
    tiltlm, AWRS         `samplers.strings.awrs.AWRS` on the same automaton behind a wall: it is
                         asked about single tokens
    genlm-control        `AWRS(llm, BoolFSA.from_regex(...).coerce(llm, f=b"".join))`, as documented

genlm-control leaves the tokens with foreign characters out in advance; our AWRS here has to reject
them.

A side's cost is seconds / ESS of the final weights.  That ESS only sees the weights since the last
resampling, so it is between about N / 2 and N for every side; the spread of log Z over runs is the
stricter sign of how noisy the weights are.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from genlm.control import AWRS, SMC, BoolFSA
from jaxtyping import Array, Float, Int

import ppl
from ppl.potential import Potential, State
from ppl.pytrees import register_dataclass
from ppl.space import Space
from samplers import smc
from samplers.diagnostics import ess
from samplers.strings import awrs

from .report import OURS, table, take_turns, time_ratio
from .text import NUM, TOKENS, Setting, check_count, forget

PATTERN = r"([A-Za-z]{1,5}[,.]? )*([A-Za-z]{1,5}[,.]?)?"
OURS_ALIKE = "tiltlm, AWRS"
PEER = "genlm-control"


class Run(NamedTuple):
    """Tokens decoded, effective sample size of the final weights, estimated log Z."""

    tokens: int
    ess: float
    log_z: float


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Wall(Potential):
    """A potential that says nothing in advance: what AWRS is made for."""

    behind: Potential

    def within(self, space: Space) -> Potential:
        return Wall(self.behind.within(space))

    def init(self, num: int) -> State:
        return self.behind.init(num)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        return self.behind.step(state, token)

    def final(self, state: State) -> Float[Array, " N"]:
        return self.behind.final(state)


def compare(setting: Setting, rounds: int) -> dict[str, float]:
    """Print all sides; the ratios of seconds per effective sample, theirs over ours.

    Raises:
        RuntimeError: if a side decoded another number of tokens.
    """
    sides = {
        OURS: ours(setting, alike=False),
        OURS_ALIKE: ours(setting, alike=True),
        PEER: genlm_control(setting),
    }
    seconds, runs = take_turns(sides, rounds, "Timing a regular expression")
    for name, row in runs.items():
        check_count(name, [run.tokens for run in row])
    size = {name: statistics.mean(run.ess for run in row) for name, row in runs.items()}

    def ratio(own: str) -> float:
        return time_ratio(seconds, PEER, own) * size[own] / size[PEER]

    rows = []
    for name, times in seconds.items():
        rate = NUM * TOKENS / statistics.median(times)
        log_z = [run.log_z for run in runs[name]]
        spread = (
            f"{np.mean(log_z):.1f} ± {np.std(log_z, ddof=1):.1f}"
            if rounds > 1
            else f"{log_z[0]:.1f}"
        )
        cost = 1000 * statistics.median(times) / size[name]
        faster = "" if name == PEER else f"{ratio(name):.2f}"
        rows.append((name, f"{rate:.0f}", f"{size[name]:.1f}", spread, f"{cost:.0f}", faster))
    columns = ("side", "tokens/s", "ESS", "log Z", "ms per ESS", "faster by")
    table(f"words of at most five letters, N = {NUM}, {TOKENS} tokens", columns, rows)
    return {"genlm-control-awrs": ratio(OURS), "awrs-against-awrs": ratio(OURS_ALIKE)}


def ours(setting: Setting, *, alike: bool) -> Callable[[int], Run]:
    automaton = ppl.regex(PATTERN, setting.tokenizer, canonical=False)
    full = ppl.min_tokens(TOKENS) * (Wall(automaton) if alike else automaton)
    proposal = {"proposal": awrs.AWRS()} if alike else {}

    def run(seed: int) -> Run:
        target = setting.lm.given(setting.prompt, max_tokens=TOKENS) * full
        out = smc.run(jax.random.key(seed), target, num_particles=NUM, **proposal)
        return Run(int(out.sequences.length.sum()), float(ess(out.log_weights)), float(out.log_z))

    return run


def genlm_control(setting: Setting) -> Callable[[int], Run]:
    condition = BoolFSA.from_regex(PATTERN).coerce(setting.peer, f=b"".join)
    sampler = SMC(AWRS(setting.peer, condition))

    async def decode() -> Run:
        out = await sampler(
            n_particles=NUM,
            ess_threshold=0.5,
            max_tokens=TOKENS + 1,
            resampling_method="systematic",
            terminate_when=lambda context: len(context) >= TOKENS,
        )
        return Run(
            sum(len(context) - 1 for context in out.contexts), float(out.ess), float(out.log_ml)
        )

    def run(seed: int) -> Run:
        forget(setting, seed)
        return asyncio.run(decode())

    return run
