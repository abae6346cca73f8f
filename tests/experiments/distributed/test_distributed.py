"""Two processes share one population, and draw what one process draws."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.distributed import __main__ as distributed
from samplers import smc

ROOT = Path(__file__).parents[3]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "experiments.distributed", *args]


@pytest.mark.slow
def test_two_processes_draw_what_one_draws():
    done = subprocess.run(
        command("--num-particles", "16"), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = json.loads(line)
    alone = smc.run(
        jax.random.key(0), distributed.tabular_target(), num_particles=16, threshold=0.9
    )
    assert found["processes"] == 2 and found["devices"] >= 2
    assert found["resampled"] == int(alone.trace.resampled.sum()) > 0
    np.testing.assert_array_equal(found["tokens"], alone.sequences.tokens)
    np.testing.assert_allclose(found["log_z"], alone.log_z, atol=1e-4)


def test_half_an_address_is_refused():
    done = subprocess.run(
        command("--process-id", "0"), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "expected --process-id and --coordinator together, got one" in done.stderr
