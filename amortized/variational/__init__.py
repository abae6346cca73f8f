"""Variational inference over NumPyro models: losses that NumPyro does not have, guides that are
flows and encoders, and training by `amortized.fit`.
"""
