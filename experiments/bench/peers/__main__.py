"""Tokens per second of `samplers.smc` over genlm-control and over transformers' `generate`, in one process.

All three decode with the same float32 SmolLM2-135M weights (one GGUF file), the same prompt, N = 16 strings of exactly
32 tokens, sampling at temperature 1 from the whole vocabulary.  Each round times every side once, in turn; the ratios
are medians over rounds, after one round of warm-up (compilation on our side, caches on theirs).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from genlm.control import SMC, PromptedLLM, direct_token_sampler
from rich import print as show
from rich.progress import track
from rich.table import Table

import models
import ppl
from models import download
from samplers import smc

MODEL = "smollm2-135m"
PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."
NUM = 16
TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()

    lm, tokenizer = models.load(MODEL)
    prompt = tokenizer.chat(PROMPT)
    directory = hugging_face_copy()
    sides: dict[str, Callable[[int], int]] = {
        "tiltlm": ours(lm, prompt),
        "generate": generate(directory, prompt),
        "genlm-control": genlm_control(directory, prompt),
    }
    check_same_model(lm, prompt, directory)
    for side in sides.values():
        side(0)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in track(range(1, rounds + 1), "Timing", transient=True):
        for name, side in sides.items():
            start = time.perf_counter()
            count = side(i)
            seconds[name].append(time.perf_counter() - start)
            if count != NUM * TOKENS:
                raise RuntimeError(f"expected {NUM * TOKENS} tokens from {name}, got {count}")
    report(seconds)


def report(seconds: dict[str, list[float]]) -> None:
    ratios = {
        name: statistics.median(t / own for t, own in zip(times, seconds["tiltlm"], strict=True))
        for name, times in seconds.items()
        if name != "tiltlm"
    }
    view = Table(title=f"{MODEL}, float32, N = {NUM}, {TOKENS} tokens", title_justify="left")
    for column in ("side", "tokens per second", "tiltlm is faster by"):
        view.add_column(column, justify="left" if column == "side" else "right")
    for name, times in seconds.items():
        rate = NUM * TOKENS / statistics.median(times)
        view.add_row(name, f"{rate:.0f}", f"{ratios[name]:.2f}" if name in ratios else "")
    show(view)
    device = f"{jax.devices()[0].device_kind}, {torch.get_num_threads()} torch threads"
    print(json.dumps({"name": "peers", "ratios": {k: round(v, 3) for k, v in ratios.items()}, "device": device}))


def ours(lm: ppl.LM, prompt: list[int]) -> Callable[[int], int]:
    def run(seed: int) -> int:
        # Includes the prompt's prefill, as the other sides do.
        target = lm.given(prompt, max_tokens=TOKENS) * ppl.min_tokens(TOKENS)
        out = smc.run(jax.random.key(seed), target, num_particles=NUM)
        return int(np.asarray(out.sequences.length).sum())

    return run


def generate(directory: Path, prompt: list[int]) -> Callable[[int], int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "num_return_sequences": NUM}

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
        return out[:, len(prompt) :].numel()

    return run


def genlm_control(directory: Path, prompt: list[int]) -> Callable[[int], int]:
    # Its end-of-string token is one the model practically never draws, so that all strings run the full length.
    llm = PromptedLLM.from_name(
        str(directory),
        backend="hf",
        prompt_ids=prompt,
        eos_byte_strings=[b"<reponame>"],
        hf_opts={"dtype": torch.float32},
    )
    sampler = SMC(direct_token_sampler(llm))

    async def decode() -> int:
        # The forced end at max_tokens counts as a token there.
        out = await sampler(n_particles=NUM, ess_threshold=0.5, max_tokens=TOKENS + 1)
        return sum(len(context) - 1 for context in out.contexts)

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        llm.model.clear_cache()
        llm.model.cache_kv(prompt)
        return asyncio.run(decode())

    return run


def hugging_face_copy() -> Path:
    """The same weights in the Hugging Face layout, which genlm-control needs; made once, in the cache."""
    directory = download.cache_directory() / "peers" / MODEL
    if not (directory / "config.json").exists():
        gguf = download.fetch(MODEL)
        partial = directory.with_name(f"{MODEL}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        options = {"gguf_file": gguf.name}
        read = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
        # A model read from GGUF still calls itself quantised and refuses to be saved; its weights no longer are.
        config = transformers.LlamaConfig(**{k: v for k, v in read.config.to_dict().items() if "quant" not in k})
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
        raise RuntimeError(f"expected both sides to run one model, got logits that differ by {difference:.3g}")


if __name__ == "__main__":
    main()
