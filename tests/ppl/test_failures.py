"""What Python rewards do wrong is said once: what raised, on which text, how often."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl import failures
from ppl.failures import Tally
from samplers import smc
from samplers.mcmc import chains, suffix
from samplers.smc import importance
from samplers.strings import proposals
from tests.experiments.letters import Letters
from tests.samplers.problems import plain

KEY = jax.random.key(3)


def picky(text: str) -> float:
    """Raises on texts that start with $, is NaN on those that start with a."""
    if text[:1] == "$":
        raise RuntimeError("no money")
    return float("nan") if text[:1] == "a" else 0.1 * len(text)


def raised(out: Any) -> tuple[int, int]:
    """How often the function raised, and failed in all."""
    x = out.sequences
    first = np.where(np.asarray(x.length) > 0, np.asarray(x.tokens)[:, 0], 1)
    return int((first == 3).sum()), int(((first == 3) | (first == 0)).sum())


def test_a_run_says_once_what_raised_on_which_text_and_how_often(caplog: Any):
    target = plain("markov") * ppl.reward(ppl.python(picky, Letters()))
    options = {"num_particles": 32, "proposal": proposals.bootstrap}
    out = importance.run(KEY, target, **options)
    some, failed = raised(out)
    assert 1 < some < failed < 32 and int(out.num_invalid) == failed
    (record,) = caplog.records
    said = record.getMessage()
    assert "the Python function picky " in said and f"It failed in {failed} of 32 calls." in said
    assert ("raised RuntimeError: no money on '$" in said) or ("returned nan for 'a" in said)
    # Another run says it again.
    importance.run(KEY, target, **options)
    assert [r.getMessage() for r in caplog.records] == [said, said]


def test_chains_say_it_once(caplog: Any):
    target = plain("markov") * ppl.reward(ppl.python(picky, Letters()))
    x = ppl.Sequences(jnp.full((4, target.max_tokens), 1, jnp.int32), jnp.zeros(4, jnp.int32))
    chains.run(KEY, suffix.kernel(target), x, num_samples=30)
    (record,) = caplog.records
    assert "picky" in record.getMessage() and " of " in record.getMessage()


def test_outside_of_a_run_the_first_failure_is_said(caplog: Any):
    def outside(ids: list[int]) -> float:
        raise KeyError(len(ids))

    target = plain("markov") * ppl.reward(ppl.python(outside))
    tokens = jnp.full((3, target.max_tokens), 1, jnp.int32)
    for _ in range(3):
        np.asarray(target.log_density(tokens, jnp.zeros(3, jnp.int32)))
    (record,) = caplog.records
    assert "raised KeyError: 0 on [] (token ids: it was given no tokenizer)" in record.getMessage()
    assert "in 3 of 3 calls so far" in record.getMessage()


def test_a_reward_outside_of_0_and_1_says_so(caplog: Any):
    """Of a Python function by its value; of a jax function when the run is over."""
    p = plain("markov")
    target = p * ppl.reward(ppl.log_odds(ppl.python(lambda text: 1.5, Letters())))
    importance.run(KEY, target, num_particles=8)
    (record,) = caplog.records
    assert "expected rewards in [0, 1] to take log-odds of, got 1.5" in record.getMessage()
    caplog.clear()

    def outside(tokens: Any, length: Any) -> Any:
        return jnp.where(tokens[:, 0] == 3, 1.5, 0.5)

    out = importance.run(KEY, p * ppl.reward(ppl.log_odds(outside)), num_particles=32)
    assert int(out.num_invalid) > 0
    (record,) = caplog.records
    assert f"{int(out.num_invalid)} strings got weight 0" in record.getMessage()
    assert "a reward outside [0, 1]" in record.getMessage()


@pytest.mark.slow
def test_a_traced_run_says_it_too(caplog: Any):
    target = plain("markov") * ppl.reward(ppl.python(picky, Letters()))
    run = jax.jit(lambda key: smc.run(key, target, num_particles=32, threshold=0.0))
    jax.block_until_ready(run(KEY))
    (record,) = caplog.records
    assert "picky" in record.getMessage() and "so far" in record.getMessage()


def test_tallies_of_many_threads_and_nested_runs_add_up(caplog: Any):
    def work() -> None:
        for _ in range(50):
            failures.report("f", Tally(calls=2, failed=1, first="f failed"))

    with failures.said_once(["f"]):
        threads = [threading.Thread(target=work) for _ in range(8)]
        with failures.said_once(["f"]):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not caplog.records
    (record,) = caplog.records
    assert "f failed; that string gets weight 0.  It failed in 400 of 800 calls." in caplog.text
    assert not failures._running and "f" not in failures._tallies
    caplog.clear()
    with failures.said_once(["f"]):
        failures.report("f", Tally(calls=3))
    assert not caplog.records


@pytest.mark.bad_input
@pytest.mark.parametrize("make", [ppl.reward, ppl.log_odds])
def test_a_function_of_the_text_is_no_function_of_arrays(make: Any):
    with pytest.raises(ValueError, match=r"got .*<lambda>\(text\); .* ppl.python\(function, tok"):
        make(lambda text: 0.5)
    with pytest.raises(ValueError, match="expected a jax function .* got 3; for a Python"):
        make(3)
    with pytest.raises(ValueError, match="ppl.python"):
        ppl.step_scores(len, ppl.Steps(every=2))


class Pressed:
    """A reward whose calls from number `after` on meet a Ctrl-C."""

    def __init__(self, after: int) -> None:
        self.after, self.calls = after, 0

    def __call__(self, text: str) -> float:
        self.calls += 1
        if self.calls > self.after:
            raise KeyboardInterrupt
        return 0.1 * len(text)


def test_chains_keep_what_they_had_at_an_interrupt_in_a_reward(caplog: Any):
    target = plain("markov") * ppl.reward(ppl.python(Pressed(150), Letters()))
    kernel, start = suffix.kernel(target), importance.run(KEY, plain("markov"), num_particles=2)
    out = chains.run(KEY, kernel, start.sequences, num_samples=500)
    assert out.interrupted and 0 < out.num_samples < 500
    assert out.draws["sequences"].length.shape[0] == out.num_samples and not caplog.records
    quiet = suffix.kernel(plain("markov") * ppl.reward(ppl.python(Pressed(10_000), Letters())))
    whole = chains.run(KEY, quiet, start.sequences, num_samples=out.num_samples)
    np.testing.assert_array_equal(out.draws["sequences"].tokens, whole.draws["sequences"].tokens)


def test_an_interrupt_in_a_reward_is_raised_as_one():
    reward = Pressed(2)
    target = plain("markov") * ppl.reward(ppl.python(reward, Letters()))
    with pytest.raises(KeyboardInterrupt):
        smc.run(KEY, target, num_particles=8)
    assert reward.calls == 3  # the rest is not asked any more
    reward.calls, seen = -20, []
    with pytest.raises(KeyboardInterrupt):
        for out in smc.iterate(KEY, target, num_particles=64):
            seen.append(out)
    assert seen and all(np.isfinite(out.log_z) for out in seen)
    assert not failures.interrupted(now=True)  # nobody would hear of it


def test_programs_of_all_threads_hear_of_an_interrupt():
    """None of them may return what a skipped function gave; and a block outside of the one that
    raised is not told again.
    """
    heard, opened, done = [], threading.Event(), threading.Event()

    def other() -> None:
        try:
            with failures.interruptible():
                opened.set()
                done.wait(5)
        except KeyboardInterrupt:
            heard.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    opened.wait(5)
    with failures.interruptible():
        with pytest.raises(KeyboardInterrupt), failures.interruptible():
            assert failures.interrupted(now=True) and failures.interrupted()
        assert failures.interrupted()  # the other one's is still to be heard
        # ... and what this block's program would be told then is heard here too.
        done.set()
        thread.join()
        with pytest.raises(KeyboardInterrupt), failures.interruptible():
            failures.interrupted(now=True)
    assert heard == ["other"] and not failures.interrupted()
