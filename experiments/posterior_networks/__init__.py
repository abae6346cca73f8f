"""How good are learned posteriors on the ten tasks of the public benchmark?"""
