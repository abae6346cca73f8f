"""Chains are those of the kernel stepped by hand, however they are cut into chunks, stopped and
gone on with.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.exact import enumerate_strings
from ppl.rows import take_rows
from ppl.sequences import Sequences
from samplers.base import Cost, Kernel, holding
from samplers.latent import rejuvenation
from samplers.mcmc import chains, suffix
from samplers.results import Chains
from samplers.smc import conditional, pimh
from tests.helpers import TraceCounter
from tests.samplers.problems import target_of

KEY = jax.random.key(7)
TARGET = target_of("table", "every_1")


class Walk(NamedTuple):
    """A chain whose state has no strings and no name for where it is."""

    x: jax.Array
    past: jax.Array


class WalkInfo(NamedTuple):
    accepted: jax.Array
    wide: jax.Array
    parts: tuple


def walk(step: Any = None) -> Kernel:
    """A random walk whose next step depends on all before; two costs, as a kernel of two
    parts has.
    """

    def move(key: Any, state: Walk) -> tuple[Walk, WalkInfo]:
        up = jax.vmap(jax.random.bernoulli)(jax.random.split(key, state.x.shape[0]))
        x = state.x + jnp.where(up, 1.0, -0.9)
        one = Cost(tokens=up.sum(), forwards=jnp.int32(1))
        return Walk(x, 0.9 * state.past + x), WalkInfo(up, jnp.zeros((*x.shape, 33)), (one, (one,)))

    return Kernel(lambda x: Walk(x, jnp.zeros_like(x)), step or move)


def where(state: Walk) -> dict[str, Any]:
    return {"x": state.x, "past": state.past}


def run(kernel: Kernel, num_samples: int, **options: Any) -> Chains:
    return chains.run(
        KEY, kernel, jnp.arange(3.0), num_samples=num_samples, collect=where, thin=2, **options
    )


def assert_equal(a: Chains, b: Chains) -> None:
    for name in ("draws", "info", "state", "cost"):
        jax.tree.map(np.testing.assert_array_equal, getattr(a, name), getattr(b, name))
    assert (a.steps, a.num_samples, a.interrupted) == (b.steps, b.num_samples, b.interrupted)


def some_strings(num: int) -> Sequences:
    exact = enumerate_strings(TARGET)
    return take_rows(exact.sequences, jnp.asarray(np.flatnonzero(exact.probs)[:num]))


def continuous() -> Kernel:
    return rejuvenation.chains(blackjax.hmc(lambda x: -0.5 * (x**2).sum(), 0.5, jnp.ones(2), 3))


KERNELS: dict[str, Any] = {
    "walk": lambda: (walk(), jnp.arange(5.0)),
    "suffix": lambda: (suffix.kernel(TARGET), some_strings(5)),
    "conditional": lambda: (conditional.kernel(TARGET, num_particles=3), some_strings(5)),
    "hmc": lambda: (continuous(), jnp.ones((5, 2))),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "walk")) for name in KERNELS]
)
def test_the_draws_are_those_of_stepping_by_hand(name: str):
    kernel, x = KERNELS[name]()
    collect = where if name == "walk" else chains.collected
    out = chains.run(KEY, kernel, x, num_samples=4, thin=3, warmup=5, collect=collect)
    state, step = kernel.init(x), jax.jit(kernel.step)
    draws, infos = [], []
    for i in range(5 + 4 * 3):
        state, info = step(jax.random.fold_in(KEY, i), state)
        infos.append(info)
        draws += [collect(state)] * (i >= 5 and (i - 5) % 3 == 2)
    wanted = jax.tree.map(lambda *leaves: np.stack(leaves), *draws)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), out.draws, wanted)
    steps = jax.tree.map(
        lambda *leaves: np.stack(leaves).reshape(4, 3, *leaves[0].shape), *infos[5:]
    )
    for field in ("accepted", "details", "log_ratio", "changed", "acceptance_rate"):
        if hasattr(steps, field):
            # A ratio is a difference of sums, which two programs may round to 0 or not.
            close = functools.partial(
                np.testing.assert_allclose, rtol=1e-5, atol=1e-6, err_msg=field
            )
            jax.tree.map(close, getattr(out.info, field), getattr(steps, field))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), out.state, state)
    cost = chains.total_cost(jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos))
    assert (out.cost is None) == (cost is None) == (name == "hmc")
    if cost is not None:
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), out.cost, cost)


def test_a_longer_run_keeps_its_prefix_however_it_is_cut(monkeypatch: pytest.MonkeyPatch):
    kernel, seen = walk(), []
    short = run(
        kernel, 20, warmup=5, watch=lambda result, total: seen.append((result.steps, total))
    )
    long = run(kernel, 50, warmup=5)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:20]), short.draws, long.draws)
    # Warm-up and draws by ones, twos, fours ...
    assert seen[-1] == (45, 45) and seen[0][0] <= 2 and {steps for steps, _ in seen} >= {5}
    for seconds in (0.0, np.inf):
        monkeypatch.setattr(chains, "SECONDS", seconds)
        assert_equal(run(kernel, 50, warmup=5), long)
    # All that a device holds: the walk is as long as several of them.
    monkeypatch.setattr(chains, "CHUNK_DRAWS", 8)
    assert_equal(run(walk(), 50, warmup=5), long)


def test_a_device_holds_as_many_draws_as_have_room():
    for num_bytes, most in ((chains.CHUNK_BYTES // 3, 3), (2 * chains.CHUNK_BYTES, 1)):
        assert chains._capacity(jax.ShapeDtypeStruct((num_bytes,), jnp.int8)) == most
    assert chains._capacity({"nothing": jax.ShapeDtypeStruct((0,), jnp.int8)}) == chains.CHUNK_DRAWS


def test_a_run_that_goes_on_is_one_that_never_stopped():
    kernel = walk()
    whole, half = run(kernel, 50, warmup=3), run(kernel, 17, warmup=3)
    before = jax.tree.map(np.copy, half.draws)
    assert_equal(run(kernel, 50, warmup=3, resume=half), whole)
    jax.tree.map(np.testing.assert_array_equal, half.draws, before)
    assert_equal(run(kernel, 17, warmup=3, resume=half), half)
    # What is compared can differ: the state is what is gone on from.
    elsewhere = dataclasses.replace(half, state=kernel.init(jnp.arange(3.0)))
    assert (run(kernel, 50, warmup=3, resume=elsewhere).draws["x"] != whole.draws["x"]).any()


@pytest.mark.parametrize("at", [1, 3, 6])
def test_an_interrupt_returns_what_there_is(at: int):
    kernel, calls = walk(), []

    def interrupt(result: Chains, total: int) -> None:
        calls.append(result.steps)
        if len(calls) == at:
            raise KeyboardInterrupt

    whole, cut = run(kernel, 50, warmup=9), run(kernel, 50, warmup=9, watch=interrupt)
    assert cut.interrupted and not whole.interrupted and cut.steps == calls[-1] < 109
    assert len(cut.draws["x"]) == cut.num_samples == max(cut.steps - 9, 0) // 2
    np.testing.assert_array_equal(cut.draws["x"], whole.draws["x"][: cut.num_samples])
    assert_equal(run(kernel, 50, warmup=9, resume=cut), whole)


def test_an_interrupt_within_a_chunk_loses_that_chunk_only(monkeypatch: pytest.MonkeyPatch):
    kernel, whole, device_get, calls = walk(), None, jax.device_get, []
    whole = run(kernel, 50)

    def interrupt(tree: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return device_get(tree)

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_get", interrupt)
        cut = run(kernel, 50)
    assert cut.interrupted and 0 < cut.num_samples < 50
    assert_equal(run(kernel, 50, resume=cut), whole)


def test_steps_are_compiled_once_for_each_shape():
    counter = TraceCounter(walk().step)
    kernel = walk(counter)
    run(kernel, 5, warmup=3)
    traced = counter.count
    for options in ({}, {"warmup": 7}, {"resume": run(kernel, 6)}):
        run(kernel, 30, **options)
    assert counter.count == traced
    chains.run(KEY, kernel, jnp.arange(4.0), num_samples=5, collect=where, thin=2)
    assert counter.count == 2 * traced


def moved_by(key: Any, table: jax.Array, state: Walk) -> tuple[Walk, None]:
    return Walk(state.x + table[3], state.past), None


def test_what_a_kernel_holds_is_an_argument():
    """Another kernel of the same kind runs the same program, with its own arrays; nothing of them
    is in it.
    """
    counter = TraceCounter(moved_by)

    def steps_of(table: jax.Array) -> Any:
        kernel = Kernel(lambda x: Walk(x, x), holding(counter, table))
        out = chains.run(KEY, kernel, jnp.zeros(2), num_samples=3, collect=where)
        assert out.info is None and out.cost is None
        return out.draws["x"]

    np.testing.assert_array_equal(
        steps_of(jnp.arange(1000.0)), np.outer([3.0, 6.0, 9.0], [1.0, 1.0])
    )
    traced = counter.count
    np.testing.assert_array_equal(
        steps_of(2 * jnp.arange(1000.0)), np.outer([6.0, 12.0, 18.0], [1.0, 1.0])
    )
    assert counter.count == traced


def test_what_a_closure_closes_over_is_a_constant():
    for factor in (1.0, 2.0):
        table = factor * jnp.arange(5.0)
        kernel = Kernel(lambda x: Walk(x, x), lambda key, s, t=table: moved_by(key, t, s))
        out = chains.run(KEY, kernel, jnp.zeros(2), num_samples=2, collect=where)
        np.testing.assert_array_equal(out.draws["x"][:, 0], factor * np.array([3.0, 6.0]))


def test_what_is_kept():
    out = run(walk(), 6)
    assert (
        out.info.accepted.shape == (6, 2, 3)
        and out.info.wide is None
        and out.info.parts == (None, (None,))
    )
    assert (
        int(out.cost.tokens) == 2 * out.info.accepted.sum()
        and int(out.cost.forwards) == 2 * out.steps == 24
    )  # pyright: ignore
    assert out.info.accepted.dtype == bool and out.draws["x"].dtype == jnp.arange(3.0).dtype
    mean = run(walk(), 6, record=lambda info: {"rate": info.accepted.mean(0)})
    np.testing.assert_allclose(mean.info["rate"], out.info.accepted.mean(1), rtol=1e-6)
    assert chains.collected(some_strings(2)).keys() == {"sequences"}
    assert isinstance(chains.positions(pimh.State(some_strings(2), jnp.zeros(2))), Sequences)
    state = continuous().init(jnp.ones((5, 2)))
    assert chains.collected(state).keys() == {"position", "logdensity"} and chains.positions(
        state
    ).shape == (5, 2)


@pytest.mark.bad_input
def test_bad_input():
    kernel, x = walk(), jnp.arange(3.0)
    for options in ({"num_samples": 0}, {"num_samples": 5, "thin": 0}):
        with pytest.raises(ValueError, match="to be a whole number of at least 1, got 0"):
            chains.run(KEY, kernel, x, collect=where, **options)
    with pytest.raises(ValueError, match="expected warmup to be at least 0 steps, got -1"):
        run(kernel, 5, warmup=-1)
    with pytest.raises(
        ValueError, match="expected a chain state with `sequences` or `position`, got Walk"
    ):
        chains.run(KEY, kernel, x, num_samples=5)
    done = run(kernel, 5)
    with pytest.raises(
        ValueError, match="expected to go on with a run of the same key, thin and warmup"
    ):
        run(kernel, 9, warmup=1, resume=done)
    with pytest.raises(ValueError, match="and another key"):
        chains.run(jax.random.key(0), kernel, x, num_samples=9, thin=2, collect=where, resume=done)
    with pytest.raises(
        ValueError, match="expected num_samples to count the 5 draws that there are, got 4"
    ):
        run(kernel, 4, resume=done)
    with pytest.raises(
        ValueError, match="expected to go on with a run of the same kernel, collect and record"
    ):
        chains.run(KEY, kernel, x, num_samples=9, thin=2, collect=lambda s: {"x": s.x}, resume=done)
