"""The decoder by itself: caches, undoing, masks, dtypes, and the errors of configs and weights."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from models import transformer, weights
from models.config import DecoderConfig, Layer, Rope
from models.families import FAMILIES
from models.ops import attention
from ppl.lm import LM, Prefix
from ppl.testing import check_lm

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
PROMPT = [5, 17, 60, 33, 8, 91, 12, 44, 70, 29]

forward = jax.jit(transformer.forward, static_argnums=0)


def read(family: str) -> tuple[dict, dict]:
    folder = FIXTURES / family
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def load(family: str) -> LM:
    raw, tensors = read(family)
    config = DecoderConfig.from_hf(raw)
    return transformer.decoder(config, weights.from_hf(config, tensors), config.eos[0])


def size(tree) -> int:
    """Numbers in all arrays of a pytree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_conformance_kit_passes():
    """Steps, truncation to different lengths, reordering, paddings: on a local and a
    global layer.
    """
    lm = load("gemma3")
    config = dataclasses.replace(lm.static, layers=lm.static.layers[:2])
    params = lm.params | {"layers": lm.params["layers"][:2]}
    check_lm(
        transformer.decoder(config, params, lm.eos),
        PROMPT,
        key=jax.random.key(0),
        num=2,
        max_tokens=6,
    )


@pytest.mark.slow
def test_rows_truncated_to_different_lengths_go_on_from_there():
    """Windows of 7 positions reach across the border of prompt and suffix at a different place in
    every row.
    """
    lm = load("mistral")
    old = np.random.default_rng(0).integers(3, 96, (4, 9))
    new = np.random.default_rng(1).integers(3, 96, (4, 3))
    keep, ancestors = np.array([9, 0, 4, 7]), np.array([2, 0, 3, 3])
    prefix = lm.prefill(PROMPT)
    step = jax.jit(LM.step)
    cache = lm.init(prefix, 4, 12)
    for column in old.T:
        cache, _ = step(lm, prefix, cache, jnp.asarray(column))
    cache = lm.reorder(lm.truncate(cache, jnp.asarray(keep)), jnp.asarray(ancestors))
    for column in new.T:
        cache, logits = step(lm, prefix, cache, jnp.asarray(column))
    np.testing.assert_array_equal(cache.length, keep[ancestors] + 3)
    for row, source in enumerate(ancestors):
        string = [*PROMPT, *old[source, : keep[source]], *new[row]]
        expected = forward(lm.static, lm.params, jnp.asarray([string]))[0, -1]
        np.testing.assert_allclose(logits[row], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "gpt2", "gemma2"])
def test_one_pass_over_strings_is_the_full_pass(family: str):
    """Windows across the border of prompt and string, learned positions, softcaps; padding behind
    is never read.
    """
    lm = load(family)
    strings = np.random.default_rng(0).integers(3, 96, (3, 9))
    prefix = lm.prefill(PROMPT)
    logits = jax.jit(LM.extend)(lm, prefix, jnp.asarray(strings))
    prompts = np.tile(PROMPT, (3, 1))
    expected = forward(
        lm.static, lm.params, jnp.asarray(np.concatenate([prompts, strings], axis=1))
    )[:, len(PROMPT) :]
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    padded = jax.jit(LM.extend)(lm, prefix, jnp.asarray(strings).at[:, 4:].set(lm.eos))
    np.testing.assert_allclose(padded[:, :4], logits[:, :4], atol=1e-5)

    # Behind rows of different lengths.
    cache, first = jax.jit(LM.advance)(
        lm, prefix, lm.init(prefix, 3, 9), jnp.asarray(strings[:, :4])
    )
    np.testing.assert_allclose(first, expected[:, :4], atol=1e-4, rtol=0)
    keep = np.asarray([4, 1, 3])
    cache = lm.truncate(cache, jnp.asarray(keep))
    cache, logits = jax.jit(LM.advance)(lm, prefix, cache, jnp.asarray(strings[:, 4:]))
    np.testing.assert_array_equal(cache.length, keep + 5)
    for row, n in enumerate(keep):
        string = [*PROMPT, *strings[row, :n], *strings[row, 4:]]
        whole = forward(lm.static, lm.params, jnp.asarray([string]))[0, -5:]
        np.testing.assert_allclose(logits[row], whole, atol=1e-4, rtol=0)


