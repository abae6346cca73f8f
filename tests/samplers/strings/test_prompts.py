"""Several prompts at once are each prompt alone, and their loops stay loops."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.target import Target
from samplers import resampling, smc
from samplers.draws import ancestral
from samplers.mcmc import chains, checkpoints, power, suffix
from samplers.results import Chains
from samplers.search import best_of_n
from samplers.strings import awrs, cuts, prompts, proposals, selection
from tests.helpers import MAX_TOKENS, MODELS
from tests.samplers.problems import PROBLEMS

KEY = jax.random.key(9)
PROMPTS = [(2, 0), (3,) * 20, (0,), (1, 2, 3), (2, 2)]


def given(model: str = "hmm", problem: str = "plain", num: int = 3) -> list[Target]:
    """Ragged prompts: 20 tokens need the next bucket, and a table has no room for them."""
    fitting = [prompt[:2] if model == "table" else prompt for prompt in PROMPTS[:num]]
    plain = MODELS[model]().given_each(fitting, max_tokens=MAX_TOKENS)
    return [PROBLEMS[problem].build(p) for p in plain]


def assert_each_alone(together: Any, alone: Callable[[int], Any], num: int = 3) -> None:
    """Equal strings and counts; floats up to rounding, for it is another program."""
    for i, own in enumerate(prompts.apart(together)):
        both = [_without_cache(out) for out in (own, alone(i))]
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(both[0]), jax.tree.leaves(both[1]), strict=True
        ):
            name = f"{i} {jax.tree_util.keystr(path)}"
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            if jnp.issubdtype(a.dtype, jnp.floating):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)
            else:
                np.testing.assert_array_equal(a, b, err_msg=name)
    assert i == num - 1


CALLBACK = ppl.reward(ppl.python(lambda ids: float(len(ids))))


def _without_cache(out: Any) -> Any:
    """What lies in a cache beyond a string's end means nothing."""
    if isinstance(out, Chains):
        return dataclasses.replace(out, state=dataclasses.replace(out.state, cache=None))
    return out


RUNS: dict[str, tuple[Callable[..., Any], list[Target], dict[str, Any]]] = {
    "powers": (
        smc.run,
        [p**a for p, a in zip(given(), (1.7, 0.8, 1.0), strict=True)],
        {"num_particles": 6, "history": True, "threshold": 0.9},
    ),
    "steps": (
        smc.run,
        given("table", "every_2"),
        {
            "steps": ppl.Steps(delimiters=[3, 2]),
            "selection": selection.next_step(),
            "resampler": resampling.ssp,
            "num_particles": 5,
            "threshold": 0.95,
        },
    ),
    "awrs": (
        smc.run,
        given("markov", "regex"),
        {"proposal": awrs.AWRS(), "num_particles": 6, "threshold": 0.98},
    ),
    "truncated": (
        smc.run,
        given("table", "second_lm"),
        {"proposal": proposals.top_k(2), "num_particles": 6},
    ),
    "callback": (
        smc.run,
        [p * CALLBACK for p in given()],
        {"num_particles": 4, "threshold": 0.9},
    ),
    "ancestral": (ancestral.run, given(), {"num_samples": 7}),
    "best_of_n": (best_of_n.run, given("hmm", "reward"), {"num_samples": 4}),
    "power": (
        power.run,
        [p**2 for p in given("table", "reward")],
        {"num_chains": 3, "block_size": 2, "moves_per_block": 3},
    ),
}
FAST = ("powers", "truncated", "ancestral")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in RUNS]
)
def test_a_list_of_targets_is_each_alone(name: str):
    """Prompts, powers and lengths of prompts may differ; the weights of the model are shared."""
    run, targets, options = RUNS[name]
    keys = jax.random.split(KEY, len(targets))
    out = run(KEY, targets, **options)
    assert_each_alone(out, lambda i: run(keys[i], targets[i], **options))
    if name in ("powers", "steps", "truncated", "awrs"):  # they select at times of their own
        assert len({tuple(row) for row in np.asarray(out.trace.resampled)}) > 1


