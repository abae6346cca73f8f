"""How samplers are called wrongly, and what they say."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import ppl
from samplers import calling, registry, resampling, smc
from samplers.draws import ancestral
from samplers.mcmc import suffix
from samplers.search import best_of_n
from samplers.smc import annealed, conditional, importance, resample_move, sequential
from samplers.strings import proposals, selection
from tests import helpers
from tests.samplers.problems import target_of

KEY = jax.random.key(0)
pytestmark = pytest.mark.bad_input


def target() -> Any:
    return target_of("table", "reward")


TARGETS = [
    (lambda x: smc.run(KEY, x), "smc.run"),
    (lambda x: smc.run(KEY, [x, x]), "a list"),
    (lambda x: next(smc.iterate(KEY, x)), "iterate"),
    (lambda x: ancestral.run(KEY, target=x), "by name"),
    (lambda x: best_of_n.run(KEY, x), "best_of_n"),
    (lambda x: suffix.kernel(x), "a kernel"),
    (lambda x: smc.run(KEY, target(), proposal=proposals.LanguageModel(x)), "a guide"),
    (lambda x: ppl.Text(x), "Text"),
    (lambda x: ppl.exact.enumerate_strings(x), "exact"),
]


@pytest.mark.parametrize("call", [call for call, _ in TARGETS], ids=[name for _, name in TARGETS])
def test_a_model_is_no_target(call: Any):
    with pytest.raises(
        ValueError, match=r"expected a target, got an LM.*; pass lm.given\(prompt, "
    ):
        call(helpers.table())


def test_other_things_are_no_targets():
    with pytest.raises(ValueError, match="got Banned, a potential; multiply it onto"):
        smc.run(KEY, ppl.banned([1]))
    with pytest.raises(ValueError, match="expected a target, got str"):
        smc.run(KEY, "smollm2-135m")


@pytest.mark.parametrize("key", [0, None, np.zeros(2, np.float32), "key"], ids=repr)
def test_a_number_is_no_key(key: Any):
    with pytest.raises(ValueError, match=r"expected a key of JAX.*; pass jax.random.key\(0\)"):
        smc.run(key, target(), num_particles=4)
    with pytest.raises(ValueError, match="expected a key of JAX"):
        ancestral.run(key=key, target=target(), num_samples=2)


@pytest.mark.parametrize("threshold", [float("nan"), np.float32("nan"), "often", [0.5]], ids=repr)
def test_a_threshold_is_a_number(threshold: Any):
    """Of every sampler that has one, kernels too."""
    calls = (
        lambda: smc.run(KEY, target(), num_particles=4, threshold=threshold),
        lambda: conditional.kernel(target(), num_particles=4, threshold=threshold),
        lambda: annealed.run(KEY, target(), np.array([1.0]), num_particles=4, threshold=threshold),
        lambda: resample_move.run(KEY, target(), num_particles=4, threshold=threshold),
    )
    for call in calls:
        with pytest.raises(ValueError, match="expected threshold to be a number, got .*; pass 0.5"):
            call()


def test_products_are_of_targets_and_potentials():
    for product in (
        lambda: helpers.table() ** 2,
        lambda: helpers.table() * ppl.banned([0]),
        lambda: target() * helpers.table(),
    ):
        with pytest.raises(ValueError, match=r"got an LM, which has no prompt .*write lm.given"):
            product()
    with pytest.raises(ValueError, match=r"got the function .*<lambda>; write ppl.reward"):
        target() * (lambda text: 0.0)
    with pytest.raises(TypeError, match="unsupported operand"):
        target() * 3


def test_an_unknown_option_is_named_after_what_was_called():
    with pytest.raises(
        TypeError, match=r"^smc.run\(\) got an unexpected option 'num_particle'; did"
    ):
        smc.run(KEY, target(), num_particle=4)
    with pytest.raises(TypeError, match="did you mean threshold"):
        smc.run(KEY, target(), treshold=0.5)
    with pytest.raises(TypeError, match=r"^suffix.kernel\(\) .*'foo'; it takes target, cut, early"):
        suffix.kernel(target(), foo=1)
    with pytest.raises(TypeError, match=r"^smc.iterate\(\) got an unexpected option 'steps_every'"):
        smc.iterate(KEY, target(), steps_every=1)


def test_the_options_of_every_sampler_are_known():
    for entry in registry.entries():
        function = inspect.unwrap(entry.function)
        parameters = inspect.signature(function).parameters.values()
        keywords = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
        known = calling._options(function)
        assert known and not set(keywords) & set(known), entry.name
        assert not keywords or len(known) > len(parameters) - 1, entry.name


FUNCTIONS: dict[str, tuple[Any, str]] = {
    "resampler": (
        {"resampler": "stratified"},
        r"resampler to be a function of \(key, log_probs, num\), got 'stratified'; pass e.g."
        " samplers.resampling.stratified itself",
    ),
    "no resampler": ({"resampler": "best"}, "got 'best'; pass e.g. samplers.resampling.systematic"),
    "proposal": (
        {"proposal": "bootstrap"},
        r"got 'bootstrap'; pass e.g. samplers.strings.proposals",
    ),
    "selection": ({"selection": "annealed"}, "selection.annealed itself"),
    "not called": (
        {"proposal": proposals.top_p},
        r"got top_p\(p.*or call what makes such functions",
    ),
    "not called either": ({"selection": selection.annealed}, r"selection .* got annealed\("),
    "mesh": ({"mesh": 4}, r"expected a jax.sharding.Mesh, got 4; pass"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_string_is_no_function(name: str):
    options, message = FUNCTIONS[name]
    with pytest.raises(ValueError, match=message):
        smc.run(KEY, target(), num_particles=4, **options)


def test_a_string_is_no_function_elsewhere():
    with pytest.raises(
        ValueError, match="cut to be a function .* got 'uniform'; .*cuts.uniform it"
    ):
        suffix.kernel(target(), cut="uniform")
    with pytest.raises(ValueError, match="expected resampler to be a function .* got 'ssp'; pass"):
        annealed.run(KEY, target() ** 2, jnp.array([0.5, 1.0]), resampler="ssp")


@pytest.mark.slow
def test_a_mesh_may_have_axes_of_any_name():
    plain = {"num_particles": 8, "threshold": 0.9}
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    out, alone = smc.run(KEY, target(), mesh=mesh, **plain), smc.run(KEY, target(), **plain)
    np.testing.assert_array_equal(out.sequences.tokens, alone.sequences.tokens)


def test_good_calls_pass():
    """The decorated functions keep their names, their signatures and their docstrings."""
    assert smc.run.__name__ == "run" and "Sequential Monte Carlo" in (smc.run.__doc__ or "")
    assert list(inspect.signature(importance.run).parameters)[:2] == ["key", "target"]
    sequential.method(
        target(),
        resampler=resampling.ssp,
        proposal=proposals.top_p(0.9),
        selection=selection.annealed(2.0),
    )
    jax.eval_shape(lambda t: smc.run(KEY, t, num_particles=4), target())


def test_rewards_outside_of_0_and_1_are_said_once(caplog: pytest.LogCaptureFixture):
    """By the sampler that was called, of all that it met; not by those inside of it."""
    held = ppl.reward(ppl.log_odds(lambda tokens, length: 0.5 + 0.0 * length))

    def ran(num: int, *inner: int) -> Any:
        for each in inner:
            calling.watched(ran, held, each)
        return SimpleNamespace(num_invalid=np.int32(num))

    calling.watched(ran, held, 5, 2, 3)
    (record,) = caplog.records
    assert record.getMessage().startswith("5 strings got weight 0")