def test_gradients_of_strings_reach_the_weights_through_the_prompt():
    """d log p / d weights of the target read again under the model equals that of one full pass."""
    lm = load("llama3")
    config = dataclasses.replace(lm.static, layers=lm.static.layers[:1])
    lm = transformer.decoder(config, lm.params | {"layers": lm.params["layers"][:1]}, lm.eos)
    string = np.random.default_rng(1).integers(3, 96, 5)
    target = lm.given(PROMPT, max_tokens=5)

    def whole(params):
        logits = transformer.forward(lm.static, params, jnp.asarray([[*PROMPT, *string]]))[
            0, len(PROMPT) - 1 : -1
        ]
        return jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.asarray(string)[:, None], axis=1
        ).sum()

    def read(params):
        x = jnp.asarray(string)[None], jnp.asarray([5])
        return target.under(dataclasses.replace(lm, params=params)).token_log_probs(*x).sum()

    expected, got = jax.jit(jax.grad(whole))(lm.params), jax.jit(jax.grad(read))(lm.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, expected)


def test_truncating_never_lengthens():
    lm = load("smollm2")
    cache = lm.init(lm.prefill(PROMPT), 2, 4)
    np.testing.assert_array_equal(lm.truncate(cache, jnp.asarray([0, 3])).length, [0, 0])


@pytest.mark.parametrize(("num", "max_tokens"), [(1, 4), (5, 7)])
def test_caches_take_prompt_plus_particles_times_tokens_rows(num: int, max_tokens: int):
    lm = load("qwen3")
    prefix = lm.prefill(PROMPT, pad_to=16)
    config = lm.static
    row = len(config.layers) * 2 * config.num_kv_heads * config.head_dim
    cache = lm.init(prefix, num, max_tokens)
    assert size(prefix.data) == 16 * row
    assert size(cache) == num * max_tokens * row + num
    assert all(leaf.shape[0] == num for leaf in jax.tree.leaves(cache))


def test_a_loop_of_steps_keeps_one_copy_of_the_cache():
    """XLA must write the cache in place: a second copy would double memory and traffic."""
    lm = load("smollm2")
    prefix = lm.prefill(PROMPT)
    num, max_tokens = 16, 512

    def run(lm, prefix):
        def body(carry):
            t, cache, token = carry
            cache, logits = lm.step(prefix, cache, token)
            return t + 1, cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        start = (jnp.int32(0), lm.init(prefix, num, max_tokens), jnp.zeros(num, jnp.int32))
        return jax.lax.while_loop(lambda carry: carry[0] < 8, body, start)[2]

    compiled = jax.jit(run).lower(lm, prefix).compile()
    cache_bytes = 4 * size(jax.eval_shape(lambda: lm.init(prefix, num, max_tokens)))
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * cache_bytes


def test_prompts_of_one_bucket_share_one_trace():
    lm = load("llama3")
    token = jnp.asarray([7, 40])
    traces = []

    @jax.jit
    def run(lm, padded, length):
        traces.append(1)
        data, logits = lm.functions.prefill(lm.static, lm.params, padded, length)
        prefix = Prefix(padded, length, logits, data)
        return lm.step(prefix, lm.init(prefix, 2, 3), token)[1]

    for length in (3, 9, 10):
        padded = jnp.asarray([*PROMPT[:length], *[11] * (16 - length)], jnp.int32)
        strings = jnp.asarray([[*PROMPT[:length], 7], [*PROMPT[:length], 40]])
        expected = forward(lm.static, lm.params, strings)[:, -1]
        np.testing.assert_allclose(run(lm, padded, jnp.int32(length)), expected, atol=1e-4, rtol=0)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"final_softcap": None}),
        ("gemma2", {"embedding_scale": 1.0}),
        ("gemma3", {"norm_offset": 0.0}),
        ("gemma3", {"attention_scale": 0.25}),
        ("gpt2", {"activation": "gelu"}),
        ("llama3", {"norm_eps": 1e-2}),
    ],
)
def test_the_fixtures_tell_a_wrong_config_from_the_right_one(family: str, change: dict):
    """Otherwise agreement with transformers would prove nothing about these entries."""
    lm = load(family)
    ids = jnp.asarray(load_file(FIXTURES / family / "expected.safetensors")["ids"])
    wrong = forward(dataclasses.replace(lm.static, **change), lm.params, ids)
    assert np.abs(wrong - forward(lm.static, lm.params, ids)).max() > 2e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "index", "layer"),
    [
        ("mistral", 0, {"window": 8}),
        ("qwen2", 2, {"window": None}),
        ("gemma2", 1, {"window": 5}),
        ("gemma3", 0, {"rope": Rope(1e6, 8.0)}),
        ("llama2", 1, {"rope": Rope(1e4)}),
        ("llama3", 1, {"rope": Rope(1e4, 8.0)}),
        ("smollm3", 1, {"rope": Rope(1e4)}),
    ],
)
def test_the_fixtures_tell_a_wrong_layer_from_the_right_one(family: str, index: int, layer: dict):
    lm = load(family)
    ids = jnp.asarray(load_file(FIXTURES / family / "expected.safetensors")["ids"])
    layers = list(lm.static.layers)
    layers[index] = dataclasses.replace(layers[index], **layer)
    wrong = forward(dataclasses.replace(lm.static, layers=tuple(layers)), lm.params, ids)
    assert np.abs(wrong - forward(lm.static, lm.params, ids)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.optimised
def test_bfloat16_weights_give_bfloat16_caches_and_float32_logits():
    lm = load("gemma3")
    half = dataclasses.replace(
        lm, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lm.params)
    )
    prefix = half.prefill(PROMPT)
    cache, logits = jax.jit(LM.step)(half, prefix, half.init(prefix, 2, 3), jnp.asarray([4, 9]))
    suffixes = jax.tree.leaves((cache.suffixes, prefix.data))
    assert {leaf.dtype for leaf in suffixes} == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == prefix.logits.dtype == jnp.float32
    expected = forward(lm.static, lm.params, jnp.asarray([[*PROMPT, 4], [*PROMPT, 9]]))[:, -1]
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("window", [None, 700])
def test_blocks_of_queries_give_the_same_attention_as_all_at_once(window, monkeypatch):
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(1, 1024, 2, 4)), jnp.float32)
    key, value = jnp.asarray(rng.normal(size=(2, 1, 1024, 1, 4)), jnp.float32)
    score = attention.Score(0.5, None)
    blocked = attention.causal(query, key, value, window, score)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 1024)
    np.testing.assert_allclose(
        blocked, attention.causal(query, key, value, window, score), atol=1e-6
    )


