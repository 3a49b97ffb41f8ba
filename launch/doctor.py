"""Short for ``conclugen_jax.commands.doctor``."""

from conclugen_jax.commands import app, doctor

if __name__ == "__main__":
    app.run(doctor.main)
