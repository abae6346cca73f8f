"""Losses: zero, or least, where a sampler draws from its target."""
