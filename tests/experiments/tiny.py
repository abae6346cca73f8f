"""A tiny random chat model in the Hugging Face layout: the Llama fixture with a tokenizer of single
characters.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FIXTURE = Path(__file__).parents[1] / "models" / "fixtures" / "smollm2"
SPECIAL = ["<pad>", "<s>", "</s>"]
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}<s>"


def write(directory: Path, *, chat: bool = True) -> Path:
    """Write the model into `directory`; V = 96, EOS = 2, context 256."""
    directory.mkdir()
    tensors = load_file(FIXTURE / "model.safetensors")
    # One layer: three times quicker to compile.
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if ".layers." not in name or ".layers.0." in name
    }
    save_file(kept, directory / "model.safetensors")
    config = json.loads((FIXTURE / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 256, "num_hidden_layers": 1})
    )
    characters = [chr(code) for code in range(ord("!"), ord("~")) if chr(code) not in "`^"] + [
        "Ġ",
        "Ċ",
    ]
    vocab = {
        piece: token for token, piece in enumerate([*SPECIAL, *characters][: config["vocab_size"]])
    }
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(SPECIAL)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | (
        {"chat_template": TEMPLATE} if chat else {}
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
