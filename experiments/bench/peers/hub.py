"""Self-consistency, best-of-n and beam search beside its_hub, on one model.

its_hub asks a server for text; here a stub of its client runs transformers' `generate`, on all
requests that are waiting together in one batch, as a good server would.  Votes of 16 strings of 32
tokens; beams of 16 in four steps of eight tokens, of which their first has four rows.  Both sides
count the tokens that they drew, and seconds per token are compared.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from its_hub import (
    AbstractLanguageModel,
    AbstractOutcomeRewardModel,
    AbstractProcessRewardModel,
    BestOfN,
    SelfConsistency,
)
from its_hub.api import ChatMessage
from its_hub.core.algorithms.beam_search import BeamSearch
from its_hub.core.lms.step_generation import StepGeneration
from its_hub.core.orchestrator import LMOrchestrator

import ppl
from samplers.search import answers, best_of_n, pools, step_search, votes

from .report import OURS, table, take_turns, time_ratio
from .text import MODEL, NUM, PROMPT, TOKENS, Setting, check_count

STEP, KEPT = 8, 4
PEER = "its-hub"
METHODS = ("self-consistency", "best-of-n", "beam")

Run = Callable[[int], int]


def compare(setting: Setting, rounds: int) -> dict[str, float]:
    """Print both sides of each method; seconds per token, theirs over ours, and the geometric mean
    of all.

    Raises:
        RuntimeError: if a side drew another number of tokens.
    """
    own, theirs = ours(setting), hub(setting)
    ratios, rows = {}, []
    for name in METHODS:
        sides = {OURS: own[name], PEER: theirs[name]}
        seconds, counts = take_turns(sides, rounds, f"Timing {name}")
        if name == "beam":
            check_beam(counts)
        else:
            for side, row in counts.items():
                check_count(side, row)
        drawn = {side: row[0] for side, row in counts.items()}
        ratio = time_ratio(seconds, PEER) * drawn[OURS] / drawn[PEER]
        ratios[f"{PEER}-{name}"] = ratio
        rates = [drawn[side] / float(np.median(seconds[side])) for side in sides]
        rows.append((name, *(f"{rate:.0f}" for rate in rates), f"{ratio:.2f}"))
    ratios[PEER] = float(np.exp(np.mean(np.log(list(ratios.values())))))
    columns = ("method", f"{OURS}, tokens per second", PEER, "faster by")
    table(f"{MODEL}, float32, N = {NUM}", columns, rows)
    return ratios


def check_beam(counts: dict[str, list[int]]) -> None:
    """Refuse searches of other sizes: their first step has as many rows as beams are kept."""
    steps = TOKENS // STEP
    expected = {OURS: {NUM * TOKENS}, PEER: {KEPT * STEP + NUM * STEP * (steps - 1)}}
    found = {side: set(row) for side, row in counts.items()}
    if found != expected:
        raise RuntimeError(f"expected {expected} tokens of a beam search, got {found}")


# Ours.


def ours(setting: Setting) -> dict[str, Run]:
    """Method -> a function of a seed that returns the number of tokens."""
    # An end that the model practically never draws, so that all strings run the full length.
    lm = dataclasses.replace(setting.lm, eos=setting.tokenizer.encode("<reponame>")[0])
    answer = answers.last_number(setting.tokenizer)

    def target() -> ppl.Target:
        # Includes the prompt's prefill, as the other sides do.
        return lm.given(setting.prompt, max_tokens=TOKENS)

    def self_consistency(seed: int) -> int:
        first, second = jax.random.split(jax.random.key(seed))
        pool = pools.draw(first, target(), num=NUM, answer=answer)
        jax.block_until_ready(votes.majority(second, pool))
        return int(pool.cost.tokens)

    def best(seed: int) -> int:
        judged = target() * ppl.reward(variety)
        return int(best_of_n.run(jax.random.key(seed), judged, num_samples=NUM).cost.tokens)

    def beam(seed: int) -> int:
        sizes = {"num_beams": NUM, "width": NUM // KEPT, "max_steps": TOKENS // STEP}
        steps = ppl.Steps(every=STEP)
        return int(
            step_search.beam(jax.random.key(seed), target(), likely, steps, **sizes).cost.tokens
        )

    return dict(zip(METHODS, (self_consistency, best, beam), strict=True))


def variety(tokens: jax.Array, length: jax.Array) -> jax.Array:
    """A reward [N]: how many tokens differ from the one before."""
    real = jnp.arange(1, tokens.shape[1]) < length[:, None]
    return ((tokens[:, 1:] != tokens[:, :-1]) & real).sum(axis=1).astype(jnp.float32)


def likely(tokens: jax.Array, length: jax.Array) -> jax.Array:
    """The same as a probability [N]."""
    return jax.nn.sigmoid(variety(tokens, length) - TOKENS / 2)


# Theirs.


def hub(setting: Setting) -> dict[str, Run]:
    """Method -> a function of a seed that returns the number of tokens."""
    server = Server(setting)
    # All requests at once; a limit would let them in one by one, and the server wait for none.
    orchestrator = LMOrchestrator(max_concurrency=-1)
    steps = StepGeneration(
        max_steps=TOKENS // STEP - 1, tokens_per_step=STEP, temperature=1.0
    )  # one more than it is told
    methods = (
        SelfConsistency(number, orchestrator=orchestrator),
        BestOfN(Variety(), orchestrator),
        BeamSearch(steps, StepVariety(), beam_width=KEPT),
    )

    def side(method: Any) -> Run:
        def run(seed: int) -> int:
            torch.manual_seed(seed)
            server.tokens = 0
            method.infer(server, PROMPT, budget=NUM)
            return server.tokens

        return run

    return {name: side(method) for name, method in zip(METHODS, methods, strict=True)}


class Server(AbstractLanguageModel):
    """The client of a server which runs the requests that wait together in one batch."""

    def __init__(self, setting: Setting):
        directory, dtype = setting.directory, torch.float32
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        self.setting, self.waiting, self.tokens = setting, [], 0

    async def agenerate(self, messages: list, stop: str | None = None, **how: Any) -> list[dict]:
        """Answers to a batch."""
        calls = (self.agenerate_single(each, stop, **how) for each in messages)
        return await asyncio.gather(*calls)

    async def agenerate_single(self, messages: list, stop: str | None = None, **how: Any) -> dict:
        """An answer, once the batch of all that are asked for now is done."""
        loop = asyncio.get_running_loop()
        request = Request(messages, how.get("max_completion_tokens"), loop.create_future())
        self.waiting.append(request)
        if len(self.waiting) == 1:
            loop.call_soon(self.serve)
        return await request.answer

    def serve(self) -> None:
        """One batch, padded on the left."""
        batch, self.waiting = self.waiting, []
        num = batch[0].max_tokens or TOKENS
        prompts = [torch.tensor(self.prompt(request.messages)) for request in batch]
        width = max(map(len, prompts))
        rows = [torch.nn.functional.pad(ids, (width - len(ids), 0)) for ids in prompts]
        real = [torch.arange(width) >= width - len(ids) for ids in prompts]
        with torch.inference_mode():
            out = self.model.generate(
                torch.stack(rows),
                attention_mask=torch.stack(real).long(),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                min_new_tokens=num,
                max_new_tokens=num,
                pad_token_id=0,
            )[:, width:]
        self.tokens += out.numel()
        for request, ids in zip(batch, out.tolist(), strict=True):
            text = self.setting.tokenizer.decode(ids)
            request.answer.set_result({"role": "assistant", "content": text})

    def prompt(self, messages: list[ChatMessage]) -> list[int]:
        """The prompt, and what has been said so far."""
        said = "".join(each.extract_text_content() for each in messages[1:])
        return self.setting.prompt + (self.setting.tokenizer.encode(said) if said else [])


class Request(NamedTuple):
    """What a client asks for, and where the answer comes."""

    messages: list
    max_tokens: int | None
    answer: asyncio.Future


class Variety(AbstractOutcomeRewardModel):
    """How many different characters an answer has."""

    def score(self, messages: Any, **how: Any) -> list[float]:
        return [float(len(set(each[-1].extract_text_content()))) for each in messages]

    async def ascore(self, messages: Any, orchestrator: Any = None, **how: Any) -> list[float]:
        return self.score(messages)


class StepVariety(AbstractProcessRewardModel):
    """The same of what has been said so far."""

    def score(self, prompt_or_messages: Any, steps: list[str]) -> list[float]:
        return [float(len(set(text))) for text in steps]

    async def ascore(self, prompt_or_messages: Any, steps: list[str]) -> list[float]:
        return self.score(prompt_or_messages, steps)


def number(text: str) -> str:
    """The last number of a text."""
    return (re.findall(r"[0-9]+", text) or [""])[-1]
