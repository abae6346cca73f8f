"""Low-rank adapters of a decoder: W + (alpha / rank) A B in place of W, with W shared and A, B
trained (2106.09685).

    lm = lora.attach(key, base, rank=8)                    # the same law as base: B starts at zero
    adapter, base = lora.split(lm)                         # the adapter is what is trained
    lm = lora.join(adapter, base)                          # base's arrays, not copies of them
    lora.merge(lm)                                         # an ordinary decoder
    lora.save(directory, lm, base)                         # as PEFT does
    lora.load(directory, base)                             # what PEFT or `save` wrote

A decoder with adapters has {"lora": {"a" [in, rank], "b" [rank, out], "scale" []}} beside the
kernels that it adapts, in every layer; the functions of `models.transformer` run it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ppl.checks import check_count
from ppl.lm import LM
from ppl.pytrees import register_dataclass

from . import heads
from .adapter_files import Adapted, read, write
from .weights import Params

TARGETS = ("qkv", "out", "up", "down")


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is trained: for every layer and target {"a" [in, rank], "b" [rank, out]}; scale = alpha
    / rank is fixed.
    """

    layers: tuple[dict[str, dict[str, PyTree]], ...]
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The number of columns of the widest A."""
        return max(pair["a"].shape[1] for layer in self.layers for pair in layer.values())


def attach(
    key: PRNGKeyArray,
    lm: LM,
    *,
    rank: int = 8,
    alpha: float | int = 16.0,
    targets: Sequence[str] = TARGETS,
) -> LM:
    """The decoder with fresh adapters: A uniform within 1 / sqrt(in), B zero, so that the law is
    the base's exactly.

    Args:
        key: A comes from it.
        lm: a decoder of `models.transformer`.
        rank: of A B, at least 1.
        alpha: A B counts alpha / rank.
        targets: which matrices, in every layer: "qkv" (queries, keys and values together), "out",
            "up" (with the gate), "down".

    Raises:
        ValueError: if the model is not a decoder or has adapters already, the rank or alpha is not
            positive, or a target matches no layer.
    """
    check_count("rank", rank)
    if not alpha > 0:
        raise ValueError(f"expected alpha above 0, got {alpha}; twice the rank is usual")
    layers = _plain_layers(lm)
    kernels = {name for layer in layers for name, weights in layer.items() if "kernel" in weights}
    absent = [name for name in targets if name not in kernels]
    if absent or not targets:
        raise ValueError(
            f"expected LoRA targets out of {', '.join(sorted(kernels))}, got"
            f" {', '.join(absent) or 'none'}, which"
            " matches no layer"
        )

    def fresh(key: PRNGKeyArray, kernel: Array) -> dict[str, Array]:
        inputs, outputs = kernel.shape
        a = jax.random.uniform(key, (inputs, rank), jnp.float32, -1.0, 1.0)
        a = a / np.float32(np.sqrt(inputs))
        return {"a": a, "b": jnp.zeros((rank, outputs), jnp.float32)}

    def of(index: int, name: str) -> dict[str, Array]:
        # By the target's own number, so that an adapter of fewer targets has the same A in those.
        here = jax.random.fold_in(jax.random.fold_in(key, index), sorted(kernels).index(name))
        return fresh(here, layers[index][name]["kernel"])

    adapter = tuple({name: of(index, name) for name in targets} for index in range(len(layers)))
    return join(Adapter(adapter, float(np.float32(alpha / rank))), lm)


def join(adapter: Adapter, lm: LM) -> LM:
    """The decoder with an adapter; inside jit too, and differentiable in the adapter."""
    scale = jnp.float32(adapter.scale)

    def adapted(layer: Params, own: dict[str, dict[str, Array]]) -> Params:
        return layer | {name: layer[name] | {"lora": own[name] | {"scale": scale}} for name in own}

    pairs = zip(_decoder_layers(lm), adapter.layers, strict=True)
    return _with_layers(lm, tuple(adapted(layer, own) for layer, own in pairs))


def split(lm: LM) -> tuple[Adapter, LM]:
    """The adapter, and the same model without it.

    Raises:
        ValueError: if the model has no adapters.
    """
    layers = _decoder_layers(lm)
    found = tuple(
        {name: _adapted(weights) for name, weights in layer.items() if _adapted(weights)}
        for layer in layers
    )
    if not any(found):
        raise ValueError(
            "expected a decoder with adapters, got one without; lora.attach makes them"
        )
    scale = next(float(pair["scale"]) for layer in found for pair in layer.values())
    own = tuple(
        {name: {k: pair[k] for k in ("a", "b")} for name, pair in layer.items()} for layer in found
    )
    return Adapter(own, scale), _with_layers(lm, _each_matrix(layers, _plain))


def merge(lm: LM) -> LM:
    """The decoder with kernels W + scale A B, in W's dtype, and without adapters: the same law up
    to rounding.
    """

    def folded(weights: Params) -> Params:
        lora = _adapted(weights)
        if not lora:
            return weights
        product = lora["scale"] * (lora["a"] @ lora["b"])
        kernel = (weights["kernel"].astype(jnp.float32) + product).astype(weights["kernel"].dtype)
        return _plain(weights) | {"kernel": kernel}

    return _with_layers(lm, _each_matrix(_decoder_layers(lm), folded))


def save(directory: str | Path, lm: LM, base: LM) -> None:
    """Write the adapter of a decoder as PEFT does, `adapter_config.json` beside
    `adapter_model.safetensors`; float32.

    `base` is the model that it is an adapter of: an embedding or output matrix that is not the
    base's own is written as a whole (`modules_to_save`).  Matrices that share a kernel (queries,
    keys and values; gate and up) are written each by itself.

    Raises:
        ValueError: if the model has no adapters.
    """
    adapter, _ = split(lm)
    mine, theirs = ({"embed": x.params["embed"], "head": heads.own(x)} for x in (lm, base))
    whole = {
        name: np.asarray(mine[name])
        for name in mine
        if mine[name] is not theirs[name] and not np.array_equal(mine[name], theirs[name])
    }
    write(directory, heads.decoder_config(base), Adapted(adapter.layers, adapter.scale, whole))


def load(directory: str | Path, lm: LM) -> LM:
    """The decoder with the adapter of a directory in PEFT's layout, from PEFT or from `save`.

    LoRA of the layers' matrices, in PEFT's names: `r`, `lora_alpha`, `use_rslora`, `rank_pattern`
    and `alpha_pattern`; `target_modules`, `exclude_modules` and `layers_to_transform`; and the
    embedding and the output matrix in `modules_to_save`.  A configuration that says anything else
    is refused by name: DoRA, biases, other methods.

    Raises:
        FileNotFoundError: if there is no such directory.
        ValueError: if it is no adapter, is damaged, or is that of another model or method; if the
            model is not a decoder, or has adapters already.
    """
    _plain_layers(lm)
    found = read(directory, heads.decoder_config(lm))
    own = {name: jnp.asarray(x, lm.params["embed"].dtype) for name, x in found.whole.items()}
    if own:
        # Of a model whose output matrix is the embedding only the one that was trained changes.
        lm = heads.attach(own.get("head", heads.own(lm)), lm)
        lm = dataclasses.replace(lm, params=lm.params | own)
    return join(Adapter(found.layers, found.scale), lm)


def with_dropout(key: PRNGKeyArray, lm: LM, rate: float | Float[Array, ""]) -> LM:
    """The decoder whose adapters see their inputs with a share `rate` of the numbers dropped, the
    rest scaled up.

    For the passes that gradients go through (`read` and `extend`); drawing takes the model without.

    Raises:
        ValueError: unless 0 <= rate < 1.
    """
    if not isinstance(rate, Tracer) and not 0 <= rate < 1:
        raise ValueError(f"expected a dropout rate in [0, 1), got {rate}; 0.1 is usual")
    layers = []
    for index, layer in enumerate(_decoder_layers(lm)):
        keys = jax.random.split(jax.random.fold_in(key, index), len(layer))
        layers.append(
            {
                name: weights | {"lora": lora | {"key": own, "rate": jnp.float32(rate)}}
                if (lora := _adapted(weights))
                else weights
                for (name, weights), own in zip(sorted(layer.items()), keys, strict=True)
            }
        )
    return _with_layers(lm, tuple(layers))


def _decoder_layers(lm: LM) -> tuple[Params, ...]:
    if not isinstance(lm.params, dict) or "layers" not in lm.params:
        raise ValueError(
            "expected a decoder of models.transformer, got another language model; train all of its"
            " weights"
            " (amortized.strings.guide.full), or give its own module an adapter"
        )
    return lm.params["layers"]


def _plain_layers(lm: LM) -> tuple[Params, ...]:
    layers = _decoder_layers(lm)
    if any(_adapted(weights) for layer in layers for weights in layer.values()):
        raise ValueError(
            "expected a decoder without adapters, got one with; lora.merge or lora.split it first"
        )
    return layers


def _with_layers(lm: LM, layers: tuple[Params, ...]) -> LM:
    return dataclasses.replace(lm, params=lm.params | {"layers": layers})


def _each_matrix(
    layers: tuple[Params, ...], change: Callable[[Params], Params]
) -> tuple[Params, ...]:
    return tuple({name: change(weights) for name, weights in layer.items()} for layer in layers)


def _adapted(weights: Params) -> dict[str, Any]:
    return weights.get("lora", {})


def _plain(weights: Params) -> Params:
    return {name: leaf for name, leaf in weights.items() if name != "lora"}
