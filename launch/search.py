"""Short for ``conclugen_jax.commands.search``."""

from conclugen_jax.commands import app, search

if __name__ == "__main__":
    app.run(search.main)