def test_scores_far_below_zero_lose_no_part_of_the_softmax():
    """Prompt and suffix are merged by their tops: with tops 200 apart the far part must vanish, not
    become NaN.
    """
    query = jnp.ones((1, 1, 2))
    prompt = attention.Prompt(jnp.full((1, 2, 3), 100.0), jnp.ones((1, 3, 2)))
    suffix = attention.Suffix(jnp.zeros((1, 1, 2, 4)), jnp.full((1, 1, 4, 2), 7.0))
    score = attention.Score(1.0, None)
    seen = attention.bias(3, jnp.int32(3), 4, jnp.asarray([1]), None)
    np.testing.assert_allclose(
        attention.shared_prompt(query, prompt, suffix, seen, score), jnp.ones((1, 1, 2))
    )
    windowed = attention.bias(3, jnp.int32(3), 4, jnp.asarray([1]), 2)
    hidden = attention.shared_prompt(query, prompt, suffix, windowed, score)
    np.testing.assert_allclose(hidden, jnp.full((1, 1, 2), 7.0))


def test_all_wrong_tensors_are_listed_at_once():
    raw, tensors = read("llama3")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((4, 32), np.float32)
    with pytest.raises(ValueError) as error:
        weights.from_hf(DecoderConfig.from_hf(raw), tensors)
    message = str(error.value)
    assert "missing: layers.1.mlp.up_proj.weight, norm.weight" in message
    assert "unexpected: model.layers.9.mlp.up_proj.weight" in message
    assert "misshapen: layers.0.self_attn.k_proj.weight (expected [16, 32], got [4, 32])" in message


def test_harmless_buffers_tied_copies_and_absent_prefixes_are_accepted():
    raw, tensors = read("gpt2")
    config = DecoderConfig.from_hf(raw)
    plain = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    plain["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    plain["h.0.attn.masked_bias"] = np.float32(-1e4)
    plain["lm_head.weight"] = plain["wte.weight"]
    jax.tree.map(
        np.testing.assert_array_equal,
        weights.from_hf(config, plain),
        weights.from_hf(config, tensors),
    )
    raw, tensors = read("smollm2")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    weights.from_hf(DecoderConfig.from_hf(raw), tensors)


def test_a_tied_head_whose_flag_is_wrong_says_so():
    raw, tensors = read("smollm2")
    untied = DecoderConfig.from_hf(raw | {"tie_word_embeddings": False})
    with pytest.raises(ValueError, match=r"missing: lm_head.weight\n.*_embeddings must be true"):
        weights.from_hf(untied, tensors)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    assert "head" in weights.from_hf(untied, tensors)
    with pytest.raises(ValueError, match=r"got another one \(lm_head.weight\); set tie_word_emb"):
        weights.from_hf(DecoderConfig.from_hf(raw), tensors)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_model_with_images_the_language_model_is_read(prefix: str):
    """In the names of transformers 4 and 5; the outer configuration leaves most to defaults."""
    raw, tensors = read("gemma3")
    inner = {name: x for name, x in raw.items() if name not in ("eos_token_id", "head_dim")}
    wrapped = {"model_type": "gemma3", "text_config": inner, "eos_token_id": [2, 3]}
    config = DecoderConfig.from_hf({**wrapped, "text_config": inner | {"head_dim": 16}})
    assert config == dataclasses.replace(DecoderConfig.from_hf(raw), eos=(2, 3))
    renamed = {prefix + name.removeprefix("model."): x for name, x in tensors.items()}
    renamed["multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(3, np.float32)
    renamed[f"{prefix.partition('language')[0]}vision_tower.x.weight"] = np.ones(3, np.float32)
    jax.tree.map(
        np.testing.assert_array_equal,
        weights.from_hf(config, renamed),
        weights.from_hf(config, tensors),
    )
    bare = {"hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240}
    four_b = DecoderConfig.from_hf({"model_type": "gemma3", "text_config": bare})
    sizes = four_b.vocab_size, four_b.num_heads, four_b.num_kv_heads, four_b.head_dim
    assert (*sizes, four_b.context) == (262208, 8, 4, 256, 131072)


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(ValueError, match="got 'mamba'") as error:
        DecoderConfig.from_hf({"model_type": "mamba", "architectures": ["MambaForCausalLM"]})
    assert all(family in str(error.value) for family in FAMILIES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "xielu"}, "activation"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
            r"expected weights in float32.* got a checkpoint that is quantised .*: fp8\); load the",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised .*: gptq"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "quantised .*: bitsandbytes, load_in_8bit",
        ),
        ({"eos_token_id": "12"}, "expected eos_token_id to be a token id or a list .*, got '12'"),
        ({"eos_token_id": [2, 3.0]}, r"a list of token ids, got \[2, 3.0\]; write whole numbers"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "got 'dynamic'",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None, "vocab_size": None}, "vocab_size, hidden_size"),
    ],
)
def test_configs_it_cannot_honour_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(read("llama3")[0] | change)


