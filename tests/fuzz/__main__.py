"""`python -m tests.fuzz`: corrupted model files are refused by name, or do no harm.

Inputs are made from a seed and a number, and loaded in child processes with a limit of time and of
memory.  A child that dies, or says nothing for too long, is replaced.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import child, corruptions

ROOT = Path(__file__).parent.parent.parent
SECONDS = 120.0
"""Without a word of a child, which the system ends much earlier if it uses the processor."""
BATCH = 400
"""Inputs of one child."""
KINDS = {
    "refused": "clean refusals that name the file",
    "loaded": "harmless loads",
    "raw": "raw exceptions",
    "hung": f"over {child.SECONDS:g} s",
    "memory": "over 1 GB above the file",
    "died": "deaths of the process",
}
GOOD = ("refused", "loaded")
CHILD = [sys.executable, "-m", "tests.fuzz.child"]


@dataclasses.dataclass(frozen=True)
class Found:
    """What came of an input."""

    number: int
    told: str
    kind: str
    why: str


def fuzz(seed: int, num: int, first: int = 0) -> Iterator[Found]:
    """What comes of `num` inputs from number `first` on."""
    last = first + num
    while first < last:
        for found in _of_one_child(seed, first, min(first + BATCH, last)):
            yield found
            first = found.number + 1


def _of_one_child(seed: int, first: int, last: int) -> Iterator[Found]:
    command = [*CHILD, *map(str, (seed, first, last))]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    lines: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(json.loads(line))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        begun = {"begun": None, "told": "its start"}
        while True:
            try:
                said = lines.get(timeout=SECONDS)
            except queue.Empty:
                yield _broken(begun, "hung", f"no word for {SECONDS:g} s")
                return
            if said is None:
                if begun is not None or process.wait() != 0:
                    status = process.wait()
                    kind = "hung" if status == -signal.SIGXCPU else "died"
                    yield _broken(begun, kind, f"exit status {status}")
                return
            if "ended" in said:
                assert begun is not None
                yield Found(said["ended"], begun["told"], said["kind"], said["why"])
                begun = None
            else:
                begun = said if said["begun"] is not None else None
    finally:
        process.kill()
        process.wait()


def _broken(begun: dict[str, Any] | None, kind: str, why: str) -> Found:
    if begun is None or begun["begun"] is None:
        raise RuntimeError(f"expected a child that loads inputs, got one that {kind}: {why}")
    return Found(begun["begun"], begun["told"], kind, why)


def replay(seed: int, number: int) -> str:
    """The command that runs one input again, in the open."""
    return f"python -m tests.fuzz --seed {seed} --only {number}"


def report(console: Console, seed: int, found: list[Found], seconds: float) -> bool:
    """Print the table; whether all is well."""
    counts = collections.Counter(one.kind for one in found)
    table = Table("outcome", "inputs", title=f"{len(found)} corrupted inputs, seed {seed}")
    for kind, words in KINDS.items():
        table.add_row(words, str(counts[kind]))
    console.print(table)
    console.print(f"{seconds:.0f} s, {1000 * seconds / max(len(found), 1):.0f} ms each")
    return all(counts[kind] == 0 for kind in KINDS if kind not in GOOD)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", type=int, help="run one input in this process, in the open")
    args = parser.parse_args()
    console = Console(width=120)
    if args.only is not None:
        told, _ = corruptions.build(args.seed, args.only)
        console.print(told, markup=False)
        child.main(args.seed, args.only, args.only + 1)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    begun, found = time.monotonic(), []
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"seed {args.seed}", total=args.num)
        for one in fuzz(args.seed, args.num, args.first):
            found.append(one)
            progress.advance(bar)
            if one.kind not in GOOD:
                console.print(f"{one.kind} {one.number}: {one.told}", markup=False)
                console.print(f"  {one.why}", markup=False)
                console.print(f"  again: {replay(args.seed, one.number)}", markup=False)
    sys.exit(not report(console, args.seed, found, time.monotonic() - begun))


if __name__ == "__main__":
    main()
