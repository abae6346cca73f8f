"""Saving a run: whole, whatever interrupts it, and damaged files are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.showing import saving
from ppl import files
from ppl.sequences import Sequences
from ppl.table.__main__ import read
from tests.ppl import test_files


def run(number: int) -> saving.Run:
    """A run of as many strings, all of this number."""
    tokens = np.full((number, 3), number, np.int32)
    population = saving.Population(
        Sequences(tokens, np.full(number, 2, np.int32)),
        np.zeros(number, np.float32),
        float(number),
        None,
        0,
        {},
    )
    return saving.Run(
        config=saving.Config(prompt="p", seed=number),
        population=population,
        texts=[str(number)] * number,
        pieces={},
        seconds={},
        comparison={},
        interrupted=False,
        key=[number],
        versions={},
        device="",
    )


def test_an_interrupt_leaves_the_old_run_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In whichever line of the writing: the arrays and the texts are of one run."""
    monkeypatch.setattr(test_files, "__file__", saving.__file__)
    saving.save(run(2), tmp_path)
    seen, number, stopped = set(), 2, True
    for line in range(1, 400, 3):
        number = 5 - number
        before = saving.load(tmp_path).config.seed
        stopped = test_files.interrupted(lambda: saving.save(run(number), tmp_path), line)  # noqa: B023
        loaded = saving.load(tmp_path)
        assert loaded.config.seed in (before, number)
        assert len(loaded.texts) == len(loaded.population.log_weights) == loaded.config.seed
        assert len(read(tmp_path).texts) == loaded.config.seed == loaded.population.log_z
        seen.add((before, loaded.config.seed, stopped))
        if not stopped:
            break
    assert not stopped and {(2, 2, True), (3, 3, True)} & seen
    assert {path.name for path in tmp_path.iterdir()} == {saving.RESULTS, saving.ARRAYS}


@pytest.mark.parametrize("name", [saving.RESULTS, saving.ARRAYS])
@pytest.mark.parametrize("content", [b"", b"{", b'{"config": 3}', b"PK\x03\x04"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes):
    saving.save(run(2), tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a run in results\.json and arrays\.npz, got"):
        saving.load(tmp_path)


def test_without_a_run_the_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        saving.load(tmp_path)
    assert not (tmp_path / files.READY).exists()
