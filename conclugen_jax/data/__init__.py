"""From source files to shards on disk to batches of rows. NumPy only: nothing here imports JAX."""
