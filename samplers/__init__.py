"""How it is inferred: particles, moves, kernels and the samplers built from them."""
