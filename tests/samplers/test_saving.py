"""Results in files: what comes back is what was saved, in its own types; nothing else is read."""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ppl
from samplers import saving, smc
from samplers.draws import ancestral
from samplers.mcmc import chains, suffix
from samplers.search import best_of_n
from tests.samplers.problems import target_of

KEY = jax.random.key(3)


def same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b) and a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


RUNS = {
    "weighted": lambda t: smc.run(KEY, t, num_particles=4, history=True),
    "draws": lambda t: ancestral.run(KEY, t.under(t.lm), num_samples=3),
    "choice": lambda t: best_of_n.run(KEY, t, num_samples=3),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_was_saved_comes_back(name: str, tmp_path: Path):
    out = RUNS[name](target_of("table", "reward"))
    saving.save(out, tmp_path / "out.npz")
    found = saving.load(tmp_path / "out.npz")
    assert type(found) is type(out) and repr(found) == repr(out)
    same(found, out)
    assert os.listdir(tmp_path) == ["out.npz"]


@pytest.mark.slow
def test_chains_go_on_from_a_file_as_from_memory(tmp_path: Path):
    target = target_of("table", "reward")
    kernel = suffix.kernel(target)
    start = ancestral.run(KEY, target.under(target.lm), num_samples=2).sequences
    out = chains.run(KEY, kernel, start, num_samples=2)
    saving.save(out, tmp_path / "chains.npz")
    found = saving.load(tmp_path / "chains.npz")
    same(found, out)
    more = [chains.run(KEY, kernel, start, num_samples=4, resume=x).draws for x in (found, out)]
    same(*more)


def test_trees_of_many_kinds(tmp_path: Path):
    tree = {
        "keys": jax.random.split(KEY, 2),
        "half": jnp.ones(3, jnp.bfloat16) / 3,
        "host": (np.arange(3, dtype=np.int16), [1, 2.5, "text", None, True, float("-inf")]),
        "state": optax.ScaleByAdamState(jnp.int32(3), jnp.ones(2), np.float64(0.5)),
        "empty": ppl.Sequences(jnp.zeros((0, 2), jnp.int32), jnp.zeros(0, jnp.int32)),
    }
    saving.save(tree, tmp_path / "tree")
    found = saving.load(tmp_path / "tree")
    assert found["host"][1] == tree["host"][1] and found["host"][0].dtype == np.int16
    same({**found, "host": ()}, {**tree, "host": ()})


def test_a_record_of_others_is_no_tuple(tmp_path: Path):
    """It would come back as another tree."""
    point = collections.namedtuple("point", "x y")(1, 2)
    with pytest.raises(ValueError, match="test_saving.point at result.p; save the parts"):
        saving.save({"p": point}, tmp_path / "out.npz")
    with pytest.raises(ValueError, match="OrderedDict at result.p"):
        saving.save({"p": collections.OrderedDict(a=1)}, tmp_path / "out.npz")


def test_what_is_no_data_is_refused_by_its_place(tmp_path: Path):
    with pytest.raises(ValueError, match=r"builtins.function at result.a.1; save the parts"):
        saving.save({"a": [1, lambda x: x]}, tmp_path / "out.npz")
    assert not os.listdir(tmp_path)


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "out.npz"
    saving.save({"x": jnp.arange(3)}, file)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saving.save({"x": jnp.arange(4)}, file)
    assert saving.load(file)["x"].shape == (3,) and os.listdir(tmp_path) == ["out.npz"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (["record", "os:system", []], "a record of os, whose records are not read"),
        (["record", "samplers.smc.sequential:run", []], "which is no record"),
        (["jax", "a7", "float32"], "KeyError"),
        (["record", "ppl.sequences:Sequences", [["gone", ["value", 1]]]], "TypeError"),
    ],
)
def test_another_file_is_refused_by_name(tree: Any, message: str, tmp_path: Path):
    file = tmp_path / "bad.npz"
    np.savez(file, manifest=np.array(json.dumps({"result": tree})))
    with pytest.raises(ValueError, match=rf"expected .*bad.npz to be a result.*{message}"):
        saving.load(file)


def test_bytes_that_are_no_archive(tmp_path: Path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not quite")
    with pytest.raises(ValueError, match="expected .*bad.npz to be a result"):
        saving.load(tmp_path / "bad.npz")
    with pytest.raises(FileNotFoundError):
        saving.load(tmp_path / "none.npz")
