"""Forty constraints beside genlm-control: the same strings have mass, and weigh the same.

    python -m experiments.bench.peers.constraints

Twenty regular expressions, ten JSON schemas, ten grammars, each over a small vocabulary whose
tokens cut characters and terminals anyhow, and a Markov chain over it.  Of each are compared

    strings   all strings of at most LENGTH tokens: which have positive mass, and log p + log Phi
    weights   independent draws of both libraries, each token from the locally optimal law: the
              log-weight, the sum over steps of the log of the mass that the constraint leaves, of
              strings that both drew.  Strings cut by the horizon are left out

Where a library reads a constraint in another way by design, the table says why (`cases`); all else
that differs is an error.  The JSON line has, per kind, the share of constraints on which the
strings agree, and of those on which the weights do.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Sequence

import jax
import numpy as np
from genlm.control import EOS, SMC, BoolCFG, BoolFSA, JsonSchema, Potential, direct_token_sampler
from jaxtyping import Array, Float
from rich.console import Console
from rich.markup import escape
from rich.progress import track

import ppl
from models import tabular
from ppl.target import Target
from samplers.smc import importance

from .cases import CASES, Case
from .report import table

LENGTH, HORIZON, DRAWS, TOLERANCE = 4, 16, 200, 1e-4
MORE = (b"?", b"@", b"%", b"$", b"=")
"""Tokens that fill a vocabulary up to SIZE, so that programs are compiled for one size."""
SIZE = 7

String = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is to ours: the bytes of tokens, and EOS after them."""

    token_bytes: tuple[bytes | None, ...]

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @property
    def eos(self) -> int:
        return len(self.token_bytes) - 1


