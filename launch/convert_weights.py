"""Short for ``conclugen_jax.commands.convert_weights``."""

from conclugen_jax.commands import app, convert_weights

if __name__ == "__main__":
    app.run(convert_weights.main)
