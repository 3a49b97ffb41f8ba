"""From the files of users to verified shards to rows of a split. NumPy only, no JAX; uses ``system``."""