@pytest.mark.slow
def test_groups_of_prompts():
    """Five prompts of four particles, in groups of two that are filled up."""
    batch_size = 8
    targets = given(num=5)
    keys = jax.random.split(KEY, 5)
    size = {"block_size": batch_size}
    assert_each_alone(
        smc.run(KEY, targets, num_particles=4, **size),
        lambda i: smc.run(keys[i], targets[i], num_particles=4, **size),
        5,
    )
    assert_each_alone(
        ancestral.run(KEY, targets, num_samples=4, batch_size=batch_size),
        lambda i: ancestral.run(keys[i], targets[i], num_samples=4),
        5,
    )


@pytest.mark.slow
def test_chains_of_several_kernels_are_those_of_each(tmp_path: Any):
    """Stopped, saved and gone on with, too."""
    targets = given("table", "reward")
    kernels = [suffix.kernel(target**2, cut=cuts.uniform_in_length) for target in targets]
    keys = jax.random.split(KEY, 3)
    x = [ancestral.run(keys[i], p, num_samples=4).sequences for i, p in enumerate(given("table"))]
    short = chains.run(KEY, kernels, x, num_samples=2, thin=2, warmup=1)
    checkpoints.save(tmp_path / "run.npz", short)
    short = checkpoints.load(tmp_path / "run.npz", kernels, x)
    out = chains.run(KEY, kernels, x, num_samples=4, thin=2, warmup=1, resume=short)
    assert out.draws["log_prob"].shape == (3, 4, 4) and out.num_samples == 4

    def alone(i: int) -> Any:
        return chains.run(keys[i], kernels[i], x[i], num_samples=4, thin=2, warmup=1)

    assert_each_alone(out, alone)


def loops(function: Callable[..., Any], *args: Any) -> dict[str, int]:
    """How many loops and conditions of each kind a traced function has."""
    text = str(jax.make_jaxpr(function)(*args))
    return {name: len(re.findall(rf"\b{name}\[", text)) for name in ("while", "cond")}


def test_loops_and_conditions_stay_what_they_are():
    """Under the map a condition of each prompt would become a select of both sides."""
    targets = given("table", "product")
    options = {"num_particles": 4, "proposal": proposals.top_k(2)}
    one = loops(lambda key: smc.run(key, targets[0], **options), KEY)
    both = loops(lambda key: smc.run(key, targets, **options), KEY)
    assert both == one and min(one.values()) > 0


def test_bad_lists():
    lm = MODELS["hmm"]()
    one, two = lm.given((2, 0), max_tokens=4), lm.given((3,) * 20, max_tokens=4)
    with pytest.raises(
        ValueError, match=r"padded prompts \[16, 32\].*make targets with lm.given_each"
    ):
        smc.run(KEY, [one, two])
    with pytest.raises(ValueError, match=r"max_tokens \[4, 3\]"):
        ancestral.run(KEY, [one, lm.given((2, 0), max_tokens=3)])
    other = MODELS["markov"]().given((2, 0), max_tokens=4)
    with pytest.raises(ValueError, match="expected targets with one model"):
        smc.run(KEY, [one, other])
    with pytest.raises(ValueError, match="the number of targets"):
        smc.run(KEY, [])
    with pytest.raises(ValueError, match="batch_size to be a whole number"):
        ancestral.run(KEY, [one], batch_size=0)
    with pytest.raises(ValueError, match="initial positions for each of 2 kernels, got 1"):
        chains.run(KEY, [suffix.kernel(one)] * 2, [None], num_samples=1)


@pytest.mark.bad_input
def test_something_else_in_a_list():
    with pytest.raises(ValueError, match="expected a target, got an LM"):
        smc.run(KEY, [MODELS["hmm"]()])
