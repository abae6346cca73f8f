"""The missing middle: its density is that of the whole story; a tiny run trains, goes on, and shows
what it found.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from experiments.infilling import __main__ as infilling
from experiments.infilling import report as infilling_report
from experiments.infilling import stories
from experiments.infilling.report import Cell


def test_stories_are_told_once():
    every = stories.TRAINING + stories.HELD_OUT
    assert (
        len({story.beginning for story in every})
        == len({story.ending for story in every})
        == len(every)
    )
    assert all(
        text.endswith(".") and text.count(".") - text.count("Mr.") == 1
        for story in every
        for text in story
    )


@pytest.mark.slow
def test_missing_words_have_the_density_of_the_whole(model: Path):
    """log gamma(z) = log p(z, ending | beginning), by one full pass of the model; in steps too."""
    lm, tokenizer = models.load(model)
    task = infilling.task_of(lm, tokenizer, stories.HELD_OUT[:2])
    for i, story in enumerate(stories.HELD_OUT[:2]):
        before, middle, after = infilling.gap(tokenizer, story)
        text = [*before, *middle, *after]
        assert tokenizer.decode(text) == f"{story.beginning} {story.ending}"
        logits = lm.extend(lm.prefill(text[:1]), jnp.asarray([text[1:]]))[0, :-1]
        log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)[
            np.arange(len(text) - 2), text[2:]
        ]
        example = jax.tree.map(lambda leaf, i=i: leaf[i], task.examples)
        for target in (task.target(i), infilling.posterior(lm, example, infilling.STEPS)):
            found = target.log_density(jnp.asarray([middle]), jnp.asarray([len(middle)]))[0]
            assert float(found) == pytest.approx(log_probs[len(before) - 2 :].sum(), rel=1e-4)


def cell(kind: str, method: str, ess: list[float]) -> Cell:
    rest = {
        "elbo": ess,
        "log_z": ess,
        "log_joint": ess,
        "distinct": ess,
        "tokens": [1, 2],
        "middle": [" He ran.", " No."],
    }
    return Cell(kind, method, ess, **rest, seconds=1.0)


def test_what_a_guide_is_worth():
    cells = [cell("held out", "prior", [0.1, 0.1]), cell("held out", "GFlowNet", [0.2, 0.4])]
    assert infilling_report.ess_ratio(cells, "held out") == pytest.approx(3)
    assert "| held out | GFlowNet | 0.300 ± 0.100 |" in infilling_report.markdown(cells)
    assert len(infilling_report.draw(cells).axes) == 3


def test_the_divergence_is_log_z_less_the_elbo():
    """log Z by both methods: log of the mean of 1 and 3; SMC has no ELBO."""
    first, second = cell("held out", "prior", [0.1]), cell("held out", "SMC, prior", [0.1])
    first = dataclasses.replace(first, elbo=[-5.0], log_z=[0.0])
    second = dataclasses.replace(second, elbo=[None], log_z=[float(np.log(3))])
    assert infilling_report.divergence([first, second], first) == pytest.approx([np.log(2) + 5])
    assert infilling_report.divergence([first, second], second) == []


@pytest.mark.slow
def test_a_tiny_run_goes_on(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--quick", "--model", str(model), "--out", str(tmp_path)]
    assert infilling.main(arguments) == 0
    path = tmp_path / "results.json"
    document = json.loads(path.read_text())
    first = document["cells"]
    assert [(c["stories"], c["method"]) for c in first] == [
        (kind, method) for method in infilling.METHODS for kind in ("trained on", "held out")
    ]
    path.write_text(json.dumps(document | {"cells": first[:-1]}))
    capsys.readouterr()
    assert infilling.main(arguments) == 0
    assert "9 results of an earlier run" in capsys.readouterr().out
    again = json.loads(path.read_text())["cells"]
    for row in (first[-1], again[-1]):
        row.pop("seconds")
    assert again == first
