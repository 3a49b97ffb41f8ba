"""Short for ``conclugen_jax.commands.checkpoint``."""

from conclugen_jax.commands import app, checkpoint

if __name__ == "__main__":
    app.run(checkpoint.main)
