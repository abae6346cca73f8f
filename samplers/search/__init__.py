"""Choices without a target: best of n, beams and trees over steps of text."""
