"""What becomes of JSON schemas as people write them: coverage of `ppl.json_schema`.

    python -m experiments.bench.schemas

Each of the schemas in cases.jsonl becomes tables, or a parser's, or is refused by name.  It is
wrong if a valid document has no mass, an invalid one has some, or the text of a random walk through
the constraint is not valid; the referee is the jsonschema package (`pip install 'tiltlm[test]'`).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter

from . import cases, judging


def main() -> None:
    """Print a table and, last, one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.schemas")
    parser.add_argument("--walks", type=int, default=150, help="random walks through each schema")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = [judging.judge(case, args.walks, args.seed) for case in cases.load()]
    for verdict in found:
        for problem in verdict.problems:
            print(f"wrong    {verdict.name}: {problem}")
        if verdict.way == "refused":
            print(f"refused  {verdict.name}: {verdict.why}")
    ways = Counter(verdict.way for verdict in found)
    wrong = sum(bool(verdict.problems) for verdict in found)
    total, walked = len(found), sum(verdict.walked for verdict in found)
    print(f"\n{'schemas':<24}{total:>6}")
    for way in ("tables", "parser", "refused"):
        print(f"{way:<24}{ways[way]:>6}{100 * ways[way] / total:>8.1f} %")
    print(f"{'wrong':<24}{wrong:>6}\n{'documents':<24}{sum(v.documents for v in found):>6}")
    unended = sum(verdict.unended for verdict in found)
    print(f"{'walks that ended':<24}{walked:>6}\n{'and that did not':<24}{unended:>6}")
    share = 1 - ways["refused"] / total
    print(json.dumps({"name": "schemas", "accepted": round(share, 4), "wrong": wrong, **ways}))


if __name__ == "__main__":
    main()
