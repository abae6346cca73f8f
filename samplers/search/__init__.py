"""Choices without a target: pools and votes on them, best of n, beams over steps of text."""
