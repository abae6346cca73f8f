"""Stochastic variational inference of any NumPyro model and guide, in the compiled loop of
`amortized.fit`.

    def model(x):                                     # what is observed comes as an argument
        with numpyro.plate("data", 1000, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([len(x), 2]).to_event(1))
            numpyro.sample("x", dist.Normal(decoder(z), 0.1).to_event(1), obs=x)

    training = svi.training(key, model, guide, Trace_ELBO(), data={"x": x}, batch_size=100)
    out = fit.run(key, training, optimizer=optax.adam(1e-3), num_steps=10_000)
    values = svi.values(training, out)                # of every numpyro.param, as Predictive takes
    log_weights = svi.log_weights(key, model, guide, values, {"x": x}, num_samples=100)

A step's batch are rows of the data, drawn without replacement, and the plates say how many data
they stand for: a loss is an unbiased estimate of that of all data.  Objectives are NumPyro's and
those of `losses`.  `fit.run` brings checkpoints, early stop, and steps that are skipped where they
are not finite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PRNGKeyArray
from numpyro.infer import SVI
from numpyro.infer.elbo import ELBO
from numpyro.infer.util import transform_fn

from ppl.checks import check_count, check_key
from ppl.rows import take_rows

from ..fit import Fitted
from ..posteriors.batches import Cursor, walked
from ..training import Training
from .densities import (
    Call,
    Data,
    Densities,
    Program,
    Trace,
    Values,
    replayed,
    run,
    samples,
    weighed,
)
from .losses import Objective


class Loss(eqx.Module):
    """An objective at parameters on R^D.

    Attributes:
        transforms: of every `numpyro.param`, from R^D to its own constraint.
    """

    model: Program = eqx.field(static=True)
    guide: Program = eqx.field(static=True)
    objective: ELBO = eqx.field(static=True)
    transforms: dict[str, Callable[[Any], Any]] = eqx.field(static=True)

    def __call__(
        self, params: Values, key: PRNGKeyArray, batch: dict[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        values = transform_fn(self.transforms, params)
        if isinstance(self.objective, Objective):
            return self.objective.measured(key, Call(self.model, self.guide, values, (), batch))
        value: Any = self.objective.loss(key, values, self.model, self.guide, **batch)
        return value, {}


class Minibatches(eqx.Module):
    """Rows of the data in an order that changes with every epoch; all of them if B = N."""

    data: dict[str, Array]
    batch_size: int = eqx.field(static=True)

    @property
    def size(self) -> int:
        """N."""
        return len(next(iter(self.data.values())))

    def __call__(
        self, key: PRNGKeyArray, params: Any, cursor: Cursor | None
    ) -> tuple[dict[str, Array], Cursor | None]:
        del params
        if cursor is None:
            return self.data, None
        at, cursor = walked(key, cursor, self.batch_size)
        return take_rows(self.data, at), cursor


def training(
    key: PRNGKeyArray,
    model: Program,
    guide: Program,
    objective: ELBO,
    *,
    data: Data,
    batch_size: int | None = None,
) -> Training:
    """What `fit.run` minimises to fit a guide, and the parameters of the model.

    What is trained are the `numpyro.param` sites of both (`numpyro.contrib.module.eqx_module` for
    networks); arrays that model and guide close over are constants of the program.

    Args:
        key: for the start of the parameters.
        model, guide: NumPyro's, called with a batch's arrays as keyword arguments.  Of minibatches
            their plates must know: `numpyro.plate("data", N, subsample_size=len(x))`.
        objective: an ELBO of `numpyro.infer` or of `losses`.
        data: arrays with N rows each.
        batch_size: rows to a step; all if None.

    Raises:
        ValueError: if the arrays have different lengths or are not finite, or N < batch_size; if a
            latent of the guide has no path derivative, and the objective needs one; if model and
            guide scale a latent differently; or if something is global and nothing says how many
            data a batch stands for.
    """
    check_key(key)
    arrays = _checked(data, batch_size)
    num = len(next(iter(arrays.values())))
    draw = Minibatches(arrays, num if batch_size is None else batch_size)
    start = (
        Cursor(jnp.arange(num, dtype=jnp.int32), jnp.int32(0)) if draw.batch_size < num else None
    )
    batch = jax.tree.map(lambda rows: rows[: draw.batch_size], arrays)
    # NumPyro's own way to the parameters' start, and to R^D.
    svi = SVI(model, guide, optax.sgd(0.0), objective)
    state = svi.init(key, **batch)
    transforms = _transforms(svi)
    params = svi.optim.get_params(state.optim_state)
    call = Call(model, guide, transform_fn(transforms, params), (), batch)
    _check_sites(key, call, objective, num / draw.batch_size)
    return Training(params, draw, Loss(model, guide, objective, transforms), start)


def values(training: Training, out: Fitted) -> Values:
    """Every `numpyro.param` within its constraint, the best ones if there was `patience`: what
    `numpyro.infer.Predictive(guide, params=values, ...)` takes.
    """
    loss = training.loss
    if not isinstance(loss, Loss):
        raise ValueError(
            f"expected a training of svi.training, got one with the loss {type(loss).__name__}"
        )
    return transform_fn(loss.transforms, out.best)


def log_weights(
    key: PRNGKeyArray,
    model: Program,
    guide: Program,
    values: Values,
    data: Data,
    num_samples: int,
) -> Float[Array, "K *B"]:
    """log p(x, z) - log q(z) of K draws of the guide, by datum: properly weighted samples of the
    posterior.

    mean exp is an unbiased estimate of p(x), the mean the ELBO, logsumexp - log K the
    importance-weighted bound of K samples, and the effective sample size tells a guide that has
    missed something it proposes at all.

    Raises:
        ValueError: if there are minibatches, in plates that not all sites share.
    """
    check_key(key)
    check_count("num_samples", num_samples)
    call = Call(model, guide, values, (), _checked(data, None))
    each = _densities(call, jax.random.split(key, num_samples))
    return each.log_p - each.log_q


@eqx.filter_jit
def _densities(call: Call, keys: Key[Array, " K"]) -> Densities:
    return jax.vmap(functools.partial(weighed, call=call))(keys)


def _checked(data: Data, batch_size: int | None) -> dict[str, Array]:
    """The data as arrays of the same length."""
    arrays = {name: jnp.asarray(rows) for name, rows in data.items()}
    shapes = {name: rows.shape for name, rows in arrays.items()}
    if not arrays or len({shape[:1] for shape in shapes.values()}) > 1 or () in shapes.values():
        raise ValueError(
            f"expected data as arrays by name that have the same number of rows, got {shapes}"
        )
    if bad := [name for name, rows in arrays.items() if not np.isfinite(np.asarray(rows)).all()]:
        raise ValueError(
            f"expected finite data, got NaN or infinite values in {bad}; leave out such rows, or"
            " mask them in the model"
        )
    if batch_size is not None:
        check_count("batch_size", batch_size)
        if batch_size > (num := len(next(iter(arrays.values())))):
            raise ValueError(
                f"expected batches of at most the {num} rows of the data, got batch_size ="
                f" {batch_size}; leave it out for all rows"
            )
    return arrays


def _transforms(svi: SVI) -> dict[str, Callable[[Any], Any]]:
    """From R^D to every parameter's constraint, as NumPyro found them."""
    assert isinstance(svi.constrain_fn, functools.partial)
    return svi.constrain_fn.args[0]


