"""Rounds of several tokens, look-ahead, guides, truncation, blocks and meshes: LAW 1 holds for each
of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import ppl
from ppl.draw import categorical
from samplers import base, population, resampling, smc
from samplers.strings import extending, growing, proposals, selection
from tests.helpers import EOS, MAX_TOKENS, Letters, as_strings
from tests.samplers.problems import check_law, gamma, masses, second, smc_masses, target_of

TEXTS = ["ab", "bab"]
AT_TEXTS = ppl.Steps.by_text(TEXTS, Letters())
EVERY_2, AT_32 = ppl.Steps(every=2), ppl.Steps(delimiters=[3, 2])


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def options(name: str, target: Any) -> dict[str, Any]:
    """How to run, by name."""
    return {
        "steps of two": {"steps": EVERY_2},
        "delimiters": {"steps": AT_32},
        "texts": {"steps": AT_TEXTS},
        "a delimiter that never comes": {
            "steps": ppl.Steps(delimiters=[0]),
            "proposal": proposals.bootstrap,
        },
        "look one step ahead": {"selection": selection.next_step(EVERY_2), "steps": EVERY_2},
        "look to the delimiter": {"selection": selection.next_step(AT_32), "steps": AT_32},
        "look one token ahead of delimiters": {"selection": selection.next_token, "steps": AT_32},
        "guide": {"proposal": proposals.LanguageModel(second(target) ** 0.5)},
        "truncation mixed with a guide": {
            "proposal": proposals.mixture(
                [0.3, 0.7], [proposals.LanguageModel(second(target)), proposals.top_k(2)]
            ),
            "steps": AT_32,
        },
    }[name]


# Blocks draw what one population draws, which is tested below.
LAWS = [
    slow("delimiters", "power_of_all", "hmm"),
    ("look to the delimiter", "every_1", "table"),
    slow("texts", "second_lm", "hmm"),
    slow("steps of two", "every_2", "table"),
    slow("a delimiter that never comes", "forced", "hmm"),
    slow("look one step ahead", "product", "hmm"),
    slow("look one token ahead of delimiters", "regex", "markov"),
    slow("truncation mixed with a guide", "reward", "hmm"),
]


@pytest.mark.parametrize(("how", "problem", "model"), LAWS)
def test_law_1(how: str, problem: str, model: str):
    target = target_of(model, problem)
    found = smc_masses(
        jax.random.key(21), target, 6000, (0.6, 1.1), num_particles=4, **options(how, target)
    )
    for rows in found.values():
        check_law(rows, gamma(model, problem), resolution=0.03)


def test_rounds_end_where_texts_are_complete():
    """From the first token after the round before, with the text that it left: "bb" ends twice in
    b, b, b.  Also of rows that resampling has moved.
    """
    target, num, once_more = target_of("markov", "reward"), 512, 0
    proposal, steps = (
        proposals.as_proposal(proposals.bootstrap),
        ppl.Steps.by_text("bb", Letters()),
    )
    move = jax.jit(extending.extend(target, proposal, steps.within(target.space)).sample)
    x, before = growing.start(target, proposal, num), [()] * num
    for number in range(3):
        x, _ = move(jax.random.key(number), x)
        strings = as_strings(x.sequences.tokens, x.sequences.length)
        for row, (old, new) in enumerate(zip(before, strings, strict=True)):
            grown = range(len(old) + 1, min(len(new) + 1, MAX_TOKENS))
            ends = [n for n in grown if Letters().completes(new[:n], ["bb"])]
            assert ends == ([len(new)] if x.active[row] else [])
            once_more += bool(ends) and not Letters().completes(new[len(old) :], ["bb"])
        x = growing.reorder(target, proposal, x, jnp.arange(num)[::-1])
        before = strings[::-1]
    assert not x.active.all() and once_more > 0


# Planted faults.


def no_carry(patch: pytest.MonkeyPatch) -> None:
    """The look-ahead is not divided out again."""

    def resample(
        key: Any, p: Any, ancestors_of: Any, when: Any, reorder: Any, log_selection: Any
    ) -> Any:
        after, ancestors = base.resample(key, p, ancestors_of, when, reorder, log_selection)
        done = after.log_z != p.log_z
        return dataclasses.replace(
            after, log_weights=jnp.where(done, 0.0, after.log_weights)
        ), ancestors

    patch.setattr(population, "resample", resample)


def nobody_waits(patch: pytest.MonkeyPatch) -> None:
    """Rows whose step is over keep their tokens, but their caches and potentials go on."""
    patch.setattr(extending, "_wait", lambda before, after, moving: after)


def guide_unpaid(patch: pytest.MonkeyPatch) -> None:
    """Tokens of the guide are scored under the model's own law."""

    def draw(self: Any, keys: Any, target: Any, logits: Any, potential: Any, state: Any) -> Any:
        token, _ = categorical(keys, self.law(target, logits, potential, state))
        log_p = jax.nn.log_softmax(logits)
        return proposals.Draw(token, jnp.take_along_axis(log_p, token[:, None], axis=1)[:, 0])

    patch.setattr(proposals.LanguageModel, "draw", draw)


