"""Test session set-up: run-time checks of signatures, four CPU devices, and a compilation cache.

All three must be in place before the first import of the packages under test, hence at import time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

# Halves the time to compile.  XLA ends the process at a flag that it does not know, so a new
# release goes without.
known = metadata.version("jaxlib").startswith("0.10.")
outside = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false" * known
# Four host devices for the sharding tests; arrays stay on the first unless a test places them.
FLAGS = f"{outside} --xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = FLAGS

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from beartype import beartype  # noqa: E402

# Reads the flags; the processes that tests start, notebooks and commands, have one device.
jax.devices()
os.environ["XLA_FLAGS"] = outside


def check_signature(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check arguments and result against the annotations, except in a constructor.

    JAX rebuilds registered dataclasses with whatever a transformation puts in the leaves (shapes,
    axis numbers, None), so a constructor's annotations describe the object that a user makes, not
    every one that exists.
    """
    return function if function.__qualname__.endswith(".__init__") else beartype(function)


jaxtyping.install_import_hook(
    ("ppl", "samplers", "models", "amortized"), "tests.conftest.check_signature"
)


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs between sessions: compiling is most of what the tests spend their time
    on.
    """
    config.addinivalue_line(
        "markers", "bad_input: passes what a signature forbids; its run-time checks step aside"
    )
    config.addinivalue_line(
        "markers", "optimised: compiled so, for bfloat16 products on CPUs and for long training"
    )
    cache = getattr(config, "cache", None)
    if cache is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        options = {
            "jax_compilation_cache_dir": str(cache.mkdir("jax")),
            "jax_persistent_cache_min_compile_time_secs": 0.1,
            "jax_persistent_cache_min_entry_size_bytes": 0,
        }
        for name, value in options.items():
            jax.config.update(name, value)
            # Also for the processes that tests start: notebooks and commands share programs.
            os.environ[name.upper()] = str(value)


@pytest.fixture(autouse=True)
def _signatures(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test of the documented error for bad input must see that error, not the type checker's."""
    jaxtyping.config.update(
        "jaxtyping_disable", request.node.get_closest_marker("bad_input") is not None
    )
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def _programs() -> Iterator[None]:
    """Let go of compiled programs when there are many.

    Each holds several memory maps, some 300 in a test; Linux allows a process 65,530, and ends it
    at the next one.  Letting go costs: the small ones, of sums and copies, are compiled again.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 8_000:
        jax.clear_caches()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Small programs take longer to compile than to run, so they are compiled unoptimised."""
    optimised = item.get_closest_marker("optimised") is not None
    jax.config.update("jax_disable_most_optimizations", not optimised)
