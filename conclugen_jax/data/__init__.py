"""From users' files to verified shards to rows of a split: sources -> builders -> manifest -> shards -> batches.

NumPy only, no JAX; uses ``system``.
"""
