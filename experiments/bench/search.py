"""What best-first search costs beside its model passes, at width 16.

    python -m experiments.bench.search

Whole compiled runs from the same prompt, divided by the passes of the model that they took, each
over a batch of 16 rows: `ancestral.run`, which does the pass and a draw and nothing else, and
searches that expand one node, or four, at a time into 16 next steps of eight tokens.  They take
turns in one process; each label is the median over rounds of the ratio within a round.

    greedy            queue of 64, 16 children of the best node
    four_at_a_time    the same with four children of each of the four best
"""

from __future__ import annotations

import argparse
from typing import Any

import jax

import models
import ppl
from samplers.draws import ancestral
from samplers.search import best_first, priorities

from .. import compilation
from . import turns
from .smc_overhead import PROMPT, newness

WIDTH, MAX_TOKENS, EXPANSIONS = 16, 64, 8


def runs(lm: Any, tokenizer: Any) -> turns.Runs:
    """Label -> a function of a key that makes one whole run; the first is the plain one."""
    p, steps = lm.given(tokenizer.chat(PROMPT), max_tokens=MAX_TOKENS), ppl.Steps(every=8)
    first = priorities.greedy(chance)
    sizes: dict[str, Any] = {"capacity": 64, "max_expansions": EXPANSIONS}
    four: dict[str, Any] = {
        "width": WIDTH // 4,
        "num_pop": 4,
        "capacity": 64,
        "max_expansions": 4 * EXPANSIONS,
    }
    return {
        "ancestral": lambda key: ancestral.run(key, p, num_samples=WIDTH),
        "greedy": lambda key: best_first.run(key, p, first, steps, width=WIDTH, **sizes),
        "four_at_a_time": lambda key: best_first.run(key, p, first, steps, **four),
    }


def chance(tokens: jax.Array, length: jax.Array) -> jax.Array:
    """A process reward [N]: the more of its tokens differ from their predecessor, the likelier."""
    return jax.nn.sigmoid(newness(tokens, length) - 3.0)


def passes(out: Any) -> int:
    """Of the model, one after another."""
    return int(out.cost.depth)


def main() -> None:
    """Print a table and, last, one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.search")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    compilation.use_cache()
    times = turns.measure(runs(*models.load(args.model)), args.rounds, passes)
    title = f"{args.model}, {WIDTH} rows, {MAX_TOKENS} tokens, {args.rounds} rounds"
    turns.report("search_overhead", times, title)


if __name__ == "__main__":
    main()
