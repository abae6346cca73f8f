"""Everything in double precision: `tests.double_precision`, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from samplers import registry


def report() -> dict[str, Any]:
    # Compiled unoptimised, as in the fast tests.
    options = {"JAX_ENABLE_X64": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = os.environ | options | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.double_precision"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_sampler_keeps_its_types_and_the_laws_hold():
    found = report()
    registered = {entry.name.removeprefix("samplers.") for entry in registry.entries()}
    missing = registered - found["faults"].keys()
    assert not missing, f"add a case to tests/double_precision.py for {sorted(missing)}"
    faults = [f"{name}: {fault}" for name, fault in found["faults"].items() if fault]
    assert not faults, "\n".join(faults)
    assert all(abs(z) < 5 for z in found["laws"].values()), found["laws"]
