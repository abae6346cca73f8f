"""The training loop against a plain one, and to the bits: longer runs, other paces, interrupts,
kills, checkpoints.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from amortized import fit, progress, training
from amortized.training import Training
from tests import conftest
from tests.helpers import TraceCounter

KEY = jax.random.key(5)
TRUTH = np.array([1.0, -2.0, 0.5], np.float32)
BAD = 5  # every so many draws there is NaN in the batch


def draw(key: Any, params: Any, data: Any) -> tuple[Any, Any]:
    """A regression problem; `data` counts the draws, and holds a key of its own."""
    x = jax.random.normal(key, (4, 3)) + jax.lax.stop_gradient(0.01 * params["w"])
    noise = jax.random.normal(jax.random.fold_in(data["key"], data["draws"]), (4,))
    y = jnp.where(jax.random.bernoulli(key, 1 / BAD), jnp.nan, x @ TRUTH + 0.1 * noise)
    return (x, y), data | {"draws": data["draws"] + 1}


def loss(params: Any, key: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    x, y = batch
    jitter = 0.01 * jax.random.normal(key, y.shape)
    value = jnp.mean((x @ params["w"] + params["b"] - y - jitter) ** 2)
    return value, {"tokens": jnp.int32(4), "bias": params["b"]}


def start() -> tuple[Any, Any]:
    return {"w": jnp.zeros(3, jnp.float32), "b": jnp.float32(0)}, {
        "draws": 0,
        "key": jax.random.key(1),
    }


OPTIMIZER = optax.multi_transform(
    {"slow": optax.adam(0.03), "fast": optax.sgd(0.3)}, {"w": "slow", "b": "fast"}
)


def training_of(**parts: Any) -> Training:
    """The regression, or another in some parts."""
    params, data = start()
    return Training(**{"params": params, "draw": draw, "loss": loss, "data": data} | parts)


def run(num_steps: int = 50, **options: Any) -> fit.Fitted:
    options = {"optimizer": OPTIMIZER, "chunk": 8, "progress": False, **options}
    return fit.run(KEY, training_of(), num_steps=num_steps, **options)


def assert_equal(a: fit.Fitted, b: fit.Fitted) -> None:
    parts = [(x.params, x.best, x.history, x.data["draws"], x.steps, x.stopped) for x in (a, b)]
    jax.tree.map(np.testing.assert_array_equal, *parts)


def plain_loop(num_steps: int, clip: float, accumulate: int) -> tuple[Any, list[float], int]:
    """What `fit.run` says it does, with a Python loop."""
    params, data = start()
    opt_state, losses, skipped = OPTIMIZER.init(params), [], 0
    value_and_grad = jax.jit(jax.value_and_grad(lambda *args: loss(*args)[0]))
    for t in range(num_steps):
        after, total, values = data, jax.tree.map(jnp.zeros_like, params), []
        for key in jax.random.split(jax.random.fold_in(KEY, t), accumulate):
            draw_key, loss_key = jax.random.split(key)
            batch, after = draw(draw_key, params, after)
            value, grads = value_and_grad(params, loss_key, batch)
            total = jax.tree.map(lambda a, b: a + b / accumulate, total, grads)
            values.append(value)
        losses.append(float(np.mean(values)))
        if not np.isfinite(losses[-1]):
            skipped += 1
            continue
        norm = optax.tree.norm(total)
        total = jax.tree.map(lambda g, norm=norm: g * jnp.minimum(1.0, clip / norm), total)
        updates, opt_state = OPTIMIZER.update(total, opt_state, params)
        params, data = optax.apply_updates(params, updates), after
    return params, losses, skipped


def test_it_is_the_plain_loop():
    """Skipped steps, clipping, accumulation and groups of parameters, on problems with a NaN now
    and then.
    """
    out = run(20, max_grad_norm=2.0, accumulate=2)
    params, losses, skipped = plain_loop(20, 2.0, 2)
    assert out.skipped == skipped and 2 < skipped < 15 and out.stopped == ""
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), out.params, params
    )
    np.testing.assert_allclose(out.history["loss"], losses, rtol=1e-4)
    np.testing.assert_array_equal(out.history["skipped"], ~np.isfinite(losses))
    np.testing.assert_array_equal(out.history["tokens"], 8)
    assert int(out.data["draws"]) == 2 * (20 - skipped)  # what a skipped step drew is forgotten
    np.testing.assert_allclose(run(400).params["w"], TRUTH, atol=0.1)


def test_longer_runs_keep_their_prefix_and_the_pace_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
):
    out = run(50, patience=100)
    for pace in (-1.0, 1e9):  # one step at a time; as many as there may be
        monkeypatch.setattr(fit, "SECONDS", pace)
        assert_equal(run(50, patience=100), out)
    longer = run(70).history
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:50]), out.history, longer)


def test_one_compilation_serves_all():
    counter = TraceCounter(loss)

    def traces(num_steps: int) -> int:
        before = counter.count
        options = {"optimizer": OPTIMIZER, "chunk": 8, "progress": False}
        out = fit.run(KEY, training_of(loss=counter), num_steps=num_steps, **options)
        assert out.steps == num_steps
        return counter.count - before

    once = traces(8)
    assert traces(29) <= 1 < once <= 4  # the shapes are looked at again


def frozen_loss(weights: Any, params: Any, key: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    return jnp.mean((weights * params["w"][0] - 1) ** 2), {}


def frozen_draw(weights: Any, key: Any, params: Any, data: Any) -> tuple[Any, Any]:
    return weights.sum(), data


def test_frozen_weights_are_arguments_not_constants():
    """Of `Partial`s; a plain closure, planted, shows in the text of the program."""
    weights, small = (
        jnp.asarray(np.random.default_rng(0).normal(size=50_000), jnp.float32),
        start()[0],
    )

    def text(loss: Any, draw: Any) -> int:
        fixed = {"w": None, "b": None}
        how = training.Method(KEY, draw, loss, fixed, OPTIMIZER, chunk=8)
        state = training.initial(how, small, None)
        return len(training.steps.lower((how, np.int32(0), np.int32(1)), state).as_text())

    partial = [jax.tree_util.Partial(f, weights) for f in (frozen_loss, frozen_draw)]
    assert text(*partial) < 100_000 < text(functools.partial(_closed, weights), partial[1])


def _closed(weights: Any, *args: Any) -> Any:
    return frozen_loss(weights, *args)


def test_patience_keeps_the_best_parameters():
    """The criterion grows after step 24: three chunks without a better one, and the parameters of
    step 24.
    """

    def criterion(rows: Any) -> float:
        assert np.isfinite(rows["loss"]).all()
        return abs(float(rows["bias"].mean()) - 1.2)

    def climb(params: Any, key: Any, batch: Any) -> Any:
        return -params["b"] + 0 * batch[0].sum(), {"bias": params["b"]}

    options = {"optimizer": optax.sgd(0.06), "chunk": 8, "progress": False, "criterion": criterion}
    out = fit.run(KEY, training_of(loss=climb), num_steps=200, patience=3, **options)
    assert (out.steps, out.stopped) == (48, "patience")
    np.testing.assert_allclose([out.best["b"], out.params["b"]], [24 * 0.06, 48 * 0.06], rtol=1e-5)


def test_accumulated_gradients_are_averaged():
    """Unclipped, and by an optimiser that knows how large a gradient is: four draws with the
    gradients 1, 2, 3 and 4 make one step of 2.5.
    """

    def count(key: Any, params: Any, data: Any) -> tuple[Any, Any]:
        return data["draws"] + 1, data | {"draws": data["draws"] + 1}

    def slope(params: Any, key: Any, batch: Any) -> Any:
        return params["b"] * batch, {"batch": batch}

    options = {"optimizer": optax.sgd(1.0), "num_steps": 1, "progress": False}
    training = training_of(draw=count, loss=slope)
    out = fit.run(KEY, training, accumulate=4, chunk=1, **options)
    np.testing.assert_allclose(out.params["b"], -2.5)
    np.testing.assert_allclose([out.history["grad_norm"][0], out.history["batch"][0]], [2.5, 2.5])
    clipped = fit.run(KEY, training, accumulate=4, chunk=1, max_grad_norm=2.0, **options)
    np.testing.assert_allclose(clipped.params["b"], -2.0, rtol=1e-6)
    np.testing.assert_allclose(clipped.history["grad_norm"], 2.5)  # before clipping


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_finite_loss_with_gradients_that_are_not_is_skipped(max_grad_norm: float | None):
    """|w| at w = 0, by the root of its square: a loss of 0, and a gradient of 0 / 0."""

    def distance(params: Any, key: Any, batch: Any) -> Any:
        return jnp.sqrt(jnp.sum(params["w"] ** 2)) + 0.0 * params["b"], {}

    options = {"optimizer": OPTIMIZER, "num_steps": 3, "chunk": 8, "progress": False}
    out = fit.run(KEY, training_of(loss=distance), max_grad_norm=max_grad_norm, **options)
    np.testing.assert_array_equal(out.history["loss"], 0.0)
    assert out.skipped == 3 and np.isnan(out.history["grad_norm"]).all()
    np.testing.assert_array_equal(out.params["w"], 0.0)
    assert int(out.data["draws"]) == 0


def test_nothing_finite_is_the_end():
    def hopeless(params: Any, key: Any, batch: Any) -> Any:
        return params["b"] * jnp.nan, {}

    options = {"optimizer": OPTIMIZER, "num_steps": 100, "chunk": 8}
    out = fit.run(KEY, training_of(loss=hopeless), **options)
    assert (out.steps, out.skipped, out.stopped) == (8, 8, "not finite")
    np.testing.assert_array_equal(out.params["w"], 0)


# Checkpoints.


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("at", [11, 32])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    options = {"patience": 100, "max_grad_norm": 1.0, "directory": tmp_path, "save_every": 2}
    whole = run(60, patience=100, max_grad_norm=1.0)
    show = progress.Bar.show

    def interrupt(self: Any, step: int, *args: Any) -> None:
        show(self, step, *args)
        if step >= at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(fit, "SECONDS", -1.0)
    with monkeypatch.context() as patched:
        patched.setattr(progress.Bar, "show", interrupt)
        out = run(60, **options)
    assert (out.steps, out.stopped) == (at, "interrupted")
    assert_equal(run(60, **options), whole)
    assert_equal(run(60, **options), whole)  # nothing left to do
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


SCRIPT = """
import sys
import jax
jax.config.update("jax_disable_most_optimizations", True)
from tests.amortized import test_fit
test_fit.run(100_000, directory=sys.argv[1], save_every=1, patience=10**6)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path):
    """kill -9 at an arbitrary moment."""
    environment = os.environ | {"XLA_FLAGS": conftest.FLAGS}  # other flags, other bits
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment)
    deadline = time.monotonic() + 120
    while max((int(p.name) for p in tmp_path.glob("[0-9]*") if p.name.isdigit()), default=0) < 100:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    latest = max(int(p.name) for p in tmp_path.glob("[0-9]*") if p.name.isdigit())
    num = latest + 20
    assert_equal(
        run(num, directory=tmp_path, save_every=1, patience=10**6), run(num, patience=10**6)
    )


