"""Writes tiny random checkpoints of every family with `transformers`, and the logits it computes
from them.

Run in an environment with torch and transformers (the project itself needs neither):

    python tests/models/make_fixtures.py

Each folder under fixtures/ holds config.json, model.safetensors and expected.json (token ids and
float32 logits). Sliding windows are shorter than the sequence, so that a wrong window changes the
logits.
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers as tf
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).parent / "fixtures"
LENGTH = 24
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}

FAMILIES = {
    "llama2": tf.LlamaConfig(**SIZES, rope_parameters=LINEAR, attention_bias=True, mlp_bias=True),
    "llama3": tf.LlamaConfig(
        **{**SIZES, "eos_token_id": [2, 3]}, rope_parameters=LLAMA3, rms_norm_eps=1e-5
    ),
    "smollm2": tf.LlamaConfig(**SIZES, rope_parameters=PLAIN, tie_word_embeddings=True),
    "smollm3": tf.SmolLM3Config(
        **SIZES, rope_parameters=PLAIN, no_rope_layers=[1, 0, 1], tie_word_embeddings=True
    ),
    "mistral": tf.MistralConfig(**SIZES, rope_parameters=PLAIN, sliding_window=7, head_dim=16),
    "qwen2": tf.Qwen2Config(
        **SIZES,
        rope_parameters=PLAIN,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
    ),
    "qwen3": tf.Qwen3Config(**SIZES, rope_parameters=PLAIN, head_dim=16, tie_word_embeddings=True),
    "gemma2": tf.Gemma2Config(
        **SIZES,
        rope_parameters=PLAIN,
        head_dim=16,
        sliding_window=5,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": tf.Gemma3TextConfig(
        **SIZES,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            "sliding_attention": PLAIN,
        },
        head_dim=16,
        sliding_window=5,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": tf.GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        eos_token_id=2,
        bos_token_id=1,
    ),
}


def make(name: str, config: tf.PretrainedConfig) -> None:
    """One family: random weights (biases and norms too, which are constant when fresh), ids,
    logits.
    """
    torch.manual_seed(len(name))
    config._attn_implementation = "eager"
    model = tf.AutoModelForCausalLM.from_config(config).eval().float()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 2.0 * parameter.shape[-1] ** -0.5
            centre = parameter.mean() if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
        ids = torch.randint(3, 96, (2, LENGTH), generator=generator)
        logits = model(ids).logits
    folder = ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file(
        {"ids": ids.numpy().astype(np.int32), "logits": logits.numpy()},
        folder / "expected.safetensors",
    )


if __name__ == "__main__":
    for family, config in FAMILIES.items():
        make(family, config)
        print(family)
