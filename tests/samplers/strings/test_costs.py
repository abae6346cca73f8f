"""What replays cost, of strings made up for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest

import ppl
from samplers.strings import costs, growing, proposals
from tests import helpers
from tests.samplers.problems import plain

REPLAYS: dict[str, tuple[Any, bool, dict[str, int]]] = {
    # strings of three tokens and of one, beside one of four that waits
    "plain": (proposals.bootstrap, False, {}),
    "asked": (proposals.bootstrap, True, {"potential_calls": 4}),
    # A guide is fed token by token, and reads its prompt and what it has been fed.
    "guided": (
        proposals.LanguageModel(helpers.hmm().given((2, 0), max_tokens=4)),
        False,
        {"forwards": 3, "depth": 3, "kv_read": (2 + 1) + (2 + 2) + (2 + 3) + (2 + 1)},
    ),
}


@pytest.mark.parametrize("name", REPLAYS)
def test_a_replay_is_of_the_strings_that_go_on(name: str):
    proposal, tilted, other = REPLAYS[name]
    target = plain("table") * ppl.banned([3]) if tilted else plain("table")
    x = growing.start(target, proposals.as_proposal(proposal), 3)
    sequences = dataclasses.replace(x.sequences, length=jnp.array([3, 1, 4], jnp.int32))
    x = dataclasses.replace(x, sequences=sequences, active=jnp.array([True, True, False]))
    cost = costs.replay(target, proposals.as_proposal(proposal), x)
    found = {field.name: int(getattr(cost, field.name)) for field in dataclasses.fields(cost)}
    assert found == {**dict.fromkeys(found, 0), **other}
