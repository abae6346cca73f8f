"""Adapters in PEFT's layout: `adapter_config.json` beside `adapter_model.safetensors`.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [rank, in], lora_B [out, rank]

PEFT adapts every matrix of a checkpoint by itself, `models.lora` those side by side in one kernel
together: there q, k and v share A where their A are equal, and else each has columns of its own.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ppl.files import latest, together
from ppl.showing import shown

from . import saving
from .config import DecoderConfig
from .tokenizer import read_json
from .weights import Matrix, matrices, plain_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
WHOLE = {"embed_tokens": "embed", "wte": "embed", "lm_head": "head"}
"""Modules that an adapter may hold as they are (`modules_to_save`), and what is ours for it."""

# What a configuration may say, whatever it says: what is read here, and what changes no law.
_READ = {
    *("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "bias", "init_lora_weights", "fan_in_fan_out", "lora_dropout"),
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "runtime_config"),
}
_VALUES = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    # Others change the base as well.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
}
PATTERNS = ("rank_pattern", "alpha_pattern")
_KINDS = {
    **dict.fromkeys(PATTERNS, dict),
    **dict.fromkeys(("target_modules", "exclude_modules"), (str, list)),
    "layers_to_transform": (int, list),
}


@shown
class Adapted(NamedTuple):
    """layers: for every layer and kernel {"a" [in, rank], "b" [rank, out]}, which count `scale`;
    whole: what takes the place of "embed" or "head".
    """

    layers: tuple[dict[str, dict[str, Array]], ...]
    scale: float
    whole: dict[str, np.ndarray]


def read(directory: str | Path, config: DecoderConfig) -> Adapted:
    """The adapter of a decoder in a directory; see `lora.load`."""
    directory = Path(directory).expanduser()
    _check_directory(directory)
    entries = read_json(latest(directory, CONFIG))
    _check_entries(directory / CONFIG, entries)
    path = directory / WEIGHTS
    tensors = {
        plain_name(name.removeprefix(PREFIX)): np.asarray(tensor, np.float32)
        for name, tensor in saving.read(latest(directory, WEIGHTS))[0].items()
    }
    scale = _scale(entries, "")
    blocks = matrices(config)
    pairs = {
        m.name: _pair(path, entries, m, _full_name(config, m.name), tensors, scale)
        for block in blocks
        for kernel in block.values()
        for m in kernel
        if f"{m.name}.lora_A.weight" in tensors or _targeted(entries, _full_name(config, m.name))
    }
    shape = (config.vocab_size, config.hidden_size)
    whole = {
        mine: _take(path, tensors, f"{name}.weight", shape)
        for name, mine in WHOLE.items()
        if f"{name}.weight" in tensors
    }
    if tensors:
        raise ValueError(
            f"{path}: expected LoRA tensors of the matrices of this {config.family} decoder's"
            f" layers, and {', '.join(WHOLE)} as a whole, got {', '.join(sorted(tensors))}; merge"
            " the adapter into its model with peft (merge_and_unload) and load that"
        )
    layers = tuple(
        {
            name: _joined(kernel, [pairs.get(m.name) for m in kernel])
            for name, kernel in block.items()
            if any(m.name in pairs for m in kernel)
        }
        for block in blocks
    )
    if not any(layers):
        raise ValueError(f"{path}: expected LoRA tensors, got none; save the adapter again")
    return Adapted(layers, scale, whole)


def write(directory: str | Path, config: DecoderConfig, adapted: Adapted) -> None:
    """Write an adapter; see `lora.save`."""
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for block, layer in zip(matrices(config), adapted.layers, strict=True):
        for name, pair in layer.items():
            for m, a, b in _parts(block[name], np.asarray(pair["a"]), np.asarray(pair["b"])):
                full = _full_name(config, m.name)
                tensors |= {f"{full}.lora_A.weight": a.T, f"{full}.lora_B.weight": b.T}
                ranks[full] = a.shape[1]
    embed = "wte" if config.family == "gpt2" else "embed_tokens"
    names = {"embed": _full_name(config, embed), "head": "lm_head"}
    for mine, x in adapted.whole.items():
        tensors[f"{names[mine]}.weight"] = np.asarray(x, np.float32)
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    others = {name: own for name, own in ranks.items() if own != rank}
    entries = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(adapted.scale * rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.family == "gpt2",
        "target_modules": _short(list(ranks), len(adapted.layers)),
        "modules_to_save": [names[mine].rpartition(".")[2] for mine in adapted.whole] or None,
        "rank_pattern": others,
        "alpha_pattern": {name: _number(adapted.scale * own) for name, own in others.items()},
    }
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    with together(directory) as fresh:
        tensors = {PREFIX + name: x for name, x in sorted(tensors.items())}
        saving.save(fresh / WEIGHTS, tensors, {"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _check_directory(directory: Path) -> None:
    if not directory.exists():
        raise FileNotFoundError(
            f"expected a directory with {CONFIG} and {WEIGHTS}, got {directory}, which does not"
            " exist; check the path"
        )
    absent = [name for name in (CONFIG, WEIGHTS) if not latest(directory, name).is_file()]
    if absent:
        raise ValueError(
            f"{directory}: expected an adapter in PEFT's layout, a directory with {CONFIG} and"
            f" {WEIGHTS}, got one without {' and '.join(absent)}; write it with lora.save, or with"
            " peft's save_pretrained, or load a whole model with models.load"
        )


def _check_entries(path: Path, entries: Mapping[str, Any]) -> None:
    wrong = [
        f"{name}={entries.get(name)!r}"
        for name, allowed in _VALUES.items()
        if entries.get(name) not in allowed
    ]
    wrong += [
        f"{name}={entries[name]!r}" for name in sorted(entries.keys() - _READ) if entries[name]
    ]
    if wrong:
        raise ValueError(
            f"{path}: expected an adapter that is plain LoRA of a language model's matrices, got"
            f" {', '.join(wrong)}; merge it into its model with peft (merge_and_unload) and load"
            " that"
        )
    for name, kinds in _KINDS.items():
        value = entries.get(name)
        if value is not None and not isinstance(value, kinds):
            got = f"{type(value).__name__} {value!r}"
            raise ValueError(f"{path}: expected {name} as peft writes it, got {got}; save it again")
    numbers = {name: [entries.get(name)] for name in ("r", "lora_alpha")}
    numbers |= {name: (entries.get(name) or {}).values() for name in PATTERNS}
    for name, values in numbers.items():
        for x in values:
            if isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x < np.inf:
                raise ValueError(f"{path}: expected {name} above 0, got {x!r}; save it again")
    expressions = [key for name in PATTERNS for key in entries.get(name) or {}]
    expressions += [entries.get(name) for name in ("target_modules", "exclude_modules")]
    for expression in expressions:
        try:
            re.compile(expression if isinstance(expression, str) else "")
        except re.error as error:
            raise ValueError(
                f"{path}: expected regular expressions of names, got {expression!r} ({error}); save"
                " it again"
            ) from error


def _full_name(config: DecoderConfig, name: str) -> str:
    """A matrix's name inside of the model that PEFT wraps."""
    return f"{'transformer' if config.family == 'gpt2' else 'model'}.{name}"


