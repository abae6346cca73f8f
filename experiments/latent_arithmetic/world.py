"""Chain sums of reasoning-gym with a latent rationale: a question, the line of steps that is
missing, an answer.

    Sum: 5 + 4 - 7
    Steps: 5 + 4 = 9, 9 - 7 = 2
    Answer: 2

The rationale z is what stands between "Steps:" and the line break, which is the model's EOS here.
All results lie between 0 and 9, so that ten answers are all there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

import models
from amortized.strings import gflownet
from models.tokenizer import Tokenizer
from ppl.continuation import continuation
from ppl.lm import LM
from ppl.sequences import Sequences
from ppl.target import Target

from ..sums import is_easy, solution

SHOTS = ("5 + 4 - 7", "2 + 6 - 3")
NUM_ANSWERS = 10
DIGITS = 1


def rationale(expression: str) -> str:
    """The worked solution on one line."""
    return " " + ", ".join(solution(expression))


def result(expression: str) -> int:
    """What the sum is."""
    return int(solution(expression)[-1].split()[-1])


def answer(number: int) -> str:
    """The line that follows the rationale's, whole: with its end."""
    return f"Answer: {number}\n"


def prompt(expression: str) -> str:
    """Two worked examples and the question."""
    turn = "Sum: {}\nSteps:"
    shots = [f"{turn.format(shot)}{rationale(shot)}\n{answer(result(shot))}" for shot in SHOTS]
    return "".join(shots) + turn.format(expression)


def expressions(num_terms: int, num: int, seed: int) -> list[str]:
    """Different sums of so many one-digit terms, none of them an example.

    Raises:
        ImportError: without the package reasoning-gym.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            "expected the package reasoning-gym for these sums, got none installed; run `pip"
            " install 'tiltlm[tasks]'`"
        ) from error
    options = {
        "min_terms": num_terms,
        "max_terms": num_terms,
        "min_digits": DIGITS,
        "max_digits": DIGITS,
    }
    made = reasoning_gym.create_dataset("chain_sum", size=100 * num, seed=seed, **options)
    found = dict.fromkeys(made[i]["metadata"]["expression"] for i in range(100 * num))
    return [e for e in found if is_easy(e) and e not in SHOTS][:num]


def law_of(lm: LM, example: Any) -> Target:
    """The law of rationales; the horizon is that of the examples' reference rationales."""
    return Target(
        lm, lm.read(example["prompt"], example["prompt_length"]), example["rationale"].shape[0]
    )


def target_of(lm: LM, example: Any) -> Target:
    """gamma(z) = p(z, EOS, y | x) with the right answer y."""
    p = law_of(lm, example)
    return p * continuation(p, example["answer"], example["answer_length"])


@dataclasses.dataclass(frozen=True)
class World:
    """A model whose EOS is the line break, its tokenizer, and the ten answers [10, L] with their
    lengths [10].
    """

    lm: LM
    tokenizer: Tokenizer
    answers: Int[Array, "J L"]
    length: Int[Array, " J"]

    @classmethod
    def load(cls, model: str) -> World:
        """A model by its name or directory.

        Raises:
            ValueError: if its tokenizer has no token for a line break.
        """
        lm, tokenizer = models.load(model)
        line_break = tokenizer.encode("\n", add_special_tokens=False)
        if len(line_break) != 1:
            raise ValueError(
                f"expected a tokenizer with one token for a line break, got {line_break}; choose"
                " another model"
            )
        lm = dataclasses.replace(lm, eos=line_break[0])
        answers = [
            tokenizer.encode(answer(number), add_special_tokens=False)
            for number in range(NUM_ANSWERS)
        ]
        return cls(lm, tokenizer, *_padded(answers))

    def task(self, questions: Sequence[str]) -> gflownet.Task:
        """The posteriors of the rationales of these questions; every example has its reference
        rationale with it.
        """
        prompts, prompt_length = _padded([self.tokenizer.encode(prompt(e)) for e in questions])
        written = [self.tokenizer.encode(rationale(e), add_special_tokens=False) for e in questions]
        # One token more than the longest: references end before the horizon.
        rationales, rationale_length = _padded(written, self.lm.eos, room=1)
        right = jnp.asarray([result(e) for e in questions])
        examples = {
            "prompt": prompts,
            "prompt_length": prompt_length,
            "rationale": rationales,
            "rationale_length": rationale_length,
            "answer": self.answers[right],
            "answer_length": self.length[right],
            "right": right,
        }
        return gflownet.Task(self.lm, examples, target_of, law_of)


def reference(examples: Any) -> Sequences:
    """The reference rationales of all examples [P, T]."""
    return Sequences(examples["rationale"], examples["rationale_length"])


def _padded(
    rows: Sequence[Sequence[int]], fill: int = 0, room: int = 0
) -> tuple[Int[Array, "P S"], Int[Array, " P"]]:
    length = np.array([len(row) for row in rows])
    tokens = np.full((len(rows), length.max() + room), fill)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(length, jnp.int32)
