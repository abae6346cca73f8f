"""The compilation clock runs while JAX compiles and stands still otherwise; the cache goes where it
is told.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments import compilation


def test_the_clock_counts_compilation_only():
    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        return jnp.sin(x) @ x

    x, start = jnp.ones((3, 3)), compilation.seconds_so_far()
    function(x)
    compiled = compilation.seconds_so_far()
    assert compiled > start
    function(x)
    assert compilation.seconds_so_far() == compiled


def test_compiled_programs_are_kept_under_the_cache_directory(tmp_path: Path):
    code = (
        "import jax; from experiments import compilation; compilation.use_cache();"
        " jax.jit(lambda x: x + 1)(1)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["TILTLM_CACHE"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert any((tmp_path / "compiled").iterdir())
