"""Targets that forbid strings: a guide's law is masked by their look-ahead, other strings of reward
zero have a floor.  With neither a loss of zero means nothing, and `fit` says so.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ppl
from amortized import fit
from amortized.objectives import balance
from amortized.strings import behaviours, evidence, gflownet, guide, prefix_rewards, rollouts
from models import tabular
from ppl.lm import LM
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from tests.samplers.problems import Tokenizer

EOS, V, T = 1, 3, 3
STEPS = 1500
MASK = ppl.regex("a(a|b)*b|b", Tokenizer((b"a", None, b"b"), EOS, V))


def law_of(lm: LM, prompt: Any) -> ppl.Target:
    return ppl.Target(lm, lm.read(prompt, jnp.int32(2)), T)


def masked(lm: LM, prompt: Any) -> ppl.Target:
    """Most strings are forbidden, the empty one too, and the look-ahead knows which."""
    return law_of(lm, prompt) * MASK


def zero(tokens: Any, length: Any) -> Any:
    """A reward on a scale of its own, zero for half of the strings, the empty one too."""
    wrong = ((tokens == 0).sum(1) == 1) | (length == 0)
    return jnp.where(wrong, -jnp.inf, -4.0 + 0.5 * length)


def rewarded(lm: LM, prompt: Any) -> ppl.Target:
    return law_of(lm, prompt) * ppl.reward(zero)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Bare(gflownet.Task):
    """Planted fault: the law as it is given, without the mask."""

    def law(self, lm: LM, index: Any) -> ppl.Target:
        return self.law_of(lm, self._example(index))


OBJECTIVES = {
    "vargrad": (gflownet.vargrad, prefix_rewards.at_the_end),
    "tb": (gflownet.tb, prefix_rewards.at_the_end),
    "modified_subtb": (gflownet.modified_subtb, prefix_rewards.at_every_prefix),
}


def astray(key: Any, num: int) -> behaviours.Behaviour:
    """Off the guide's way often enough to meet what is rare."""
    return behaviours.drawn(num, epsilon=0.3)


def train(
    target_of: Any, name: str, kind: type[gflownet.Task] = gflownet.Task
) -> tuple[float, fit.Fitted]:
    """The total variation of what was learned, from a uniform table, and the run."""
    base = tabular.random_hmm(jax.random.key(5), 3, V, eos=EOS)
    task = kind(base, jnp.asarray([[2, 0]]), target_of, law_of)
    g = guide.full(tabular.table(jnp.zeros((tabular.num_prefixes(V, 2 + T - 1), V)), eos=EOS))
    objective, rewards = OBJECTIVES[name]
    options = {"objective": objective, "rewards": rewards, "behaviour": astray}
    training = gflownet.training(g, task, num=16, **options)
    rate = {"guide": 0.1, "log_z": 0.3}
    optimizer = optax.multi_transform(
        {part: optax.adam(optax.cosine_decay_schedule(r, STEPS)) for part, r in rate.items()},
        {part: part for part in rate},
    )
    options = {"optimizer": optimizer, "num_steps": STEPS, "progress": False}
    out = fit.run(jax.random.key(0), training, **options)
    learned = dataclasses.replace(g, params=out.params["guide"])
    return evidence.total_variation(task.target(0), task.law(learned.lm, 0)), out


@pytest.mark.parametrize(
    ("target_of", "name"),
    [
        (masked, "modified_subtb"),
        (rewarded, "vargrad"),
        pytest.param(rewarded, "tb", marks=pytest.mark.slow),
    ],
)
def test_a_target_that_forbids_strings_is_learned(target_of: Any, name: str):
    """Total variation of about e^-10 at most, though the root cannot stop; what a look-ahead
    forbids is never drawn.
    """
    distance, out = train(target_of, name)
    assert distance < 1e-4, distance
    if target_of is masked:
        assert not out.history["zero_rewards"].any()
    else:
        assert 0 < out.history["zero_rewards"][:50].mean()
        assert out.history["zero_rewards"][-100:].mean() < fit.VISIBLE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target_of", "name"), [(masked, "vargrad"), (rewarded, "modified_subtb"), (rewarded, "tb")]
)
def test_with_neither_mask_nor_floor_a_wrong_law_has_no_loss(
    target_of: Any, name: str, monkeypatch: Any, caplog: Any
):
    """Planted fault: both are taken away."""
    monkeypatch.setattr(balance, "floored", lambda x, log_prior: x)
    distance, out = train(target_of, name, Bare)
    assert distance > 0.1 and out.history["loss"][-50:].mean() < 1e-6
    assert "strings of the last 100 steps had reward zero" in caplog.records[-1].getMessage()


def grammatical(lm: LM, prompt: Any) -> ppl.Target:
    rule = ppl.grammar('start: "a" start "b" | "b"', Tokenizer((b"a", None, b"b"), EOS, V))
    return law_of(lm, prompt) * rule


@pytest.mark.parametrize("target_of", [masked, grammatical])
def test_a_uniform_guide_takes_turns_among_what_is_allowed(target_of: Any):
    """A grammar's look-ahead comes from a parser on the host; gradients pass by both, and by the
    dead states after a string's end.
    """
    base = tabular.random_hmm(jax.random.key(5), 3, V, eos=EOS)
    task = gflownet.Task(base, jnp.asarray([[2, 0]]), target_of, law_of)
    g = guide.full(tabular.table(jnp.zeros((tabular.num_prefixes(V, 2 + T - 1), V)), eos=EOS))
    tokens, length = [[2, EOS, EOS], [0, 2, 2], [0, 0, 2]], [1, 3, 3]
    x = Sequences(jnp.asarray(tokens, jnp.int32), jnp.asarray(length, jnp.int32))

    def log_prob(params: Any) -> Any:
        lm = dataclasses.replace(g, params=params).lm
        return rollouts.scores(task.law(lm, 0), x).log_prob(x.length)

    # No string of T tokens ends in "a"; of that the parser knows nothing.
    known = {masked: [1 / 2, 1 / 8, 1 / 4], grammatical: [1 / 2, 1 / 4, 1 / 8]}[target_of]
    found, pull = jax.vjp(log_prob, g.params)
    np.testing.assert_allclose(np.exp(found), known, rtol=1e-6)
    (gradient,) = pull(jnp.asarray([1.0, 1.0, 0.0], found.dtype))
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(gradient))
