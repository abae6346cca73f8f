"""Canvases of any-order models: reveal their sites, weighted for a target or as diffusion does."""
