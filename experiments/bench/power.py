"""What power sampling costs: tokens per second over plain sampling, early rejection, and effective
samples per second.

    python -m experiments.bench.power
    python -m experiments.bench.power --growth

    throughput         tokens per second of `power.run` over `ancestral.run` at equal N: 8 chains,
                       96 tokens in blocks of 32, 10 moves per block, alpha = 4; the median over
                       rounds of the ratio in a round
    early_rejection    share of the proposals' tokens that early rejection saves, for the same
                       accepted strings
    ess_...            effective samples of log p per second over suffix Metropolis-Hastings', 24
                       tokens, 8 chains from the same start; the numbers themselves are printed too

`--growth` shows how a suffix move grows with the number of tokens and of chains instead, as a table
and a figure.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

import models
from ppl.target import Target
from samplers.base import Kernel
from samplers.draws import ancestral
from samplers.mcmc import chains, multiple_try, parallel_tempering, power, suffix, suffix_csmc
from samplers.mcmc import diagnostics as chain_diagnostics
from samplers.results import Chains
from samplers.strings import ladders

from .. import compilation
from . import turns

ALPHA, NUM, MAX_TOKENS, BLOCK, MOVES = 4.0, 8, 96, 32, 10
ESS_TOKENS, ESS_STEPS = 24, 30
GROWTH_MOVES = 4
HORIZONS, CHAINS = (32, 64, 128, 256), (1, 2, 4, 8, 16, 32, 64)
PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."


def runs(p: Target, num: int = NUM) -> turns.Runs:
    """Label -> a function of a key that makes one whole run; the first is the plain one."""
    return {
        "ancestral": lambda key: ancestral.run(key, p, num_samples=num),
        "power": lambda key: power_run(key, p, num),
    }


def power_run(key: jax.Array, p: Target, num: int = NUM, *, early_rejection: bool = True) -> Chains:
    """One run of power sampling in the setting of this module."""
    size, moves = BLOCK, MOVES
    return power.run(
        key,
        p**ALPHA,
        num_chains=num,
        block_size=size,
        moves_per_block=moves,
        early_rejection=early_rejection,
    )


def tokens_of(out: Any) -> int:
    """Tokens that a run drew."""
    return int(out.cost.tokens)


def early_rejection(p: Target) -> float:
    """The share of tokens saved.

    Raises:
        RuntimeError: if it changed a string.
    """
    with_it, without = (power_run(jax.random.key(1), p, early_rejection=on) for on in (True, False))
    if not (with_it.sequences.tokens == without.sequences.tokens).all():
        raise RuntimeError(
            "expected early rejection to change the cost and nothing else, got other strings"
        )
    return 1 - int(with_it.info.tokens.sum()) / int(without.info.tokens.sum())


def kernels(target: Target) -> dict[str, Kernel]:
    """The kernels whose chains are compared, each with what one step of it is."""
    ladder = ladders.geometric(1, ALPHA, 3)
    return {
        "suffix": suffix.kernel(target),
        "multiple_try": multiple_try.kernel(target, num_tries=4),
        "suffix_csmc": suffix_csmc.kernel(target, num_particles=4),
        "tempering": parallel_tempering.kernel(target, ladder),
    }


def effective_samples(p: Target, console: Console) -> dict[str, float]:
    """Label -> effective samples of log p per second, which are printed as they come."""
    target = p**ALPHA
    x = power.run(
        jax.random.key(1), target, num_chains=NUM, block_size=16, moves_per_block=8
    ).sequences
    rates, of = {}, kernels(target)
    for label, kernel in track(
        of.items(), "effective samples", console=Console(stderr=True), total=len(of)
    ):
        chains.run(jax.random.key(0), kernel, x, num_samples=1, collect=_log_prob)  # compiles
        start = time.perf_counter()
        out = chains.run(jax.random.key(2), kernel, x, num_samples=ESS_STEPS, collect=_log_prob)
        seconds = time.perf_counter() - start
        rates[label] = chain_diagnostics.bulk_ess(out.draws["log_prob"]) / seconds
        console.print(
            f"{label}, {NUM} chains, {ESS_TOKENS} tokens: {rates[label]:.3f} effective samples of"
            " log p / s"
        )
    return rates


def _log_prob(state: Any) -> dict[str, jax.Array]:
    return {"log_prob": state.log_prob}


def growth(given: Callable[[int], Target], rounds: int) -> list[dict[str, float]]:
    """Milliseconds of a suffix move per chain, and its tokens per second over plain sampling's,
    over T and C.
    """
    middle = HORIZONS[0]
    cells = [(num, middle) for num in CHAINS] + [(NUM, max_tokens) for max_tokens in HORIZONS[1:]]
    rows = []
    for num, max_tokens in track(cells, "growth", console=Console(stderr=True)):
        p = given(max_tokens)
        both = {**runs(p, num), "power": _moves(p, num)}
        times = turns.measure(both, rounds, tokens_of)
        per_token = statistics.median(times["power"])
        drawn = float(both["power"](jax.random.key(1)).info.tokens.mean())
        ratio = 1 / statistics.median(turns.ratios(times)["power"])
        rows.append(
            {"C": num, "T": max_tokens, "ms per move": per_token * drawn, "throughput": ratio}
        )
    return rows


def _moves(p: Target, num: int) -> Callable[[jax.Array], Any]:
    """Suffix moves over whole strings, after one extension to the horizon."""
    return lambda key: power.run(
        key, p**ALPHA, num_chains=num, block_size=p.max_tokens, moves_per_block=GROWTH_MOVES
    )


def main() -> None:
    """Print numbers and, last, one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.power")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--growth", action="store_true", help="over the numbers of tokens and chains instead"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/bench/power_growth.png"), help="of --growth"
    )
    args = parser.parse_args()
    compilation.use_cache()
    lm, tokenizer = models.load(args.model)

    def given(max_tokens: int) -> Target:
        return lm.given(tokenizer.chat(PROMPT), max_tokens=max_tokens)

    if args.growth:
        rows = growth(given, args.rounds)
        sizes = {"C": ("chains", NUM), "T": ("tokens", HORIZONS[0])}
        turns.show_growth(rows, "ms per suffix move and chain", sizes, ("ms per move",), args.out)
        turns.last_line(
            "power_growth", {f"C{row['C']:.0f}-T{row['T']:.0f}": row["throughput"] for row in rows}
        )
        return
    p, console = given(MAX_TOKENS), Console()
    times = turns.measure(runs(p), args.rounds, tokens_of)
    found = {"throughput": 1 / statistics.median(turns.ratios(times)["power"])}
    for label, row in times.items():
        console.print(
            f"{label}, {NUM} chains, {MAX_TOKENS} tokens: {statistics.median(row):.2f} ms per token"
        )
    console.print(f"throughput {found['throughput']:.3f}")
    found["early_rejection"] = early_rejection(p)
    console.print(f"early rejection saves {found['early_rejection']:.3f} of the proposals' tokens")
    rates = effective_samples(given(ESS_TOKENS), console)
    others = {
        f"ess_{label}": rate / rates["suffix"] for label, rate in rates.items() if label != "suffix"
    }
    turns.last_line("power", {**found, **others})


if __name__ == "__main__":
    main()
