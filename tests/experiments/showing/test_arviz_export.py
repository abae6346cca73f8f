"""Chains as ArviZ sees them: the same numbers, with chains first."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
import pytest

from experiments.showing import arviz_export
from samplers.mcmc import diagnostics as chain_diagnostics
from samplers.results import Chains

from ..letters import Letters


def test_groups_have_chains_first(chain_run: Chains):
    found = arviz_export.groups(chain_run, Letters())
    posterior, stats = found["posterior"], found["sample_stats"]
    assert posterior.keys() == {"log_prob", "length"}
    np.testing.assert_array_equal(posterior["log_prob"][2], chain_run.draws["log_prob"][:, 2])
    assert stats["token_ids"].shape == (4, 60, 6) and stats["text"].shape == (4, 60)
    tokens, length = stats["token_ids"][1, 7], int(posterior["length"][1, 7])
    assert stats["text"][1, 7] == Letters().decode(tokens[:length])
    np.testing.assert_allclose(stats["accepted"][3, 5], chain_run.info.accepted[5, :, 3].mean())
    assert "text" not in arviz_export.groups(chain_run)["sample_stats"]


def test_the_extra_is_named_where_it_is_missing(chain_run: Chains, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'tiltlm\[arviz\]'"):
        arviz_export.to_arviz(chain_run)


def test_older_versions_take_the_groups_by_name(chain_run: Chains, monkeypatch: pytest.MonkeyPatch):
    """What ArviZ 0 is called with: posterior and statistics beside each other, chains first."""

    class Older:
        """ArviZ 0, as far as it matters."""

        class InferenceData: ...

        @staticmethod
        def from_dict(posterior: Any, *, sample_stats: Any, dims: dict[str, list[str]]) -> Any:
            return posterior, sample_stats, dims

    monkeypatch.setitem(sys.modules, "arviz", Older())
    posterior, stats, dims = arviz_export.to_arviz(chain_run, Letters())
    assert {x.shape for x in posterior.values()} == {(4, 60)}
    np.testing.assert_array_equal(posterior["log_prob"].T, chain_run.draws["log_prob"])
    assert stats["token_ids"].shape == (4, 60, 6) and dims == {"token_ids": ["token"]}


def test_version_one_takes_the_groups_as_one_dictionary(
    chain_run: Chains, monkeypatch: pytest.MonkeyPatch
):
    class One:
        """ArviZ 1, as far as it matters."""

        InferenceData = None

        @staticmethod
        def from_dict(data: dict[str, Any], *, dims: dict[str, list[str]]) -> Any:
            return data, dims

    monkeypatch.setitem(sys.modules, "arviz", One())
    data, dims = arviz_export.to_arviz(chain_run)
    assert data.keys() == {"posterior", "sample_stats"} and dims == {"token_ids": ["token"]}


@pytest.mark.slow
def test_arviz_finds_what_we_find(chain_run: Chains, tmp_path):
    import arviz  # of the dev extra: a slow lane without it fails

    found = arviz_export.to_arviz(chain_run, Letters())
    assert dict(found["posterior"]["log_prob"].sizes) == {"chain": 4, "draw": 60}
    assert found["sample_stats"]["token_ids"].dims == ("chain", "draw", "token")
    x = chain_run.draws["log_prob"]
    assert float(arviz.ess(found["posterior"]["log_prob"].values, method="bulk")) == pytest.approx(
        chain_diagnostics.bulk_ess(x), rel=0.02
    )
    assert set(arviz.summary(found).index) == {"log_prob", "length"}


def test_a_run_without_draws_is_refused(chain_run: Chains, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "arviz", type("arviz", (), {}))
    none = dataclasses.replace(chain_run, draws={}, info=None, steps=0)
    with pytest.raises(ValueError, match="expected a run with draws, got one without"):
        arviz_export.to_arviz(none)
