"""Short for ``conclugen_jax.commands.predict``."""

from conclugen_jax.commands import app, predict

if __name__ == "__main__":
    app.run(predict.main)
