"""Tasks of reasoning-gym that a small language model can sometimes solve, put to it with worked
examples.

Which ones: those that SmolLM2-135M solves in 5 to 60 % of draws (`power_sampling --survey` measures
it).
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable
from typing import Any

from .. import sums

EXAMPLES = 5
PAD_TO = 288


@dataclasses.dataclass(frozen=True)
class Kind:
    """One task: its dataset with options, an entry's question and worked answer, and what a text
    answers.

    `read` gives the answer in the form that the dataset scores, None for a text without one.
    """

    dataset: str
    options: dict[str, Any]
    question: Callable[[Any], str]
    solution: Callable[[Any], str]
    read: Callable[[str], str | None]
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem: the prompt with its worked examples, and the score of an answer (1 is right)."""

    prompt: str
    score: Callable[[str], float]


def _sorting_question(entry: Any) -> str:
    numbers = " ".join(str(round(float(n))) for n in entry["metadata"]["original_numbers"])
    return f"{numbers} {entry['metadata']['direction']}"


def _sorting_solution(entry: Any) -> str:
    return " ".join(str(round(float(n))) for n in ast.literal_eval(entry["answer"]))


def _sum_solution(entry: Any) -> str:
    return "\n".join(sums.solution(entry["metadata"]["expression"]))


def _countdown_question(entry: Any) -> str:
    numbers = " ".join(map(str, entry["metadata"]["numbers"]))
    return f"{entry['metadata']['target']} from {numbers}"


def _expression(text: str) -> str | None:
    """Sums, products and parentheses of whole numbers; what scores answers would run anything."""
    said = text.strip().replace(" ", "")
    return said if re.fullmatch(r"[0-9()]([+*/-]?[0-9()])*", said) else None


def _span(entry: Any) -> list[str]:
    return entry["metadata"]["span"]


KINDS = {
    "chain_sum": Kind(
        "chain_sum",
        {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        lambda entry: entry["metadata"]["expression"],
        _sum_solution,
        sums.answer,
        max_tokens=24,
    ),
    "number_sorting": Kind(
        "number_sorting",
        {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "min_value": 0, "max_value": 20},
        _sorting_question,
        _sorting_solution,
        lambda text: str(text.split()) if text.split() else None,
        max_tokens=16,
    ),
    "number_sequence": Kind(
        "number_sequence",
        {"max_complexity": 1, "max_terms": 5, "min_value": 1, "max_value": 20},
        lambda entry: entry["question"],
        lambda entry: entry["answer"],
        lambda text: text.strip() or None,
        max_tokens=8,
    ),
    "countdown": Kind(
        "countdown",
        {"min_numbers": 2, "max_numbers": 2, "max_value": 9, "min_target": 1, "max_target": 81},
        _countdown_question,
        lambda entry: entry["metadata"]["expression"].replace(" ", ""),
        _expression,
        max_tokens=8,
    ),
    "letter_counting": Kind(
        "letter_counting",
        {"min_words": 1, "max_words": 2},
        lambda entry: f"{entry['metadata']['target_letter']} in {' '.join(_span(entry))}",
        lambda entry: entry["answer"],
        lambda text: text.strip() or None,
        max_tokens=4,
    ),
}


def problems(name: str, num: int, seed: int) -> list[Problem]:
    """`num` problems of a task, which share their worked examples.

    Raises:
        ImportError: without the package reasoning-gym.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            "expected the package reasoning-gym for these tasks, got none installed; run `pip"
            " install 'tiltlm[tasks]'`"
        ) from error
    kind = KINDS[name]
    made = reasoning_gym.create_dataset(
        kind.dataset, size=EXAMPLES + num, seed=seed, **kind.options
    )
    entries = [made[i] for i in range(EXAMPLES + num)]
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}"
    worked = [
        turn.format(kind.question(e), kind.solution(e)) + "<|im_end|>\n" for e in entries[:EXAMPLES]
    ]

    def score(entry: Any) -> Callable[[str], float]:
        return lambda said: float(made.score_answer(said, entry))

    return [
        Problem("".join(worked) + turn.format(kind.question(e), ""), score(e))
        for e in entries[EXAMPLES:]
    ]
