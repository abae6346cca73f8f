"""Tasks of reasoning-gym, put to a language model: its strings are drawn once for each prompt and
kept beside the results.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from models.refusals import reading
from models.tokenizer import Tokenizer
from ppl.files import replacing
from ppl.lm import LM
from samplers.draws import ancestral
from samplers.search.answers import ids_of

from ..power_sampling.tasks import KINDS, PAD_TO, Problem
from .banks import CORRECT_SCORE, Bank

TASKS = ("chain_sum", "number_sorting", "countdown", "letter_counting")
DRAWS = "draws.npz"


@dataclasses.dataclass
class Drawn:
    """The strings of prompts that were drawn so far, in a file.

    about: what they depend on; draws of anything else are not gone on from.  strings: of each task
    the tokens [N, T] and lengths [N] of prompts, in their order.
    """

    path: Path
    about: dict[str, Any]
    strings: dict[str, list[tuple[np.ndarray, np.ndarray]]] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.strings = {}
        if not self.path.exists():
            return
        with reading(self.path, "the draws of an earlier run, or none"):
            held = np.load(self.path)
            if json.loads(str(held["about"])) != self.about:
                return
            for task in json.loads(str(held["tasks"])):
                both = held[f"{task} tokens"], held[f"{task} length"]
                self.strings[task] = list(zip(*both, strict=True))

    def add(self, task: str, tokens: np.ndarray, length: np.ndarray) -> None:
        """One more prompt, which is saved at once."""
        self.strings.setdefault(task, []).append((tokens, length))
        named = {"about": json.dumps(self.about), "tasks": json.dumps(list(self.strings))}
        arrays: dict[str, Any] = {name: np.array(text) for name, text in named.items()}
        for name, prompts in self.strings.items():
            both = zip(*prompts, strict=True)
            arrays |= {
                f"{name} {which}": np.stack(rows) for which, rows in zip(PARTS, both, strict=True)
            }
        with replacing(self.path) as fresh, fresh.open("wb") as file:
            np.savez_compressed(file, **arrays)


PARTS = ("tokens", "length")


def draw(
    seed: int, lm: LM, tokenizer: Tokenizer, task: str, problems: Sequence[Problem], drawn: Drawn
) -> None:
    """The strings of the next prompt of a task."""
    index = len(drawn.strings.get(task, []))
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(task.encode()))
    ids = tokenizer.encode(problems[index].prompt)
    p = lm.given(ids, max_tokens=KINDS[task].max_tokens, pad_to=PAD_TO)
    num = drawn.about["num_draws"]
    out = ancestral.run(jax.random.fold_in(key, index), p, num_samples=num).sequences
    drawn.add(task, np.asarray(out.tokens), np.asarray(out.length))


def bank(tokenizer: Tokenizer, task: str, problems: Sequence[Problem], drawn: Drawn) -> Bank:
    """What the strings of a task answer, whether that is right, and what the verifier says."""
    rows = [
        _judged(tokenizer, task, problem, *strings)
        for problem, strings in zip(problems, drawn.strings[task], strict=True)
    ]
    return Bank(*(np.stack(column) for column in zip(*rows, strict=True)))


def _judged(
    tokenizer: Tokenizer,
    task: str,
    problem: Problem,
    tokens: Int[np.ndarray, "N T"],
    length: Int[np.ndarray, " N"],
) -> tuple[np.ndarray, ...]:
    texts = [tokenizer.decode(row[:size]) for row, size in zip(tokens, length, strict=True)]
    said = [KINDS[task].read(text) for text in texts]
    right = {answer: problem.score(answer) >= 1 for answer in said if answer is not None}
    scores = {a: verdict(problem.prompt, a, correct) for a, correct in right.items()}
    return (
        ids_of(said, lambda answer: answer)[0],
        np.array([answer is not None and right[answer] for answer in said]),
        np.array([-np.inf if answer is None else scores[answer] for answer in said]),
        length + (length < tokens.shape[1]),
    )


def verdict(prompt: str, answer: str, correct: bool) -> float:
    """The verifier's score: always the same for an answer to a prompt, uniform if it is wrong."""
    seed = zlib.crc32(f"{prompt}\n{answer}".encode())
    return CORRECT_SCORE if correct else float(np.random.default_rng(seed).random())
