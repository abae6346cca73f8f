"""QUEST and QAlign leave their targets invariant; means over tokens, and another proposal
temperature, do not.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.exact import enumerate_strings
from ppl.target import Target
from samplers.mcmc import qalign, quest, suffix
from samplers.strings import cuts
from samplers.testing import check_kernel
from tests.helpers import as_strings, brute_force_law, table
from tests.samplers.chains import Chain, chain_of, chi_square_z, suffix_chain
from tests.samplers.problems import MAX_TOKENS, PROMPT, plain, score, score_arrays

BETA = 0.7


def quality(tokens: Any, length: Any) -> Any:
    """A score in (0, 1)."""
    return jax.nn.sigmoid(score_arrays(tokens, length))


def qalign_chain(p: Target, reward: Any, cut: cuts.Cut = cuts.uniform_in_length) -> Chain:
    return suffix_chain(qalign.target(p, reward, beta=BETA), temperature=1.0, cut=cut)


def quest_chain(
    p: Target, reward: Any, cut: cuts.Cut = cuts.uniform_in_length, temperature: float = 1.0
) -> Chain:
    return chain_of(quest.target(p, reward, beta=BETA), quest.method(temperature, cut))


def stationary_distance(chain: Chain) -> float:
    """Total variation between the law that K leaves invariant and pi, and its error."""
    support = chain.pi > 0
    matrix = chain.matrix[np.ix_(support, support)]
    system = np.vstack([matrix.T - np.eye(len(matrix)), np.ones(len(matrix))])
    law = np.linalg.lstsq(system, np.append(np.zeros(len(matrix)), 1.0), rcond=None)[0]
    return float(0.5 * np.abs(law - chain.pi[support]).sum())


# The transition matrices.


def test_the_transition_matrices_leave_pi_invariant():
    p, law = plain("table"), brute_force_law(table(), PROMPT, MAX_TOKENS)[0]
    aligned, others = (
        [qalign_chain(p, score_arrays), qalign_chain(p, score_arrays, cuts.uniform)],
        [quest_chain(p, score_arrays), quest_chain(p, score_arrays, cuts.uniform, temperature=0.8)],
    )
    x = as_strings(aligned[0].pieces.sequences.tokens, aligned[0].pieces.sequences.length)
    tilt = np.exp([score(string) / BETA for string in x])
    reference = np.asarray([law.get(string, 0.0) for string in x])
    for chains, weights in ((aligned, reference * tilt), (others, (reference > 0) * tilt)):
        for chain in chains:
            assert chain.bias <= 1e-12 and chain.imbalance <= 1e-12
            assert stationary_distance(chain) <= 1e-9 and chain.pi @ np.diag(chain.matrix) < 0.99
            np.testing.assert_allclose(chain.pi, weights / weights.sum(), atol=1e-6)


@pytest.mark.slow
def test_constraints_powers_and_rewards_of_other_kinds_are_kept():
    p = plain("table") * ppl.banned([2])
    rewards = (ppl.log_odds(quality), ppl.python(lambda ids: 0.3 * len(ids) - 0.2 * ids.count(0)))
    for reward in rewards:
        for chain in (qalign_chain(p**1.4, reward), quest_chain(p, reward)):
            outside = (np.asarray(chain.pieces.sequences.tokens) == 2).any(1)
            outside |= np.isneginf(np.asarray(chain.pieces.log_p)).any(1)
            assert chain.bias <= 1e-12
            np.testing.assert_array_equal(chain.pi == 0, outside)


def mean_rule(target: Target, cut_law: Any, x: Any, y: Any, cut: Any, horizon: Any) -> Any:
    """As coded in public: means of the log-probabilities of the tokens drawn and of
    those replaced.
    """

    def mean(state: Any) -> Any:
        size = jnp.minimum(state.sequences.length + 1, state.log_q.shape[1])
        rest = (jnp.arange(state.log_q.shape[1]) >= cut[:, None]) & (
            jnp.arange(state.log_q.shape[1]) < size[:, None]
        )
        return jnp.where(rest, state.log_q, 0.0).sum(1) / jnp.maximum(rest.sum(1), 1)

    reward = y.log_phi.sum(1) - x.log_phi.sum(1)
    hastings = cut_law(cut, y.sequences.length, horizon) - cut_law(cut, x.sequences.length, horizon)
    return reward + hastings + mean(x) - mean(y)


def test_the_published_mean_of_log_probabilities_is_not_invariant(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(suffix, "log_ratio", mean_rule)
    chain = quest_chain(plain("table"), score_arrays)
    assert chain.bias > 0.01 and stationary_distance(chain) > 0.3


def test_the_published_temperature_has_another_target(monkeypatch: pytest.MonkeyPatch):
    """Proposals at temperature 0.8 whose probabilities are left out: p_0.8(x) e^{r / beta}, not
    p(x) e^{r / beta}.
    """

    def cancelled(target: Any, cut_law: Any, x: Any, y: Any, cut: Any, horizon: Any) -> Any:
        hastings = cut_law(cut, y.sequences.length, horizon) - cut_law(
            cut, x.sequences.length, horizon
        )
        return y.log_phi.sum(1) - x.log_phi.sum(1) + hastings

    target = qalign.target(plain("table"), score_arrays, beta=BETA)
    options: dict[str, Any] = {"temperature": 0.8, "cut": cuts.uniform_in_length}
    right = suffix_chain(target, **options)
    monkeypatch.setattr(suffix, "log_ratio", cancelled)
    published = suffix_chain(target, **options)
    assert right.bias <= 1e-12 and published.bias > 1e-3
    log_law = np.asarray(published.pieces.log_q).sum(1) + np.asarray(published.pieces.log_phi).sum(
        1
    )
    law = np.exp(log_law - np.logaddexp.reduce(log_law))
    # log q is float32: a matrix that is made of it knows its law to about that.
    assert np.abs(law @ published.matrix - law).max() <= 1e-12
    assert 0.5 * np.abs(law - right.pi).sum() > 0.02


# The jitted chains.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quest", "qalign"])
def test_the_chains_make_the_moves_of_the_matrix(name: str):
    p = plain("table")
    if name == "quest":
        kernel, chain = quest.kernel(p, score_arrays, beta=BETA), quest_chain(p, score_arrays)
        target = quest.target(p, score_arrays, beta=BETA)
    else:
        kernel, chain = qalign.kernel(p, score_arrays, beta=BETA), qalign_chain(p, score_arrays)
        target = qalign.target(p, score_arrays, beta=BETA)
    counts = check_kernel(kernel, target, key=jax.random.key(0))
    assert abs(chi_square_z(counts, chain.matrix)) < 5
    other = qalign_chain(p, score_arrays, cuts.uniform).matrix
    assert chi_square_z(counts, other) > 10


@pytest.mark.bad_input
def test_bad_input():
    p = table().given(PROMPT, max_tokens=3)
    for beta in (0.0, -1.0, math.nan, math.inf):
        for module in (qalign, quest):
            with pytest.raises(ValueError, match="expected a finite beta above 0"):
                module.kernel(p, score_arrays, beta=beta)
    with pytest.raises(ValueError, match="expected a temperature above 0"):
        quest.kernel(p, score_arrays, beta=1.0, temperature=0.0)
    with pytest.raises(ValueError, match="alpha above 0"):
        qalign.kernel(dataclasses.replace(p, alpha=jnp.float32(math.nan)), score_arrays, beta=1.0)
    outside = enumerate_strings(p).sequences
    with pytest.raises(ValueError, match="in the support of the target"):
        quest.kernel(p * ppl.banned([2]), score_arrays, beta=1.0).init(outside)
