"""Short for ``conclugen_jax.commands.convert_mmsa``."""

from conclugen_jax.commands import app, convert_mmsa

if __name__ == "__main__":
    app.run(convert_mmsa.main)
