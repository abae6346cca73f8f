"""The replay buffer against a dictionary in plain Python, and the laws of its draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortized.objectives import balance
from amortized.strings import replay
from ppl.sequences import Sequences

EOS, HORIZON, SLOTS, PROMPTS = 2, 3, 4, 2


def batch(seed: int, num: int = 12) -> tuple[Sequences, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    length = rng.integers(0, HORIZON + 1, num)
    tokens = np.where(np.arange(HORIZON) < length[:, None], rng.integers(0, 2, (num, HORIZON)), EOS)
    log_reward = rng.normal(size=(num, HORIZON + 1)).astype(np.float32)
    log_reward[0, length[0]], log_reward[1, length[1]] = -np.inf, np.nan
    prompts = rng.integers(0, PROMPTS, num)
    sequences = Sequences(jnp.asarray(tokens, jnp.int32), jnp.asarray(length, jnp.int32))
    return sequences, jnp.asarray(log_reward), jnp.asarray(prompts)


def contents(buffer: replay.Replay) -> list[dict[tuple[int, ...], float]]:
    score = np.asarray(buffer.score)
    found: list[dict[tuple[int, ...], float]] = []
    for prompt in range(buffer.length.shape[0]):
        rows = np.flatnonzero(np.asarray(buffer.filled[prompt]))
        strings = [
            tuple(np.asarray(buffer.tokens)[prompt, k, : buffer.length[prompt, k]].tolist())
            for k in rows
        ]
        assert len(set(strings)) == len(strings), "a string twice"
        found.append(dict(zip(strings, score[prompt, rows].tolist(), strict=True)))
    return found


def test_it_keeps_the_best_strings_of_each_prompt_once():
    add = jax.jit(replay.add)
    buffer = replay.empty(PROMPTS, SLOTS, HORIZON)
    model: list[dict[tuple[int, ...], float]] = [{} for _ in range(PROMPTS)]
    for seed in range(5):
        sequences, log_reward, prompts = batch(seed)
        buffer = add(buffer, sequences, log_reward, prompts)
        for row, prompt in enumerate(np.asarray(prompts)):
            length = int(sequences.length[row])
            string, score = (
                tuple(np.asarray(sequences.tokens)[row, :length].tolist()),
                float(log_reward[row, length]),
            )
            slots = model[prompt]
            if not np.isfinite(score):
                continue
            if string not in slots and len(slots) == SLOTS:
                worst = min(slots, key=lambda s: slots[s])
                if score <= slots[worst]:
                    continue
                del slots[worst]
            slots[string] = score
        assert contents(buffer) == model
    assert all(len(slots) == SLOTS for slots in model)
    assert not {"log_q", "log_prob"} & set(vars(buffer))


def test_rewards_come_back_untempered_whole_and_padded():
    sequences, log_reward, _ = batch(0, num=3)
    log_reward = jnp.nan_to_num(log_reward, nan=0.5, neginf=0.5)
    buffer = jax.jit(replay.add)(replay.empty(1, 8, HORIZON), sequences, log_reward)
    drawn = jax.jit(lambda key: replay.sample(key, buffer, jnp.zeros(64, jnp.int32), EOS))(
        jax.random.key(0)
    )
    stored = {
        tuple(t): r for t, r in zip(sequences.tokens.tolist(), np.asarray(log_reward), strict=True)
    }
    assert bool(drawn.found.all())
    assert {tuple(t) for t in drawn.sequences.tokens.tolist()} == set(stored)
    for tokens, row in zip(
        drawn.sequences.tokens.tolist(), np.asarray(drawn.log_reward), strict=True
    ):
        np.testing.assert_array_equal(row, stored[tuple(tokens)])


@pytest.mark.parametrize(
    "priority", [replay.uniform, replay.ranked(0.5)], ids=["uniform", "ranked"]
)
def test_draws_follow_the_priorities(priority: replay.Priority):
    scores = np.array([0.3, 2.0, -1.0])
    tokens = jnp.asarray([[0, EOS, EOS], [1, EOS, EOS], [0, 1, EOS]])
    log_reward = jnp.broadcast_to(jnp.asarray(scores, jnp.float32)[:, None], (3, HORIZON + 1))
    sequences = Sequences(tokens.astype(jnp.int32), jnp.asarray([1, 1, 2], jnp.int32))
    buffer = jax.jit(replay.add)(replay.empty(1, 5, HORIZON), sequences, log_reward)
    num = 20_000
    drawn = jax.jit(
        lambda key: replay.sample(key, buffer, jnp.zeros(num, jnp.int32), EOS, priority)
    )(jax.random.key(1))
    rank = np.array([1, 0, 2])
    law = np.full(3, 1 / 3) if priority is replay.uniform else 1 / (0.5 * 3 + rank)
    law = law / law.sum()
    counts = np.array(
        [(np.asarray(drawn.log_reward)[:, 0] == np.float32(s)).mean() for s in scores]
    )
    assert np.isclose(counts.sum(), 1)
    assert (np.abs(counts - law) < 5 * np.sqrt(law * (1 - law) / num)).all()


def test_prompts_without_strings_are_flagged_and_give_no_gradient():
    sequences, log_reward, _ = batch(3)
    buffer = jax.jit(replay.add)(
        replay.empty(2, SLOTS, HORIZON), sequences, log_reward, jnp.ones(12, jnp.int32)
    )
    drawn = jax.jit(lambda b: replay.sample(jax.random.key(0), b, jnp.asarray([0, 1, 0, 1]), EOS))(
        buffer
    )
    assert drawn.found.tolist() == [False, True, False, True]
    assert (np.asarray(drawn.sequences.tokens)[::2] == EOS).all() and (
        np.asarray(drawn.sequences.length)[::2] == 0
    ).all()

    @jax.jit
    def gradient(log_q: jax.Array, drawn: replay.Drawn) -> tuple:
        def loss(log_q: jax.Array) -> tuple:
            stop, weight = jnp.zeros((4, HORIZON + 1)), drawn.found.astype(jnp.float32)
            x = balance.strings(
                log_q, stop, drawn.log_reward, drawn.sequences.length, weight=weight
            )
            unweighted = balance.strings(log_q, stop, drawn.log_reward, drawn.sequences.length)
            return balance.tb(x, 0.0), balance.flags(unweighted)

        return jax.grad(loss, has_aux=True)(log_q)

    slope, counts = gradient(jnp.full((4, HORIZON), -1.0), drawn)
    assert np.isfinite(np.asarray(slope)).all() and (np.asarray(slope)[::2] == 0).all()
    assert int(counts["dead"]) == 2


@pytest.mark.bad_input
def test_an_empty_buffer_is_an_error_where_it_can_be():
    buffer = replay.empty(1, SLOTS, HORIZON)
    prompts = jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="add rollouts"):
        replay.sample(jax.random.key(0), buffer, prompts, EOS)
    inside = jax.jit(lambda b: replay.sample(jax.random.key(0), b, prompts, EOS).found)(buffer)
    assert not inside.any()
    with pytest.raises(ValueError, match="num_slots=0"):
        replay.empty(1, 0, HORIZON)
