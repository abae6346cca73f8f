"""The engine: what a token is and adds, and how much of the target a proposal leaves out."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from samplers import smc
from samplers.mcmc import chains, multiple_try, suffix, suffix_csmc
from samplers.strings import growing, proposals
from tests.helpers import EOS, MAX_TOKENS, VOCAB_SIZE
from tests.samplers.problems import plain, target_of

FORBIDDEN = 3


def forbids(target: Any, logits: Any, potential: Any) -> Any:
    """A law of the user's that never draws one token."""
    return jnp.where(jnp.arange(logits.shape[1]) == FORBIDDEN, -jnp.inf, logits)


def guide(target: Any) -> proposals.LanguageModel:
    """A guide whose own constraint forbids what the target allows."""
    return proposals.LanguageModel(plain("hmm") * ppl.banned([FORBIDDEN]))


WAYS = {"law": lambda target: forbids, "guide": guide}
KERNELS = {
    "suffix": suffix.kernel,
    "multiple_try": multiple_try.kernel,
    "suffix_csmc": suffix_csmc.kernel,
}


def lost_at_most(target: Any) -> float:
    """The greatest probability of the forbidden token after any prefix."""
    strings = ppl.exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)
    logits = target.lm.extend(target.prefix, strings.tokens)
    every = jnp.concatenate([target.prefix.logits[None], logits.reshape(-1, VOCAB_SIZE)])
    return float(jax.nn.softmax(every)[:, FORBIDDEN].max())


def test_smc_reports_what_a_guide_forbids():
    target = plain("markov")
    out = smc.run(jax.random.key(1), target, num_particles=64, proposal=guide(target))
    assert not (out.sequences.tokens == FORBIDDEN).any()
    at_first = float(jax.nn.softmax(target.prefix.logits)[FORBIDDEN])
    assert at_first - 1e-6 <= float(out.missing_support) <= lost_at_most(target) + 1e-6


@pytest.mark.parametrize(
    ("kernel", "way"), [("suffix", "guide"), ("multiple_try", "law"), ("suffix_csmc", "law")]
)
def test_chains_report_what_a_proposal_forbids(kernel: str, way: str):
    target = plain("markov")
    x = smc.run(jax.random.key(2), target, num_particles=6).sequences
    moves = KERNELS[kernel](target, proposal=WAYS[way](target))
    out = chains.run(jax.random.key(3), moves, x, num_samples=8)
    missing = np.asarray(out.info.missing_support)
    assert 0 < missing.max() <= lost_at_most(target) + 1e-6


def test_one_token_forbidden_is_its_probability():
    """One token: the same number in SMC and in a chain, by hand."""
    lm = plain("table").lm
    target = lm.given([2, 0], max_tokens=1)
    lost = float(jax.nn.softmax(target.prefix.logits)[FORBIDDEN])
    out = smc.run(jax.random.key(4), target, num_particles=3, proposal=forbids)
    np.testing.assert_allclose(out.missing_support, lost, rtol=1e-5)
    kernel = suffix.kernel(target, proposal=forbids)
    _, info = kernel.step(jax.random.key(5), kernel.init(out.sequences))
    np.testing.assert_allclose(info.missing_support, lost, rtol=1e-5)


def test_what_the_target_forbids_is_not_missing():
    target = target_of("hmm", "product")
    asked = proposals.Stateless(
        jax.tree_util.Partial(lambda *args: proposals.locally_optimal(*args))
    )
    assert not asked.covers and proposals.as_proposal(proposals.locally_optimal).covers
    out = smc.run(jax.random.key(6), target, num_particles=16, proposal=asked)
    assert float(out.missing_support) == 0


@pytest.mark.parametrize("name", ["bootstrap", "tempered", "locally_optimal", "powered", "mixture"])
def test_a_law_that_covers_leaves_nothing_out(name: str):
    """`covers` is a claim about a law: checked against the law itself."""
    of = {
        "bootstrap": proposals.bootstrap,
        "tempered": proposals.tempered(0.7),
        "locally_optimal": proposals.locally_optimal,
        "powered": proposals.Powered(lookahead=True),
        "mixture": proposals.mixture([1, 3], [proposals.bootstrap, forbids]),
    }
    proposal, target = proposals.as_proposal(of[name]), target_of("table", "product")
    assert proposal.covers
    x = growing.start(target, proposal, 5)
    law = proposal.law(target, x.logits, x.potential, x.proposal)
    wanted = proposals.locally_optimal(target, x.logits, x.potential)
    assert not (jnp.isneginf(law) & (wanted > -jnp.inf)).any()


def test_a_mixture_takes_its_shares_of_laws_that_add_up_to_one():
    """The locally optimal law and `forbids` do not."""
    target = target_of("table", "product") ** 1.7
    parts = [proposals.as_proposal(part) for part in (proposals.locally_optimal, forbids)]
    mixture = proposals.mixture([1, 3], parts)
    x = growing.start(target, mixture, 2)
    found = mixture.law(target, x.logits + 0.5, x.potential, x.proposal)
    laws = [part.law(target, x.logits + 0.5, x.potential, ()) for part in parts]
    first, second = (np.asarray(jax.nn.softmax(law)) for law in laws)
    np.testing.assert_allclose(np.exp(found), 0.25 * first + 0.75 * second, rtol=1e-5)
    assert all(abs(np.exp(law).sum(1) - 1).min() > 0.1 for law in laws)


def test_rows_that_do_not_move_stay():
    target = target_of("table", "reward")
    proposal = proposals.as_proposal(proposals.bootstrap)
    x = growing.start(target, proposal, 6)
    keys = jax.random.split(jax.random.key(7), 6)
    x, _ = growing.token(keys, target, proposal, x, jnp.ones(6, bool))
    moving = x.active & (jnp.arange(6) % 2 == 0)
    y, added = growing.token(keys, target, proposal, x, moving)
    stays = np.flatnonzero(~np.asarray(moving))
    for name in ("sequences", "active", "log_prob", "drawn", "missing"):
        before, after = getattr(x, name), getattr(y, name)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[stays], np.asarray(b)[stays])
    np.testing.assert_array_equal(np.asarray(added.log_weight(target))[stays], 0)


def test_followed_rows_are_weighed_like_drawn_ones():
    """Following what was drawn gives the same pieces: `token` with and without keys."""
    target = target_of("hmm", "product")
    proposal = proposals.as_proposal(proposals.tempered(1.4))
    start = growing.start(target, proposal, 32)
    everyone = jnp.ones(32, bool)
    drawn, one = growing.token(
        jax.random.split(jax.random.key(8), 32), target, proposal, start, everyone
    )
    given = dataclasses.replace(drawn.sequences, length=jnp.minimum(drawn.sequences.length, 1))
    again, two = growing.token(
        None, target, proposal, start, everyone, growing.Follow(everyone, given)
    )
    for a, b in zip(
        jax.tree.leaves((one, again.sequences)),
        jax.tree.leaves((two, drawn.sequences)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_where_the_law_has_no_mass_nothing_is_drawn():
    """Weight 0, though the target gives the token that stands there mass."""
    target = plain("markov")
    law = proposals.LanguageModel(target * ppl.forced([2]))  # which cannot follow this prompt
    out = smc.run(jax.random.key(1), target, num_particles=4, proposal=law)
    assert out.all_dead and out.missing_support == 1
