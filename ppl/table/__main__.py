"""A saved run as a table: `python -m ppl.table results/demo`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..files import latest
from ..sequences import Sequences
from . import table

RESULTS, ARRAYS = "results.json", "arrays.npz"


@dataclasses.dataclass(frozen=True)
class Saved:
    """The strings [N] of a saved run, their weights, and the texts that go with them."""

    sequences: Sequences
    log_weights: np.ndarray
    log_z: float | None
    texts: list[str]

    def decode(self, ids: Any) -> str:
        """The text of one of its strings: a saved run is its own tokenizer."""
        strings = zip(self.sequences.tokens, self.sequences.length, strict=True)
        wanted = list(ids)
        return self.texts[
            next(i for i, (row, n) in enumerate(strings) if row[:n].tolist() == wanted)
        ]


def read(directory: Path) -> Saved:
    """The run in a directory; its files are described in `experiments.showing.saving`.

    Raises:
        FileNotFoundError: if there is none.
    """
    document = json.loads(latest(directory, RESULTS).read_text(encoding="utf-8"))
    with np.load(latest(directory, ARRAYS), allow_pickle=False) as file:
        tokens, length, log_weights = file["tokens"], file["length"], file["log_weights"]
    return Saved(
        sequences=Sequences(tokens, length),
        log_weights=log_weights,
        log_z=None if document["log_z"] is None else float(document["log_z"]),
        texts=[row["text"] for row in document["strings"]],
    )


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status, 2 if there is no run."""
    parser = argparse.ArgumentParser(prog="python -m ppl.table", description=__doc__)
    parser.add_argument("directory", type=Path, help="where python -m experiments.decode saved")
    parser.add_argument("--top", type=int, default=10, help="how many strings (%(default)s)")
    args = parser.parse_args(argv)
    try:
        run = read(args.directory)
    except FileNotFoundError as error:
        print(
            f"error: expected a saved run, {RESULTS} and {ARRAYS}, got no {error.filename}; name"
            " the directory that python -m experiments.decode says it saved in",
            file=sys.stderr,
        )
        return 2
    print(table(run, run, top=args.top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
