"""Writes adapters of some of the tiny checkpoints with `peft`, and the logits it computes.

Run in an environment with torch, transformers and peft, after make_fixtures.py (the project itself
needs none of them):

    python tests/models/make_adapters.py

Each folder under fixtures_adapters/ is what `save_pretrained` writes, and expected.safetensors
(token ids and float32 logits); the part of its name before the dot is the checkpoint's.
"""

import pathlib
import shutil

import numpy as np
import peft
import torch
import transformers as tf
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
ROOT = HERE / "fixtures_adapters"
LENGTH = 12

ADAPTERS = {
    "llama3.some": {"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"],
                    "layers_to_transform": [1, 2]},
    "llama3.all": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True,
                   "rank_pattern": {"k_proj": 3, r"layers.1.self_attn.o_proj": 1},
                   "alpha_pattern": {"down_proj": 7}, "modules_to_save": ["lm_head"]},
    "smollm2.embedding": {"r": 2, "lora_alpha": 5, "modules_to_save": ["embed_tokens"],
                          "target_modules": r".*layers\.[02]\.(mlp\.up_proj|self_attn\.k_proj)"},
    "smollm2.head": {"r": 2, "lora_alpha": 5, "target_modules": ["mlp.down_proj"],
                     "exclude_modules": ["layers.0.mlp.down_proj"],
                     "modules_to_save": ["lm_head"]},
    "gpt2.fused": {"r": 3, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj"],
                   "fan_in_fan_out": True},
}  # fmt: skip


def make(name: str, options: dict) -> None:
    """One adapter with random A and B, and random matrices in the place of those that are saved."""
    base = tf.AutoModelForCausalLM.from_pretrained(HERE / "fixtures" / name.partition(".")[0])
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(base.eval().float(), config).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    ids = torch.randint(3, 96, (1, LENGTH), generator=generator)
    model.peft_config["default"].base_model_name_or_path = name.partition(".")[0]
    folder = ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    with torch.no_grad():  # in double precision, so that what differs is our rounding
        logits = model.double()(ids).logits.float()
    save_file(
        {"ids": ids.numpy().astype(np.int32), "logits": logits.numpy()},
        folder / "expected.safetensors",
    )


if __name__ == "__main__":
    for name, options in ADAPTERS.items():
        make(name, options)
        print(name)
