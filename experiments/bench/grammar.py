"""What a grammar costs: an SMC step under a context-free grammar over one under a regular
expression, at equal N.

    python -m experiments.bench.grammar

A grammar is parsed on the host, a regular expression is a table on the device.  All runs are whole
compiled `smc.run`s from one prompt, divided by the rounds they took; they take turns in one
process, and a label is the median over repetitions of the ratio within one.  Every repetition has a
key of its own, so no text is parsed a second time.

    json      arbitrary JSON by its grammar, over JSON of two levels by a regular expression
    regular   the regular expression written as a grammar, over the same: what the callback costs,
              and nothing else
"""

from __future__ import annotations

import argparse

import models
from ppl.automata import regex
from ppl.context_free import grammar
from samplers import smc

from .. import compilation
from . import turns

NUM, MAX_TOKENS = 16, 32
PROMPT = (
    "List what is in a lighthouse keeper's kitchen, with numbers, as JSON. Answer with JSON only."
)

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


def runs(model: str) -> turns.Runs:
    """Label -> a function of a key that makes one whole run; the first is the regular
    expression's.
    """
    lm, tokenizer = models.load(model)
    plain = lm.given(tokenizer.chat(PROMPT), max_tokens=MAX_TOKENS)
    pattern = json_pattern(2)
    as_terminal = "start: TEXT\nTEXT: /" + pattern.replace("/", r"\/") + "/"
    targets = {
        "regex": plain * regex(pattern, tokenizer, canonical=False),
        "json": plain * grammar(JSON, tokenizer),
        "regular": plain * grammar(as_terminal, tokenizer),
    }
    return {
        label: lambda key, t=target: smc.run(key, t, num_particles=NUM)
        for label, target in targets.items()
    }


def main() -> None:
    """Print a table and, last, one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.grammar")
    parser.add_argument("--rounds", type=int, default=15, help="repetitions")
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    compilation.use_cache()
    times = turns.measure(runs(args.model), args.rounds, lambda out: int(out.rounds))
    turns.report(
        "grammar", times, f"{args.model}, N = {NUM}, {MAX_TOKENS} tokens, {args.rounds} repetitions"
    )


if __name__ == "__main__":
    main()
