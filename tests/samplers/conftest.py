"""Fixtures of the tests of samplers."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def optimised() -> Iterator[None]:
    """For programs that take longer to run than to compile; all others are compiled unoptimised."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
