"""Short for ``conclugen_jax.commands.study``."""

from conclugen_jax.commands import app, study

if __name__ == "__main__":
    app.run(study.main)
