"""A mutant's tests, run in a copy of the tree."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .mutant import PACKAGES, ROOT, Mutant

COPIED = (*PACKAGES, "models", "amortized", "experiments", "tests")
LANES = {"fast": "not slow", "slow": "slow"}
ENDED = {0: "survived", 1: "caught", 2: "broken", 3: "broken", 4: "broken", 5: "survived"}
"""What pytest's exit codes say of a mutant; 2 is a module that cannot be imported."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How the tests of a mutant ended, in which lane, after how many seconds; `by` is the test."""

    outcome: str
    lane: str
    seconds: float
    by: str = ""

    @property
    def caught(self) -> bool:
        return self.outcome != "survived"


class Copy:
    """A copy of the tree that may be mutated; what is mutated in it is written back afterwards."""

    def __init__(self, folder: Path, cache: Path, root: Path = ROOT):
        self.folder, self.root = folder, root
        for name in COPIED:
            shutil.copytree(
                root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(root / "pyproject.toml", folder / "pyproject.toml")
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        self._check()

    def _check(self) -> None:
        """Tests of the original would let every mutant survive."""
        code = "import ppl, samplers; print(ppl.__file__, samplers.__file__)"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        if not all(path.startswith(str(self.folder)) for path in done.stdout.split()):
            raise RuntimeError(f"expected modules of {self.folder}, got {done.stdout}")

    def tested(
        self, tests: tuple[str, ...], lane: str, limit: float, *, first: bool = True
    ) -> Verdict:
        """The tests of a lane, up to the first that fails (or all)."""
        options = ["-x"] if first else []
        command = [
            *(sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=no", "-rfE"),
            *("-p", "no:cacheprovider", "--durations=0", "-m", LANES[lane], *options, *tests),
        ]
        begun = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Verdict("timed out", lane, time.monotonic() - begun)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        code = process.returncode
        # A signal: the mutant has ended the process.
        outcome = ENDED.get(code, "caught")
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        by = failed[0].partition(" - ")[0] if failed else ""
        return Verdict(outcome, lane, time.monotonic() - begun, by)

    def verdict(
        self, mutant: Mutant, tests: tuple[str, ...], lanes: tuple[str, ...], limit: float
    ) -> Verdict:
        """What becomes of a mutant: the fast lane first, the slow one if it survives."""
        path, right = self.folder / mutant.file, (self.root / mutant.file).read_text()
        try:
            path.write_text(mutant.source(self.root))
            for lane in lanes:
                found = self.tested(tests, lane, limit)
                if found.caught:
                    return found
            return found
        finally:
            path.write_text(right)


class Ledger:
    """Verdicts on disk, by what they depend on: the mutated module and the tests."""

    def __init__(self, file: Path):
        self.file = file
        self.known: dict[str, dict[str, Any]] = {}
        if file.exists():
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                self.known[entry["digest"]] = entry

    @staticmethod
    def digest(text: str, tests: tuple[str, ...], lanes: tuple[str, ...]) -> str:
        parts = [text, *lanes, *(name + (ROOT / name).read_text() for name in tests)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    def get(self, digest: str) -> Verdict | None:
        entry = self.known.get(digest)
        return None if entry is None else Verdict(**entry["verdict"])

    def add(self, digest: str, name: str, verdict: Verdict) -> None:
        entry = {"digest": digest, "name": name, "verdict": dataclasses.asdict(verdict)}
        self.known[digest] = entry
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as lines:
            lines.write(json.dumps(entry) + "\n")