def test_layer_types_must_fit_the_layers():
    with pytest.raises(ValueError, match="3 times"):
        DecoderConfig.from_hf(read("gemma2")[0] | {"layer_types": ["full_attention"]})


def test_defaults_of_each_family_where_the_config_is_silent():
    qwen = {name: value for name, value in read("qwen2")[0].items() if name != "layer_types"}
    assert [layer.window for layer in DecoderConfig.from_hf(qwen).layers] == [None, None, 6]
    assert DecoderConfig.from_hf(qwen | {"use_sliding_window": False}).layers[2].window is None
    gemma = {name: value for name, value in read("gemma3")[0].items() if name != "layer_types"}
    gemma = gemma | {"num_hidden_layers": 7, "sliding_window_pattern": 3}
    windows = [layer.window is not None for layer in DecoderConfig.from_hf(gemma).layers]
    assert windows == [True, True, False, True, True, False, True]
    smol = {
        name: value
        for name, value in read("smollm3")[0].items()
        if name not in ("layer_types", "no_rope_layers")
    }
    ropes = [
        layer.rope is not None
        for layer in DecoderConfig.from_hf(smol | {"num_hidden_layers": 5}).layers
    ]
    assert ropes == [True, True, True, False, True]


def test_eos_may_be_absent_one_or_several():
    raw, _ = read("smollm2")
    assert DecoderConfig.from_hf(raw).eos == (2,)
    assert DecoderConfig.from_hf(raw | {"eos_token_id": [4, 5]}).eos == (4, 5)
    assert DecoderConfig.from_hf(raw | {"eos_token_id": None}).eos == ()


def test_eos_outside_the_vocabulary_is_refused():
    lm = load("smollm2")
    with pytest.raises(ValueError, match=r"eos in \[0, 96\), got 96"):
        transformer.decoder(lm.static, lm.params, 96)


def test_configs_are_hashable_and_compare_by_value():
    raw, _ = read("gemma3")
    assert hash(DecoderConfig.from_hf(raw)) == hash(DecoderConfig.from_hf(dict(raw)))
    assert Layer(Rope(1e4), 5) == Layer(Rope(1e4), 5) != Layer(Rope(1e4), None)


# Not getrusage: its maximum is inherited from the process that starts this one, pytest's worker.
MEMORY_SCRIPT = """
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import models

lm, _ = models.load("smollm2-135m")
prefix = lm.prefill([7 + i % 1000 for i in range(512)])

@jax.jit
def run(lm, prefix):
    def body(t, carry):
        cache, token = carry
        cache, logits = lm.step(prefix, cache, token)
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    start = lm.init(prefix, 64, 64), jnp.arange(64, dtype=jnp.int32)
    return jax.lax.fori_loop(0, 64, body, start)[1]

jax.block_until_ready(run(lm, prefix))
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
"""


@pytest.mark.slow
def test_64_particles_of_64_tokens_on_a_512_token_prompt_fit_3_gigabytes():
    """Greatest resident memory of a process that loads the real model and decodes."""
    command = [sys.executable, "-c", MEMORY_SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert int(done.stdout) * 1024 < 3e9