def _check_sites(key: PRNGKeyArray, call: Call, objective: ELBO, scale: float) -> None:
    """What no objective of NumPyro says."""
    found: list[Trace] = []

    def look(key: PRNGKeyArray) -> None:
        guide = run(key, call.guide, call.values, call)
        found.extend([guide, run(key, replayed(call.model, guide), call.values, call)])

    jax.eval_shape(look, key)
    guide, model = map(samples, found)
    if mutable := [n for trace in found for n, site in trace.items() if site["type"] == "mutable"]:
        raise ValueError(
            f"expected parameters and no mutable state, got {mutable}; take layers without running"
            " statistics"
        )
    rough = [name for name, site in guide.items() if not site["fn"].has_rsample]
    if rough and not objective.can_infer_discrete:
        raise ValueError(
            f"expected a guide whose draws have derivatives for {type(objective).__name__}, got"
            f" {rough} without, as if nothing depended on them; take losses.ReweightedWakeSleep, or"
            " TraceGraph_ELBO or TraceEnum_ELBO of numpyro"
        )
    for name in guide.keys() & model.keys():
        ours, theirs = (
            1.0 if site["scale"] is None else site["scale"] for site in (guide[name], model[name])
        )
        if not np.isclose(ours, theirs):
            raise ValueError(
                f"expected the latent {name} to count as often in the guide as in the model,"
                f" {theirs:.6g} times, got {ours:.6g}; give both the same plates, of the same sizes"
            )
    whole = [name for name, site in guide.items() if not site["cond_indep_stack"]]
    found_scales = {1.0 if site["scale"] is None else site["scale"] for site in model.values()}
    if whole and not np.isclose(list(found_scales), scale).any():
        raise ValueError(
            f"expected a plate that says how many data a batch stands for, {scale:.6g} times its"
            f" rows, beside what is global, {whole}, got the scales {sorted(found_scales)}; write"
            ' numpyro.plate("data", N, subsample_size=len(x)) around what is of single data'
        )
