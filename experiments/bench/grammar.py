"""What a grammar costs: an SMC step under a context-free grammar over one under a regular expression, at equal N.

    python -m experiments.bench.grammar

A grammar is parsed on the host, a regular expression is a table on the device.  All runs are whole compiled `smc.run`s
from one prompt, divided by the rounds they took; they take turns in one process, and a label is the median over
repetitions of the ratio within one.  Every repetition has a key of its own, so no text is parsed a second time.

    json      arbitrary JSON by its grammar, over JSON of two levels by a regular expression
    regular   the regular expression written as a grammar, over the same: what the callback costs, and nothing else
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
from ppl.automata import regex
from ppl.context_free import grammar
from samplers import smc

from .. import compilation, saving

NUM, MAX_TOKENS = 16, 32
PROMPT = "List what is in a lighthouse keeper's kitchen, with numbers, as JSON. Answer with JSON only."
BASE = "regex"

STRING = r'"[^"\\\x00-\x1f]*"'
NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?"
JSON = rf"""
start: object
value: object | array | STRING | NUMBER | "true" | "false" | "null"
object: "{{" pair ("," pair)* "}}"
pair: STRING ":" value
array: "[" value ("," value)* "]"
STRING: /{STRING}/
NUMBER: /{NUMBER}/
%ignore /[ \n]{{1,4}}/
"""


def json_pattern(levels: int) -> str:
    """Objects whose values nest to `levels`; the same symbols as `JSON`."""
    space, value = r"[ \n]{0,4}", f"({STRING}|{NUMBER}|true|false|null)"
    for level in range(levels):
        pair = f"{STRING}{space}:{space}{value}"
        members, items = (f"{one}({space},{space}{one})*" for one in (pair, value))
        nested = rf"\{{{space}{members}{space}\}}"
        value = nested if level == levels - 1 else rf"({value}|{nested}|\[{space}{items}{space}\])"
    return value


def runs(model: str) -> dict[str, Callable[[jax.Array], smc.Result]]:
    """Label -> a function of a key that makes one whole run; `BASE` is the regular expression's."""
    lm, tokenizer = models.load(model)
    plain = lm.given(tokenizer.chat(PROMPT), max_tokens=MAX_TOKENS)
    pattern = json_pattern(2)
    as_terminal = "start: TEXT\nTEXT: /" + pattern.replace("/", r"\/") + "/"
    targets = {
        BASE: plain * regex(pattern, tokenizer),
        "json": plain * grammar(JSON, tokenizer),
        "regular": plain * grammar(as_terminal, tokenizer),
    }
    return {label: lambda key, t=target: smc.run(key, t, num_particles=NUM) for label, target in targets.items()}


def measure(of: dict[str, Callable[[jax.Array], Any]], repetitions: int) -> dict[str, list[float]]:
    """Label -> milliseconds per round in each repetition, in turn."""
    for run in of.values():
        jax.block_until_ready(run(jax.random.key(0)))  # compiles
    times: dict[str, list[float]] = {label: [] for label in of}
    for r in range(repetitions):
        # The order turns, so that whoever follows a neighbour's burst is not always the same.
        labels = list(of)[r % len(of) :] + list(of)[: r % len(of)]
        for label in labels:
            start = time.perf_counter()
            out = jax.block_until_ready(of[label](jax.random.key(r + 1)))
            times[label].append(1000 * (time.perf_counter() - start) / int(out.rounds))
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Label -> the ratio to `BASE` within each repetition."""
    base = times[BASE]
    return {label: [a / b for a, b in zip(row, base, strict=True)] for label, row in times.items() if label != BASE}


def main() -> None:
    """Print a table and, last, one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.grammar")
    parser.add_argument("--rounds", type=int, default=15, help="repetitions")
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    compilation.use_cache()
    times = measure(runs(args.model), args.rounds)
    over = ratios(times)
    view = Table(title=f"{args.model}, N = {NUM}, {MAX_TOKENS} tokens, {args.rounds} repetitions", title_justify="left")
    for name in ("", "ms / round", "over regex", "quartiles"):
        view.add_column(name, justify="left" if not name else "right")
    for label, row in times.items():
        cells = ["1", ""]
        if label != BASE:
            low, middle, high = statistics.quantiles(over[label], n=4)
            cells = [f"{middle:.3f}", f"{low:.3f} .. {high:.3f}"]
        view.add_row(label, f"{statistics.median(row):.1f}", *cells)
    Console().print(view)
    medians = {label: round(statistics.median(row), 4) for label, row in over.items()}
    print(json.dumps({"name": "grammar", "ratios": medians, "device": saving.device()}))


if __name__ == "__main__":
    main()
