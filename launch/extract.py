"""Short for ``conclugen_jax.commands.extract``."""

from conclugen_jax.commands import app, extract

if __name__ == "__main__":
    app.run(extract.main)
