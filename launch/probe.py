"""Short for ``conclugen_jax.commands.probe``."""

from conclugen_jax.commands import app, probe

if __name__ == "__main__":
    app.run(probe.main)
