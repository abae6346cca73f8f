"""A kernel made anew, of other weights and another prompt of the same shapes, compiles and traces
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.tree_util import Partial

import ppl
from models import tabular
from ppl.ancestral import ancestral
from ppl.target import Target
from samplers import kernels
from samplers.base import Kernel
from samplers.latent import blocks, pmmh
from samplers.mcmc import (
    chains,
    multiple_try,
    parallel_tempering,
    pref_mh,
    qalign,
    quest,
    suffix,
    suffix_csmc,
    vgb,
)
from samplers.mcmc.judges import judge
from samplers.results import Chains
from samplers.smc import conditional, pimh
from tests.helpers import EOS

V, T = 4, 3
OBSERVED = jnp.asarray([1, 3])


def prompt(number: int) -> Target:
    """Weights and a prompt of their own, of one bucket; no two numbers have anything in common."""
    lm = tabular.random_markov(jax.random.key(number), V, eos=EOS)
    return lm.given((2, 0, 3)[: 2 + number % 2], max_tokens=T)


def reward(tokens: Any, length: Any) -> Any:
    return 0.3 * length.astype(jnp.float32)


def votes(keys: Any, x: Any, y: Any) -> Any:
    return jax.vmap(jax.random.bernoulli)(keys).astype(jnp.int32)


def strings(target: Target) -> Any:
    return ancestral(jax.random.key(3), target, 4)


def of_strings(make: Callable[[Target], Kernel]) -> Callable[[int], tuple[Kernel, Any]]:
    return lambda number: (make(prompt(number) ** 2.0), strings(prompt(number)))


def log_evidence(shift: Any, key: Any, theta: Any) -> Any:
    return -0.5 * (theta - shift) ** 2 + jax.random.normal(key)


def near(scale: Any, theta: Any) -> Any:
    return dist.Normal(theta, scale)


def particle_mh(number: int) -> tuple[Kernel, Any]:
    move = pmmh.propose(Partial(near, jnp.float32(0.3 + number)))
    evidence = Partial(log_evidence, jnp.float32(number))
    return pmmh.kernel(evidence, dist.Normal(0.0, jnp.float32(1 + number)), move), jnp.zeros(4)


def model(p: Target, counts: Any) -> None:
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    tokens = numpyro.sample("text", ppl.Text(p))
    size = 1 + (tokens != p.lm.eos).sum()
    with numpyro.plate("data", len(counts)):
        numpyro.sample("counts", dist.Poisson(rate * size), obs=counts)


def gibbs(target: Target) -> Kernel:
    return conditional.kernel(target, num_particles=3)


def alternating(number: int) -> tuple[Kernel, Any]:
    of = blocks.joint(model, prompt(number), OBSERVED + number)
    kernel = blocks.kernel(of, batch_size=1, text_kernel=gibbs)
    return kernel, of.start(jax.random.key(1), 4)


def two(target: Target) -> tuple[Kernel, Kernel]:
    return suffix.kernel(target), multiple_try.kernel(target, num_tries=2, block=2)


MAKE: dict[str, Callable[[int], tuple[Kernel, Any]]] = {
    "suffix": of_strings(suffix.kernel),
    "multiple_try": of_strings(multiple_try.kernel),
    "parallel_tempering": of_strings(lambda t: parallel_tempering.kernel(t, [1.0, 2.0])),
    "suffix_csmc": of_strings(suffix_csmc.kernel),
    "pref_mh": of_strings(lambda t: pref_mh.kernel(t, judge(votes, num_votes=1))),
    "qalign": of_strings(lambda t: qalign.kernel(t, reward, beta=0.5)),
    "quest": of_strings(lambda t: quest.kernel(t, reward, beta=0.5)),
    "vgb": of_strings(vgb.kernel),
    "particle_gibbs": of_strings(gibbs),
    "pimh": of_strings(lambda t: pimh.kernel(t, num_particles=3)),
    "cycle": of_strings(lambda t: kernels.cycle(*two(t))),
    "mix": of_strings(lambda t: kernels.repeat(kernels.mix(*two(t), probs=[1, 2]), 2)),
    "pmmh": particle_mh,
    "blocks": alternating,
}
FAST = ("suffix", "pmmh")


def compiled(run: Callable[[], Any]) -> int:
    """How often anything is traced or compiled, as jax itself counts."""
    seen = []

    def listen(event: str, duration: float, **tags: Any) -> None:
        if event.endswith(("jaxpr_trace_duration", "backend_compile_duration")):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(seen)


def kept(state: Any) -> dict[str, Any]:
    return {"x": state.theta} if isinstance(state, pmmh.State) else chains.collected(state)


def drawn(kernel: Kernel, x: Any) -> Chains:
    return chains.run(jax.random.key(5), kernel, x, num_samples=6, thin=2, collect=kept)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in MAKE]
)
def test_a_second_kernel_of_the_same_shapes_compiles_nothing(name: str):
    made = [MAKE[name](number) for number in (0, 2, 4)]
    first = drawn(*made[0])
    second = drawn(*made[1])
    # The second one too compiles nothing but small pieces: `init` looks at the strings' numbers.
    assert compiled(lambda: drawn(*made[2])) == 0
    differ = jax.tree.map(lambda a, b: (a != b).any(), first.draws, second.draws)
    assert any(jax.tree.leaves(differ)), "the program knows which kernel it runs"


def test_what_compiles_is_counted():
    """A closure is another program each time."""
    number = jnp.float32(2)
    kernel = lambda: Kernel(lambda x: x, lambda key, x: (x + number, None))  # noqa: E731
    run = lambda: chains.run(  # noqa: E731
        jax.random.key(0), kernel(), jnp.zeros(3), num_samples=2, collect=position
    )
    run()
    assert compiled(run) > 0
    np.testing.assert_array_equal(run().draws["x"][:, 0], [2.0, 4.0])


def position(state: Any) -> dict[str, Any]:
    return {"x": state}
