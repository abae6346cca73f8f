"""Tokens per second of `samplers.smc` beside transformers' `generate` and genlm-control, one model,
no constraint.

All three decode with the same float32 weights (one GGUF file), the same prompt, N = 16 strings of
exactly 32 tokens, sampling at temperature 1 from the whole vocabulary.
"""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from genlm.control import SMC, PromptedLLM, direct_token_sampler

import models
import ppl
from models import download
from models.tokenizer import Tokenizer
from samplers import smc

from .report import OURS, table, take_turns, time_ratio

MODEL = "smollm2-135m"
PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."
NUM = 16
TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Setting:
    """One model in the three libraries, and the prompt."""

    lm: ppl.LM
    tokenizer: Tokenizer
    prompt: list[int]
    directory: Path
    peer: PromptedLLM


def load() -> Setting:
    """The model in all libraries.

    Raises:
        RuntimeError: if they do not run the same model.
    """
    lm, tokenizer = models.load(MODEL)
    prompt = tokenizer.chat(PROMPT)
    directory = hugging_face_copy()
    check_same_model(lm, prompt, directory)
    # genlm-control's end-of-string token is one the model practically never draws, so that all
    # strings run the full length.
    peer = PromptedLLM.from_name(
        str(directory),
        backend="hf",
        prompt_ids=prompt,
        eos_byte_strings=[b"<reponame>"],
        hf_opts={"dtype": torch.float32},
    )
    return Setting(lm, tokenizer, prompt, directory, peer)


def compare(setting: Setting, rounds: int) -> dict[str, float]:
    """Print all sides; the ratios of seconds per token, theirs over ours.

    Raises:
        RuntimeError: if a side decoded another number of tokens.
    """
    sides = {
        OURS: ours(setting),
        "generate": generate(setting),
        "genlm-control": genlm_control(setting),
    }
    seconds, counts = take_turns(sides, rounds, "Timing plain decoding")
    for name, row in counts.items():
        check_count(name, row)
    ratios = {name: time_ratio(seconds, name) for name in sides if name != OURS}
    rows = []
    for name, times in seconds.items():
        rate = NUM * TOKENS / statistics.median(times)
        rows.append((name, f"{rate:.0f}", f"{ratios[name]:.2f}" if name in ratios else ""))
    table(
        f"{MODEL}, float32, N = {NUM}, {TOKENS} tokens",
        ("side", "tokens per second", "faster by"),
        rows,
    )
    return ratios


def check_count(name: str, counts: list[int]) -> None:
    """Refuse to compare runs of different lengths."""
    if set(counts) != {NUM * TOKENS}:
        raise RuntimeError(f"expected {NUM * TOKENS} tokens from {name} in every run, got {counts}")


def ours(setting: Setting) -> Callable[[int], int]:
    def run(seed: int) -> int:
        # Includes the prompt's prefill, as the other sides do.
        target = setting.lm.given(setting.prompt, max_tokens=TOKENS) * ppl.min_tokens(TOKENS)
        out = smc.run(jax.random.key(seed), target, num_particles=NUM)
        return int(np.asarray(out.sequences.length).sum())

    return run


def generate(setting: Setting) -> Callable[[int], int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        setting.directory, dtype=torch.float32
    ).eval()
    ids = torch.tensor([setting.prompt])
    options = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "num_return_sequences": NUM,
    }

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=TOKENS,
                max_new_tokens=TOKENS,
                pad_token_id=0,
                **options,
            )
        return out[:, len(setting.prompt) :].numel()

    return run


def genlm_control(setting: Setting) -> Callable[[int], int]:
    sampler = SMC(direct_token_sampler(setting.peer))

    async def decode() -> int:
        # The forced end at max_tokens counts as a token there.
        out = await sampler(n_particles=NUM, ess_threshold=0.5, max_tokens=TOKENS + 1)
        return sum(len(context) - 1 for context in out.contexts)

    def run(seed: int) -> int:
        forget(setting, seed)
        return asyncio.run(decode())

    return run


def forget(setting: Setting, seed: int) -> None:
    """Bring genlm-control to where a run starts: nothing cached but the prompt, which is
    read anew.
    """
    torch.manual_seed(seed)
    setting.peer.model.clear_cache()
    setting.peer.model.cache_kv(setting.prompt)


def hugging_face_copy() -> Path:
    """The same weights in the Hugging Face layout, which genlm-control needs; made once, in the
    cache.
    """
    directory = download.cache_directory() / "peers" / MODEL
    if not (directory / "config.json").exists():
        gguf = download.fetch(MODEL)
        partial = directory.with_name(f"{MODEL}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        options = {"gguf_file": gguf.name}
        read = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, **options
        )
        # A model read from GGUF still calls itself quantised and refuses to be saved; its weights
        # no longer are.
        config = transformers.LlamaConfig(
            **{k: v for k, v in read.config.to_dict().items() if "quant" not in k}
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(partial)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(partial)
        partial.rename(directory)
    return directory


def check_same_model(lm: ppl.LM, prompt: list[int], directory: Path) -> None:
    """Refuse to compare different models: next-token logits after the prompt must agree."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(torch.tensor([prompt])).logits[0, -1].numpy()
    difference = float(np.abs(np.asarray(lm.prefill(prompt).logits) - theirs).max())
    if not difference < 1e-2:
        raise RuntimeError(
            f"expected both sides to run one model, got logits that differ by {difference:.3g}"
        )
