"""How it is inferred, learned: guides, objectives and posterior networks, which again
are samplers.
"""
