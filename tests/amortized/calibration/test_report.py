"""One table and one figure, right when the sampler is, and saying what is off when it is not."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from amortized.calibration import report
from amortized.calibration.c2st import Accuracy
from amortized.calibration.joint import Joint

from . import problems

ACCURACY = Accuracy(
    np.array([0.5, 0.55]), np.array([0.01, 0.01]), np.zeros((2, 5)), np.zeros((2, 5), int), 1_000
)


def quantities(theta: Any, x: Any) -> dict[str, Any]:
    return {"log p(x | theta)": -((theta - x) ** 2).sum()}


def log_prob(theta: Any, x: Any) -> Any:
    return -((theta - x / 2) ** 2).sum()


@functools.cache
def good() -> report.Report:
    them = problems.gaussian(np.random.default_rng(1), 1_000, 99)
    return report.run(jax.random.key(1), them, quantities=quantities, log_prob=log_prob)


def test_the_report_of_an_exact_sampler():
    out = good()
    assert out.ok and out.p_value >= 0.01 and len(out.lines) == 7
    assert [line.check for line in out.lines[-3:]] == [
        "central intervals",
        "highest density",
        "TARP",
    ]
    assert "Nothing speaks against the sampler (N = 1,000, S = 99;" in str(out)
    assert "log p(x | theta)" in str(out) and max(map(len, str(out).splitlines())) <= 80
    assert len(repr(out)) < 2_000 and "text/html" in out._repr_mimebundle_()


def test_the_report_of_a_sampler_that_is_too_sure_and_off():
    them = problems.gaussian(np.random.default_rng(2), 500, 99, sd=0.4, shift=0.3)
    out = report.run(jax.random.key(1), them, accuracy=ACCURACY)
    assert not out.ok and out.p_value < 1e-9
    assert "8 of 8" not in str(out) and "speak against the sampler" in str(out)
    assert "too sure" in str(out) and "accuracy 0.550" in str(out)
    lines = {(line.check, line.name): line for line in out.lines}
    assert lines["C2ST", "observation 0"].p_value == 0.5
    assert lines["C2ST", "observation 1"].p_value < 1e-5
    assert all(line.adjusted >= line.p_value for line in out.lines)


def test_what_was_left_out_is_said():
    them = problems.gaussian(np.random.default_rng(3), 100, 9)
    x = them.x.copy()
    x[4] = np.nan
    with pytest.warns(UserWarning, match="1 of 100 simulations"):
        them = Joint(them.theta, x, them.draws)
    out = report.run(jax.random.key(1), them)
    assert "N = 99," in str(out) and "not finite: x: 1" in str(out).replace("\n", " ")


def test_the_figure_has_all_of_it():
    figure = good().plot()
    figure.draw_without_rendering()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    wanted = ("theta[0]", "theta[1]", "log p(x", "central", "highest", "TARP")
    assert [any(t.startswith(w) for t in titles) for w in wanted] == [True] * 6
