"""`models.load`: every accepted form, and every form of damage with the error it gives."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models import download, loading

from .fixtures_io import builders


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return builders.directory(tmp_path / "model", "smollm2")


def test_a_directory_gives_the_model_and_its_tokenizer(directory: Path):
    lm, tok = models.load(directory)
    assert (lm.vocab_size, lm.eos, lm.context) == (96, 2, 64)
    assert (tok.vocab_size, tok.eos, tok.bos) == (96, 2, 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {jnp.dtype("float32")}
    prompt = tok.chat("the end")
    assert lm.prefill(prompt).logits.shape == (96,)
    assert tok.decode(prompt) == "user: the enda: "


def test_a_model_alone_needs_no_tokenizer(directory: Path):
    whole, tok = models.load(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        models.load(directory)
    lm = models.load_lm(directory)
    assert lm.eos == tok.eos == 2 and models.load_lm(directory, eos=5).eos == 5
    jax.tree.map(np.testing.assert_array_equal, whole.params, lm.params)


@pytest.mark.parametrize(("eos", "got"), [(None, "none in the configuration"), (96, "96")])
def test_a_model_alone_needs_its_eos(eos: int | None, got: str, directory: Path):
    config = json.loads((directory / "config.json").read_text())
    config.pop("eos_token_id", None)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"ends a string, in \[0, 96\), got {got}; pass eos="):
        models.load_lm(directory, eos=eos)


def test_a_path_as_text_and_a_trailing_slash(directory: Path):
    assert models.load(f"{directory}/")[0].vocab_size == 96


def test_shards_give_the_same_weights_as_one_file(directory: Path):
    whole, _ = models.load(directory)
    builders.shard(directory, 3)
    sharded, _ = models.load(directory)
    jax.tree.map(np.testing.assert_array_equal, whole.params, sharded.params)


def test_dtype_is_that_of_every_weight(directory: Path):
    lm, _ = models.load(directory, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {jnp.dtype("bfloat16")}


def test_stored_bfloat16_becomes_float32_on_cpu(directory: Path):
    path = directory / "model.safetensors"
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(path).items()}
    save_file(tensors, path)
    lm, _ = models.load(directory)
    embed = lm.params["embed"]
    assert embed.dtype == jnp.float32
    np.testing.assert_array_equal(embed, tensors["model.embed_tokens.weight"].astype(np.float32))


def test_a_registered_name_is_fetched(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = builders.gguf_of(tmp_path / "tiny.gguf", "llama", directory)
    fetched = []
    monkeypatch.setattr(download, "fetch", lambda name: fetched.append(name) or path)
    assert models.load("smollm2-135m")[0].vocab_size == 96
    assert fetched == ["smollm2-135m"]


def test_the_hub_downloads_only_what_is_read(directory: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        calls.append((repository, allow_patterns))
        return str(directory)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert models.load("hf:org/name")[0].vocab_size == 96
    [(repository, patterns)] = calls
    assert repository == "org/name"
    assert not any("bin" in pattern or "pt" in pattern or pattern == "*" for pattern in patterns)
    assert {"config.json", "model*.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(
        patterns
    )


def test_the_hub_without_its_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match=r"huggingface_hub to load hf:org/name.*pip install 'tiltlm\[hub\]'"
    ):
        models.load("hf:org/name")


def test_an_unknown_name_lists_what_is_accepted():
    with pytest.raises(
        ValueError,
        match=r"expected a registered name \(smollm2-135m\), a directory .*'smollm'.*spelling",
    ):
        models.load("smollm")


def test_another_file_type_is_refused(directory: Path):
    with pytest.raises(
        ValueError,
        match=r"\.gguf file or hf:org/name, got the file .*model\.safetensors; .* directory",
    ):
        models.load(directory / "model.safetensors")


def test_a_missing_gguf_file_is_named(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"expected a GGUF file, got .*absent\.gguf, which does not exist"
    ):
        models.load(tmp_path / "absent.gguf")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(directory: Path, name: str):
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        models.load(directory)


def test_pickled_weights_are_never_read(directory: Path):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(
        FileNotFoundError,
        match=r"got only pytorch_model\.bin, which are pickles.*safe_serialization",
    ):
        models.load(directory)


def test_every_truncation_of_safetensors_is_refused(directory: Path):
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError,
            match=r"model\.safetensors: expected a safetensors file .* delete it and fetch",
        ):
            models.load(directory)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"of {len(whole)} bytes, got {len(whole) - 1} bytes"):
        models.load(directory)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: raw[:8] + b"x" + raw[9:],
        lambda raw: raw.replace(b'"F32"', b'"F99"', 1),
        lambda raw: raw.replace(b"data_offsets", b"data_offsetz", 1),
        lambda raw: raw.replace(b'"shape":[96', b'"shape":[95', 1),
    ],
    ids=["header length", "JSON", "type", "entry", "shape"],
)
def test_corrupted_safetensors_are_refused(directory: Path, damage):
    path = directory / "model.safetensors"
    raw = damage(path.read_bytes())
    assert raw != path.read_bytes()
    path.write_bytes(raw)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: expected a safetensors file .*damaged or truncated"
    ):
        models.load(directory)


def test_a_missing_shard_is_named(directory: Path):
    builders.shard(directory, 2)[1].unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected the shard .*model-00002-of-00002\.safetensors"
    ):
        models.load(directory)


def test_a_long_name_of_a_missing_shard_is_cut(directory: Path):
    builders.shard(directory, 2)
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002", 100_000 * "a"))
    with pytest.raises(FileNotFoundError, match=r"expected the shard .*aaa \.\.\. aaa") as caught:
        models.load(directory)
    assert len(str(caught.value)) < 1000


def test_a_shard_outside_the_directory_is_refused(directory: Path):
    files = builders.shard(directory, 1)
    outside = files[0].rename(directory.parent / "outside.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(files[0].name, f"../{outside.name}"))
    with pytest.raises(FileNotFoundError, match=r"expected the shard .*outside\.safetensors"):
        models.load(directory)


def test_shards_that_lack_listed_tensors_are_named(directory: Path):
    builders.shard(directory, 1)
    index = directory / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"]["model.extra.weight"] = "model-00001-of-00001.safetensors"
    index.write_text(json.dumps(entries))
    with pytest.raises(
        ValueError,
        match=r"expected shards with all tensors it lists, got none of model\.extra\.weight",
    ):
        models.load(directory)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_damaged_config_is_refused(directory: Path, content: str):
    (directory / "config.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"config\.json: expected a JSON object, got .*; fetch the file again"
    ):
        models.load(directory)


def test_an_index_without_a_map_is_refused(directory: Path):
    builders.shard(directory, 1)
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"index\.json: expected an object weight_map with names of files, got None",
    ):
        models.load(directory)


def test_an_unknown_architecture_is_refused(directory: Path, tmp_path: Path):
    other = builders.directory(tmp_path / "other", "smollm2", model_type="mamba")
    with pytest.raises(
        ValueError, match="expected a config whose model_type is one of .*llama.*, got 'mamba'"
    ):
        models.load(other)


def test_all_missing_unexpected_and_misshapen_tensors_are_listed(directory: Path):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
    tensors["model.surprise.weight"] = np.zeros(3, np.float32)
    save_file(tensors, path)
    with pytest.raises(ValueError) as caught:
        models.load(directory)
    for part in (
        "missing: norm.weight",
        "unexpected: model.surprise.weight",
        "misshapen: layers.0.mlp.up_proj.weight",
    ):
        assert part in str(caught.value)


def test_a_tokenizer_that_does_not_fit_is_refused(directory: Path):
    tokens = [*builders.TOKENS, *(f"extra{index}" for index in range(100))]
    builders.backend(tokens).save(str(directory / "tokenizer.json"))
    with pytest.raises(
        ValueError,
        match=r"at most 96 tokens \(the model's embedding rows\), got 152; use the tokenizer",
    ):
        models.load(directory)


def test_quantised_weights_without_a_word_in_the_configuration_are_refused(directory: Path):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].astype(np.int8)}, path)
    with pytest.raises(ValueError, match="expected weights in bfloat16, .*, got int8: the checkp"):
        models.load(directory)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].replace(b'"I8"', b'"F8_E4M3"').rstrip()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    with pytest.raises(ValueError, match="expected weights in bfloat16, .*, got F8_E4M3: the ch"):
        models.load(directory)


def test_eos_that_is_no_number_names_the_file(directory: Path):
    (directory / "generation_config.json").write_text('{"eos_token_id": "2"}')
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id to be .* got '2'"):
        models.load(directory)


def test_loading_reads_nothing_but_the_directory(directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: pytest.fail("network"))
    assert loading.load(directory)[0].vocab_size == 96


@pytest.mark.slow
def test_smollm2_answers():
    """Logits from transformers' own reading of the same GGUF file (float32)."""
    lm, tok = models.load("smollm2-135m")
    prompt = tok.chat("What is the capital of France?")
    prefix = lm.prefill(prompt)
    expected = {504: 25.3254, 60: 25.2433, 15319: 24.9425, 2219: 24.4017, 7026: 24.3146}
    np.testing.assert_allclose(
        prefix.logits[jnp.array(list(expected))], list(expected.values()), atol=2e-3
    )
    step = jax.jit(lambda lm, prefix, cache, token: lm.step(prefix, cache, token))
    cache, logits, out = lm.init(prefix, 1, 16), prefix.logits[None], []
    while len(out) < 16 and lm.eos not in out:
        out.append(int(jnp.argmax(logits[0])))
        cache, logits = step(lm, prefix, cache, jnp.array(out[-1:], jnp.int32))
    assert tok.decode(out) == "The capital of France is Paris."
    assert out[-1] == tok.eos == lm.eos
