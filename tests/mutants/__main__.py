"""`python -m tests.mutants`: which share of planted faults do the tests of each module catch?

A sample of mutants of `ppl` and `samplers`, half of them from the catalogue of subtle faults (as
far as that reaches) and half made by the operators, is tested one by one in copies of the tree, by
the test files that belong to the mutated module.  What is known is not run again: verdicts are kept
in `results/mutants`, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import queue
import random
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .belonging import tests_of
from .catalogue import EQUIVALENT, exact
from .mutant import ROOT, Mutant, files
from .operators import mutants_of
from .running import Copy, Ledger, Verdict

RESULTS = ROOT / "results" / "mutants"


def sample(num: int, seed: int, only: str) -> list[Mutant]:
    """`num` mutants of the files whose names begin with `only`, drawn without replacement."""
    rng = random.Random(seed)
    subtle = [mutant for mutant in exact() if mutant.file.startswith(only)]
    made = [
        mutant
        for file in files()
        if file.startswith(only)
        for mutant in mutants_of(file)
        if (mutant.file, mutant.place, mutant.old, mutant.new) not in EQUIVALENT
    ]
    rng.shuffle(subtle)
    rng.shuffle(made)
    chosen = subtle[: num // 2]
    return chosen + list(itertools.islice(filter(_compiles, made), num - len(chosen)))


def _compiles(mutant: Mutant) -> bool:
    try:
        compile(mutant.source(), mutant.file, "exec")
    except SyntaxError:
        return False
    return True


def run(mutants: list[Mutant], lanes: tuple[str, ...], jobs: int, limit: float) -> list[Verdict]:
    """The verdict on each mutant."""
    ledger, lock = Ledger(RESULTS / "verdicts.jsonl"), threading.Lock()
    digests = [Ledger.digest(m.source(), tests_of(m.file), lanes) for m in mutants]
    todo = [n for n, digest in enumerate(digests) if ledger.get(digest) is None]
    if not todo:
        return [_known(ledger, digest) for digest in digests]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, _progress() as progress:
        cache = RESULTS / "jax"
        copies: queue.Queue[Copy] = queue.Queue()
        for n in range(jobs):
            copies.put(Copy(Path(folder) / f"copy-{n}", cache))
        _check_unmutated(copies, ledger, [mutants[n] for n in todo], lanes, progress)
        bar = progress.add_task("mutants", total=len(mutants), completed=len(mutants) - len(todo))

        def one(n: int) -> None:
            copy = copies.get()
            try:
                found = copy.verdict(mutants[n], tests_of(mutants[n].file), lanes, limit)
            finally:
                copies.put(copy)
            with lock:
                ledger.add(digests[n], mutants[n].name, found)
                progress.advance(bar)
                if not found.caught:
                    progress.console.print(f"[red]survived[/] {_plain(mutants[n].name)}")

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, todo))
    return [_known(ledger, digest) for digest in digests]


def _check_unmutated(
    copies: queue.Queue[Copy],
    ledger: Ledger,
    mutants: list[Mutant],
    lanes: tuple[str, ...],
    progress: Progress,
) -> None:
    """Tests that fail without a mutant would catch them all."""
    tests = tuple(sorted({test for mutant in mutants for test in tests_of(mutant.file)}))
    sources = "".join((ROOT / file).read_text() for file in files())
    for lane in lanes:
        digest = Ledger.digest(sources, tests, (lane,))
        if ledger.get(digest) is not None:
            continue
        bar = progress.add_task(f"the {lane} tests without a mutant", total=None)
        copy = copies.get()
        found = copy.tested(tests, lane, 7200.0, first=True)
        copies.put(copy)
        progress.remove_task(bar)
        if found.caught:
            raise SystemExit(f"the tests fail without a mutant: {found.outcome} {found.by}")
        ledger.add(digest, f"unmutated, {lane}", found)


def _known(ledger: Ledger, digest: str) -> Verdict:
    verdict = ledger.get(digest)
    assert verdict is not None
    return verdict


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def report(mutants: list[Mutant], verdicts: list[Verdict]) -> float:
    """Print the share by module and the survivors; returns the share."""
    console = Console(width=120)
    by_module: dict[str, list[Verdict]] = collections.defaultdict(list)
    for mutant, verdict in zip(mutants, verdicts, strict=True):
        by_module[mutant.file].append(verdict)
    table = Table("module", "mutants", "caught", "fast lane", "timed out", "not imported")
    for name, found in [*sorted(by_module.items()), ("all", verdicts)]:
        fast = sum(v.caught and v.lane == "fast" for v in found)
        counts = [sum(v.outcome == outcome for v in found) for outcome in ("timed out", "broken")]
        caught = sum(v.caught for v in found)
        table.add_row(
            *(name, str(len(found)), f"{caught / len(found):.0%}", f"{fast / len(found):.0%}"),
            *map(str, counts),
        )
    console.print(table)
    for mutant, verdict in zip(mutants, verdicts, strict=True):
        if not verdict.caught:
            console.print(f"survived: {_plain(mutant.name)}", soft_wrap=True)
    return sum(verdict.caught for verdict in verdicts) / len(verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose names begin so, samplers/smc say")
    parser.add_argument("--lanes", default="fast,slow", help="fast, or fast,slow (the default)")
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for a lane of a mutant")
    parser.add_argument("--least", type=float, default=0.92, help="fail below this share")
    parser.add_argument("--list", action="store_true", help="show the sample, run nothing")
    args = parser.parse_args()
    mutants = sample(args.num, args.seed, args.only)
    if args.list:
        print(*(mutant.name for mutant in mutants), sep="\n")
        return
    share = report(mutants, run(mutants, tuple(args.lanes.split(",")), args.jobs, args.limit))
    print(f"caught {share:.1%} of {len(mutants)} (seed {args.seed})")
    sys.exit(share < args.least)


if __name__ == "__main__":
    main()
