"""Posterior networks: simulation-based inference for NumPyro models, learned once and drawn from in
milliseconds.
"""
