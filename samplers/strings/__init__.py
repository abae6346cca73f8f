"""What every sampler of strings shares: the engine that extends them, proposals, selection, cuts,
ladders, prompts.
"""
