"""Lineages by hand: a genealogy of three rounds and four slots, small enough to follow with a
finger.
"""

from __future__ import annotations

import numpy as np

from experiments.showing import lineages

ANCESTORS = np.array([[0, 1, 2, 3], [0, 0, 2, 2], [1, 1, 1, 3]])
"""Of round 0, slots 0 and 2 have children; of round 1, slots 1 and 3 have."""
WEIGHTS = np.array([0.5, 0.2, 0.0, 0.3])


def test_ancestry_is_followed_back_from_the_end():
    np.testing.assert_array_equal(
        lineages.ancestry(ANCESTORS), [[0, 0, 0, 2], [1, 1, 1, 3], [0, 1, 2, 3]]
    )


def test_weight_flows_back():
    expected = [[0.7, 0, 0.3, 0], [0, 0.7, 0, 0.3], WEIGHTS]
    np.testing.assert_allclose(lineages.descendant_weights(ANCESTORS, WEIGHTS), expected)
    np.testing.assert_array_equal(
        lineages.survivors(ANCESTORS, WEIGHTS > 0),
        np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 1]], bool),
    )


def test_a_lineage_has_the_rank_of_what_most_of_its_weight_became():
    ranks = lineages.ranks(ANCESTORS, ["a", "b", "a", "b"], WEIGHTS, most=2)
    np.testing.assert_array_equal(ranks, [[0, -1, 1, -1], [-1, 0, -1, 1], [0, 1, -1, 1]])
    ranks = lineages.ranks(ANCESTORS, ["a", "b", "a", "b"], WEIGHTS, most=1)
    np.testing.assert_array_equal(ranks[-1], [0, 1, -1, 1])


def test_equal_strings_are_merged_and_the_dead_left_out():
    assert lineages.merged("abab", [0.1, 0.3, 0.1, 0.0]) == [("b", 0.3), ("a", 0.2)]


def test_neighbours_with_one_string_share_a_label():
    said = [["x", "x", "y", "y"], ["p", "p", "q", "r"], ["", "", "s", "t"]]
    kept = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    runs = list(lineages.runs(ANCESTORS, said, kept))
    assert runs[:3] == [(0, 0, 1), (0, 2, 2), (0, 3, 3)]  # y twice, but one of them died out
    assert runs[3:6] == [(1, 0, 1), (1, 2, 2), (1, 3, 3)]
    assert runs[6:] == [(2, 0, 1), (2, 2, 2), (2, 3, 3)]


def test_labels_keep_beginning_and_end():
    assert lineages.abridged("a line\nand more", 20) == "a line↵and more"
    long = "x = 1" + "." * 30 + "= 7"
    short = lineages.abridged(long, 15)
    assert len(short) == 15 and short.startswith("x = ") and short.endswith("= 7")
    assert lineages.abridged("December", 5) == "Dece…"
    assert lineages.label(" July", 9) == "·July" and lineages.label(" two words", 20) == "two words"