FAULTS = {
    "look-ahead kept": (no_carry, "look to the delimiter", "every_1", "table"),
    "nobody waits": (nobody_waits, "delimiters", "second_lm", "hmm"),
    "guide unpaid": (guide_unpaid, "guide", "reward", "table"),
}


@pytest.mark.parametrize("name", [slow(name) for name in FAULTS])
def test_a_planted_fault_fails(name: str, monkeypatch: pytest.MonkeyPatch):
    plant, how, problem, model = FAULTS[name]
    plant(monkeypatch)
    target = target_of(model, problem)

    def resampler(*args: Any) -> Any:  # a new function, hence a new trace
        return resampling.multinomial(*args)

    run = {"num_particles": 4, "threshold": 1.1, "resampler": resampler, **options(how, target)}
    found = masses(
        lambda key: smc.run(key, target, **run), jax.random.split(jax.random.key(22), 20_000)
    )
    with pytest.raises(AssertionError, match="z = "):
        check_law(found, gamma(model, problem), resolution=0.03)


# What rounds, look-ahead and truncation do.


def test_with_one_token_of_look_ahead_all_weights_are_equal():
    """Where all factors are known in advance, selection by W Z and the locally optimal draw leave
    no spread.
    """
    target = target_of("hmm", "regex")
    out = smc.run(
        jax.random.key(0),
        target,
        num_particles=16,
        selection=selection.next_token,
        threshold=1.1,
        history=True,
    )
    # The first round has nothing to look ahead from: its weights are the normaliser, the same for
    # all.
    weights = np.asarray(out.history.log_weights[: int(out.rounds)])
    alive = weights > -np.inf
    assert alive.any(1).all() and out.trace.resampled[1 : int(out.rounds)].all()
    np.testing.assert_allclose(
        weights.max(1, where=alive, initial=-9), weights.min(1, where=alive, initial=9), atol=1e-5
    )


@pytest.mark.slow
def test_look_ahead_by_a_token_costs_no_pass():
    target = target_of("hmm", "regex")
    plain = smc.run(jax.random.key(0), target, num_particles=8, threshold=0.0)
    ahead = smc.run(
        jax.random.key(0), target, num_particles=8, threshold=0.0, selection=selection.next_token
    )
    np.testing.assert_array_equal(plain.sequences.tokens, ahead.sequences.tokens)
    assert plain.cost.forwards == ahead.cost.forwards
    step = smc.run(
        jax.random.key(0), target, num_particles=8, threshold=0.0, selection=selection.next_step()
    )
    np.testing.assert_array_equal(plain.sequences.tokens, step.sequences.tokens)
    assert step.cost.forwards > plain.cost.forwards and step.cost.tokens > plain.cost.tokens


