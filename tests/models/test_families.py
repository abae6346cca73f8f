"""Every family against the logits `transformers` computed from the same tiny checkpoint (see
make_fixtures.py).
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from models import transformer, weights
from models.config import DecoderConfig

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
FAMILIES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())


def read(family):
    """The family's config.json, its tensors, and the token ids with their expected logits."""
    folder = FIXTURES / family
    expected = load_file(folder / "expected.safetensors")
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors"), expected["ids"], expected["logits"]


def older(config):
    """The same config in the layout of transformers 4: rope_theta, rope_scaling,
    rope_local_base_freq.
    """
    config = dict(config)
    rope = config.pop("rope_parameters", None)
    if rope is None:
        return config
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    scaling = {
        ("type" if name == "rope_type" else name): rope[name]
        for name in rope
        if name != "rope_theta"
    }
    scaling = None if rope["rope_type"] == "default" else scaling
    return config | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_agrees_with_transformers(family):
    raw, tensors, ids, expected = read(family)
    config = DecoderConfig.from_hf(raw)
    params = weights.from_hf(config, tensors)
    logits = jax.jit(transformer.forward, static_argnums=0)(config, params, jnp.asarray(ids))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


# Of those left out, the steps have nothing of their own: they differ in the full pass, or in
# names.
@pytest.mark.parametrize(
    "family",
    [
        *("gemma2", "qwen2", "smollm3"),
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma3", "gpt2", "mistral")),
    ],
)
def test_prompt_and_steps_agree_with_transformers(family):
    """Both sequences share no token, so each is run as prompt and steps; the other particles take
    other tokens.
    """
    raw, tensors, ids, expected = read(family)
    config = DecoderConfig.from_hf(raw)
    lm = transformer.decoder(config, weights.from_hf(config, tensors), config.eos[0])
    start, num = 9, 3
    step = jax.jit(lambda lm, prefix, cache, token: lm.step(prefix, cache, token))
    for row in range(2):
        prefix = lm.prefill(ids[row, :start].tolist())
        np.testing.assert_allclose(prefix.logits, expected[row, start - 1], atol=1e-4, rtol=0)
        cache = lm.init(prefix, num, ids.shape[1] - start)
        for position in range(start, ids.shape[1]):
            true = int(ids[row, position])
            cache, logits = step(
                lm, prefix, cache, jnp.asarray([(true + 5) % 90, true, (true * 7) % 90])
            )
            np.testing.assert_allclose(logits[1], expected[row, position], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_older_and_newer_config_layouts_mean_the_same(family):
    raw = read(family)[0]
    assert DecoderConfig.from_hf(older(raw)) == DecoderConfig.from_hf(raw)


def test_heads_that_do_not_divide_the_width_are_refused():
    raw = read("gpt2")[0]
    with pytest.raises(ValueError, match=r"number of heads that divides the \d+ coord.*, got 5;"):
        DecoderConfig.from_hf(raw | {"n_head": 5})
