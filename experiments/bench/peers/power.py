"""Moves per second of `samplers.power` beside the paper's algorithm written plainly over
transformers' `generate`.

Power sampling (arXiv 2510.14901, Algorithm 1), alpha = 4, the same model, prompt, blocks and moves.
The other side is one chain, as published: a move calls `generate` on the prompt and what is kept,
at temperature 1 / alpha, and takes the log-probabilities from its scores.  It does not end strings
early, and nor may ours, so that moves are equally long.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers

import ppl
from samplers.mcmc import power

from .report import table, take_turns, time_ratio
from .text import MODEL, Setting

ALPHA, TOKENS, BLOCK, MOVES = 4.0, 96, 32, 5
CHAINS = (8, 32)
PUBLISHED = "transformers, one chain"
STAGES = TOKENS // BLOCK


def compare(setting: Setting, rounds: int) -> dict[str, float]:
    """Print all sides; the ratios of seconds per move, theirs over ours."""
    sides: dict[str, Callable[[int], int]] = {
        f"tiltlm, {num} chains": ours(setting, num) for num in CHAINS
    }
    sides[PUBLISHED] = published(setting)
    seconds, counts = take_turns(sides, rounds, "Timing power sampling")
    per_move = {
        name: [s / count for s, count in zip(seconds[name], counts[name], strict=True)]
        for name in sides
    }
    ratios = {
        f"power-mh-{num}": time_ratio(per_move, PUBLISHED, f"tiltlm, {num} chains")
        for num in CHAINS
    }
    rows = [
        (
            name,
            f"{1 / statistics.median(times):.2f}",
            f"{ratios[label]:.2f}" if label in ratios else "",
        )
        for name, times in per_move.items()
        for label in [f"power-mh-{name.split()[1]}"]
    ]
    title = f"{MODEL}, float32, {TOKENS} tokens in blocks of {BLOCK}, {MOVES} moves per block"
    table(title, ("side", "moves per second", "faster by"), rows)
    return ratios


def ours(setting: Setting, num: int) -> Callable[[int], int]:
    """C chains; returns how many moves they made."""

    def run(seed: int) -> int:
        p = setting.lm.given(setting.prompt, max_tokens=TOKENS) * ppl.min_tokens(TOKENS)
        options = {
            "num_chains": num,
            "block_size": BLOCK,
            "moves_per_block": MOVES,
            "log_phi_max": 0.0,
        }
        out = power.run(jax.random.key(seed), p**ALPHA, **options)
        assert (np.asarray(out.sequences.length) == TOKENS).all()
        return out.info.accepted.size

    return run


def published(setting: Setting) -> Callable[[int], int]:
    """One chain; returns how many moves it made."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        setting.directory, dtype=torch.float32
    ).eval()
    prompt = torch.tensor([setting.prompt])

    def extend(kept: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`num` more tokens, and log p^alpha - log q of each."""
        ids = torch.cat([prompt, kept[None]], dim=1)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=num,
            max_new_tokens=num,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1 / ALPHA,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        new = out.sequences[0, ids.shape[1] :]
        chosen = torch.arange(num), new
        log_p = torch.log_softmax(torch.cat(out.logits), dim=-1)[chosen]
        log_q = torch.log_softmax(torch.cat(out.scores), dim=-1)[chosen]
        return new, ALPHA * log_p - log_q

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        draw = np.random.default_rng(seed)
        tokens, log_w = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        with torch.inference_mode():
            for _ in range(STAGES):
                new, more = extend(tokens, BLOCK)
                tokens, log_w = torch.cat([tokens, new]), torch.cat([log_w, more])
                for _ in range(MOVES):
                    cut = int(draw.integers(len(tokens)))
                    new, more = extend(tokens[:cut], len(tokens) - cut)
                    if math.log(draw.uniform()) < float(more.sum() - log_w[cut:].sum()):
                        tokens, log_w = (
                            torch.cat([tokens[:cut], new]),
                            torch.cat([log_w[:cut], more]),
                        )
        assert len(tokens) == TOKENS
        return STAGES * MOVES

    return run
