"""Continuous latents: tempered SMC, filters and smoothers, samplers inside samplers, models with a
text site.
"""
