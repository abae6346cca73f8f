"""Exact marginals of tabular models, with NumPy in float64: oracles that share nothing with the
models' own code but the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ppl.lm import LM


def markov_log_z(lm: LM, prompt: Sequence[int], max_tokens: int, alpha: float = 1.0) -> float:
    """log sum_x p(x | prompt)^alpha over strings of at most `max_tokens` tokens, by transfer
    matrices.

    EOS is absorbing; a string cut by the horizon counts with the product of its tokens.
    """
    powered = _powered(lm, alpha)
    return float(np.log(_tails(powered, lm.eos, max_tokens)[0][prompt[-1]]))


def markov_marginals(
    lm: LM, prompt: Sequence[int], max_tokens: int, alpha: float = 1.0
) -> np.ndarray:
    """P(x_t = v) [T, V] under the law proportional to p(x | prompt)^alpha; a string that has ended
    repeats EOS.
    """
    powered = _powered(lm, alpha)
    tails = _tails(powered, lm.eos, max_tokens)
    going = np.zeros(lm.vocab_size)  # mass of strings still growing, by last token
    going[prompt[-1]] = 1.0 / tails[0][prompt[-1]]
    ended, rows = 0.0, []
    for tail in tails[1:]:
        going = going @ powered
        ended, going[lm.eos] = ended + going[lm.eos], 0.0
        marginal = going * tail
        marginal[lm.eos] = ended
        rows.append(marginal)
    return np.stack(rows)


def markov_expected_length(
    lm: LM, prompt: Sequence[int], max_tokens: int, alpha: float = 1.0
) -> float:
    """Expected number of tokens before EOS (or the horizon) under the law proportional to p(x |
    prompt)^alpha.
    """
    marginals = markov_marginals(lm, prompt, max_tokens, alpha)
    return float(marginals.sum() - marginals[:, lm.eos].sum())


def _powered(lm: LM, alpha: float) -> np.ndarray:
    probability = np.exp(np.asarray(lm.params, np.float64))
    return np.where(probability > 0, probability**alpha, 0.0)


def _tails(powered: np.ndarray, eos: int, max_tokens: int) -> list[np.ndarray]:
    """tails[t][u]: total powered weight of what can follow t tokens of which u is the last."""
    tails = [np.ones(len(powered))]
    for _ in range(max_tokens):
        following = tails[0].copy()
        following[eos] = 1.0
        tails.insert(0, powered @ following)
    return tails


def hmm_log_likelihood(lm: LM, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """log p(tokens | prompt) by the forward algorithm over the joint law of hidden states and
    tokens.

    `tokens` includes EOS if the string ended.
    """
    params = {name: np.asarray(value, np.float64) for name, value in lm.params.items()}
    transition, emission = params["transition"], params["emission"]

    def log_joint(observed: Sequence[int]) -> float:
        forward = params["initial"] * emission[:, observed[0]]
        for token in observed[1:]:
            forward = (forward @ transition) * emission[:, token]
        with np.errstate(divide="ignore"):
            return float(np.log(forward.sum()))

    return log_joint([*prompt, *tokens]) - log_joint(prompt)
