"""Guides are language models: they conform, serve as proposals (LAW 1), and come back
from files.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from amortized.strings import guide
from models import config, tabular, transformer
from ppl import exact, reward
from ppl.lm import LM
from ppl.testing import check_lm
from samplers import smc
from samplers.smc import importance
from samplers.strings.proposals import LanguageModel
from tests import helpers
from tests.helpers import EOS, PROMPT, VOCAB_SIZE
from tests.samplers.problems import score_arrays

SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context": 32}


@functools.cache
def decoder() -> LM:
    return transformer.random(jax.random.key(0), config.small(VOCAB_SIZE, **SIZES), EOS)


def perturbed(g: guide.Guide, size: float = 0.5) -> guide.Guide:
    """As after some training."""
    rng = np.random.default_rng(9)
    noisy = jax.tree.map(
        lambda leaf: jnp.asarray(leaf + size * rng.normal(size=leaf.shape), leaf.dtype), g.params
    )
    return dataclasses.replace(g, params=noisy)


GUIDES = {
    "lora": lambda: guide.lora(jax.random.key(1), decoder(), rank=2),
    "some targets": lambda: guide.lora(
        jax.random.key(1), decoder(), rank=3, alpha=7.0, targets=("up", "qkv")
    ),
    "full": lambda: guide.full(decoder()),
    "head": lambda: guide.head(decoder()),
    "table": lambda: guide.full(tabular.table(jnp.zeros((1 + 4 + 16 + 64, 4)), eos=EOS)),
}


@pytest.mark.parametrize("name", [pytest.param("lora", marks=pytest.mark.slow), "table"])
def test_a_guide_is_a_language_model(name: str):
    check_lm(perturbed(GUIDES[name]()).lm, [2], key=jax.random.key(0), num=2, max_tokens=3)


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_starts_as_its_model_and_moves_with_its_params(name: str):
    g = GUIDES[name]()
    start = tabular.table(jnp.zeros((85, 4)), eos=EOS) if name == "table" else decoder()
    x = exact.strings(VOCAB_SIZE, 2, EOS)

    def density(lm):
        return lm.given([2], max_tokens=2).log_density(x.tokens, x.length)

    np.testing.assert_allclose(density(g.lm), density(start), atol=1e-5)
    moved = perturbed(g)
    assert np.abs(density(moved.lm) - density(start)).max() > 0.05
    np.testing.assert_allclose(density(moved.merged()), density(moved.lm), atol=1e-5)
    if name == "lora":
        assert jax.tree.structure(moved.merged()) == jax.tree.structure(start)


@pytest.mark.slow
@pytest.mark.parametrize("run", [importance.run, smc.run])
def test_a_guide_serves_as_a_proposal(run):
    """LAW 1 with a wrong guide: E[Z-hat] = Z, and an expectation, over replicas of a few
    particles.
    """
    target = helpers.table().given(PROMPT, max_tokens=3) * reward(score_arrays)
    proposal = LanguageModel(target.under(perturbed(GUIDES["lora"]()).lm))
    truth = exact.enumerate_strings(target)
    keys = jax.random.split(jax.random.key(3), 4000)

    @jax.jit
    @jax.vmap
    def replica(key):
        out = run(key, target, num_particles=4, proposal=proposal)
        weights = jnp.exp(out.log_z + out.log_weights)
        return weights.mean(), (weights * out.sequences.length).mean()

    z_hat, moment = replica(keys)
    z = np.exp(truth.log_z)
    helpers.assert_z(z_hat, z, resolution=0.03 * z)
    expected = z * (truth.probs * np.asarray(truth.sequences.length)).sum()
    helpers.assert_z(moment, expected, resolution=0.04 * expected)


@pytest.mark.parametrize("name", ["lora", "some targets", "table"])
def test_saved_guides_come_back_bit_for_bit(name: str, tmp_path):
    g = perturbed(GUIDES[name]())
    g.save(tmp_path / "guide")
    back = GUIDES[name]().load(tmp_path / "guide")
    jax.tree.map(np.testing.assert_array_equal, back, g)
    assert [path.name for path in tmp_path.iterdir()] == ["guide"]


def test_adapters_of_another_rank_and_scale_come_back_as_they_are(tmp_path):
    GUIDES["some targets"]().save(tmp_path)
    back = GUIDES["lora"]().load(tmp_path)
    assert jax.tree.structure(back) == jax.tree.structure(GUIDES["some targets"]())


def test_guides_of_other_models_are_refused(tmp_path):
    path = tmp_path / "guide.safetensors"
    GUIDES["full"]().save(path)
    other = transformer.random(
        jax.random.key(0), config.small(VOCAB_SIZE, **SIZES | {"context": 8}), EOS
    )
    deeper = transformer.random(
        jax.random.key(0), config.small(VOCAB_SIZE, **SIZES | {"num_layers": 2}), EOS
    )
    with pytest.raises(ValueError, match="layers.1.down.kernel .expected .* got none.*; build the"):
        guide.full(deeper).load(path)
    with pytest.raises(ValueError, match="expected a guide on this model.* got one on another"):
        GUIDES["head"]().load(path)
    heads, narrow = tmp_path / "head", guide.head(other)
    narrow.save(heads)
    assert narrow.load(heads) is not None
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: expected a guide written by Guide.sa"):
        GUIDES["full"]().load(tmp_path / "other.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged or truncated"):
        GUIDES["full"]().load(path)
    with pytest.raises(FileNotFoundError):
        GUIDES["full"]().load(tmp_path / "absent.safetensors")


def test_training_from_scratch_needs_sizes_that_fit():
    with pytest.raises(ValueError, match="multiple of 2 . num_heads = 8, got 12"):
        config.small(4, hidden_size=12)
    with pytest.raises(ValueError, match="num_layers"):
        config.small(4, num_layers=0)


def test_parameters_are_the_guides_own():
    """A training loop may give their memory away: the base must survive."""
    base = decoder()
    for g in (guide.full(base), guide.head(base)):
        shared = {id(leaf) for leaf in jax.tree.leaves(base)}
        assert not shared & {id(leaf) for leaf in jax.tree.leaves(g.params)}
    frozen = guide.lora(jax.random.key(0), base).frozen
    assert all(a is b for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(base), strict=True))