@pytest.mark.slow
@pytest.mark.parametrize("steps", [EVERY_2, AT_32])
def test_replaying_the_genealogy_gives_the_strings(steps: ppl.Steps):
    target = target_of("table", "every_1")
    out = smc.run(
        jax.random.key(3), target, num_particles=12, threshold=1.1, steps=steps, history=True
    )
    rows: list[list[int]] = [[] for _ in range(12)]
    ends = [False] * 12
    for r in range(int(out.rounds)):
        ancestors, tokens = np.asarray(out.history.ancestors[r]), np.asarray(out.history.drawn[r])
        ends = [ends[a] for a in ancestors]
        rows = [
            [*rows[a], *drawn[drawn >= 0].tolist()]
            for a, drawn in zip(ancestors, tokens, strict=True)
        ]
        for i, row in enumerate(rows):
            drawn = tokens[i][tokens[i] >= 0].tolist()
            assert bool(drawn) != ends[i], "only a string that has ended draws nothing"
            ends[i] = ends[i] or EOS in drawn or len(row) == MAX_TOKENS
            if drawn and not ends[i]:  # a whole step: it ends at a boundary, and at no token before
                marks = (
                    [v in (3, 2) for v in drawn]
                    if steps.every is None
                    else [False] * (len(drawn) - 1) + [True]
                )
                assert marks == [False] * (len(drawn) - 1) + [True]
                assert steps.every is None or len(row) % steps.every == 0
    assert all(ends)
    padded = [[*row, *[EOS] * (MAX_TOKENS - len(row))] for row in rows]
    np.testing.assert_array_equal(out.sequences.tokens, padded)
    drawn = np.asarray(out.history.drawn) >= 0
    assert out.cost.tokens == drawn.sum()
    assert out.cost.forwards == drawn.sum(2).max(1).sum()  # the longest step of each round


@pytest.mark.slow
def test_steps_of_one_token_are_single_tokens():
    """Another order of keys, so other strings; the same number of everything."""
    target = target_of("table", "every_1")
    out = smc.run(
        jax.random.key(3),
        target,
        num_particles=6,
        threshold=1.1,
        steps=ppl.Steps(every=1),
        history=True,
    )
    assert out.history.drawn.shape == (MAX_TOKENS, 6, 1) and out.trace.resampled[1]


@pytest.mark.parametrize("proposal", [slow(proposals.top_k(4)), proposals.top_p(1.0)])
def test_nothing_is_missing_from_a_law_that_is_not_cut(proposal: Any):
    out = smc.run(jax.random.key(0), target_of("hmm", "plain"), num_particles=8, proposal=proposal)
    assert float(out.missing_support) == 0


@pytest.mark.parametrize("proposal", [proposals.top_k(2), proposals.top_p(0.6)])
def test_missing_support_is_reported(proposal: Any):
    """One token: what is missing is the mass of the tokens that are not drawn, by hand."""
    lm = target_of("hmm", "plain").lm
    target = lm.given([2, 0], max_tokens=1) * ppl.reward(lambda tokens, length: 0.5 * length)
    p = np.sort(np.asarray(jax.nn.softmax(target.prefix.logits), np.float64))[::-1]
    kept = proposal.k if proposal.k is not None else int((np.cumsum(p) - p < 0.6).sum())
    out = smc.run(jax.random.key(0), target, num_particles=500, proposal=proposal)
    np.testing.assert_allclose(out.missing_support, p[kept:].sum(), rtol=1e-5)
    assert len(np.unique(out.sequences.tokens)) <= kept


@pytest.mark.slow
def test_a_truncated_proposal_samples_the_truncated_target():
    """Its Z is short of the target's by what is missing: the report is no false alarm."""
    target = target_of("table", "reward")
    keys = jax.random.split(jax.random.key(1), 4000)
    found = masses(
        lambda key: smc.run(key, target, num_particles=4, proposal=proposals.top_k(3)), keys
    )
    with pytest.raises(AssertionError, match="z = -"):
        check_law(found, gamma("table", "reward"), resolution=0.05)


