"""Classifier two-sample tests: how well a network tells two samples apart.

    accuracy = 1/2   if they have the same law,     Phi(|mu| / 2) for N(0, 1) against N(mu, 1)
               1     if they do not overlap

It is the measure that posterior benchmarks report (`reference` is the posterior of a long run).
Both samples are scaled by mean and spread of the reference; the classifier has two hidden layers of
10 D units, and is trained five times, each on four fifths of the rows, and asked about the rest.

Lopez-Paz and Oquab (arXiv 1610.06545); as in the benchmark of Lueckmann et al. (arXiv 2101.04653).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray
from scipy import stats

from ppl.checks import check_count, check_key
from ppl.showing import shown

from ..progress import Count
from . import classifier

FOLDS = 5


@shown
@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How often a classifier is right, for each pair of samples [*B].

    Attributes:
        accuracy: [*B] mean over the folds.
        std_error: [*B] of a share of 2 n rows.  The classifier's own chance is not in it: another
            key says about that.
        folds: [*B, 5] of each fold.
        epochs: [*B, 5] of its training.
        num: n, rows of each sample.
    """

    accuracy: Float[np.ndarray, "*B"]
    std_error: Float[np.ndarray, "*B"]
    folds: Float[np.ndarray, "*B F"]
    epochs: Int[np.ndarray, "*B F"]
    num: int

    @property
    def p_values(self) -> Float[np.ndarray, "*B"]:
        """[*B] of accuracy 1/2 against more, by a normal law of 2 n rows told right by chance."""
        return stats.norm.sf((np.asarray(self.accuracy) - 0.5) * np.sqrt(4 * 2 * self.num))


def run(key: PRNGKeyArray, samples: Any, reference: Any, *, batch_size: int = 1) -> Accuracy:
    """How well a classifier tells samples from reference samples.

    Args:
        key: typed key; one order of rows for all pairs, and a key of its own for each.
        samples, reference: [n, D], or [B, n, D]: pairs of samples, for B observations.
        batch_size: pairs whose networks are trained side by side; the result does not depend on
            it.  Worth more than 1 on accelerators.

    Raises:
        ValueError: if the shapes differ or have other axes, there are fewer rows than folds, or a
            number is not finite.
    """
    check_key(key)
    check_count("batch_size", batch_size)
    samples, reference = (np.asarray(part, np.float32) for part in (samples, reference))
    _check(samples, reference)
    many = samples.ndim == 3
    pairs = (samples, reference) if many else (samples[None], reference[None])
    num, found = len(pairs[0]), []
    order_key, pairs_key = jax.random.split(key)
    keys = jax.random.split(pairs_key, num)
    with Count("two-sample tests", num) as bar:
        for start in range(0, num, batch_size):
            rows = slice(start, start + batch_size)
            parts = _pairs(order_key, keys[rows], pairs[0][rows], pairs[1][rows])
            found.append(jax.device_get(parts))
            bar.show(min(start + batch_size, num))
    right, epochs = (np.concatenate(part) for part in zip(*found, strict=True))
    accuracies = _accuracies(right, epochs, samples.shape[-2])
    return Accuracy(*(part if many else part[0] for part in accuracies), num=samples.shape[-2])


def _accuracies(right: np.ndarray, epochs: np.ndarray, num: int) -> tuple[np.ndarray, ...]:
    """Accuracy, its standard error, both [B], and of folds, from the rows told right."""
    sizes = np.array([len(part) for part in np.array_split(np.arange(2 * num), FOLDS)])
    folds = right / sizes
    accuracy = folds.mean(axis=1)
    return accuracy, np.sqrt(accuracy * (1 - accuracy) / sizes.sum()), folds, epochs


def _check(samples: np.ndarray, reference: np.ndarray) -> None:
    if samples.shape != reference.shape or samples.ndim not in (2, 3) or samples.size == 0:
        raise ValueError(
            "expected samples and reference of one shape, [n, D] or [B, n, D], got"
            f" {samples.shape} and {reference.shape}; take as many of the one as of the other, and"
            " [:, None] of numbers"
        )
    if 2 * samples.shape[-2] < FOLDS:
        raise ValueError(f"expected at least 3 rows, got {samples.shape[-2]}; usual are 1,000")
    for name, part in (("samples", samples), ("reference", reference)):
        bad = int((~np.isfinite(part)).any(axis=-1).sum())
        if bad:
            raise ValueError(
                f"expected finite numbers, got {bad} rows of {name} with NaN or infinity; look at"
                " what draws them, or leave them out and say so"
            )


def _places(size: int) -> tuple[np.ndarray, ...]:
    """Places in the order of rows of every fold's training and test rows, with their weights: folds
    of different sizes are filled up by rows of weight 0.
    """
    tests = np.array_split(np.arange(size), FOLDS)
    trains = [np.setdiff1d(np.arange(size), test) for test in tests]
    out = []
    for folds in (trains, tests):
        most = max(map(len, folds))
        out += [
            np.stack([np.resize(fold, most) for fold in folds]),
            np.stack([np.arange(most) < len(fold) for fold in folds]).astype(np.float32),
        ]
    return tuple(out)


@jax.jit
def _pairs(key: Any, keys: Any, samples: Any, reference: Any) -> Any:
    """Rows that were told right, and epochs, [B, folds]."""
    num, size, dim = samples.shape
    train, train_weights, test, test_weights = _places(2 * size)

    def data(key: PRNGKeyArray, samples: Any, reference: Any) -> Any:
        scale = reference.std(axis=0)
        rows = jnp.concatenate([samples, reference]) - reference.mean(axis=0)
        rows = rows / jnp.where(scale > 0, scale, 1.0)
        order = classifier.shuffled(key, 2 * size)
        return rows[order], order < size

    own = jax.vmap(lambda one: jax.random.split(one, FOLDS + 1))(keys)
    rows, labels = jax.vmap(data)(own[:, 0], samples, reference)

    def flat(leaf: Any) -> Any:
        return leaf.reshape(num * FOLDS, *leaf.shape[2:])

    trained = classifier.train(
        key,
        flat(own[:, 1:]),
        flat(rows[:, train]),
        flat(labels[:, train]),
        jnp.tile(train_weights, (num, 1)),
        width=classifier.WIDTH * dim,
    )
    found = jax.vmap(classifier.logits)(trained.layers, flat(rows[:, test])) > 0
    right = (found == flat(labels[:, test])) * jnp.tile(test_weights, (num, 1))
    return right.sum(1).reshape(num, FOLDS), trained.epochs.reshape(num, FOLDS)
