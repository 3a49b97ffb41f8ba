"""Short for ``conclugen_jax.commands.inspect_dataset``."""

from conclugen_jax.commands import app, inspect_dataset

if __name__ == "__main__":
    app.run(inspect_dataset.main)
