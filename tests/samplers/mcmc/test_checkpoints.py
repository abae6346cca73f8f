"""A run that was killed goes on from its file to the bits of one that never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samplers.base import Cost, Kernel
from samplers.mcmc import chains, suffix
from samplers.mcmc import checkpoints as chain_checkpoints
from samplers.results import Chains
from tests.samplers.mcmc.test_chains import assert_equal, some_strings, walk
from tests.samplers.mcmc.test_chains import where as walked
from tests.samplers.problems import target_of

KEY = jax.random.key(3, impl="rbg")


class Killed(Exception):
    """What stops a run in these tests."""


def coarse() -> Kernel:
    """A walk whose state numpy has no dtype for, and whose steps cost something."""

    def step(key: Any, x: Any) -> tuple[Any, Any]:
        up = jax.vmap(jax.random.normal)(jax.random.split(key, x.shape[0])).astype(jnp.bfloat16)
        return x + up, (up > 0, Cost(tokens=jnp.int32(3), forwards=jnp.int32(1)))

    return Kernel(lambda x: x.astype(jnp.bfloat16), step)


def collect(x: Any) -> dict[str, Any]:
    return {"x": x, "rough": x.astype(jnp.float32)}


def run(kernel: Kernel, **options: Any) -> Chains:
    return chains.run(
        KEY, kernel, jnp.ones(4), num_samples=30, thin=2, warmup=3, collect=collect, **options
    )


@pytest.mark.parametrize("at", [2, 4, 6])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, at: int):
    path, calls = tmp_path / "run.npz", []

    def watch(result: Chains, total: int) -> None:
        calls.append(result.steps)
        if len(calls) == at:
            raise Killed
        chain_checkpoints.save(path, result)

    kernel = coarse()
    whole = run(kernel)
    with pytest.raises(Killed):
        run(kernel, watch=watch)
    # Another process has another kernel.
    again = coarse()
    saved = chain_checkpoints.load(path, again, jnp.ones(4), collect=collect)
    assert saved.steps == calls[at - 2] < whole.steps and saved.cost is not None
    assert saved.draws["x"].dtype == saved.state.dtype == jnp.bfloat16
    assert_equal(run(again, resume=saved), whole)


def test_whatever_happens_while_it_is_written_a_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kernel, path = coarse(), tmp_path / "run.npz"
    whole = run(kernel)
    chain_checkpoints.save(path, whole)
    before, savez = path.read_bytes(), np.savez

    def cut(file: Any, **arrays: Any) -> None:
        savez(file, **dict(list(arrays.items())[:2]))
        raise Killed

    monkeypatch.setattr(np, "savez", cut)
    with pytest.raises(Killed):
        chain_checkpoints.save(path, whole)
    assert path.read_bytes() == before
    assert_equal(chain_checkpoints.load(path, kernel, jnp.ones(4), collect=collect), whole)


def test_a_file_is_plain_arrays_by_name(tmp_path: Path):
    path = tmp_path / "run.npz"
    kernel = walk()
    out = chains.run(KEY, kernel, jnp.arange(3.0), num_samples=5, collect=walked)
    chain_checkpoints.save(path, out)
    with np.load(path, allow_pickle=False) as file:
        np.testing.assert_array_equal(file["draws.past"], out.draws["past"])
        np.testing.assert_array_equal(file["info.accepted"], out.info.accepted)
        np.testing.assert_array_equal(file["state.x"], out.state.x)
        assert int(file["steps"]) == 5 and str(file["key_impl"]) == "rbg"


SCRIPT = """
import os, signal, sys
import jax, jax.numpy as jnp
from samplers.mcmc import chains
from samplers.mcmc import checkpoints as chain_checkpoints
from tests.samplers.mcmc.test_checkpoints import KEY, coarse, run
def watch(result, total):
    chain_checkpoints.save(sys.argv[1], result)
    if result.num_samples > 5:
        os.kill(os.getpid(), signal.SIGKILL)
run(coarse(), watch=watch)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_a_file_to_go_on_from(tmp_path: Path):
    path, kernel = tmp_path / "run.npz", coarse()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = chain_checkpoints.load(path, kernel, jnp.ones(4), collect=collect)
    assert 5 < saved.num_samples < 30
    assert_equal(run(kernel, resume=saved), run(kernel))


@pytest.mark.slow
def test_a_language_models_cache_is_gone_on_with(tmp_path: Path):
    path, target = tmp_path / "run.npz", target_of("table", "every_1")
    kernel, x = suffix.kernel(target), some_strings(5)
    whole = chains.run(KEY, kernel, x, num_samples=40, thin=2)
    chain_checkpoints.save(path, chains.run(KEY, kernel, x, num_samples=11, thin=2))
    saved = chain_checkpoints.load(path, kernel, x)
    assert_equal(chains.run(KEY, kernel, x, num_samples=40, thin=2, resume=saved), whole)


def test_bad_input(tmp_path: Path):
    path, kernel = tmp_path / "run.npz", coarse()
    with pytest.raises(FileNotFoundError):
        chain_checkpoints.load(path, kernel, jnp.ones(4))
    chain_checkpoints.save(path, run(kernel))
    with pytest.raises(
        ValueError, match=r"expected draws.rough of float32\[30, 5\] in .*, got float32\[30, 4\]"
    ):
        chain_checkpoints.load(path, kernel, jnp.ones(5), collect=collect)
    with pytest.raises(
        ValueError, match=r"expected draws.z of float32\[30, 4\] in .*, got nothing; load it with"
    ):
        chain_checkpoints.load(
            path, kernel, jnp.ones(4), collect=lambda x: {"z": x.astype(jnp.float32)}
        )
    with pytest.raises(ValueError, match=r"expected draws.x of float32\[30, 4\] in .*, got uint16"):
        chain_checkpoints.load(
            path, kernel, jnp.ones(4), collect=lambda x: {"x": x.astype(jnp.float32)}
        )