class Chain(Potential):
    """Our Markov chain as genlm-control's language model; the prompt is token 0."""

    def __init__(self, tokens: Sequence[bytes], log_laws: np.ndarray) -> None:
        self.log_laws, self.ids = log_laws, {token: i for i, token in enumerate(tokens)}
        super().__init__(vocabulary=list(tokens))

    def rows(self, context: Sequence[bytes]) -> list[int]:
        return [0, *(self.ids[token] for token in context)]

    async def prefix(self, context: Sequence[bytes]) -> float:
        rows = self.rows(context)
        return float(sum(self.log_laws[u, v] for u, v in itertools.pairwise(rows)))

    async def complete(self, context: Sequence[bytes]) -> float:
        return await self.prefix(context) + float(self.log_laws[self.rows(context)[-1], -1])

    async def logw_next(self, context: Sequence[bytes]):
        return self.make_lazy_weights(self.log_laws[self.rows(context)[-1]])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one constraint: strings with mass (both, ours alone, theirs alone), the largest difference
    of their log densities, strings that both drew, the largest difference of their log-weights.
    """

    both: int
    ours: list[bytes]
    theirs: list[bytes]
    density: float
    drawn: int
    weights: float

    @property
    def same_strings(self) -> bool:
        return not (self.ours or self.theirs) and self.density < TOLERANCE

    @property
    def same_weights(self) -> bool:
        return self.drawn > 0 and self.weights < TOLERANCE


def main() -> None:
    rows: list[tuple[str, ...]] = []
    shares: dict[str, list[bool]] = {}
    for number, case in enumerate(track(CASES, "Comparing", console=Console(stderr=True))):
        out = compare(case, number)
        shares.setdefault(f"{case.kind}-strings", []).append(out.same_strings)
        shares.setdefault(f"{case.kind}-weights", []).append(out.same_weights)
        if not ((out.same_strings or case.strings) and (out.same_weights or case.weights)):
            raise RuntimeError(f"expected both libraries to agree on {case}, got {out}")
        why = [case.strings] * (not out.same_strings) + [case.weights] * (not out.same_weights)
        alone = f"{len(out.ours)} / {len(out.theirs)}"
        numbers = str(out.both), alone, f"{out.density:.0e}", str(out.drawn), f"{out.weights:.0e}"
        shown = f"{case.kind}: {case.shown}"
        rows.append((escape(shown), *numbers, escape("; ".join(why))))
    columns = "constraint", "both", "ours / theirs alone", "log mass", "drawn", "weights", "why"
    table(f"strings of at most {LENGTH} tokens, {DRAWS} draws", columns, rows)
    ratios = {name: round(float(np.mean(row)), 3) for name, row in shares.items()}
    device = str(jax.devices()[0].device_kind)
    print(json.dumps({"name": "constraints", "ratios": ratios, "device": device}))


def compare(case: Case, seed: int) -> Outcome:
    tokens = tuple(token.encode("latin-1") for token in case.tokens)
    known = range(len(tokens))
    tokens += tuple(token for token in MORE if token not in tokens)[: SIZE - len(tokens)]
    target, product = both(case, tokens, seed)
    strings = [x for n in range(LENGTH + 1) for x in itertools.product(known, repeat=n)]
    here = mass(target, strings)
    there = np.array(asyncio.run(scores(product, tokens, strings)))

    def texts(which: np.ndarray) -> list[bytes]:
        found = {b"".join(tokens[i] for i in strings[row]) for row in np.flatnonzero(which)}
        return sorted(found, key=lambda text: (len(text), text))

    shared = (here > -np.inf) & (there > -np.inf)
    weights, weights_there = draws(target, seed), asyncio.run(draws_there(product, tokens))
    drawn = weights.keys() & weights_there.keys()
    return Outcome(
        int(shared.sum()),
        texts((here > -np.inf) & ~shared),
        texts((there > -np.inf) & ~shared),
        float(np.abs(here - there)[shared].max(initial=0)),
        len(drawn),
        max((abs(weights[x] - weights_there[x]) for x in drawn), default=0.0),
    )


def both(case: Case, tokens: tuple[bytes, ...], seed: int) -> tuple[Target, Potential]:
    """The chain under the constraint, here and there."""
    vocabulary = Vocabulary((*tokens, None))
    size = vocabulary.vocab_size
    laws = np.random.default_rng(seed).dirichlet(np.ones(size), size=size)
    lm = tabular.markov(laws, eos=vocabulary.eos)
    chain = Chain(tokens, np.log(laws))
    target = lm.given([0], max_tokens=HORIZON) * ours(case, vocabulary)
    return target, chain * theirs(case).coerce(chain, f=b"".join)


def ours(case: Case, vocabulary: Vocabulary) -> ppl.Potential:
    make = {"regex": ppl.regex, "schema": ppl.json_schema, "grammar": ppl.grammar}[case.kind]
    return make(case.source, vocabulary)


def theirs(case: Case) -> Potential:
    make = {"regex": BoolFSA.from_regex, "schema": JsonSchema, "grammar": BoolCFG.from_lark}
    return make[case.kind](case.source)


@jax.jit
def _log_density(target: Target, tokens: Array, length: Array) -> Float[Array, " N"]:
    return target.log_density(tokens, length)


def mass(target: Target, strings: Sequence[String]) -> np.ndarray:
    length = np.array([len(x) for x in strings], np.int32)
    tokens = np.full((len(strings), HORIZON), target.space.eos, np.int32)
    for row, x in enumerate(strings):
        tokens[row, : len(x)] = x
    return np.asarray(_log_density(target, tokens, length), np.float64)


async def scores(
    product: Potential, tokens: Sequence[bytes], strings: Sequence[String]
) -> list[float]:
    return [float(await product.complete([tokens[i] for i in x])) for x in strings]


def draws(target: Target, seed: int) -> dict[String, float]:
    """Strings that ended within the horizon, and their log-weights."""
    out = importance.run(jax.random.key(seed), target, num_particles=DRAWS)
    weights = np.asarray(out.log_weights + out.log_z, np.float64)
    rows = zip(np.asarray(out.sequences.tokens), np.asarray(out.sequences.length), strict=True)
    strings = [tuple(row[:length].tolist()) for row, length in rows]
    return _ended(strings, weights)


async def draws_there(product: Potential, tokens: Sequence[bytes]) -> dict[String, float]:
    sampler = SMC(direct_token_sampler(product))
    out = await sampler(n_particles=DRAWS, ess_threshold=0, max_tokens=HORIZON + 1)
    ids = {token: i for i, token in enumerate(tokens)}
    strings = [tuple(ids[x] for x in context if x is not EOS) for context in out.contexts]
    return _ended(strings, out.log_weights)


def _ended(strings: Sequence[String], weights: Sequence[float]) -> dict[String, float]:
    both = zip(strings, weights, strict=True)
    return {x: float(w) for x, w in both if len(x) < HORIZON and w > -np.inf}


if __name__ == "__main__":
    main()