def damage(checkpoint: Path, how: str) -> None:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for file in [path for path in files if (how == "record") == ("record" in path.parts)]:
        file.write_bytes(b"" if how == "empty" else file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("how", ["record", "state", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, how: str):
    run(8, directory=tmp_path)
    run(16, directory=tmp_path)
    damage(tmp_path / "16", how)
    with pytest.warns(UserWarning, match=r"16, got a damaged one .* goes on from step 8"):
        out = run(24, directory=tmp_path)
    assert_equal(out, run(24))
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} >= {"16.damaged", "24"}
    for step in ("8", "16", "24"):
        if (tmp_path / step).exists():
            damage(tmp_path / step, how)
    with pytest.raises(ValueError, match="expected a whole checkpoint in .*, got damaged ones of"):
        run(32, directory=tmp_path)


@pytest.mark.bad_input
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    run(8, directory=tmp_path)
    options = {"optimizer": OPTIMIZER, "chunk": 8, "directory": tmp_path}
    wider = {"w": jnp.zeros(5, jnp.float32), "b": jnp.float32(0)}
    with pytest.raises(
        ValueError, match=r"expected params\.w to be float32\[5\] in .*, got float32\[3\]"
    ):
        other = training_of(
            params=wider,
            draw=lambda k, p, d: (0, d),
            loss=lambda p, k, b: (p["w"].sum(), {"tokens": p["b"], "bias": p["b"]}),
        )
        fit.run(KEY, other, num_steps=9, **options)
    with pytest.raises(
        ValueError, match="expected to go on with a run of max_grad_norm = 1.0, got one of None"
    ):
        run(9, directory=tmp_path, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="a run of rate = 2, got one of None"):
        run(9, directory=tmp_path, config={"rate": 2})
    with pytest.raises(ValueError, match="expected opt_state"):
        run(9, directory=tmp_path, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="expected num_steps to count the 8 steps"):
        run(7, directory=tmp_path)
    with pytest.raises(ValueError, match="another key's"):
        fit.run(jax.random.key(6), training_of(), num_steps=9, **options)


@pytest.mark.parametrize(
    ("share", "said"), [(0.04, []), (0.25, ["25 % of the strings of the last 8 steps"])]
)
def test_it_says_when_many_strings_have_reward_zero(
    caplog: pytest.LogCaptureFixture, share: float, said: list[str]
):
    """Once, at the end, of the last chunk: what was so at the start is no more."""

    def reporting(params: Any, key: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        zero = jnp.where(batch < 10, 1.0, share)
        return (params["b"] - 1) ** 2, {fit.ZERO: zero}

    one = training_of(
        loss=reporting, draw=lambda key, params, data: (data, data + 1), data=jnp.int32(0)
    )
    fit.run(KEY, one, optimizer=OPTIMIZER, num_steps=20, chunk=8, progress=False)
    assert [r.getMessage().partition(" had ")[0] for r in caplog.records] == said


@pytest.mark.bad_input
def test_bad_input():
    def fitted(loss: Any = loss, draw: Any = draw, **options: Any) -> Any:
        options = {"optimizer": OPTIMIZER, "num_steps": 2, **options}
        return fit.run(KEY, training_of(loss=loss, draw=draw), **options)

    for name in ("num_steps", "accumulate", "chunk", "patience", "save_every"):
        with pytest.raises(ValueError, match=f"expected {name} to be a whole number"):
            fitted(**{name: 0})
    with pytest.raises(ValueError, match="expected draw to return data of the shapes"):
        fitted(draw=lambda key, params, data: (0, jnp.zeros(2)))
    with pytest.raises(ValueError, match=r"expected scalars of the loss, got loss of shape \(3,\)"):
        fitted(loss=lambda params, key, batch: (params["w"], {}))
    with pytest.raises(ValueError, match=r"got each of shape \(3,\)"):
        fitted(loss=lambda params, key, batch: (params["b"], {"each": params["w"]}))
    with pytest.raises(ValueError, match="metrics of other names"):
        fitted(loss=lambda params, key, batch: (params["b"], {"loss": params["b"]}))


def test_what_the_bar_says():
    rows = {"loss": np.array([1.0, 3.0, np.nan]), "skipped": np.array([False, False, True])}
    rows |= {"tokens": np.array([500.0, 500.0, 500.0]), "elbo": np.array([-1.5, -2.5, np.nan])}
    assert progress.summary(rows, 0.5) == "loss 2  elbo -2  3,000 tokens/s  1 skipped"
