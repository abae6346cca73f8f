"""What SMC costs: a step over a plain sampling step, at equal N.

    python -m experiments.bench.smc_overhead
    python -m experiments.bench.smc_overhead --growth

Both are whole compiled runs from the same prompt, divided by the steps they took (all 32, as a
rule): `smc.run` (locally optimal proposal, systematic resampling below N / 2) and `ancestral.run`,
which does the same language-model step and the same draw and nothing else.  They take turns in one
process; each label is the median over rounds of the ratio within a round.

    regex             ESS-gated resampling, regular expression
    resample_always   the same with resampling before every token
    process_reward    a score of the text every 8 tokens, resampling between its steps
    plain_smc         no potential: what the weights and the trace cost

`--growth` shows how both grow with the number of particles and of tokens instead, as a table and a
figure.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

import models
import ppl
from samplers import smc
from samplers.draws import ancestral

from .. import compilation
from . import turns

NUM, MAX_TOKENS = 32, 32
PROMPT = "Tell me a story about a lighthouse keeper."
# Sentences: no string is over before the horizon unless it ends with one, and some always go on.
SENTENCES = r"[A-Z][a-z ,']+[.!?]( [A-Z][a-z ,']+[.!?])*"
SIZES, HORIZONS = (1, 4, 16, 32, 64, 256), (32, 64, 128, 256)


def newness(tokens: jax.Array, length: jax.Array) -> jax.Array:
    """A log-score [N] of the text so far: how many of its tokens differ from their predecessor."""
    written = jax.numpy.arange(1, tokens.shape[1]) < length[:, None]
    return 0.2 * ((tokens[:, 1:] != tokens[:, :-1]) & written).sum(1)


def runs(lm: Any, tokenizer: Any, num: int = NUM, max_tokens: int = MAX_TOKENS) -> turns.Runs:
    """Label -> a function of a key that makes one whole run; the first is the plain one."""
    plain = lm.given(tokenizer.chat(PROMPT), max_tokens=max_tokens)
    constrained = plain * ppl.regex(SENTENCES, tokenizer)
    steps = ppl.Steps(every=8)
    rewarded = plain * ppl.step_scores(newness, steps)
    return {
        "ancestral": lambda key: ancestral.run(key, plain, num_samples=num),
        "regex": lambda key: smc.run(key, constrained, num_particles=num),
        "resample_always": lambda key: smc.run(key, constrained, num_particles=num, threshold=1.1),
        "process_reward": lambda key: smc.run(key, rewarded, num_particles=num, steps=steps),
        "plain_smc": lambda key: smc.run(key, plain, num_particles=num),
    }


def steps_of(out: Any) -> int:
    """Token positions that a run went through."""
    x = out.sequences
    return min(int(x.length.max()) + 1, x.tokens.shape[1])


def growth(lm: Any, tokenizer: Any, rounds: int) -> list[dict[str, float]]:
    """Milliseconds per step of a plain run and of SMC with a regular expression, over N
    and over T.
    """
    cells = [(num, HORIZONS[0]) for num in SIZES] + [
        (NUM, max_tokens) for max_tokens in HORIZONS[1:]
    ]
    rows = []
    for num, max_tokens in track(cells, "growth", console=Console(stderr=True)):
        both = runs(lm, tokenizer, num, max_tokens)
        times = turns.measure(
            {label: both[label] for label in ("ancestral", "regex")}, rounds, steps_of
        )
        plain, ours = (statistics.median(row) for row in times.values())
        ratio = statistics.median(turns.ratios(times)["regex"])
        rows.append({"N": num, "T": max_tokens, "plain": plain, "smc": ours, "ratio": ratio})
    return rows


def main() -> None:
    """Print a table and, last, one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.smc_overhead")
    parser.add_argument("--rounds", type=int, help="15; 3 of --growth, which takes ten minutes")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--growth", action="store_true", help="over N and T instead")
    parser.add_argument(
        "--out", type=Path, default=Path("results/bench/smc_growth.png"), help="of --growth"
    )
    args = parser.parse_args()
    compilation.use_cache()
    lm, tokenizer = models.load(args.model)
    if args.growth:
        rows = growth(lm, tokenizer, args.rounds or 3)
        sizes = {"N": ("particles", NUM), "T": ("tokens", HORIZONS[0])}
        turns.show_growth(rows, "ms / step", sizes, ("plain", "smc"), args.out)
        turns.last_line(
            "smc_growth", {f"N{row['N']:.0f}-T{row['T']:.0f}": row["ratio"] for row in rows}
        )
        return
    rounds = args.rounds or 15
    times = turns.measure(runs(lm, tokenizer), rounds, steps_of)
    turns.report(
        "smc_overhead", times, f"{args.model}, N = {NUM}, {MAX_TOKENS} tokens, {rounds} rounds"
    )


if __name__ == "__main__":
    main()