@pytest.mark.slow
def test_blocks_and_one_population_draw_the_same():
    target = target_of("hmm", "second_lm")
    whole = smc.run(jax.random.key(4), target, num_particles=6, threshold=1.1, history=True)
    for block_size in (1, 3):
        parts = smc.run(
            jax.random.key(4),
            target,
            num_particles=6,
            threshold=1.1,
            history=True,
            block_size=block_size,
        )
        np.testing.assert_array_equal(whole.history.drawn, parts.history.drawn)
        np.testing.assert_array_equal(whole.history.ancestors, parts.history.ancestors)
        np.testing.assert_allclose(whole.log_z, parts.log_z, rtol=1e-5)


@pytest.mark.parametrize("size", [0, 4])
def test_a_block_must_divide_the_particles(size: int):
    message = rf"expected block_size to divide the number of particles, got {size} and 6; pass num_"
    with pytest.raises(ValueError, match=message):
        smc.run(jax.random.key(0), target_of("hmm", "plain"), num_particles=6, block_size=size)


def test_a_mesh_must_divide_the_particles():
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    message = (
        "expected the size of the mesh to divide the number of particles, got 2 and 5; pass"
        " num_particles=6"
    )
    with pytest.raises(ValueError, match=message):
        smc.run(jax.random.key(0), target_of("hmm", "plain"), num_particles=5, mesh=mesh)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: proposals.top_k(0), "expected k to be a whole number of at least 1, got 0"),
        (lambda: proposals.top_p(0.0), r"expected a share p in \(0, 1\], got 0.0"),
        (
            lambda: proposals.mixture([1.0], []),
            r"expected one positive share per part, got shares \[1.0\] for 0 parts",
        ),
        (
            lambda: proposals.mixture([0.0], [proposals.bootstrap]),
            "expected one positive share per part",
        ),
        (lambda: selection.annealed(0.0), "expected a temperature above 0, got 0.0"),
    ],
)
def test_bad_options(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_guide_must_have_the_targets_strings():
    target = target_of("hmm", "plain")
    guide = target.lm.given([3], max_tokens=MAX_TOKENS + 1)
    with pytest.raises(
        ValueError, match="expected a guide over the target's strings, .* models with one tokenizer"
    ):
        smc.run(jax.random.key(0), target, proposal=proposals.LanguageModel(guide))


def test_the_best_guide_leaves_no_weights():
    """Guided by itself with a power, a plain target's power is paid at no cost in variance but the
    normaliser's.
    """
    target = target_of("hmm", "plain")
    out = smc.run(
        jax.random.key(0),
        target,
        num_particles=8,
        proposal=proposals.LanguageModel(target),
        threshold=0.0,
    )
    np.testing.assert_allclose(out.log_weights, 0.0, atol=1e-5)
    np.testing.assert_allclose(out.log_z, 0.0, atol=1e-5)
    assert (
        out.cost.forwards
        > smc.run(jax.random.key(0), target, num_particles=8, threshold=0.0).cost.forwards
    )


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.7])
def test_entropic_temperature(progress: float):
    log_weights = jnp.log(jnp.array([0.9, 0.05, 0.03, 0.02]))
    size = 1 / (0.9**2 + 0.05**2 + 0.03**2 + 0.02**2)
    expected = max(1.0, 4 / size * (1 - progress)) if size < 2 and progress < 0.5 else 1.0
    found = selection.entropic_temperature(log_weights, jnp.float32(progress))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert selection.entropic_temperature(jnp.zeros(4), jnp.float32(0.1)) == 1
    assert selection.entropic_temperature(jnp.full(4, -jnp.inf), jnp.float32(0.1)) == 1
