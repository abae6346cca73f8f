"""State-space models whose evidence is known, and what knows it: a Kalman filter, the forward
algorithm, a grid.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from samplers.latent.filtering import StateSpace

# --- a linear-Gaussian model, two hidden dimensions, one seen; nothing in it is symmetric ---

A = np.array([[0.9, 0.3], [-0.2, 0.7]])
B = np.array([0.2, -0.1])
Q = np.diag([0.5, 0.3])
H = np.array([[1.3, 0.0]])
R = np.array([[0.9]])
M0 = np.array([0.5, -0.3])
P0 = np.diag([1.0, 0.6])
Y = np.array([[1.1], [-0.4], [2.0], [0.3], [-1.2]])
Y_MISSING = np.where(np.arange(5)[:, None] == 2, np.nan, Y)


def normal(mean: Any, covariance: np.ndarray) -> Any:
    """Independent noise in every dimension."""
    return dist.Normal(mean, np.sqrt(np.diag(covariance))).to_event(1)


LINEAR = StateSpace(
    lambda: normal(jnp.asarray(M0), P0),
    lambda t, x: normal(x @ A.T + B, Q),
    lambda t, x: normal(x @ H.T, R),
)


def kalman(y: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """log p(y), filter means [T, 2] and covariances, RTS-smoothed means and covariances;
    float64.
    """
    log_z, filtered, predicted = 0.0, [], []
    m, p = M0, P0
    for t, seen in enumerate(y):
        if t > 0:
            m, p = A @ m + B, A @ p @ A.T + Q
        predicted.append((m, p))
        if not np.isnan(seen).any():
            s = H @ p @ H.T + R
            residual = seen - H @ m
            log_z -= 0.5 * float(
                residual @ np.linalg.solve(s, residual) + np.log(np.linalg.det(2 * np.pi * s))
            )
            gain = p @ H.T @ np.linalg.inv(s)
            m, p = m + gain @ residual, p - gain @ s @ gain.T
        filtered.append((m, p))
    smoothed = [filtered[-1]]
    for t in range(len(y) - 2, -1, -1):
        (m, p), (mp, pp), (ms, ps) = filtered[t], predicted[t + 1], smoothed[0]
        back = p @ A.T @ np.linalg.inv(pp)
        smoothed.insert(0, (m + back @ (ms - mp), p + back @ (ps - pp) @ back.T))
    means, covariances = (np.array(part) for part in zip(*filtered, strict=True))
    return log_z, means, covariances, *(np.array(part) for part in zip(*smoothed, strict=True))


def locally_optimal(t: Any, x: Any, y: Any) -> Any:
    """p(x_t | x_{t-1}, y_t)."""
    return _conditional(x @ A.T + B, Q, y)


def initial_optimal(y: Any) -> Any:
    return _conditional(jnp.asarray(M0), P0, y)


def _conditional(mean: Any, covariance: np.ndarray, y: Any) -> Any:
    s = H @ covariance @ H.T + R
    gain = covariance @ H.T @ np.linalg.inv(s)
    # Diagonal, since only one dimension is seen.
    return normal(mean + (y - mean @ H.T) @ gain.T, covariance - gain @ s @ gain.T)


def predictive(t: Any, x: Any, y_next: Any) -> Any:
    """log p(y_{t+1} | x_t)."""
    s = H @ Q @ H.T + R
    return dist.Normal((x @ A.T + B) @ H.T, np.sqrt(s[0, 0])).log_prob(y_next)[:, 0]


def poor_guide(t: Any, x: Any, y: Any) -> Any:
    """Too wide and off its place."""
    return dist.Normal(x @ A.T + B + 0.2 * y, 0.9).to_event(1)


def rough(t: Any, x: Any, y_next: Any) -> Any:
    return -0.3 * jnp.abs(y_next[0] - x[:, 0])


START = np.array([0.7, 0.3])
MOVES = np.array([[0.85, 0.15], [0.4, 0.6]])
SEES = np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
SYMBOLS = np.array([0, 2, 2, 1, 0, 2])
HMM = StateSpace(
    lambda: dist.Categorical(jnp.asarray(START)),
    lambda t, x: dist.Categorical(jnp.asarray(MOVES)[x]),
    lambda t, x: dist.Categorical(jnp.asarray(SEES)[x]),
)


def forward_backward() -> tuple[float, np.ndarray, np.ndarray]:
    """log p(y), the filter [T, K], and the messages b_t(x) = p(y_{t+1..} | x_t) [T, K]."""
    alpha, filtered = START * SEES[:, SYMBOLS[0]], []
    filtered.append(alpha)
    for y in SYMBOLS[1:]:
        alpha = (alpha @ MOVES) * SEES[:, y]
        filtered.append(alpha)
    messages = [np.ones(2)]
    for y in SYMBOLS[:0:-1]:
        messages.insert(0, MOVES @ (SEES[:, y] * messages[0]))
    alphas = np.array(filtered)
    return float(np.log(alpha.sum())), alphas / alphas.sum(1, keepdims=True), np.array(messages)


def twisted() -> dict[str, Any]:
    """Proposals and look-ahead that know all future observations: zero variance at any trigger."""
    messages = jnp.asarray(forward_backward()[2])

    def proposal(t: Any, x: Any, y: Any) -> Any:
        return dist.Categorical(
            logits=jnp.log(jnp.asarray(MOVES)[x] * jnp.asarray(SEES)[:, y] * messages[t])
        )

    def initial(y: Any) -> Any:
        return dist.Categorical(
            logits=jnp.log(jnp.asarray(START) * jnp.asarray(SEES)[:, y] * messages[0])
        )

    return {
        "proposal": proposal,
        "initial_proposal": initial,
        "lookahead": lambda t, x, y: jnp.log(messages[t])[x],
    }


SWITCHING = StateSpace(
    lambda: {"level": dist.Normal(0.3, 1.0), "regime": dist.Categorical(jnp.asarray(START))},
    lambda t, x: {
        "level": dist.Normal(0.8 * x["level"] + jnp.where(x["regime"] == 1, 0.5, -0.2), 0.4),
        "regime": dist.Categorical(jnp.asarray(MOVES)[x["regime"]]),
    },
    lambda t, x: (
        dist.Normal(x["level"], 0.5),
        dist.Poisson(jnp.where(x["regime"] == 1, 3.0, 0.7)),
    ),
)


def switching_evidence(levels: np.ndarray, counts: np.ndarray) -> float:
    """log p(y) by numerical integration over a fine grid of levels, for both regimes."""
    grid = np.linspace(-6, 6, 1201)
    width = grid[1] - grid[0]

    def density(x: Any, mean: Any, scale: float) -> Any:
        return np.exp(-0.5 * ((x - mean) / scale) ** 2) / (scale * np.sqrt(2 * np.pi))

    def seen(t: int) -> np.ndarray:
        rates = np.array([0.7, 3.0])
        poisson = rates ** counts[t] * np.exp(-rates) / np.prod(np.arange(1, counts[t] + 1))
        return density(levels[t], grid, 0.5)[None] * poisson[:, None]

    mass = START[:, None] * density(grid, 0.3, 1.0)[None] * seen(0)
    for t in range(1, len(levels)):
        step = [
            density(grid[:, None], 0.8 * grid[None] + shift, 0.4) * width for shift in (-0.2, 0.5)
        ]
        pushed = np.stack([step[k] @ mass[k] for k in range(2)])
        mass = (MOVES.T @ pushed) * seen(t)
    return float(np.log(mass.sum() * width))


# The hidden Markov model again, with an emission that is not known: theta is a point of a grid.
GRID = np.array([0.1, 0.3, 0.45, 0.7, 0.9])
"""P(symbol 0 | state 0); the rest of that row is shared 3 : 1."""
GRID_PRIOR = np.array([0.3, 0.1, 0.25, 0.15, 0.2])
GRID_STEPS = 0.1 / 5 + 0.9 * sum(
    p * np.roll(np.eye(5), k, axis=1) for k, p in ((-1, 0.5), (1, 0.3), (2, 0.2))
)
"""Steps on the ring of grid points: not symmetric."""


def emission_hmm(theta: Any) -> StateSpace:
    """The model at grid points theta, one number or one per particle [N]."""

    def sees(t: Any, x: Any) -> Any:
        p = jnp.asarray(GRID)[theta]
        first = jnp.stack([p, 0.75 * (1 - p), 0.25 * (1 - p)], -1)
        return dist.Categorical(jnp.where((x == 1)[..., None], jnp.asarray(SEES)[1], first))

    return HMM._replace(observation=sees)


def emission_forward(symbols: np.ndarray) -> np.ndarray:
    """p(x_t, y_0..y_t | theta) [5, 2] at the last t, by the forward algorithm."""
    found = []
    for p in GRID:
        sees = np.array([[p, 0.75 * (1 - p), 0.25 * (1 - p)], SEES[1]])
        alpha = START * sees[:, symbols[0]]
        for y in symbols[1:]:
            alpha = (alpha @ MOVES) * sees[:, y]
        found.append(alpha)
    return np.array(found)


def emission_filter(symbols: np.ndarray) -> np.ndarray:
    """p(x_t | y_0..y_t, theta) [5, 2] at the last t."""
    alpha = emission_forward(symbols)
    return alpha / alpha.sum(1, keepdims=True)


def emission_posterior(symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p(theta | y) and log p(y | theta) [5], by summation."""
    evidence = emission_forward(symbols).sum(1)
    joint = GRID_PRIOR * evidence
    return joint / joint.sum(), np.log(evidence)