def _from_pattern(entries: Mapping[str, Any], which: str, default: str, name: str) -> Any:
    for key, value in (entries.get(which) or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return entries[default]


def _scale(entries: Mapping[str, Any], name: str) -> float:
    rank = _from_pattern(entries, "rank_pattern", "r", name)
    alpha = _from_pattern(entries, "alpha_pattern", "lora_alpha", name)
    return float(np.float32(alpha / (rank**0.5 if entries.get("use_rslora") else rank)))


def _targeted(entries: Mapping[str, Any], name: str) -> bool:
    """Whether the configuration says that this matrix is adapted, by PEFT's rules."""
    wanted = entries.get("target_modules")
    if not wanted or _listed(entries.get("exclude_modules") or [], name):
        return False
    if wanted == "all-linear":
        return True
    if isinstance(wanted, str) or name in wanted:
        return _listed(wanted, name)
    layers = entries.get("layers_to_transform")
    if layers is None or layers == []:
        return _listed(wanted, name)
    index = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    layers = [layers] if isinstance(layers, int) else layers
    return _listed(wanted, name) and index is not None and int(index[1]) in layers


def _listed(wanted: str | list[str], name: str) -> bool:
    """Whether a regular expression is the whole name, or one of a list is, or its end."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def _take(
    path: Path, tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...]
) -> np.ndarray:
    """The tensor, which is then no longer there."""
    if name not in tensors or tensors[name].shape != shape:
        got = list(tensors[name].shape) if name in tensors else "none"
        raise ValueError(
            f"{path}: expected {name} of shape {list(shape)}, as the model and {CONFIG} have it,"
            f" got {got}; load the model that the adapter was trained on"
        )
    return tensors.pop(name)


Pair = tuple[np.ndarray, np.ndarray]


def _pair(
    path: Path,
    entries: Mapping[str, Any],
    m: Matrix,
    full: str,
    tensors: dict[str, np.ndarray],
    scale: float,
) -> Pair:
    """A [in, rank] and B [rank, out] of one matrix, at the scale of all."""
    rank = _from_pattern(entries, "rank_pattern", "r", full)
    a = _take(path, tensors, f"{m.name}.lora_A.weight", (rank, m.inputs)).T
    b = _take(path, tensors, f"{m.name}.lora_B.weight", (m.outputs, rank)).T
    own = _scale(entries, full)
    return a, b if own == scale else b * np.float32(own / scale)


def _joined(kernel: tuple[Matrix, ...], pairs: list[Pair | None]) -> dict[str, Array]:
    """The pairs of matrices side by side as one."""
    known = [pair for pair in pairs if pair is not None]
    if len(known) == len(pairs) and all(np.array_equal(a, known[0][0]) for a, _ in known):
        a, b = known[0][0], np.concatenate([b for _, b in known], axis=1)
    else:
        a = np.concatenate([a for a, _ in known], axis=1)
        b = np.zeros((a.shape[1], sum(m.outputs for m in kernel)), np.float32)
        row = column = 0
        for m, pair in zip(kernel, pairs, strict=True):
            if pair is not None:
                b[row : row + len(pair[1]), column : column + m.outputs] = pair[1]
                row += len(pair[1])
            column += m.outputs
    return {"a": jnp.asarray(a), "b": jnp.asarray(b)}


def _parts(
    kernel: tuple[Matrix, ...], a: np.ndarray, b: np.ndarray
) -> list[tuple[Matrix, np.ndarray, np.ndarray]]:
    """A and B of every matrix in a kernel, without the columns of A that only others use."""
    parts, start, fresh = [], 0, not b.any()
    for m in kernel:
        own = b[:, start : start + m.outputs]
        start += m.outputs
        kept = own.any(axis=1) | fresh
        if kept.any():
            parts.append((m, a[:, kept], own[kept]))
    return parts


def _number(x: float) -> int | float:
    """As PEFT writes it: whole numbers without a point."""
    return int(x) if float(x).is_integer() else float(x)


def _short(names: list[str], num_layers: int) -> list[str]:
    """Names inside of a layer, where every layer has them; else whole ones."""
    inner = [re.sub(r"^.*?\.\d+\.", "", name) for name in names]
    counts = collections.Counter(inner)
    pairs = zip(names, inner, strict=True)
    return sorted({short if counts[short] == num_layers else name for name, short in pairs})
