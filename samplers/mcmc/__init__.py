"""Markov kernels over strings, and what runs them: chains, warm-up, checkpoints, diagnostics."""
