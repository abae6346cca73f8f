"""Learned samplers of strings: guides, what draws their training batches, twists, latent
rationales, evidence.
"""
