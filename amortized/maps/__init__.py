"""Networks that give at once what else is computed anew for every case: attributions, adapters of a
task, edges of a graph, solutions.
"""
