"""The shapes of results: the same field is the same thing, by keyword, shown shortly, and taken by
`ppl.table` and the diagnostics.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import ppl
from models import tabular
from ppl.rows import weighted_rows
from ppl.sequences import Sequences
from ppl.table import merge
from samplers import base, diagnostics, results, smc
from samplers.base import Cost
from samplers.mcmc import chains, power, suffix
from samplers.results import Chains, Choice, Draws, History, MoveInfo, Trace, Weighted

NUM, ROUNDS = 4, 3
STRINGS = Sequences(
    jnp.array([[0, 1, 2], [0, 1, 2], [1, 1, 0], [2, 2, 2]], jnp.int32),
    jnp.array([2, 2, 3, 0], jnp.int32),
)
LOG_WEIGHTS = jnp.log(jnp.array([2.0, 1.0, 1.0, 0.0]))


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join("ab."[v] for v in ids)


def weighted(samples: Any = STRINGS, **more: Any) -> Weighted:
    trace = Trace(ess=jnp.ones(ROUNDS), log_z=jnp.zeros(ROUNDS), resampled=jnp.zeros(ROUNDS, bool))
    return Weighted(
        samples=samples,
        log_weights=LOG_WEIGHTS,
        log_z=jnp.float32(-1.5),
        log_z_std_error=jnp.float32(0.1),
        num_invalid=jnp.int32(0),
        rounds=jnp.int32(ROUNDS),
        cost=Cost(tokens=jnp.int32(7)),
        trace=trace,
        **more,
    )


def draws() -> Draws:
    return Draws(samples=STRINGS, log_prob=jnp.zeros(NUM), cost=Cost(forwards=jnp.int32(3)))


def choice() -> Choice:
    scores = jnp.array([0.0, 1.0, 3.0, -jnp.inf])
    return Choice(samples=STRINGS, scores=scores, best=jnp.int32(2), cost=base.Cost())


def chain() -> Chains:
    """S = 2 draws of C = 2 chains."""
    pairs = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), STRINGS)
    info = results.moved(jnp.ones((2, 1, 2), bool), changed=jnp.zeros((2, 1, 2), bool))
    return Chains(
        draws={"sequences": pairs, "log_prob": jnp.zeros((2, 2))},
        info=info,
        state=jax.tree.map(lambda leaf: leaf[-1], pairs),
        cost=None,
        steps=5,
        thin=2,
        warmup=1,
    )


SHAPES = {"weighted": weighted, "draws": draws, "choice": choice, "chains": chain}


@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_by_keyword_pytrees_and_shown_shortly(shape: str):
    out = SHAPES[shape]()
    with pytest.raises(TypeError, match="positional"):
        type(out)(*(getattr(out, field.name) for field in dataclasses.fields(out)))
    assert isinstance(out.sequences, Sequences) and out.sequences.tokens.shape[1] == 3
    said = []

    @jax.jit
    def through(x: Any) -> Any:
        said.append(repr(x))
        return x

    again = through(out)
    assert type(again) is type(out)
    jax.tree.map(np.testing.assert_array_equal, again, out)
    for found in (*said, repr(out)):
        assert found.startswith(f"{type(out).__name__}(") and len(found) < 2000
        assert found.count("\n") < 16 and "None" not in found
    assert "<table" in out._repr_html_() and len(out._repr_html_()) < 10_000


def test_strings_are_found_among_named_sites():
    mixed = weighted({"theta": jnp.zeros((NUM, 2)), "text": STRINGS})
    assert mixed.sequences is STRINGS
    latents = weighted({"theta": jnp.zeros((NUM, 2))})
    assert not hasattr(latents, "sequences") and not hasattr(weighted(jnp.zeros(NUM)), "sequences")
    two = weighted({"a": STRINGS, "b": STRINGS})
    with pytest.raises(AttributeError, match="got 2; take the site by its name"):
        _ = two.sequences


def test_what_is_derived():
    assert not bool(weighted().all_dead)
    dead = dataclasses.replace(weighted(), log_z=jnp.float32(-jnp.inf))
    assert bool(dead.all_dead) and float(dead.missing_support) == 0
    assert choice().chosen.tokens.tolist() == [[1, 1, 0]]
    assert chain().num_samples == 2 and chain().sequences.length.tolist() == [3, 0]
    assert Draws(samples=0, log_prob=jnp.zeros(1), cost=base.Cost()).details is None


def test_a_history_and_details_are_shown_by_shape():
    history = History(
        drawn=jnp.zeros((60, 50, 1), jnp.int32),
        log_weights=jnp.zeros((60, 50)),
        ancestors=jnp.zeros((60, 50), jnp.int32),
    )
    said = repr(weighted(history=history, details={"betas": jnp.zeros(100, jnp.float32)}))
    assert "drawn=int32[60, 50, 1]" in said and "betas: float32[100]" in said and len(said) < 2000


def test_moves_report_nothing_of_what_they_do_not_know():
    accepted = jnp.array([True, False])
    info = results.moved(accepted, changed=accepted, tokens=jnp.array([3, 4], jnp.int32))
    assert isinstance(info, MoveInfo) and info.tokens.tolist() == [3, 4]
    assert not info.invalid.any() and not info.outside_support.any()
    assert info.log_ratio.tolist() == info.missing_support.tolist() == [0.0, 0.0]
    assert all(int(count) == 0 for count in jax.tree.leaves(info.cost))
    assert info.proposed.all() and float(info.acceptance) == 0.5
    idle = results.moved(accepted, changed=accepted, proposed=accepted)
    assert float(idle.acceptance) == 1.0
    nothing = dataclasses.replace(info, proposed=jnp.zeros(2, bool))
    assert float(nothing.acceptance) == 0.0
    with pytest.raises(TypeError, match="swapped"):
        results.moved(accepted, changed=accepted, swapped=accepted)


def test_changed_rows():
    other = Sequences(STRINGS.tokens.at[1, 0].set(1), STRINGS.length.at[3].set(1))
    assert results.changed_rows(STRINGS, other).tolist() == [False, True, False, True]
    assert results.changed_rows(jnp.zeros(3), jnp.arange(3.0)).tolist() == [False, True, True]


def test_rows_and_weights_of_every_shape():
    for shape, expected in ((weighted, LOG_WEIGHTS), (draws, jnp.zeros(4)), (chain, jnp.zeros(4))):
        rows, log_weights = weighted_rows(shape())
        jax.tree.map(np.testing.assert_array_equal, (rows, log_weights), (STRINGS, expected))
    with pytest.raises(ValueError, match=r"got a Choice with `scores`.*take its `best`"):
        weighted_rows(choice())
    visits = dataclasses.replace(
        chain(), draws=chain().draws | {"log_weights": LOG_WEIGHTS.reshape(2, 2)}
    )
    np.testing.assert_array_equal(weighted_rows(visits)[1], LOG_WEIGHTS)


def test_means():
    def length(x: Sequences) -> jax.Array:
        return x.length.astype(jnp.float32)

    assert float(diagnostics.mean(weighted(), length)) == pytest.approx((2 * 2 + 2 + 3) / 4)
    assert float(diagnostics.mean(draws(), length)) == pytest.approx(7 / 4)
    assert float(diagnostics.mean(chain(), length)) == pytest.approx(7 / 4)
    # What is dead counts for nothing, whatever f is there.
    spoilt = diagnostics.mean(weighted(), lambda x: jnp.where(x.length == 0, jnp.nan, 1.0))
    assert float(spoilt) == 1.0
    dead = dataclasses.replace(weighted(), log_weights=jnp.full(NUM, -jnp.inf))
    assert np.isnan(diagnostics.mean(dead, length))


def test_tables_of_every_shape():
    def rows(out: Any) -> list[tuple[str, float, int, bool]]:
        found = merge(out, Letters())
        return [(text, round(weight, 4), copies, ended) for text, weight, copies, ended in found]

    assert rows(weighted()) == [("ab", 0.75, 2, True), ("bba", 0.25, 1, False)]
    equal = [("ab", 0.5, 2, True), ("bba", 0.25, 1, False), ("", 0.25, 1, True)]
    assert rows(draws()) == rows(chain()) == equal
    picked = rows(choice())
    assert [row[0] for row in picked] == ["bba", "ab"]
    assert picked[0][1] == pytest.approx(np.exp(3) / (np.exp(3) + np.e + 1), abs=1e-4)
    alive = [(row.text, round(row.weight, 4)) for row in weighted().texts(Letters()) if row.weight]
    assert sorted(alive)[-1] == ("bba", 0.25) and len(weighted().texts(Letters())) == NUM
    assert [row.text for row in chain().texts(Letters())] == [
        row.text for row in draws().texts(Letters())
    ]
    assert max(choice().texts(Letters()), key=lambda row: row.weight) == ("bba", 3.0)
    console = Console(file=io.StringIO(), width=80)
    console.print(ppl.table(choice(), Letters()))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "exp(score)" in said and "best score = 3.000" in said


def test_whatever_is_public_is_shown_shortly():
    """Of every main kind one, as a notebook would show it, and inside of jit."""
    lm = tabular.markov([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4], [0.1, 0.1, 0.8]], eos=2)
    target = lm.given([0], max_tokens=6) ** 2.0 * ppl.banned([1]) * ppl.must_end()
    out = smc.run(jax.random.key(0), target, num_particles=16, history=True)
    walk = power.run(jax.random.key(0), target, num_chains=2, block_size=3, moves_per_block=2)
    kernel = suffix.kernel(target)
    run = chains.run(jax.random.key(0), kernel, walk.sequences, num_samples=8)
    state = kernel.init(walk.sequences)
    stepped = kernel.step(jax.random.key(1), state)
    things = [lm, lm.functions, target, target.prefix, target.potential, out, out.trace, walk]
    things += [kernel, run, state, *stepped, out.cost, base.particles(out.sequences, 16)]
    things += [smc.method(target)]
    for thing in things:
        for found in (repr(thing), repr([thing, thing])[: 2 * 2000]):
            assert 0 < len(found) < 4000 and found.count("\n") < 60
        assert len(repr(thing)) < 2000 and repr(thing).count("\n") < 30
        assert len(thing._repr_html_()) < 10_000

    said = []
    jax.jit(lambda *all: said.extend(map(repr, all)) or 0)(target, out, state, stepped)
    assert len(said) == 4 and all(len(found) < 2 * 2000 for found in said)
