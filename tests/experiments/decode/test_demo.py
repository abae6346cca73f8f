"""`make demo` on the real model: its answer is right, and the same the second time."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.showing import lineages, saving

ROOT = Path(__file__).parents[3]


def demo(out: Path) -> saving.Run:
    """Run the command that the Makefile would run, into `out`."""
    # Without directory lines, which make adds when it runs inside another make, as it does in
    # `make test-slow`.
    dry_run = ["make", "-n", "--no-print-directory", "demo"]
    make = subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = shlex.split(make[make.index("-m experiments.decode") :].replace("\\\n", " "))
    command[command.index("--out") + 1] = str(out)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return saving.load(out)


@pytest.mark.slow
def test_the_demo_is_surer_of_the_date_than_masking(tmp_path: Path):
    first, second = demo(tmp_path / "first"), demo(tmp_path / "second")
    top, weight = lineages.merged(first.texts, first.population.weights)[0]
    assert top == "July 4, 1776" and weight > 0.5
    assert dict(first.comparison["masked"]).get(top, 0.0) < weight - 0.3
    np.testing.assert_array_equal(first.population.log_weights, second.population.log_weights)
    assert first.texts == second.texts and first.population.log_z == second.population.log_z
