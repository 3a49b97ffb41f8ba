"""Short for ``conclugen_jax.commands.build_dataset``."""

from conclugen_jax.commands import app, build_dataset

if __name__ == "__main__":
    app.run(build_dataset.main)
