"""Scaled rotary embeddings: numbers and logits that transformers computed; what is refused."""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from models import rope_config, transformer, weights
from models.config import DecoderConfig, Rope
from models.ops import rope

from .fixtures_io.builders import FIXTURES

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}
WIDE = {"rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
DIVIDED = [1.0, 0.2371708, 0.05, 0.007905695, 0.0025, 7.905695e-4, 2.5e-4, 7.905695e-5]
SHORT = [1.0, 0.3011693, 0.09090909, 0.02635231, 0.007692308, 0.002108185, 5.555556e-4, 1.581139e-4]

# Frequencies and the factor of cosine and sine, by transformers 5.24 (heads of 16 coordinates).
REFERENCE: dict[str, tuple[dict[str, Any], list[float], float]] = {
    "yarn": (YARN, DIVIDED, 1.138629436111989),
    "yarn, other bounds": (
        YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
        [1.0, 0.1605892, 0.025, *DIVIDED[3:]],
        1.138629436111989,
    ),
    "yarn, its factor given": (YARN | {"attention_factor": 1.5}, DIVIDED, 1.5),
    "yarn, two scales": (YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}, DIVIDED, 0.940571525101084),
    "yarn by 1": (YARN | {"factor": 1.0}, [10.0 ** (-i / 2) for i in range(8)], 1.0),
    "yarn, wide": (
        YARN | WIDE,
        [
            1.0,
            0.1939228,
            0.02546242,
            0.002582819,
            4.419417e-5,
            8.570256e-6,
            1.661967e-6,
            3.222933e-7,
        ],
        1.34657359027997,
    ),
    "longrope": (LONG, SHORT, 1.1547005383792517),
    "longrope by the contexts": (LONG | {"factor": None}, SHORT, 1.1547005383792517),
    "longrope, its factor given": (LONG | {"attention_factor": 1.25}, SHORT, 1.25),
}


def entries(scaling: dict[str, Any]) -> dict[str, Any]:
    return {"max_position_embeddings": 256, "rope_parameters": scaling}


@pytest.mark.parametrize("name", REFERENCE)
def test_frequencies_are_those_of_transformers(name: str):
    scaling, frequencies, magnitude = REFERENCE[name]
    found = rope_config.rope(entries(scaling), 1.0, 16)
    np.testing.assert_allclose(rope.frequencies(found, 16), frequencies, rtol=2e-6)
    assert found.magnitude == pytest.approx(magnitude, rel=1e-12)
    cos, sin = rope.angles(found, 16, jnp.array([0, 3]))
    np.testing.assert_allclose(cos[0, 0], magnitude, rtol=1e-6)
    np.testing.assert_allclose(sin[1, 0], magnitude * np.sin(3 * np.array(frequencies)), rtol=1e-5)


def test_longrope_keeps_to_the_original_context():
    older = {"type": "longrope", "short_factor": LONG["short_factor"], "long_factor": [9.0] * 8}
    config = {"max_position_embeddings": 256, "rope_theta": 10000.0, "rope_scaling": older}
    config["original_max_position_embeddings"] = 64
    assert rope_config.rope(config, 1.0, 16) == rope_config.rope(entries(LONG), 1.0, 16)
    assert rope_config.context(config) == rope_config.context(entries(LONG)) == 64
    assert rope_config.context(entries(YARN)) == 256


LOGITS = {
    "yarn": (
        {**YARN, "original_max_position_embeddings": 16, "beta_fast": 4.0},
        [[0.30041, 2.54035, 1.86105, 7.13255], [0.2517, 0.08803, -2.17441, 4.09286]],
    ),
    "longrope": (
        {
            **LONG,
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [9.0] * 4,
        },
        [[0.89918, 2.46068, 1.31705, 7.39561], [-1.44411, -0.23197, -1.03469, 0.89401]],
    ),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_those_of_transformers(name: str):
    """Of the tiny Llama with another scaling, the first four after the last position."""
    scaling, expected = LOGITS[name]
    raw = json.loads((FIXTURES / "llama3" / "config.json").read_text())
    config = DecoderConfig.from_hf(raw | {"rope_parameters": scaling})
    params = weights.from_hf(config, load_file(FIXTURES / "llama3" / "model.safetensors"))
    ids = load_file(FIXTURES / "llama3" / "expected.safetensors")["ids"]
    logits = transformer.forward(config, params, jnp.asarray(ids))
    np.testing.assert_allclose(logits[:, -1, :4], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic"}, "default, linear, llama3, yarn, longrope, got 'dynamic'"),
        ({"rope_type": "yarn"}, "expected yarn rope scaling with factor, but factor is absent"),
        (
            LONG | {"short_factor": [1.0]},
            "expected longrope scaling with 8 short factors, .* got 1",
        ),
        ({"rope_type": "linear", "factor": -1.0}, "factor to be a finite number above 0, got -1.0"),
        ({"partial_rotary_factor": 0.5}, "over the whole head, got a partial_rotary_factor of 0.5"),
    ],
)
def test_scalings_it_cannot_honour_are_refused(scaling: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        rope_config.rope(entries(scaling), 1.0, 16)


def test_without_scaling_nothing_is_divided():
    assert rope_config.rope({"max_position_embeddings": 8}, 7.0, 16) == Rope(7.0)
