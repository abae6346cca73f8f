"""What SMC costs: a step with a regular-expression target over a plain sampling step, at equal N.

    python -m experiments.bench.smc_overhead

Both are whole compiled runs from the same prompt, divided by the steps they took (all 32, as a rule): `smc.run`
(locally optimal proposal, systematic resampling below N / 2) and `ancestral.run`, which does the same language-model
step and the same draw and nothing else.  They take turns in one process; each label is the median over rounds of the
ratio within a round.

    regex             ESS-gated resampling, regular expression
    resample-always   the same with resampling after every token
    plain-smc         no potential: what the weights and the trace cost
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import models
import ppl
from samplers import ancestral, smc

from .. import compilation, saving

NUM, MAX_TOKENS = 16, 32
PROMPT = "Tell me a story about a lighthouse keeper."
# Sentences: no string is over before the horizon unless it ends with one, and some always go on.
SENTENCES = r"[A-Z][a-z ,']+[.!?]( [A-Z][a-z ,']+[.!?])*"
BASE = "ancestral"


def runs(model: str) -> dict[str, Callable[[jax.Array], Any]]:
    """Label -> a function of a key that makes one whole run; `BASE` is the plain one."""
    lm, tokenizer = models.load(model)
    plain = lm.given(tokenizer.chat(PROMPT), max_tokens=MAX_TOKENS)
    constrained = plain * ppl.regex(SENTENCES, tokenizer)
    return {
        BASE: lambda key: ancestral.run(key, plain, num_samples=NUM),
        "regex": lambda key: smc.run(key, constrained, num_particles=NUM),
        "resample-always": lambda key: smc.run(key, constrained, num_particles=NUM, threshold=1.1),
        "plain-smc": lambda key: smc.run(key, plain, num_particles=NUM),
    }


def measure(of: dict[str, Callable[[jax.Array], Any]], rounds: int) -> dict[str, list[float]]:
    """Label -> milliseconds per token step in each round, in turn."""
    for run in of.values():
        jax.block_until_ready(run(jax.random.key(0)))  # compiles
    times: dict[str, list[float]] = {label: [] for label in of}
    for r in range(rounds):
        # The order turns, so that whoever follows a neighbour's burst is not always the same.
        labels = list(of)[r % len(of) :] + list(of)[: r % len(of)]
        for label in labels:
            start = time.perf_counter()
            out = jax.block_until_ready(of[label](jax.random.key(r)))
            elapsed = time.perf_counter() - start
            x = out.sequences if isinstance(out, smc.Result) else out
            times[label].append(1000 * elapsed / min(int(x.length.max()) + 1, MAX_TOKENS))
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Label -> the ratio to `BASE` within each round."""
    base = times[BASE]
    return {label: [a / b for a, b in zip(row, base, strict=True)] for label, row in times.items() if label != BASE}


def main() -> None:
    """Print a table and, last, one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.smc_overhead")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    compilation.use_cache()
    times = measure(runs(args.model), args.rounds)
    over = ratios(times)
    view = Table(title=f"{args.model}, N = {NUM}, {MAX_TOKENS} tokens, {args.rounds} rounds", title_justify="left")
    for name in ("", "ms / step", "over ancestral", "quartiles"):
        view.add_column(name, justify="left" if not name else "right")
    for label, row in times.items():
        cells = ["1", ""]
        if label != BASE:
            low, middle, high = statistics.quantiles(over[label], n=4)
            cells = [f"{middle:.3f}", f"{low:.3f} .. {high:.3f}"]
        view.add_row(label, f"{statistics.median(row):.1f}", *cells)
    Console().print(view)
    medians = {label: round(statistics.median(row), 4) for label, row in over.items()}
    print(json.dumps({"name": "smc_overhead", "ratios": medians, "device": saving.device()}))


if __name__ == "__main__":
    main()
