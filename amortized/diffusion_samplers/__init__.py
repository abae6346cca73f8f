"""Diffusion samplers: Markov chains on R^D that learn to end in a density which is only known up to
its constant.
"""
