"""Many prompts in one batch over one prompt after another, on a real model.

    python -m experiments.bench.prompts
    python -m experiments.bench.prompts --many 64

    prompts            tokens per second of `smc.run` over a list of 8 prompts of 8 particles, over
                       that of 8 runs of one prompt each, with the same keys
    same_strings       the share of particles with the same string in both: 1, but where another
                       order of sums turns a draw

`--many` runs so many prompts with at most `--batch-size` rows going through the model at a time,
and says how much memory the process took at most.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import models
from ppl.lm import LM
from ppl.target import Target
from samplers import smc

from .. import compilation
from . import turns

NUM_PROMPTS, NUM_PARTICLES, MAX_TOKENS, BATCH_SIZE = 8, 8, 32, 64
THINGS = ("rivers", "birds", "metals", "planets", "poets", "cities", "trees", "instruments")
QUESTION = "Name {} {}, separated by commas, and say in a few words what they have in common."


def targets_of(lm: LM, tokenizer: Any, num: int) -> list[Target]:
    """p^1.5 after prompts of several lengths."""
    asked = [QUESTION.format(2 + i // len(THINGS), THINGS[i % len(THINGS)]) for i in range(num)]
    given = lm.given_each([tokenizer.chat(text) for text in asked], max_tokens=MAX_TOKENS)
    return [p**1.5 for p in given]


def runs(targets: list[Target]) -> turns.Runs:
    """Label -> a function of a key that runs all targets; the first in turn."""

    def in_turn(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(targets))
        found = [
            smc.run(key, target, num_particles=NUM_PARTICLES)
            for key, target in zip(keys, targets, strict=True)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    return {
        "in turn": in_turn,
        "prompts": lambda key: smc.run(key, targets, num_particles=NUM_PARTICLES),
    }


def tokens_of(out: Any) -> int:
    """Tokens that all runs drew."""
    return int(out.cost.tokens.sum())


def same_strings(of: turns.Runs, key: jax.Array) -> float:
    """The share of particles with the same string."""
    in_turn, together = (run(key).sequences.tokens for run in of.values())
    return float((in_turn == together).all(-1).mean())


def many(targets: list[Target], batch_size: int, console: Console) -> None:
    """Run all, and print what it took."""
    start = time.perf_counter()
    with console.status(f"{len(targets)} prompts"):
        out = smc.run(
            jax.random.key(1), targets, num_particles=NUM_PARTICLES, block_size=batch_size
        )
        jax.block_until_ready(out)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(
        f"{len(targets)} prompts of {NUM_PARTICLES} particles, {batch_size} rows at a time:"
        f" {tokens_of(out)} tokens in {seconds:.0f} s, compilation included; at most {peak:.1f} GiB"
        f" for the process, ESS {[round(float(x)) for x in out.trace.ess[:, -1]][:8]} ..."
    )


def main() -> None:
    """Print a table and, last, one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--many", type=int, default=0, metavar="P", help="run P prompts instead")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="of --many")
    args = parser.parse_args()
    compilation.use_cache()
    lm, tokenizer = models.load(args.model)
    if args.many:
        many(targets_of(lm, tokenizer, args.many), args.batch_size, Console())
        return
    of = runs(targets_of(lm, tokenizer, NUM_PROMPTS))
    times = turns.measure(of, args.rounds, tokens_of)
    found = {
        "prompts": 1 / statistics.median(turns.ratios(times)["prompts"]),
        "same_strings": same_strings(of, jax.random.key(1)),
    }
    for label, row in times.items():
        print(f"{label}: {statistics.median(row):.2f} ms per token")
    turns.last_line("prompts", found)


if __name__ == "__main__":
    main()
