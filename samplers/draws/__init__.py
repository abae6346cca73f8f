"""Independent draws: ancestral, low temperature, without replacement, and cheap relatives of
p^alpha.
"""
