"""Short for ``conclugen_jax.commands.downstream``."""

from conclugen_jax.commands import app, downstream

if __name__ == "__main__":
    app.run(downstream.main)
