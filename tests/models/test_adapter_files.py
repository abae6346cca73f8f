"""Adapters in PEFT's layout, against the logits that peft computed (see make_adapters.py), and back
again; what is refused.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models import lora, transformer
from ppl.lm import LM
from tests.models.test_transformer import load

FIXTURES = Path(__file__).parent / "fixtures_adapters"
ADAPTERS = sorted(folder.name for folder in FIXTURES.iterdir())
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@functools.cache
def base(name: str) -> LM:
    return load(name.partition(".")[0])


@functools.partial(jax.jit, static_argnums=0)
def forward(static: Any, params: Any, ids: Any) -> jax.Array:
    return transformer.forward(static, params, ids)


def logits(lm: LM, name: str) -> np.ndarray:
    """In double precision, as those of peft."""
    ids = load_file(FIXTURES / name / "expected.safetensors")["ids"]
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), lm.params)
        return np.asarray(forward(lm.static, params, jnp.asarray(ids)))


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_are_pefts(name: str, tmp_path: Path):
    """Of what peft wrote, and of what is written from that."""
    expected = load_file(FIXTURES / name / "expected.safetensors")["logits"]
    lm = lora.load(FIXTURES / name, base(name))
    np.testing.assert_allclose(logits(lm, name), expected, atol=1e-5, rtol=0)
    assert np.abs(expected - logits(base(name), name)).max() > 0.1
    lora.save(tmp_path, lm, base(name))
    again = lora.load(tmp_path, base(name))
    jax.tree.map(np.testing.assert_array_equal, again, lm)


@pytest.mark.parametrize("name", ADAPTERS)
def test_names_and_shapes_are_pefts(name: str, tmp_path: Path):
    lora.save(tmp_path, lora.load(FIXTURES / name, base(name)), base(name))
    mine, theirs = (load_file(folder / WEIGHTS) for folder in (tmp_path, FIXTURES / name))
    assert {n: x.shape for n, x in mine.items()} == {n: x.shape for n, x in theirs.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["bias"] == "none"
    assert config["fan_in_fan_out"] == (name == "gpt2.fused")
    if name == "llama3.some":
        assert config["r"] == 4 and config["lora_alpha"] == 9 and not config["rank_pattern"]
        assert config["target_modules"] == [
            f"model.layers.{i}.self_attn.{x}_proj" for i in (1, 2) for x in "qv"
        ]
    if name == "gpt2.fused":
        assert config["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]


def test_fresh_adapters_are_written_whole(tmp_path: Path):
    """B is zero everywhere, and every matrix of a kernel gets the kernel's A."""
    lm = lora.attach(jax.random.key(0), base("llama3.all"), rank=3, alpha=5.0)
    lora.save(tmp_path, lm, base("llama3.all"))
    tensors = load_file(tmp_path / WEIGHTS)
    own = "base_model.model.model.layers.2.self_attn."
    for part in "qkv":
        a = lm.params["layers"][2]["qkv"]["lora"]["a"]
        np.testing.assert_array_equal(tensors[f"{own}{part}_proj.lora_A.weight"].T, a)
    assert tensors[f"{own}k_proj.lora_B.weight"].shape == (16, 3)
    jax.tree.map(np.testing.assert_array_equal, lora.load(tmp_path, base("llama3.all")), lm)


CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "dora": ("llama3.some", {"use_dora": True}, "got use_dora=True; merge it"),
    "method": ("llama3.some", {"peft_type": "LOHA"}, "got peft_type='LOHA'"),
    "bias": ("llama3.some", {"bias": "all"}, "got bias='all'"),
    "base": ("llama3.some", {"init_lora_weights": "pissa"}, "got init_lora_weights='pissa'"),
    "task": ("llama3.some", {"task_type": "SEQ_CLS"}, "got task_type='SEQ_CLS'"),
    "later": ("llama3.some", {"use_novelty": 3}, "got use_novelty=3"),
    "rank": ("llama3.some", {"r": 2}, r"q_proj.lora_A.weight of shape \[2, 32\].* got \[4, 32\]"),
    "kind": ("llama3.some", {"rank_pattern": [2]}, r"expected rank_pattern as .* got list \[2\]"),
    "expression": ("llama3.some", {"target_modules": "(q"}, r"regular expressions .* got '\(q'"),
    "no rank": ("llama3.some", {"r": "4"}, "expected r above 0, got '4'"),
    "missing": (
        "llama3.some",
        {"target_modules": ["q_proj", "o_proj", "v_proj"]},
        r"self_attn.o_proj.lora_A.weight of shape \[4, 32\].* got none",
    ),
    "layers": ("llama3.some", {"layers_to_transform": None}, r"layers.0.self_attn.q_proj.* none"),
}


def copied(name: str, folder: Path, **changes: Any) -> Path:
    shutil.copytree(FIXTURES / name, folder)
    entries = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(entries | changes))
    return folder


@pytest.mark.parametrize("case", CHANGES)
def test_other_configurations_are_refused_by_name(case: str, tmp_path: Path):
    name, changes, message = CHANGES[case]
    with pytest.raises(ValueError, match=message):
        lora.load(copied(name, tmp_path / "adapter", **changes), base(name))


def test_other_models_and_tensors_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"expected h.0.attn.c_attn.lora_A.weight of shape"):
        lora.load(copied("llama3.all", tmp_path / "a", target_modules=["c_attn"]), base("gpt2"))
    folder = copied("llama3.some", tmp_path / "b")
    odd = {"base_model.model.lm_head.lora_A.weight": np.zeros((4, 32), np.float32)}
    save_file(load_file(folder / WEIGHTS) | odd, folder / WEIGHTS)
    with pytest.raises(ValueError, match="got lm_head.lora_A.weight; merge the adapter"):
        lora.load(folder, base("llama3"))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged or truncated"):
        lora.load(folder, base("llama3"))
    adapted = lora.load(FIXTURES / "llama3.some", base("llama3"))
    with pytest.raises(ValueError, match="expected a decoder without adapters"):
        lora.load(FIXTURES / "llama3.some", adapted)


def test_what_is_no_adapter_says_so(tmp_path: Path):
    for path in (tmp_path, FIXTURES.parent / "fixtures" / "gpt2", Path(__file__)):
        with pytest.raises(ValueError, match=f"{path.name}: expected an adapter in PEFT's layout"):
            lora.load(path, base("gpt2"))
    with pytest.raises(FileNotFoundError, match="which does not exist; check the path"):
        lora.load(tmp_path / "absent", base("gpt2"))
    with pytest.raises(ValueError, match="expected a decoder with adapters"):
        lora.save(tmp_path, base("gpt2"), base("gpt2"))


def test_some_layers_alone_may_have_adapters():
    lm = lora.load(FIXTURES / "llama3.some", base("llama3"))
    adapter, plain = lora.split(lm)
    assert adapter.layers[0] == {} and adapter.rank == 8
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (plain, base("llama3"))), strict=True))
    merged = lora.merge(lm)
    np.testing.assert_allclose(logits(merged, "llama3.some"), logits(lm, "llama3.some"), atol=1e-4)
